"""The loader measured beside the webdataset library, MosaicML streaming, and decoding alone.

    python -m tests.benchmarks.loader --streaming-python PYTHON

All read the same pictures with the same decoder and must bring uint8 arrays with captions; what
they bring is checked. Each runs in a process of its own, in turn, with the order swapped every
round; a ratio is the median of the rounds' own ratios. README.md beside this file has the last
figures.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from mixing.manifest import MixtureDataset, Shard, Split, load_manifest
from pipeline import images
from tests.benchmarks.loader_common import BATCH_SIZE, First, Rate, sha256_of
from tests.benchmarks.picture_server import draw_pictures
from tests.mixtures import Member, write_mixture

THREADS = (1, 2)
DATASETS = ("architecture", "birds", "coffee", "rockets")
STEP = 1_000_000
NUMS_SHARDS = (10, 100, 1_000, 10_000)

_SHARDS_PER_DATASET = 4
"""webdataset needs at least one for each of its processes."""

_LIMITS = images.Limits(min_short_edge_px=1, max_pixels=1 << 24, max_bytes=1 << 24)
_GOAL_OF_BARE, _GOAL_RESUME_S = 0.95, 5.0


@dataclass(frozen=True)
class Side:
    """A loader, or decoding alone; ``can_resume`` tells whether it can begin at any step."""

    name: str
    command: Sequence[str]
    can_resume: bool


@dataclass(frozen=True)
class Run:
    """What one process measured; ``first_s`` is from its start to its first batch."""

    first_s: float
    first: First
    rate: Rate | None


Rates = Mapping[tuple[str, int], Sequence[Rate]]
"""The rates of all rounds, by a side's name and its number of threads."""


def main() -> int:
    """Run the benchmark; returns 1 if a goal is missed."""
    options = _options()
    console = Console(highlight=False)
    ours = [sys.executable, "-m", "tests.benchmarks.loader_sides"]
    streaming = [options.streaming_python, "-m", "tests.benchmarks.loader_streaming"]
    sides = [
        Side("bare decoding", [*ours, "--side=bare"], can_resume=False),
        Side("evenmix", [*ours, "--side=evenmix"], can_resume=True),
        Side("webdataset", [*ours, "--side=webdataset"], can_resume=False),
        Side("streaming", streaming, can_resume=True),
    ]
    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
        mixture = Path(folder) / "mixture"
        digests = _write_mixture(mixture, options)
        subprocess.run([*streaming, str(mixture), "--write"], check=True)
        rates = _measure_rates(sides, mixture, digests, options)
        resumes = {
            side.name: [_run(side, mixture, digests, step=step) for step in (0, STEP)]
            for side in sides[1:]
            if side.can_resume
        }
        growth = [
            (number, _run(sides[1], _enlarge(mixture, number), digests, step=STEP))
            for number in NUMS_SHARDS
        ]
    for threads in THREADS:
        console.print(_rate_table(rates, threads))
    console.print(_resume_table(resumes), _growth_table(growth))
    peer_s = STEP * BATCH_SIZE / statistics.median(r.per_s for r in rates["webdataset", 1])
    console.print(f"webdataset would have to read for {peer_s / 3600:.0f} h to reach that step")
    return _judge(rates, [resumes["evenmix"][1], *(run for _, run in growth)], console)


# The samples


def _write_mixture(mixture: Path, options: argparse.Namespace) -> dict[str, str]:
    """Write a mixture of equal datasets; returns the digest of each caption's picture."""
    edge_px = options.resolution
    pngs, pixel_digests = [], []
    for jpeg in draw_pictures(options.pictures, 2 * edge_px, 2 * edge_px):
        pixels = images.decode(jpeg, _LIMITS)
        square, _ = images.resize_and_crop_square(pixels, edge_px)
        pngs.append(images.encode(square, "png"))
        pixel_digests.append(sha256_of(square))
    train: dict[str, list[Member]] = {name: [] for name in DATASETS}
    digests = {}
    for number in range(options.samples):
        caption = f"Picture {number}, a photograph."
        picture = number % len(pngs)
        digests[caption] = pixel_digests[picture]
        dataset = DATASETS[number * len(DATASETS) // options.samples]
        train[dataset].append(Member(f"{number:032x}", pngs[picture], [caption]))
    samples_per_shard = options.samples // (len(DATASETS) * _SHARDS_PER_DATASET)
    write_mixture(mixture, train, resolution=edge_px, samples_per_shard=samples_per_shard)
    return digests


def _enlarge(mixture: Path, num_shards: int) -> Path:
    """Write a mixture of so many shards, which are links to the first one of each dataset."""
    larger = mixture.with_name(f"mixture-{num_shards}")
    manifest = load_manifest(str(mixture))
    datasets = []
    for position, dataset in enumerate(manifest.datasets):
        (larger / dataset.name).mkdir(parents=True)
        first = dataset.train.shards[0]
        shards = [
            _link(mixture, larger, dataset, first, number)
            for number in range(position, num_shards, len(manifest.datasets))
        ]
        train = Split(num_samples=len(shards) * first.num_samples, shards=shards)
        datasets.append(dataset.model_copy(update={"train": train}))
    text = manifest.model_copy(update={"datasets": datasets}).model_dump_json()
    (larger / "mixture.json").write_text(text, encoding="utf-8")
    return larger


def _link(mixture: Path, larger: Path, dataset: MixtureDataset, first: Shard, number: int) -> Shard:
    shard = first.model_copy(update={"name": f"{dataset.name}/train-{number:05d}.tar"})
    for suffix in (".tar", ".parquet"):
        os.link(
            (mixture / first.name).with_suffix(suffix), (larger / shard.name).with_suffix(suffix)
        )
    return shard


# Measuring


def _measure_rates(
    sides: Sequence[Side], mixture: Path, digests: Mapping[str, str], options: argparse.Namespace
) -> Rates:
    rates: dict[tuple[str, int], list[Rate]] = {}
    turns = [(side, threads) for threads in THREADS for side in sides]
    for number in range(options.rounds):
        for side, threads in turns if number % 2 == 0 else reversed(turns):
            batches = options.samples // BATCH_SIZE
            measured = _run(side, mixture, digests, threads=threads, batches=batches)
            assert measured.rate is not None
            rates.setdefault((side.name, threads), []).append(measured.rate)
    return rates


def _run(
    side: Side,
    mixture: Path,
    digests: Mapping[str, str],
    *,
    threads: int = 1,
    step: int = 0,
    batches: int = 0,
) -> Run:
    """Run a side in a fresh process, and check the pictures of its first batch."""
    command = [
        *side.command, str(mixture), f"--threads={threads}", f"--step={step}",
        f"--batches={batches}",
    ]  # fmt: skip
    started = time.monotonic()
    with (
        tempfile.TemporaryFile("w+") as log,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True) as process,
    ):
        assert process.stdout is not None
        line = process.stdout.readline()
        first_s = time.monotonic() - started
        rest = process.stdout.read()
        if process.wait():
            log.seek(0)
            sys.exit(f"{command} failed:\n{log.read()}")
    first = First(**json.loads(line))
    wrong = [caption for caption, digest in first.digests.items() if digests[caption] != digest]
    if wrong:
        sys.exit(f"{side.name} does not bring the pictures that were written: {wrong}")
    return Run(first_s, first, Rate(**json.loads(rest)) if rest else None)


# What is printed


def _ratios(rates: Rates, other: str, threads: int) -> tuple[float, float]:
    """Compare evenmix with another: the medians of its rates as multiples, by wall and CPU time."""
    pairs = list(zip(rates["evenmix", threads], rates[other, threads], strict=True))
    return (
        statistics.median(own.per_s / its.per_s for own, its in pairs),
        statistics.median(own.per_core_s / its.per_core_s for own, its in pairs),
    )


def _rate_table(rates: Rates, threads: int) -> Table:
    table = Table(title=f"with {threads} thread{'s' * (threads > 1)} (evenmix's as a multiple)")
    for heading in ("", "samples/s", "samples/core-s"):
        table.add_column(heading, justify="right" if heading else "left")
    for name, number in rates:
        if number == threads:
            medians = (
                statistics.median(each.per_s for each in rates[name, threads]),
                statistics.median(each.per_core_s for each in rates[name, threads]),
            )
            multiples = _ratios(rates, name, threads)
            cells = [
                f"{median:,.0f} ({multiple:.2f}x)"
                for median, multiple in zip(medians, multiples, strict=True)
            ]
            table.add_row(name, *cells)
    return table


def _resume_table(resumes: Mapping[str, Sequence[Run]]) -> Table:
    table = Table("", "at the start", f"at step {STEP:,}", "without imports")
    table.title = "seconds from the start of a process to its first batch"
    for name, (at_start, resumed) in resumes.items():
        table.add_row(
            name,
            f"{at_start.first_s:.2f}",
            f"{resumed.first_s:.2f}",
            f"{resumed.first.since_imports_s:.2f}",
        )
    return table


def _growth_table(growth: Sequence[tuple[int, Run]]) -> Table:
    table = Table("shards", "first batch, s", "without imports", "peak MiB")
    table.title = f"evenmix at step {STEP:,}"
    for number, run in growth:
        table.add_row(
            f"{number:,}",
            f"{run.first_s:.2f}",
            f"{run.first.since_imports_s:.2f}",
            f"{run.first.peak_bytes / 2**20:.0f}",
        )
    return table


def _judge(rates: Rates, resumed: Sequence[Run], console: Console) -> int:
    """Say which goals are reached; returns 1 if one is not."""
    goals = []
    for threads in THREADS:
        of_bare = min(_ratios(rates, "bare decoding", threads))
        text = f"{of_bare:.3f} of bare decoding with {threads} (goal {_GOAL_OF_BARE})"
        goals.append((text, of_bare >= _GOAL_OF_BARE))
        for peer in ("webdataset", "streaming"):
            least = min(_ratios(rates, peer, threads))
            goals.append((f"{least:.2f} times {peer} with {threads} (goal 1)", least > 1))
    slowest_s = max(run.first_s for run in resumed)
    text = f"{slowest_s:.2f} s to the first batch at step {STEP:,} (goal {_GOAL_RESUME_S:.0f})"
    goals.append((text, slowest_s < _GOAL_RESUME_S))
    for text, is_reached in goals:
        console.print(f"{'reached' if is_reached else 'MISSED'}: {text}")
    return int(not all(is_reached for _, is_reached in goals))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="measure the loader beside others")
    parser.add_argument(
        "--streaming-python", required=True, metavar="PYTHON", help="that has streaming.txt"
    )
    parser.add_argument("--resolution", type=int, default=256)
    parser.add_argument("--pictures", type=int, default=256, help="distinct ones")
    parser.add_argument("--samples", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=5)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
