"""`evenmix export`: a run's weights as one file, or a file of weights as one of the other kind."""

import argparse
from pathlib import Path

import jax

from pipeline.errors import EvenmixError
from train.checkpoint import newest_checkpoint
from train.i1_checkpoint import write_i1_checkpoint
from train.model import ModelConfig, Params, abstract_params
from train.output import writing_to
from train.tensors import Unused, read_params
from train.weights import load_unused, open_weights, write_safetensors

WRITERS = {".safetensors": write_safetensors, ".pt": write_i1_checkpoint}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument(
        "source",
        metavar="RUN_OR_FILE",
        help="output of a run, whose newest checkpoint is taken, or a file of weights "
        "(.safetensors, or i1's .pt)",
    )
    parser.add_argument(
        "--output", required=True, metavar="FILE", help=".safetensors, or .pt for i1's own code"
    )
    parser.add_argument(
        "--raw", action="store_true", help="the weights as trained, not their moving average"
    )


def run(args: argparse.Namespace) -> int:
    """Read the weights, and write the file."""
    output = Path(args.output).expanduser()
    if output.suffix not in WRITERS:
        raise EvenmixError(
            f"--output {output} ends neither in {' nor in '.join(WRITERS)}; "
            "the ending says what kind of file it is to be"
        )
    read = _of_run if Path(args.source).expanduser().is_dir() else _of_file
    config, params, unused = read(args.source, raw=args.raw)
    with writing_to(output.parent):
        WRITERS[output.suffix](str(output), config, params, unused)
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    print(f"{output}: {count:,} parameters, {config.image_resolution} px")
    return 0


def _of_run(source: str, *, raw: bool) -> tuple[ModelConfig, Params, Unused]:
    folder = Path(source).expanduser()
    with newest_checkpoint(str(folder)) as checkpoint:
        params = checkpoint.weights(abstract_params(checkpoint.model), averaged=not raw)
        return checkpoint.model, params, load_unused(folder)


def _of_file(source: str, *, raw: bool) -> tuple[ModelConfig, Params, Unused]:
    with open_weights(source) as file:
        read = file.read
        if raw:
            if file.training is None:
                raise EvenmixError(f"{source} has one set of weights only; leave out --raw")
            read = file.training.raw
        return file.config, read_params(file.like, read), file.unused()
