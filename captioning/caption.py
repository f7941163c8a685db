"""`evenmix caption`: a set of captions for every picture, row-aligned with the image index.

Engine `source` takes the dataset's own text, engine `published` what others have published, engine
`vllm` asks a vision-language model. Either way each caption has its outcome, and a picture without
a usable one is still a row.
"""

import argparse
from typing import Any

from captioning import model_set
from captioning.from_source import SourceCaptioning
from captioning.published import job as published
from pipeline.beam_job import RunnerOptions
from pipeline.command_options import add_stage_arguments, recipe_of, runner_of
from pipeline.errors import EvenmixError
from pipeline.recipe import (
    Captions,
    PublishedCaptions,
    Recipe,
    SourceCaptions,
    VllmCaptions,
    load_recipe,
)
from pipeline.records import IMAGES
from pipeline.run import run_stage
from pipeline.stage import WorkItem
from pipeline.summary import finished_shards


def check(recipe: Recipe) -> None:
    """Check that the mixture's caption sets can be made: their models, or published captions.

    Raises:
        EvenmixError: one cannot.
    """
    for captions in recipe.mixture.all_caption_sets(recipe.mixture_datasets()):
        settings = recipe.captions[captions]
        if isinstance(settings, VllmCaptions):
            model_set.check(recipe, captions, settings)
        elif isinstance(settings, PublishedCaptions):
            published.check(recipe, captions, settings)


def run_recipe(recipe: Recipe, runner: RunnerOptions) -> None:
    """Write the caption sets of a recipe's mixture."""
    for captions in recipe.mixture.all_caption_sets(recipe.mixture_datasets()):
        run_set(recipe, captions, runner)


def run_set(recipe: Recipe, captions: str, runner: RunnerOptions) -> None:
    """Write one caption set.

    Raises:
        EvenmixError: the model or the published captions cannot be found, or a stage before has not
            finished.
    """
    settings = recipe.captions[captions]
    if isinstance(settings, VllmCaptions):
        model_set.write(recipe, captions, settings, runner, mixture_of=recipe)
    elif isinstance(settings, PublishedCaptions):
        published.write(recipe, captions, settings, runner)
    else:
        _write_from_source(recipe, captions, settings, runner)


def _write_from_source(
    recipe: Recipe, captions: str, settings: SourceCaptions, runner: RunnerOptions
) -> None:
    items = [
        WorkItem(dataset, shard, inputs={"images": digest})
        for dataset in recipe.datasets_of_set(captions)
        for shard, digest in finished_shards(recipe.root, IMAGES, dataset, "ingest").items()
    ]
    run_stage(SourceCaptioning(recipe.root, captions, settings), items, runner)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `evenmix caption`."""
    add_stage_arguments(parser)
    parser.add_argument(
        "--captions", metavar="NAME", help="this set of the recipe (default: the mixture's)"
    )
    model = parser.add_argument_group(
        "a model's set", "Override the recipe's `[captions.NAME]`, or stand for it."
    )
    model.add_argument("--model", help="a model's name on the Hub, or a folder")
    model.add_argument(
        "--endpoint", metavar="URL", help="a running server with OpenAI's API, instead of vLLM here"
    )
    model.add_argument(
        "--captions-per-image", type=int, metavar="N", help="captions written for each picture"
    )
    model.add_argument(
        "--for",
        dest="for_recipe",
        metavar="RECIPE",
        help="ask only for the pictures that this recipe's mixture may select",
    )
    model.add_argument(
        "--margin",
        type=float,
        help="further pictures to ask for, as a share of what the mixture takes (default 0.1)",
    )
    model.add_argument("--parent", metavar="NAME", help="take over the captions of this set")
    model.add_argument(
        "--redo",
        metavar="OUTCOMES",
        help="with --parent: outcomes to ask for again, such as truncated,empty",
    )
    model.add_argument(
        "--bare-engine",
        type=int,
        metavar="N",
        help="afterwards ask the engine alone for N of the captions, and print the run's rate as a "
        "share of its",
    )


def run(args: argparse.Namespace) -> int:
    """Run `evenmix caption`."""
    recipe, captions = _recipe_and_set(args)
    settings = recipe.captions[captions]
    if args.bare_engine is not None:
        _check_bare_engine(args.bare_engine, captions, settings)
    if not isinstance(settings, VllmCaptions):
        run_set(recipe, captions, runner_of(args, recipe, [captions]))
        return 0
    mixture_of = recipe
    if args.for_recipe is not None:
        mixture_of = load_recipe(args.for_recipe, {"root": args.root})
        if mixture_of.root != recipe.root:
            raise EvenmixError(
                f"{args.for_recipe} is about the corpus {mixture_of.root}, {args.recipe} about "
                f"{recipe.root}; --root ROOT says which"
            )
        if unknown := sorted(set(mixture_of.mixture_datasets()) - recipe.datasets.keys()):
            raise EvenmixError(
                f"{args.for_recipe} has datasets that {args.recipe} lacks: {', '.join(unknown)}"
            )
    runner = runner_of(args, recipe, [captions])
    model_set.write(
        recipe,
        captions,
        settings,
        runner,
        mixture_of=mixture_of,
        bare_engine_captions=args.bare_engine,
    )
    return 0


def _check_bare_engine(num_captions: int, captions: str, settings: Captions) -> None:
    if num_captions < 1:
        raise EvenmixError(f"--bare-engine {num_captions}: at least one caption is needed")
    if not isinstance(settings, VllmCaptions) or settings.endpoint is not None:
        raise EvenmixError(
            f"--bare-engine is for a model behind a server of our own, which {captions} does not "
            "have; leave it out"
        )


def _only_set(recipe: Recipe) -> str:
    """Return the caption set of the mixture.

    Raises:
        EvenmixError: it has several.
    """
    first, *others = recipe.mixture.all_caption_sets(recipe.mixture_datasets())
    if others:
        raise EvenmixError(
            f"the mixture has several caption sets: {', '.join([first, *others])}; --captions NAME "
            "says which to write"
        )
    return first


def _recipe_and_set(args: argparse.Namespace) -> tuple[Recipe, str]:
    """Load the recipe, with what the command line says of the set, and return the set's name."""
    recipe = recipe_of(args)
    captions = args.captions or _only_set(recipe)
    changes: dict[str, Any] = {
        "model": args.model,
        "endpoint": args.endpoint,
        "captions_per_image": args.captions_per_image,
        "pictures": None if args.for_recipe is None else "selected",
        "margin": args.margin,
        "parent": args.parent,
        "redo": None if args.redo is None else [name.strip() for name in args.redo.split(",")],
    }
    changes = {key: value for key, value in changes.items() if value is not None}
    if changes and not args.captions:
        raise EvenmixError(
            f"--{next(iter(changes)).replace('_', '-')} goes with --captions NAME, the set that it "
            "is for"
        )
    tables = {name: table.model_dump(exclude_unset=True) for name, table in recipe.captions.items()}
    if captions in tables:
        pass
    elif args.parent in tables:
        if tables[args.parent]["engine"] != "vllm":
            raise EvenmixError(
                f"the caption set {args.parent} is not made with a model; it cannot be a parent"
            )
        tables[captions] = tables[args.parent]
    elif args.parent and (noted := model_set.noted_settings(recipe.root, args.parent)):
        tables[captions] = {k: v for k, v in noted.items() if k not in ("pictures", "margin")}
    elif args.model or args.endpoint:
        tables[captions] = {"engine": "vllm"}
    else:
        raise EvenmixError(
            f"{args.recipe} has no caption set {captions!r}, only {', '.join(tables)}; add a table "
            f"[captions.{captions}], or name a --model"
        )
    if changes and tables[captions]["engine"] != "vllm":
        option = "for" if "pictures" in changes else next(iter(changes)).replace("_", "-")
        raise EvenmixError(
            f"the caption set {captions} of {args.recipe} is not made with a model; remove "
            f"--{option}, or give it another name"
        )
    tables[captions] = tables[captions] | changes  # the parent's own table stays as it is
    # As a whole, since a set's name may have a dot in it.
    return recipe_of(args, {"captions": tables}), captions
