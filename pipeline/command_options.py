"""The options that every Beam stage's sub-command shares."""

import argparse
import os
from collections.abc import Collection, Mapping
from itertools import pairwise
from typing import Any

from pipeline.beam_job import RunnerOptions
from pipeline.dataflow_check import check
from pipeline.errors import EvenmixError, did_you_mean
from pipeline.recipe import Corpus, Recipe, load_recipe


def add_stage_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the recipe, its overrides, and where to run."""
    parser.add_argument("recipe", help="the recipe (TOML), a path or any fsspec URL")
    add_runner_arguments(parser)


def add_runner_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the root and where to run."""
    parser.add_argument("--root", help="the corpus root R, instead of the recipe's")
    parser.add_argument(
        "--workers",
        type=int,
        default=os.cpu_count(),
        help="local worker processes (default: one per core)",
    )
    parser.epilog = "Beam's own options follow the recipe, such as --runner DataflowRunner."
    parser.set_defaults(takes_beam_options=True)


def recipe_of(args: argparse.Namespace, overrides: Mapping[str, Any] | None = None) -> Recipe:
    """Load the recipe that a command line names; ``overrides`` are by dotted name."""
    return load_recipe(args.recipe, {"root": args.root, **(overrides or {})})


def runner_of(
    args: argparse.Namespace, corpus: Corpus, captions: Collection[str] | None = None
) -> RunnerOptions:
    """Return where a command line and a recipe want jobs to run.

    ``captions`` are the caption sets that are to be written, if not those of the mixture.

    Raises:
        EvenmixError: Beam has no such option, or Dataflow needs something that is not given.
    """
    if args.workers < 1:
        raise EvenmixError(f"--workers {args.workers}: at least one is needed")
    if args.beam_options:
        _refuse_unknown(args)
    runner = RunnerOptions(
        args.workers, tuple(args.beam_options), corpus.dataflow, corpus.resources
    )
    if runner.is_dataflow:
        check(corpus, runner.beam_args, captions)
    return runner


def _refuse_unknown(args: argparse.Namespace) -> None:
    """Raise an EvenmixError if Beam does not have an option that is left for it."""
    # It takes a second to import.
    from pipeline.beam_pipeline import beam_option_names  # noqa: PLC0415

    known = beam_option_names()
    for before, word in pairwise([args.recipe or "", *args.beam_options]):
        name = word.split("=")[0]
        if not word.startswith("--") and (not before.startswith("--") or "=" in before):
            raise EvenmixError(f"{word!r} belongs to no option; there is one recipe a command")
        if word.startswith("--") and name not in known:
            hint = did_you_mean(name, known)
            raise EvenmixError(f"{name} is an option of neither evenmix nor Beam{hint}")
