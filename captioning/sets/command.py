"""`evenmix captions`: the caption sets of a corpus in numbers, or two of them side by side."""

import argparse
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import zip_longest
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import track
from rich.table import Table
from rich.text import Text

from captioning.outcomes import USABLE
from captioning.sets.committed import CaptionSet, find_sets, made_with
from captioning.sets.comparison import Compared, compare, facts, said
from captioning.sets.page import comparison_page
from captioning.sets.statistics import SetStatistics, mean, percentiles, read_statistics
from pipeline import progress, storage
from pipeline.errors import EvenmixError, did_you_mean
from pipeline.printable import printable

_PERCENTS = [5, 50, 95]
_COUNT = 5


def statistics(root: str, captions: CaptionSet) -> SetStatistics:
    """Return the statistics of a set; the terminal shows how far it has been read.

    Raises:
        EvenmixError: a shard is damaged.
    """
    total = SetStatistics()
    for shard in track(
        read_statistics(root, captions),
        description=escape(printable(captions.name)),
        total=sum(map(len, captions.shards.values())),
        console=progress.console,
        transient=True,
        disable=not progress.console.is_terminal,
    ):
        total.add(shard)
    return total


def sets_table(
    root: str, sets: Mapping[str, CaptionSet], numbers: Mapping[str, SetStatistics]
) -> Table:
    """Return how each set was made, and what became of its captions."""
    table = _table("caption sets", leading=1)
    table.add_column("set", overflow="fold", min_width=8)
    for heading in ("datasets", "pictures", "captions"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("outcomes", no_wrap=True)
    for name, captions in sets.items():
        of = numbers[name]
        table.add_row(
            _text("\n".join([name, *made_with(root, captions)])),
            f"{len(captions.shards):,}",
            f"{of.pictures:,}",
            f"{of.outcomes.total():,}",
            _text("\n".join(f"{outcome} {n:,}" for outcome, n in sorted(of.outcomes.items()))),
        )
    return table


def lengths_table(numbers: Mapping[str, SetStatistics]) -> Table:
    """Return how long the usable captions of each set are, and in how many different words."""
    table = _table("usable captions", leading=0)
    table.add_column("set", overflow="fold", min_width=8)
    for unit in ("tokens", "words"):
        table.add_column(f"{unit}:\nmean", justify="right", no_wrap=True)
        for percent in _PERCENTS:
            table.add_column(f"\np{percent}", justify="right", no_wrap=True)
    table.add_column("vocabulary", justify="right", no_wrap=True)
    for name, of in numbers.items():
        table.add_row(
            _text(name), *_lengths(of.tokens), *_lengths(of.words), f"{len(of.vocabulary):,}"
        )
    return table


def _text(text: str) -> Text:
    """Return anybody's text as it stands: neither markup nor control characters do anything."""
    return Text(printable(text))


def _lengths(lengths: Counter[int]) -> Iterator[str]:
    if not lengths:
        yield from "-" * (1 + len(_PERCENTS))
        return
    yield f"{mean(lengths):,.1f}"
    for length in percentiles(lengths, _PERCENTS):
        yield f"{length:,}"


def _table(title: str, leading: int) -> Table:
    return Table(
        title=title,
        title_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        leading=leading,
    )


def show(console: Console, names: Sequence[str], pictures: Sequence[Compared]) -> None:
    """Print pictures with their captions of the sets ``names``, a column a set."""
    for picture in pictures:
        index = picture.index
        console.print(
            _text(f"{picture.dataset}  {index['source_id']}  {index['key']}"),
            style="bold",
        )
        table = Table(box=box.SIMPLE_HEAD, leading=1, expand=True)
        for name in names:
            table.add_column(_text(name), ratio=1, overflow="fold")
        for captions in zip_longest(*picture.captions):
            table.add_row(*(_cell(caption) for caption in captions))
        console.print(table)


def _cell(caption: Mapping[str, Any] | None) -> Text:
    if caption is None:
        return Text()
    colour = "green" if caption["outcome"] in USABLE else "red"
    return Text.assemble(
        (printable(caption["outcome"]), colour),
        "".join(f" · {fact}" for fact in facts(caption)),
        f"\n{said(caption)}",
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `evenmix captions`."""
    parser.add_argument("root", help="the corpus root R, a path or any fsspec URL")
    parser.add_argument(
        "--compare", nargs=2, metavar=("A", "B"), help="show pictures' captions of two sets"
    )
    parser.add_argument("--dataset", help="with --compare: pictures of this one only")
    parser.add_argument(
        "--count", type=int, metavar="N", help=f"with --compare: N pictures (default: {_COUNT})"
    )
    parser.add_argument(
        "--html", metavar="FILE", help="with --compare: write a page with the pictures instead"
    )


def run(args: argparse.Namespace) -> int:
    """Run `evenmix captions`."""
    if args.compare is None and (args.dataset or args.html or args.count is not None):
        raise EvenmixError("--dataset, --count and --html go with --compare A B")
    sets = find_sets(args.root)
    console = Console(highlight=False)
    if args.compare is not None:
        _compare(args, sets, console)
        return 0
    numbers = {name: statistics(args.root, captions) for name, captions in sets.items()}
    console.print(sets_table(args.root, sets, numbers), lengths_table(numbers))
    print(
        "p5, p50 and p95 are the lengths that 5, 50 and 95 % of captions do not exceed.\n"
        "In Chinese and Japanese each letter counts as a word."
    )
    for name, captions in sets.items():
        if captions.unfinished:
            print(
                printable(
                    f"{name} is not finished for {', '.join(captions.unfinished)}: its committed "
                    "shards are counted."
                )
            )
    return 0


def _compare(args: argparse.Namespace, sets: Mapping[str, CaptionSet], console: Console) -> None:
    count = _COUNT if args.count is None else args.count
    if count < 1:
        raise EvenmixError(f"--count {count}: at least one is needed")
    for name in args.compare:
        if name not in sets:
            hint = did_you_mean(name, sets, f"the sets are {', '.join(sets)}")
            raise EvenmixError(f"{args.root} has no caption set {name!r}{hint}")
    pictures = compare(args.root, [sets[name] for name in args.compare], args.dataset, count)
    if args.html is None:
        show(console, args.compare, pictures)
        return
    page = comparison_page(args.root, args.compare, pictures)
    storage.replace(args.html, page.encode())
    print(f"{args.html}: {len(pictures)} pictures with their captions")
