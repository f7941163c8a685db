"""`evenmix datasets`: the catalogue as a table, all about one dataset, or a check of one."""

import argparse
import textwrap
from collections.abc import Iterator
from urllib.parse import urlsplit

from rich import box
from rich.console import Console
from rich.table import Table

from pipeline.catalog import CATALOG, Entry
from pipeline.check_dataset import check
from pipeline.config_file import configure
from pipeline.dataset import Dataset
from pipeline.errors import EvenmixError, did_you_mean
from pipeline.recipe import Fetch

_LABEL_WIDTH = 13


def catalog_table() -> Table:
    """Return the catalogue, a dataset a row; ``?`` stands for what is unverified."""
    table = Table(box=box.SIMPLE_HEAD, padding=0, pad_edge=False, show_edge=False)
    table.add_column("dataset", no_wrap=True)
    table.add_column("count", justify="right")
    table.add_column("size", justify="right", no_wrap=True)
    table.add_column("source, licence")
    for heading in ("gated", "stages", "join"):
        table.add_column(heading, no_wrap=True)
    for name, entry in CATALOG.items():
        scheme = urlsplit(entry.dataset.source).scheme
        table.add_row(
            name,
            _millions(entry.num_records),
            _size(entry.num_bytes),
            f"{scheme} {entry.dataset.layout}\n{entry.dataset.licence}",
            _yes_no(entry.gated),
            "-".join(str(px) for px in sorted({*entry.stages[:1], *entry.stages[-1:]})) or "none",
            entry.join,
        )
    return table


def describe(name: str, entry: Entry) -> Iterator[tuple[str, str]]:
    """Yield what there is to say of a dataset, as labels and texts."""
    dataset, in_i1 = entry.dataset, entry.in_i1
    yield "home", entry.home
    yield "licence", dataset.licence
    yield "terms", entry.terms
    yield "gated", _yes_no(entry.gated)
    if entry.gated:
        yield "", "Accept the terms at home, and set HF_TOKEN to a token of that account."
    yield "source", dataset.source
    if dataset.source.startswith("hf://"):
        yield "revision", dataset.revision or "none pinned: the present one is taken"
    yield "layout", dataset.layout
    yield "splits", ", ".join(entry.splits) + ("" if len(entry.splits) == 1 else "; the first")
    yield "download", _download(name, entry)
    if dataset.is_fetched:
        yield "", f"Then each picture by itself, from {dataset.image_url}"
    for file, checksum in entry.checksums.items():
        yield "checksum", f"{checksum} ({file})"
    yield "records", _number(entry.num_records)
    for subset in entry.subsets:
        amounts = [
            f"{_number(subset.num_records)} records",
            f"{_number(subset.num_files)} files",
            _size(subset.num_bytes),
        ]
        yield "  subset", f"{subset.name}: {', '.join(amounts)}"
    yield "columns", ", ".join(entry.columns) or "?"
    if any(entry.size_px):
        yield "pixels", " x ".join(str(edge or "any") for edge in entry.size_px)
    yield "source id", dataset.id_rule or "{path}"
    yield "join", f"{entry.join}: {entry.join_note}"
    yield "", f"captions: {dataset.caption_subset}; rule: {dataset.join_rule or 'none'}"
    captions = f"{in_i1.captioned:,} captioned, {_number(in_i1.captions_each)} captions each"
    yield "in i1", f"{in_i1.pictures:,} pictures, {captions}"
    yield "stages", ", ".join(f"{stage} px" for stage in entry.stages) or "none"
    yield "prompt", entry.dataset.prompt
    for label, sentences in (("unverified", entry.unverified), ("notes", entry.notes)):
        for number, sentence in enumerate(sentences):
            yield label if number == 0 else "", f"- {sentence}"


def _download(name: str, entry: Entry) -> str:
    files = "1 file" if entry.num_files == 1 else f"{_number(entry.num_files)} files"
    address = urlsplit(entry.dataset.source)
    host = "the Hugging Face Hub" if address.scheme == "hf" else address.hostname
    amount = f"{files}, {_size(entry.num_bytes)}, from {host}"
    if entry.dataset.mirror:
        return f"{amount}, mirrored into the corpus first by `evenmix mirror {name}`"
    return f"{amount}, read in parallel where they are"


def _number(number: int | None) -> str:
    return "?" if number is None else f"{number:,}"


def _millions(number: int | None) -> str:
    return "?" if number is None else f"{number / 1e6:.1f} M"


def _size(num_bytes: int | None) -> str:
    if num_bytes is None:
        return "?"
    return f"{num_bytes / 1e12:.1f} TB" if num_bytes >= 1e12 else f"{num_bytes / 1e9:.0f} GB"


def _yes_no(answer: bool | None) -> str:
    return "?" if answer is None else "yes" if answer else "no"


def _entry(name: str) -> Entry:
    if name not in CATALOG:
        hint = did_you_mean(name, CATALOG, "`evenmix datasets` lists them")
        raise EvenmixError(f"the catalogue has no dataset {name}{hint}")
    return CATALOG[name]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `evenmix datasets`."""
    parser.add_argument("name", nargs="?", metavar="NAME", help="tell all about this one")
    parser.add_argument(
        "--check", action="store_true", help="compare the catalogue with the live source"
    )
    parser.add_argument("--source", metavar="URL", help="with --check: a copy to compare with")


def run(args: argparse.Namespace) -> int:
    """Run `evenmix datasets`."""
    console = Console(highlight=False)
    if args.name is None:
        if args.check or args.source:
            raise EvenmixError("--check and --source want the NAME of a dataset")
        console.print(catalog_table())
        print("\n? is unverified. `evenmix datasets NAME` tells all about one.")
        return 0
    entry = _entry(args.name)
    if args.check:
        return _run_check(args.name, entry, args.source)
    if args.source:
        raise EvenmixError("--source is of use with --check only")
    print(f"{args.name}: {entry.title}")
    for label, text in describe(args.name, entry):
        # Words longer than a line are URLs, to be copied whole.
        print(
            textwrap.fill(
                text,
                width=console.width,
                initial_indent=f"  {label:<{_LABEL_WIDTH}}",
                subsequent_indent=" " * (_LABEL_WIDTH + 2),
                break_long_words=False,
                break_on_hyphens=False,
            )
        )
    return 0


def _run_check(name: str, entry: Entry, source: str | None) -> int:
    """Print the findings as they come; the status is 1 if one differs from the catalogue."""
    dataset = entry.dataset
    if source is not None:
        document = dataset.model_dump(exclude={"revision"}) | {"source": source}
        dataset = configure("--source", document, Dataset, {})
    print(f"{name}: {dataset.source}", flush=True)
    differences = 0
    for finding in check(name, entry, dataset, Fetch()):
        print(f"  {'DIFFERS' if finding.differs else 'ok     '}  {finding.text}", flush=True)
        differences += finding.differs
    print(f"{differences} difference{'' if differences == 1 else 's'} from the catalogue")
    return 1 if differences else 0
