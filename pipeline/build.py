"""`evenmix build`: all stages of a recipe, one after the other, and the funnel at the end.

A build that is started again goes on where it stopped; one that is complete does nothing.
"""

import argparse
import importlib

from pipeline.command_options import add_stage_arguments, recipe_of, runner_of
from pipeline.errors import EvenmixError
from pipeline.funnel import funnel_table
from pipeline.progress import console
from pipeline.recipe import Recipe

STAGES = (
    "pipeline.ingest",
    "dedup.embed",
    "dedup.deduplicate",
    "captioning.caption",
    "mixing.mix",
)
"""The modules of the stages in the order of a build; each has ``check`` and ``run_recipe``."""


def check(recipe: Recipe) -> None:
    """Check that no stage will refuse the recipe later on.

    Raises:
        EvenmixError: with everything that stands in the way.
    """
    obstacles = []
    for name in STAGES:
        try:
            importlib.import_module(name).check(recipe)
        except EvenmixError as error:
            obstacles.append(str(error))
    if obstacles:
        raise EvenmixError("\n  ".join(["the build cannot begin:", *obstacles]))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `evenmix build`."""
    add_stage_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Run `evenmix build`."""
    recipe = recipe_of(args)
    runner = runner_of(args, recipe)
    check(recipe)
    for name in STAGES:
        importlib.import_module(name).run_recipe(recipe, runner)
    console.print(funnel_table(recipe))
    return 0
