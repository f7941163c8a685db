"""`evenmix bench train`: what a step of a configuration costs on this machine, as a table."""

import argparse
import statistics
from collections.abc import Iterator

import jax
from rich import box
from rich.console import Console
from rich.table import Table

from pipeline.errors import EvenmixError
from train.bench import Bench, bench
from train.config import TrainConfig, load_config


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("part", choices=["train"], help="what is measured")
    parser.add_argument("config", help="TOML file that describes a run, or the name of a recipe")
    parser.add_argument(
        "--steps", type=int, default=20, metavar="N", help="steps measured (%(default)s)"
    )
    data = parser.add_mutually_exclusive_group()
    data.add_argument("--mixture", metavar="URL", help="folder of the mixture's mixture.json")
    data.add_argument(
        "--synthetic-data", action="store_true", help="noise and random captions, and no mixture"
    )
    parser.add_argument(
        "--random-encoders",
        action="store_true",
        help="random weights for T5Gemma and the FLUX.2 VAE, which cost as much",
    )


def run(args: argparse.Namespace) -> int:
    """Measure, and print the table."""
    if args.steps < 1:
        raise EvenmixError(f"--steps is {args.steps}; measure at least 1")
    config = load_config(args.config, mixture=args.mixture)
    found = bench(
        config,
        args.steps,
        synthetic_data=args.synthetic_data,
        random_encoders=args.random_encoders,
    )
    table = Table(box=box.SIMPLE_HEAD, show_header=False, show_edge=False, pad_edge=False)
    table.add_column(no_wrap=True)
    for label, text in describe(config, found):
        table.add_row(label, text)
    Console(highlight=False).print(table)
    return 0


def describe(config: TrainConfig, found: Bench) -> Iterator[tuple[str, str]]:
    """Yield what was found, as labels and texts."""
    measured = found.measured
    yield "parameters", f"{found.num_parameters:,}"
    yield "devices", f"{jax.device_count()} x {jax.devices()[0].device_kind}"
    yield "batch", f"{config.batch_size} pictures of {config.resolution} px"
    yield "compile time", f"{found.compile_s:.1f} s"
    yield "first step", f"{found.first_step_s:.1f} s, with the encoders' compile time"
    yield "step time", _step_time(measured.step_s)
    yield "images/s", f"{measured.images_per_s:.1f}"
    if measured.flop_per_s is not None:
        yield "model FLOPs", _flops(measured.flop_per_s, measured.peak_flop_per_s)
    yield "waiting for data", f"{measured.data_wait_share:.1%} of the time"
    yield "padding", f"{measured.padding_share:.1%} of text tokens"
    yield "memory planned", str(found.memory)
    if measured.peak_memory_bytes is not None:
        yield "memory used", f"{measured.peak_memory_bytes / 2**30:.1f} GiB at most"
    if measured.replaced_samples:
        yield "broken samples", f"{measured.replaced_samples} replaced"
    yield "loss", f"{found.loss:.4f} at the last step"
    yield "gradient norm", f"{found.gradient_norm:.4f}"


def _step_time(step_s: list[float]) -> str:
    median_s, low_s, high_s = statistics.median(step_s), min(step_s), max(step_s)
    return f"{median_s:.4g} s, median of {len(step_s)} ({low_s:.4g} to {high_s:.4g})"


def _flops(flop_per_s: float, peak_flop_per_s: float | None) -> str:
    done = f"{flop_per_s / 1e12:.4g} TFLOP/s a device"
    if peak_flop_per_s is None:
        return f"{done}; its peak is not known"
    share = flop_per_s / peak_flop_per_s
    return f"{done}, {share:.1%} of its peak ({peak_flop_per_s / 1e12:.0f}, bfloat16)"
