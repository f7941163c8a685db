"""`evenmix caption`: a set of captions for every picture, row-aligned with the image index.

Engine `source` takes the dataset's own text, engine `vllm` asks a vision-language model. Either
way each caption has its outcome, and a picture without a usable one is still a row.
"""

import argparse

from captioning.from_source import SourceCaptioning
from pipeline.beam_job import RunnerOptions
from pipeline.command_options import add_stage_arguments, recipe_of, runner_of
from pipeline.errors import EvenmixError
from pipeline.recipe import Recipe, SourceCaptions, VllmCaptions
from pipeline.records import IMAGES
from pipeline.run import run_stage
from pipeline.stage import Stage, WorkItem
from pipeline.summary import finished_shards


def check(recipe: Recipe) -> None:
    """Check that the model of the mixture's caption set is there.

    Raises:
        EvenmixError: it is not.
    """
    captions = recipe.mixture.captions
    settings = recipe.captions[captions]
    if isinstance(settings, VllmCaptions):
        _model_stage(recipe, captions, settings)


def run_recipe(recipe: Recipe, runner: RunnerOptions) -> None:
    """Write the caption set of a recipe's mixture."""
    run_set(recipe, recipe.mixture.captions, runner)


def run_set(recipe: Recipe, captions: str, runner: RunnerOptions) -> None:
    """Write one caption set.

    Raises:
        EvenmixError: the model cannot be found, or images are not ingested yet.
    """
    settings = recipe.captions[captions]
    stage: Stage
    if isinstance(settings, SourceCaptions):
        stage = SourceCaptioning(recipe.root, captions, settings)
    else:
        stage = _model_stage(recipe, captions, settings)
    items = [
        WorkItem(dataset, shard, inputs={"images": digest})
        for dataset in sorted(recipe.datasets)
        for shard, digest in finished_shards(recipe.root, IMAGES, dataset, "ingest").items()
    ]
    run_stage(stage, items, runner)


def _model_stage(recipe: Recipe, captions: str, settings: VllmCaptions) -> Stage:
    # Only here, since its packages come with the extra `vllm`.
    from captioning.from_model import VllmCaptioning  # noqa: PLC0415
    from captioning.server import resolve_model  # noqa: PLC0415

    resolve_model(settings.model)
    return VllmCaptioning(recipe.root, captions, settings, recipe.seed)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `evenmix caption`."""
    add_stage_arguments(parser)
    parser.add_argument(
        "--captions", metavar="NAME", help="this set of the recipe (default: the mixture's)"
    )
    parser.add_argument("--model", help="a model's name or path, instead of the set's own")


def run(args: argparse.Namespace) -> int:
    """Run `evenmix caption`."""
    if args.model and not args.captions:
        raise EvenmixError("--model goes with --captions NAME, the set that it is for")
    recipe = recipe_of(args)
    captions = args.captions or recipe.mixture.captions
    if captions not in recipe.captions:
        raise EvenmixError(
            f"{args.recipe} has no caption set {captions!r}, only {', '.join(recipe.captions)}; "
            f"add a table [captions.{captions}]"
        )
    # Only now: the override of a set that is not there would create it.
    recipe = recipe_of(args, {f"captions.{captions}.model": args.model})
    run_set(recipe, captions, runner_of(args))
    return 0
