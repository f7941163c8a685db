"""`evenmix train`: train on a mixture, or go on where a run was stopped."""

import argparse
import signal
import threading
from types import FrameType

import jax

from pipeline.errors import EvenmixError
from train.config import load_config
from train.loop import train
from train.sharding import start_processes


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("config", help="TOML file that describes the run, or the name of a recipe")
    parser.add_argument("--mixture", metavar="URL", help="folder of the mixture's mixture.json")
    parser.add_argument("--output", metavar="DIR", help="folder of the run; resumed if it has one")
    parser.add_argument("--steps", type=int, metavar="N", help="train until this step")
    parser.add_argument(
        "--profile",
        type=int,
        default=0,
        metavar="N",
        help="write a trace of N steps to the output folder, for XProf",
    )
    several = parser.add_argument_group("several processes, each with all devices that it sees")
    several.add_argument(
        "--coordinator",
        metavar="HOST:PORT",
        help="where process 0 is reached; or `auto`, if Slurm or Open MPI (one process a GPU), "
        "Kubernetes or Cloud TPU started them",
    )
    several.add_argument("--num-processes", type=int, metavar="N", help="how many there are")
    several.add_argument("--process-id", type=int, metavar="I", help="which this is, from 0")


def run(args: argparse.Namespace) -> int:
    """Train; SIGTERM and Ctrl-C end the run after a checkpoint, a second one at once.

    Returns 128 + the signal's number if the run was stopped by one.

    Raises:
        EvenmixError: as :func:`train.loop.train`.
    """
    if args.profile < 0:
        raise EvenmixError(f"--profile is {args.profile}; give the number of steps to trace")
    config = load_config(args.config, mixture=args.mixture, output=args.output, steps=args.steps)
    if args.coordinator:
        start_processes(args.coordinator, args.num_processes, args.process_id)
    stop = threading.Event()
    received = 0

    def on_signal(number: int, _frame: FrameType | None) -> None:
        nonlocal received
        received = number
        stop.set()
        signal.signal(number, signal.SIG_DFL)

    signal.signal(signal.SIGTERM, on_signal)
    signal.signal(signal.SIGINT, on_signal)
    evaluations = train(config, stop, args.profile)
    if evaluations is None:
        # Perhaps another process got the signal.
        return 128 + (received or signal.SIGTERM)
    if jax.process_index():
        return 0
    for name, held_out in evaluations.items():
        print(
            f"held out, {name}: {held_out.num_samples} pictures, loss {held_out.loss:.4f}, "
            f"with another's caption {held_out.swapped_loss:.4f} ({held_out.caption_margin:+.1%})"
        )
    print(f"loss curve: {config.output}/loss.png")
    return 0
