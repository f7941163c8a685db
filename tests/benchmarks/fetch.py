"""The ingest of a URL list, measured beside img2dataset on the same server and machine.

    python -m tests.benchmarks.fetch --img2dataset PATH_TO_ITS_PROGRAM

Each tool runs as a user would start it, in turn, with the order swapped every round. What it kept
is counted in the tars that it wrote. README.md beside this file has the last figures.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table

from tests.benchmarks import picture_server
from tests.benchmarks.breakdown import print_breakdown
from tests.benchmarks.measure import Cost, run

RECIPE = """
root = "{root}"
[datasets.pictures]
layout = "url_list"
source = "{url_list}"
licence = "CC0 1.0"
id_rule = "{{id}}"
image_url = "{{url}}"
text_field = "caption"
[fetch]
allow_private_addresses = true
[captions.source]
engine = "source"
[mixture]
name = "pictures-256"
resolution = 256
captions = "source"
"""

IMG2DATASET = {
    "url_list": "{url_list}",
    "output_folder": "{root}",
    "input_format": "parquet",
    "url_col": "url",
    "caption_col": "caption",
    "save_additional_columns": '["id"]',
    "output_format": "webdataset",
    "processes_count": "2",
    "thread_count": "16",
    "resize_mode": "no",
}
"""What evenmix does, said in img2dataset's options: the pictures as they came, two processes.

Of 256 (its default), 64, 32 and 16 threads a process, 16 were the fastest on two cores (README.md).
"""


@dataclass(frozen=True)
class Tool:
    """One tool with one setting: how it is started, and how many records it says it lost."""

    name: str
    command: Callable[[Path, Path], list[str]]
    failed: Callable[[Path], int]


@dataclass(frozen=True)
class Run:
    """What one run of a tool cost and brought."""

    cost: Cost
    kept: int
    failed: int

    @property
    def per_s(self) -> float:
        """Pictures kept per second."""
        return self.kept / self.cost.wall_s

    @property
    def per_core_s(self) -> float:
        """Pictures kept per second of CPU time of the tool's processes."""
        return self.kept / self.cost.cpu_s


def main() -> int:
    """Run the benchmark; returns 1 if the tools did not keep the same number of pictures."""
    options = _options()
    console = Console()
    tools = [Tool("evenmix", _evenmix, _failed_of_evenmix)] + [
        Tool(name, partial(_img2dataset, options.img2dataset, more), _failed_of_img2dataset)
        for name, more in (
            ("img2dataset", ["--skip_reencode=True"]),
            ("img2dataset, re-encoding", []),
            ("img2dataset, no decoding", ["--disable_all_reencoding=True"]),
        )
    ]
    runs: dict[str, list[Run]] = {tool.name: [] for tool in tools}
    with _server() as port, tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
        url_list = Path(folder) / "pictures.parquet"
        write_url_list(url_list, options.pictures, port)
        if options.breakdown:
            print_breakdown(_recipe(url_list, Path(folder) / "breakdown"), console)
        for number in range(options.runs):
            for tool in tools if number % 2 == 0 else reversed(tools):
                runs[tool.name].append(_run(tool, url_list, Path(folder)))
                console.print(_line(tool.name, runs[tool.name][-1]), highlight=False)
    console.print(_table(runs))
    kept = {each.kept for some in runs.values() for each in some}
    if len(kept) > 1:
        console.print(f"They did not keep the same number of pictures: {sorted(kept)}")
    return int(len(kept) > 1)


def write_url_list(path: Path, count: int, port: int) -> None:
    """Write a URL list as Parquet, with the columns url, id and caption."""
    numbers = range(count)
    columns = {
        "url": picture_server.urls(count, port),
        "id": [f"{number:08d}" for number in numbers],
        "caption": [f"Picture {number}, a photograph." for number in numbers],
    }
    pq.write_table(pa.table(columns), path)


@contextmanager
def _server() -> Iterator[int]:
    """Run the picture server in a process of its own; gives its port."""
    command = [sys.executable, "-m", "tests.benchmarks.picture_server"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        try:
            yield int(server.stdout.readline())
        finally:
            server.terminate()


def _run(tool: Tool, url_list: Path, folder: Path) -> Run:
    root, log = folder / "root", folder / "log"
    try:
        cost = run(tool.command(url_list, root), log)
    except subprocess.CalledProcessError as error:
        sys.exit(f"{error}\n{log.read_text(errors='replace')}")
    kept = sum(map(_pictures_in, root.rglob("*.tar")))
    measured = Run(cost, kept, tool.failed(root))
    shutil.rmtree(root)
    return measured


def _pictures_in(path: Path) -> int:
    with tarfile.open(path) as tar:
        return sum(name.endswith(".jpg") for name in tar.getnames())


# evenmix


def _recipe(url_list: Path, root: Path) -> Path:
    recipe = url_list.with_name("recipe.toml")
    recipe.write_text(RECIPE.format(root=root, url_list=url_list), encoding="utf-8")
    return recipe


def _evenmix(url_list: Path, root: Path) -> list[str]:
    return [sys.executable, "-m", "pipeline.cli", "ingest", str(_recipe(url_list, root))]


def _failed_of_evenmix(root: Path) -> int:
    summary = json.loads((root / "images" / "pictures" / "stage.json").read_bytes())
    return sum(summary["counts"]["rejected"].values())


# img2dataset


def _img2dataset(program: str, more: Sequence[str], url_list: Path, root: Path) -> list[str]:
    options = [
        f"--{name}={value.format(url_list=url_list, root=root)}"
        for name, value in IMG2DATASET.items()
    ]
    return [program, *options, *more]


def _failed_of_img2dataset(root: Path) -> int:
    summaries = [json.loads(path.read_bytes()) for path in root.glob("*_stats.json")]
    return sum(each["failed_to_download"] + each["failed_to_resize"] for each in summaries)


# What is printed


def _line(name: str, each: Run) -> str:
    return (
        f"{name}: {each.per_s:.0f} pictures/s, {each.per_core_s:.0f} per core-second, "
        f"{each.cost.peak_bytes / 2**20:.0f} MiB, kept {each.kept:,}, failed {each.failed:,}"
    )


def _table(runs: dict[str, list[Run]]) -> Table:
    """Tabulate the medians of the runs; a ratio is evenmix's figure over the tool's."""
    table = Table(title="medians (evenmix's figure as a multiple of the other's)")
    for heading in ("", "pictures/s", "pictures/core-s", "peak MiB", "kept", "failed"):
        table.add_column(heading, justify="right" if heading else "left")
    ours = runs["evenmix"]

    def cell(some: Sequence[Run], figure: Callable[[Run], float]) -> str:
        median, own = (statistics.median(map(figure, each)) for each in (some, ours))
        return f"{median:,.0f}" if some is ours else f"{median:,.0f} ({own / median:.2f}x)"

    for name, some in runs.items():
        table.add_row(
            name,
            cell(some, lambda each: each.per_s),
            cell(some, lambda each: each.per_core_s),
            cell(some, lambda each: each.cost.peak_bytes / 2**20),
            f"{statistics.median(each.kept for each in some):,.0f}",
            f"{statistics.median(each.failed for each in some):,.0f}",
        )
    return table


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="measure the ingest of a URL list")
    parser.add_argument("--img2dataset", required=True, metavar="PROGRAM", help="its command")
    parser.add_argument("--pictures", type=int, default=20_000)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument(
        "--breakdown", action="store_true", help="also show where the time of one work item goes"
    )
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
