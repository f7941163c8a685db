"""The search for near-duplicates, measured beside brute force and beside one clustering alone.

    python -m tests.benchmarks.dedup

For each size a corpus with drawn descriptors (tests/benchmarks/drawn_corpus.py) is searched by
`evenmix dedup`, as a user would start it: with several clusterings (six above 500,000 vectors,
where the default's four would be refused) and with one, which is HiDream-I1's way. FAISS compares
all vectors with all: `IndexFlatIP.range_search`, on as many threads as evenmix has workers. Above
50,000 vectors it does so for about 10,000 random ones, of which its time for all is extrapolated,
and the pairs of these are what the others must find.
README.md beside this file has the last figures.
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import faiss
import matplotlib

matplotlib.use("Agg")
import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq
from matplotlib import pyplot as plt
from rich.console import Console
from rich.table import Table

from tests.benchmarks import measure
from tests.benchmarks.drawn_corpus import (
    DATASET,
    DESCRIPTOR,
    DIMENSION,
    Vectors,
    draw_vectors,
    key_of_row,
    publish,
)
from tests.benchmarks.measure import Cost

Ints = npt.NDArray[np.int64]

RECIPE = """
root = "{folder}/corpus"
[datasets.{dataset}]
layout = "folder"
source = "{folder}/nowhere"
licence = "CC0 1.0"
threshold = {threshold}
[dedup]
name = "{name}"
descriptor = "{descriptor}"
{options}
[captions.source]
engine = "source"
[mixture]
name = "drawn-256"
resolution = 256
captions = "source"
"""

EVENMIX, ONE_CLUSTERING = SEARCHES = ("evenmix", "one clustering")

THRESHOLD = 0.75
WORKERS = 2
_ALL_BELOW, _QUERIES_ABOVE = 50_000, 10_000
_UNROUNDED_BELOW = 200_000
_FOUR_DO_BELOW = 500_000
_QUERIES_AT_ONCE = 4_096
_GOAL_RECALL, _GOAL_TIME_SHARE, _GOAL_SIZE = 0.99, 1 / 20, 1_000_000


@dataclass(frozen=True)
class BruteForce:
    """What brute force found: pairs of rows as ``lower * N + higher``, sorted, and its time.

    ``is_query`` are the rows that were compared with all; ``wall_s`` is that for all rows.
    """

    pairs: Ints
    is_query: npt.NDArray[np.bool_]
    wall_s: float


@dataclass(frozen=True)
class Search:
    """What a search cost, and the share of the pairs of brute force that it found.

    ``estimated`` is that share as the command itself printed it, with its interval. ``beyond`` is
    the number of pairs that it found and brute force did not.
    """

    cost: Cost
    recall: float
    beyond: int
    estimated: tuple[float, float, float]


@dataclass(frozen=True)
class Size:
    """All that was measured at one size."""

    num_pictures: int
    num_pairs: int
    brute_force_s: float
    searches: dict[str, Search]


def main() -> int:
    """Run the benchmark; returns 1 if a goal is missed."""
    options = _options()
    console = Console(highlight=False)
    sizes = []
    for number in options.sizes:
        with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
            sizes.append(_measure(number, Path(folder), console))
    console.print(_table(sizes))
    if len(sizes) > 1:
        _plot(sizes, options.plot)
    return int(not all(map(_reaches_goals, sizes)))


def _measure(num_pictures: int, folder: Path, console: Console) -> Size:
    vectors = draw_vectors(num_pictures)
    publish(f"{folder}/corpus", vectors, folder)
    stored = vectors.astype(np.float16).astype(np.float32)
    stored /= np.linalg.norm(stored, axis=1, keepdims=True)
    truth = _brute_force(stored)
    if num_pictures <= _UNROUNDED_BELOW:
        unrounded = _brute_force(vectors)
        differ = np.setxor1d(truth.pairs, unrounded.pairs, assume_unique=True)
        console.print(
            f"{num_pictures:,} vectors: stored as float16 they have {len(truth.pairs):,} pairs, as "
            f"float32 {len(unrounded.pairs):,}; {len(differ):,} are in one of the two alone"
        )
    del vectors, stored
    rows = {key_of_row(row): row for row in range(num_pictures)}
    searches = {}
    for name in SEARCHES:
        searches[name] = _search(name, folder, rows, truth)
        console.print(f"{num_pictures:,} vectors, {name}: {_line(searches[name])}")
    return Size(num_pictures, len(truth.pairs), truth.wall_s, searches)


def _brute_force(vectors: Vectors) -> BruteForce:
    """Compare vectors of length 1 with all."""
    number = len(vectors)
    is_query = np.ones(number, np.bool_)
    if number > _ALL_BELOW:
        is_query = np.random.default_rng(0).random(number) < _QUERIES_ABOVE / number
    queries = np.flatnonzero(is_query)
    faiss.omp_set_num_threads(WORKERS)
    index = faiss.IndexFlatIP(DIMENSION)
    index.add(vectors)
    found = []
    started = time.monotonic()
    for start in range(0, len(queries), _QUERIES_AT_ONCE):
        some = queries[start : start + _QUERIES_AT_ONCE]
        limits, _, others = index.range_search(vectors[some], THRESHOLD)
        found.append(_codes(np.repeat(some, np.diff(limits.astype(np.int64))), others, number))
    wall_s = (time.monotonic() - started) * number / len(queries)
    return BruteForce(np.unique(np.concatenate(found)), is_query, wall_s)


def _codes(a: Ints, b: Ints, number: int) -> Ints:
    """Return one number for each pair of different rows."""
    codes: Ints = (np.minimum(a, b) * number + np.maximum(a, b))[a != b]
    return codes


def _search(name: str, folder: Path, rows: dict[str, int], truth: BruteForce) -> Search:
    """Run `evenmix dedup` and compare what it finds with what brute force found."""
    run = name.replace(" ", "-")
    recipe, log = folder / f"{run}.toml", folder / f"{run}.log"
    recipe.write_text(
        RECIPE.format(
            folder=folder,
            dataset=DATASET,
            threshold=THRESHOLD,
            name=run,
            descriptor=DESCRIPTOR,
            options=_options_of(name, len(rows)),
        ),
        encoding="utf-8",
    )
    command = [sys.executable, "-m", "pipeline.cli", "dedup", str(recipe), f"--workers={WORKERS}"]
    try:
        cost = measure.run(command, log)
    except subprocess.CalledProcessError:
        sys.exit(f"{command} failed:\n{log.read_text(errors='replace')}")
    result = folder / "corpus" / "duplicates" / run
    codes = [np.empty(0, np.int64)]
    for path in sorted((result / "_graph").glob("[!.]*.parquet")):
        table = pq.read_table(path, columns=["key", "neighbour"])
        worse, better = (np.array([rows[k] for k in end.to_pylist()], np.int64) for end in table)
        codes.append(_codes(worse, better, len(rows)))
    found = np.concatenate(codes)
    of_queries = truth.is_query[found // len(rows)] | truth.is_query[found % len(rows)]
    is_true = np.isin(found, truth.pairs)
    report = pq.read_table(result / "_recall" / "all.parquet").to_pylist()
    (estimate,) = (row for row in report if row["measure"] == "pair_recall")
    shutil.rmtree(folder / "corpus" / "exchange", ignore_errors=True)
    return Search(
        cost,
        int(is_true.sum()) / len(truth.pairs),
        int((of_queries & ~is_true).sum()),
        (estimate["value"], estimate["low"], estimate["high"]),
    )


def _options_of(name: str, num_pictures: int) -> str:
    """Return what a search's recipe says of it, beside the defaults."""
    if name == ONE_CLUSTERING:
        return "clusterings = 1\nmin_recall = 0.0"
    return "clusterings = 6" if num_pictures > _FOUR_DO_BELOW else ""


# What is shown


def _reaches_goals(size: Size) -> bool:
    ours = size.searches[EVENMIX]
    is_fast = ours.cost.wall_s <= _GOAL_TIME_SHARE * size.brute_force_s
    return ours.recall >= _GOAL_RECALL and (is_fast or size.num_pictures < _GOAL_SIZE)


def _line(search: Search) -> str:
    value, low, high = search.estimated
    return (
        f"{search.recall:.4f} of the pairs (its own estimate {value:.4f}, {low:.4f} to {high:.4f}) "
        f"in {search.cost.wall_s:.0f} s, {search.cost.peak_bytes / 1e9:.1f} GB; "
        f"{search.beyond} pairs that brute force does not have"
    )


def _table(sizes: Sequence[Size]) -> Table:
    table = Table(title="near-duplicates: searches beside brute force")
    for column in ("vectors", "pairs", "search", "recall", "time", "of brute force", "peak memory"):
        table.add_column(column, justify="right")
    for size in sizes:
        number, pairs = f"{size.num_pictures:,}", f"{size.num_pairs:,}"
        table.add_row(number, pairs, "brute force", "1", f"{size.brute_force_s:,.0f} s", "1", "")
        for name, search in size.searches.items():
            table.add_row(
                "",
                "",
                name,
                f"{search.recall:.4f}",
                f"{search.cost.wall_s:,.0f} s",
                f"1/{size.brute_force_s / search.cost.wall_s:.1f}",
                f"{search.cost.peak_bytes / 1e9:.1f} GB",
            )
    return table


def _plot(sizes: Sequence[Size], path: Path) -> None:
    """Draw time and memory against the number of vectors, on logarithmic axes."""
    figure, (time_axes, memory_axes) = plt.subplots(1, 2, figsize=(10, 4.5))
    numbers = [size.num_pictures for size in sizes]
    brute_force = [size.brute_force_s for size in sizes]
    time_axes.loglog(numbers, brute_force, "k^--", label="brute force")
    for name in SEARCHES:
        costs = [size.searches[name].cost for size in sizes]
        time_axes.loglog(numbers, [cost.wall_s for cost in costs], "o-", label=name)
        memory_axes.loglog(numbers, [cost.peak_bytes / 1e9 for cost in costs], "o-", label=name)
    for axes, what in ((time_axes, "time (s)"), (memory_axes, "peak memory (GB)")):
        axes.set(xlabel="vectors of 512", ylabel=what)
        axes.grid(visible=True, which="both", alpha=0.3)
        axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="measure the search beside brute force")
    sizes = [50_000, 100_000, 200_000, 500_000, 1_000_000]
    parser.add_argument("--sizes", type=int, nargs="+", default=sizes, metavar="N")
    parser.add_argument("--plot", type=Path, default=Path(__file__).with_suffix(".png"))
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
