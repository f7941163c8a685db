"""The writer of mixtures, measured beside decoding, resizing and encoding alone.

    python -m tests.benchmarks.writer

`evenmix mix` does all of its work (it judges, selects, brings samples to their shards, packs them)
on one core and without Beam, in the two ways that it has; the same functions bring the same
pictures alone to their size. Each runs in a process of its own, in turn, with the order swapped
every round; an efficiency is the median of the rounds' own. README.md beside this file has the last
figures.
"""

import argparse
import itertools
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tests.benchmarks.measure import Cost
from tests.benchmarks.picture_server import draw_pictures

RECIPE = """
root = {root}
[images]
min_short_edge_px = 16
[captions.source]
engine = "source"
"""
DATASET = """
[datasets.{name}]
layout = "folder"
source = {source}
licence = "CC0 1.0"
duplicates = "exact"
"""
MIXTURE = """
[mixture]
name = "benchmark"
datasets = ["{name}"]
resolution = {resolution}
min_short_edge_px = 16
captions = "source"
"""

NAMES = {"bare": "nothing else", "whole": "resized at source", "ranges": "resized at destination"}
WAYS = ("whole", "ranges")
SMALL_GROUP_BYTES = 4 << 20
"""What a group has where growth is measured, so that there are many."""

_GOAL = 0.9


@dataclass(frozen=True)
class Source:
    """A dataset of square JPEGs, all different, and the size of the samples made of it."""

    name: str
    num_pictures: int
    edge_px: int
    resolution: int


Costs = Mapping[tuple[Source, str], Sequence[Cost]]
"""The costs of all rounds, by what was worked on and the side."""


def main() -> int:
    """Run the benchmark; returns 1 if the goal is missed."""
    options = _options()
    console = Console(highlight=False)
    large = [Source(f"edge_{edge}", options.pictures, edge, 256) for edge in (1024, 512)]
    small = [Source(f"growth_{number}", number, 96, 64) for number in options.growth]
    with tempfile.TemporaryDirectory(prefix="benchmark-") as name:
        folder = Path(name)
        _write_corpus(folder, [*large, *small])
        costs: dict[tuple[Source, str], list[Cost]] = {}
        turns = [(source, side) for source in large for side in ("bare", *WAYS)]
        for number in range(options.rounds):
            for source, side in turns if number % 2 == 0 else reversed(turns):
                costs.setdefault((source, side), []).append(_run(folder, source, side))
        growth = {
            (source, way): _run(folder, source, way, f"--group-bytes={SMALL_GROUP_BYTES}")
            for source in small
            for way in WAYS
        }
    console.print(_efficiency_table(costs), _growth_table(growth))
    worst = min(_efficiency(costs, source, way) for source in large for way in WAYS)
    verdict = "reached" if worst >= _GOAL else "MISSED"
    console.print(f"{verdict}: {worst:.3f} of decoding, resizing and encoding (goal {_GOAL})")
    return int(worst < _GOAL)


def _write_corpus(folder: Path, sources: Sequence[Source]) -> None:
    """Write JPEGs with captions, ingest them, and write a recipe for the mixture of each source."""
    common = RECIPE.format(root=json.dumps(str(folder / "corpus")))
    total = sum(source.num_pictures for source in sources)
    drawn = {
        edge_px: draw_pictures(total, edge_px, edge_px)
        for edge_px in {source.edge_px for source in sources}
    }
    for source in sources:
        pictures = folder / source.name
        pictures.mkdir()
        some = itertools.islice(drawn[source.edge_px], source.num_pictures)
        for number, jpeg in enumerate(some):
            (pictures / f"{number:05d}.jpg").write_bytes(jpeg)
            (pictures / f"{number:05d}.txt").write_text(f"Picture {number}, a photograph.")
        common += DATASET.format(name=source.name, source=json.dumps(str(pictures)))
    for source in sources:
        mixture = MIXTURE.format(name=source.name, resolution=source.resolution)
        _recipe(folder, source).write_text(common + mixture, encoding="utf-8")
    everything = MIXTURE.replace('datasets = ["{name}"]\n', "").format(resolution=64)
    recipe = folder / "recipe.toml"
    recipe.write_text(common + everything, encoding="utf-8")
    for command in ("ingest", "dedup", "caption"):
        evenmix = [sys.executable, "-m", "pipeline.cli", command, str(recipe)]
        subprocess.run(evenmix, check=True, capture_output=True)


def _recipe(folder: Path, source: Source) -> Path:
    return folder / f"{source.name}.toml"


def _run(folder: Path, source: Source, side: str, *options: str) -> Cost:
    """Run a side in a fresh process; what it has written is removed."""
    command = [
        sys.executable, "-m", "tests.benchmarks.writer_sides", side, str(_recipe(folder, source)),
        *options,
    ]  # fmt: skip
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    for written in ("mixtures", "selections", "exchange"):
        shutil.rmtree(folder / "corpus" / written, ignore_errors=True)
    return Cost(**json.loads(done.stdout.splitlines()[-1]))


# What is printed


def _efficiency(costs: Costs, source: Source, way: str) -> float:
    """Return the part of the work that is not the writer's own, by wall or CPU time: the lower."""
    pairs = list(zip(costs[source, "bare"], costs[source, way], strict=True))
    return min(
        statistics.median(bare.wall_s / mixed.wall_s for bare, mixed in pairs),
        statistics.median(bare.cpu_s / mixed.cpu_s for bare, mixed in pairs),
    )


def _efficiency_table(costs: Costs) -> Table:
    table = Table(title="on one core, medians")
    for heading in ("JPEGs", "", "pictures/s", "ms of CPU", "efficiency"):
        table.add_column(heading, justify="right" if heading else "left")
    for (source, side), some in costs.items():
        table.add_row(
            f"{source.edge_px} px",
            NAMES[side],
            f"{source.num_pictures / statistics.median(cost.wall_s for cost in some):.1f}",
            f"{1e3 * statistics.median(cost.cpu_s for cost in some) / source.num_pictures:.2f}",
            f"{_efficiency(costs, source, side):.3f}",
        )
    return table


def _growth_table(growth: Mapping[tuple[Source, str], Cost]) -> Table:
    table = Table(title="growth")
    for heading in ("", "pictures", "ms/picture", "peak MiB"):
        table.add_column(heading, justify="right" if heading else "left")
    for (source, way), cost in growth.items():
        table.add_row(
            NAMES[way],
            f"{source.num_pictures:,}",
            f"{1e3 * cost.cpu_s / source.num_pictures:.2f}",
            f"{cost.peak_bytes / 2**20:.0f}",
        )
    return table


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="measure the writer of mixtures")
    parser.add_argument("--pictures", type=int, default=400, help="of each size")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--growth", type=int, nargs="+", default=[500, 2_000, 8_000])
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
