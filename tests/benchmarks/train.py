"""What a training step costs: time, memory and use of the devices, recipe by recipe.

    python -m tests.benchmarks.train                               the demo's model
    python -m tests.benchmarks.train --recipes i1-1b-256 …         on a machine with GPUs
    python -m tests.benchmarks.train --ablations-of i1-1b-256      one choice changed at a time
    python -m tests.benchmarks.train --compile-only                all stages, without any weights

A row is what `evenmix bench train --synthetic-data --random-encoders` measures, in a process of its
own, so that no row has to do with the memory of the one before. Each device gets as many pictures
as the recipe gives it, however many devices there are. README.md beside this file has the last
figures.
"""

import argparse
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import TypeVar, TypeVarTuple, get_args

import jax
from rich import box
from rich.console import Console
from rich.table import Table

from pipeline.errors import EvenmixError
from train.bench import Bench, bench
from train.blocks import Rematerialise
from train.config import Flux2Config, Precision, T5GemmaTextConfig, load_config
from train.encoders import ByteTextEncoder
from train.flux2_vae import FLUX2_VAE, Flux2Codec
from train.frozen import FrozenEncoders
from train.memory import StepMemory
from train.sharding import make_mesh
from train.step import TrainingStep

DEMO = "demo/train.toml"
STAGES = [f"i1-{size}-{resolution}" for size in ("1b", "3b") for resolution in (256, 512, 1024)]
SIMULATED_DEVICES = 8

Args = TypeVarTuple("Args")
R = TypeVar("R")


def main() -> int:
    """Run the benchmark."""
    options = _options()
    console = Console(highlight=False, width=110)  # also where it is no terminal
    if options.compile_only:
        console.print(_compile_table())
    elif options.ablations_of:
        recipe = options.ablations_of
        rows = {change or "as it is": (recipe, change) for change in ["", *ablations(recipe)]}
        _print_measured(console, recipe, rows, options.steps)
    else:
        rows = {recipe: (recipe, "") for recipe in options.recipes}
        _print_measured(console, "recipes", rows, options.steps)
    return 0


def ablations(recipe: str) -> list[str]:
    """Return one line of a configuration for each choice that can be made otherwise."""
    config = load_config(recipe)
    choices = {
        "precision": (config.precision, get_args(Precision)),
        "rematerialise": (config.rematerialise, get_args(Rematerialise)),
        "optimiser.mu_dtype": (config.optimiser.mu_dtype, get_args(Precision)),
    }
    if isinstance(config.text, T5GemmaTextConfig):
        choices["text.dtype"] = (config.text.dtype, get_args(Precision))
    if isinstance(config.latent, Flux2Config):
        choices["latent.dtype"] = (config.latent.dtype, get_args(Precision))
    tokens = config.text.num_tokens
    return [
        *(
            f'{name} = "{other}"'
            for name, (chosen, possible) in choices.items()
            for other in possible
            if other != chosen
        ),
        f"text.trim_to = [{tokens // 2}, {tokens * 7 // 8}]",
        f"accumulate = {2 * config.accumulate}",
    ]


def measure(recipe: str, change: str, steps: int) -> Bench | str:
    """Measure a recipe with one line changed, on the devices at hand, or say why it cannot be."""
    original = load_config(recipe)
    devices = jax.device_count()
    base = str(Path(recipe).resolve()) if recipe.endswith(".toml") else recipe
    lines = [
        f"base = {json.dumps(base)}",
        f"batch_size = {original.batch_size // original.mesh.fsdp * devices}",
        f"mesh.fsdp = {devices}",
        change,
    ]
    with tempfile.NamedTemporaryFile("w", suffix=".toml") as file:
        file.write("\n".join(lines))
        file.flush()
        config = load_config(file.name)
    try:
        return bench(config, steps, synthetic_data=True, random_encoders=True)
    except (EvenmixError, jax.errors.JaxRuntimeError) as error:
        return str(error)


def compile_only(recipe: str) -> tuple[float, StepMemory]:
    """Compile a recipe's step without any weights; return the seconds, and what memory it needs."""
    config = load_config(recipe)
    mesh = make_mesh(config.mesh.fsdp)
    with jax.set_mesh(mesh):
        # The step is given what encoders return, and has only to know its shape.
        text = ByteTextEncoder(config.text.num_tokens, config.text.embed_dim)
        encoders = FrozenEncoders(text, Flux2Codec(FLUX2_VAE, params={}), mesh)
        return TrainingStep(config, encoders).compile()


def _alone(function: Callable[[*Args], R], *args: *Args) -> R | str:
    """Call a function in a fresh process; return what it does, or that the process died."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            return pool.submit(function, *args).result()
        except BrokenProcessPool:
            return "its process was ended, perhaps for its memory"


# What is printed


def _print_measured(
    console: Console, title: str, rows: Mapping[str, tuple[str, str]], steps: int
) -> None:
    """Print a table of rows (recipe, line changed), and under it what could not be measured."""
    table = Table(title=f"{title}, {steps} steps", title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("", no_wrap=True)
    for heading in ("step", "images/s", "TFLOP/s", "MFU", "compile", "planned", "used"):
        table.add_column(heading, justify="right")
    obstacles = []
    for name, (recipe, change) in rows.items():
        found = _alone(measure, recipe, change, steps)
        if isinstance(found, str):
            obstacles.append(f"{name}: {found}")
        else:
            table.add_row(name, *_cells(found))
    console.print(table, *obstacles, sep="\n")


def _cells(found: Bench) -> list[str]:
    measured = found.measured
    flop_per_s, mfu = measured.flop_per_s, measured.mfu
    used = measured.peak_memory_bytes
    return [
        f"{statistics.median(measured.step_s):.3f} s",
        f"{measured.images_per_s:.1f}",
        "" if flop_per_s is None else f"{flop_per_s / 1e12:.3g}",
        "" if mfu is None else f"{mfu:.1%}",
        f"{found.compile_s:.0f} s",
        f"{found.memory.total / 2**30:.2f} GiB",
        "" if used is None else f"{used / 2**30:.2f} GiB",
    ]


def _compile_table() -> Table:
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={SIMULATED_DEVICES}"
    title = f"compiled for {SIMULATED_DEVICES} simulated devices"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("", no_wrap=True)
    for heading in ("compile", "state", "work"):
        table.add_column(heading, justify="right")
    for recipe in STAGES:
        found = _alone(compile_only, recipe)
        if isinstance(found, str):
            table.add_row(recipe, found)
        else:
            compile_s, memory = found
            sizes = (f"{size / 2**30:.1f} GiB" for size in (memory.state, memory.work))
            table.add_row(recipe, f"{compile_s:.0f} s", *sizes)
    return table


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="measure training steps")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--recipes", nargs="+", default=[DEMO], help="names or files (%(default)s)")
    what.add_argument("--ablations-of", metavar="RECIPE", help="a recipe, each choice changed")
    what.add_argument("--compile-only", action="store_true", help="of all stages")
    parser.add_argument("--steps", type=int, default=20, help="measured (%(default)s)")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
