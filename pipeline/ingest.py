"""`evenmix ingest`: read the sources, keep the pictures that are whole and large enough.

Each work item becomes one shard: a tar of original bytes, its index, and the ledger of the records
that were not kept. Pictures of URL lists are downloaded on the way; those that could not be had,
but may be had later, are tried again by `--retry`, which adds a generation of shards.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice

from pipeline import hub, readers, storage
from pipeline.beam_job import RunnerOptions
from pipeline.command_options import add_runner_arguments, recipe_of, runner_of
from pipeline.config_file import configure
from pipeline.dataset import Dataset
from pipeline.dry_run import print_dry_run
from pipeline.errors import EvenmixError
from pipeline.exclusions import load_exclusions, stored_exclusions
from pipeline.images import Limits
from pipeline.ingest_stage import Ingest
from pipeline.mirror import for_trial, mirrored
from pipeline.progress import console
from pipeline.receipts import read_receipt
from pipeline.recipe import Corpus, Recipe
from pipeline.records import IMAGES
from pipeline.retry import retry_items
from pipeline.run import run_stage
from pipeline.stage import WorkItem, a_committed_shard
from pipeline.summary import dataset_url


@dataclass(frozen=True)
class Trial:
    """A part of the datasets: the first ``limit`` records of each, ``sample_fraction`` by hash."""

    limit: int | None = None
    sample_fraction: float = 1.0


EVERYTHING = Trial()


def check(recipe: Recipe) -> None:
    """Check that every dataset's source is there, and the list of exclusions is one.

    Raises:
        EvenmixError: with all that are not.
    """
    obstacles = []
    try:
        load_exclusions(recipe.exclusions)
    except EvenmixError as error:
        obstacles.append(str(error))
    for name, dataset in recipe.datasets.items():
        try:
            located = _locate(recipe.root, name, dataset)
            if not storage.glob_files(located.source) and not storage.list_files(located.source):
                raise EvenmixError(f"nothing at {located.source}; correct datasets.{name}.source")
        except EvenmixError as error:
            obstacles.append(f"dataset {name}: {error}")
    if obstacles:
        raise EvenmixError("\n  ".join(obstacles))


def run_recipe(recipe: Recipe, runner: RunnerOptions) -> None:
    """Ingest all datasets of a recipe."""
    stage, items = plan(recipe)
    _run(stage, items, runner)


def plan(corpus: Corpus, trial: Trial = EVERYTHING) -> tuple[Ingest, list[WorkItem]]:
    """Find the sources and cut them into work items.

    Raises:
        EvenmixError: a source is not there, cannot be read, or must be mirrored first.
    """
    datasets = {
        name: _locate(corpus.root, name, dataset, trial)
        for name, dataset in corpus.datasets.items()
    }
    limits = Limits(
        corpus.images.min_short_edge_px, corpus.images.max_pixels, corpus.images.max_bytes
    )
    stage = Ingest(
        root=corpus.root,
        datasets=datasets,
        origins={
            name: dataset.source if "://" in dataset.source else None
            for name, dataset in corpus.datasets.items()
        },
        limits=limits,
        fetch=corpus.fetch,
        exclusions=corpus.exclusions,
        limit=trial.limit,
        sample_fraction=trial.sample_fraction,
    )
    items = []
    for name, dataset in sorted(datasets.items()):
        planned = readers.plan(name, dataset, corpus.images, is_trial=trial.limit is not None)
        if trial.limit is not None:
            planned = _first_records(dataset, planned, trial.limit, limits.max_bytes)
        items += planned
    return stage, items


def _locate(root: str, name: str, dataset: Dataset, trial: Trial = EVERYTHING) -> Dataset:
    """Return a dataset as it is read: its mirror, or its source at a full revision."""
    if dataset.mirror:
        find = mirrored if trial.limit is None else for_trial
        return find(root, name, dataset)
    revision = dataset.revision or _revision_begun(root, name)
    source, revision = hub.resolve(dataset.source, revision)
    return dataset.model_copy(update={"source": source, "revision": revision})


def _revision_begun(root: str, name: str) -> str | None:
    """Return the revision of the shards that are there already, so that a run ends as it began.

    The head of a repository may have moved on since.
    """
    folder = dataset_url(root, IMAGES, name)
    shard = a_committed_shard(folder)
    if shard is None:
        return None
    identity = read_receipt(storage.join(folder, f"{shard}.parquet")).identity
    revision: str | None = identity["config"].get("dataset", {}).get("revision")
    return revision


def _first_records(
    dataset: Dataset, items: Sequence[WorkItem], limit: int, max_bytes: int
) -> list[WorkItem]:
    """Take items until they have ``limit`` records; the last one is told where to stop."""
    taken = []
    for item in items:
        if limit == 0:
            break
        # Only reading tells how many records a tar has; a trial is small enough for that.
        num_records = sum(1 for _ in islice(readers.read(dataset, item, max_bytes), limit + 1))
        is_cut = num_records > limit
        cut = replace(item, inputs={**item.inputs, "first_records": limit})
        taken.append(cut if is_cut else item)
        limit -= min(num_records, limit)
    return taken


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `evenmix ingest`."""
    parser.add_argument(
        "recipe",
        nargs="?",
        help="the recipe (TOML), a path or any fsspec URL; --dataset and --root go without one",
    )
    add_runner_arguments(parser)
    parser.add_argument(
        "--dataset",
        action="append",
        metavar="NAME",
        help="only this dataset of the recipe, or without a recipe of the catalogue (repeatable)",
    )
    parser.add_argument(
        "--limit", type=int, metavar="N", help="only each dataset's first N records"
    )
    parser.add_argument(
        "--sample-fraction", type=float, metavar="F", help="only this part of the records, by hash"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="print what would be read, from where; do nothing"
    )
    parser.add_argument(
        "--retry",
        action="store_true",
        help="download again what failed and may be had now, as a further generation of shards",
    )
    parser.add_argument("--min-short-edge", type=int, metavar="PX", help="least shorter edge kept")
    parser.add_argument("--max-pixels", type=int, help="most pixels of a picture kept")
    parser.add_argument("--max-bytes", type=int, help="largest picture file kept")


def run(args: argparse.Namespace) -> int:
    """Run `evenmix ingest`."""
    corpus, trial = _corpus_of(args), _trial_of(args)
    runner = runner_of(args, corpus)
    stage, items = plan(corpus, trial)
    if args.retry:
        items = retry_items(stage, items)
        if not items:
            console.print("ingest: no failed download that may be had now; nothing to do")
            return 0
    if args.dry_run:
        print_dry_run(stage, items)
        return 0
    _run(stage, items, runner)
    return 0


def _run(stage: Ingest, items: Sequence[WorkItem], runner: RunnerOptions) -> None:
    stored = stored_exclusions(stage.root, stage.exclusions)
    run_stage(replace(stage, exclusions=stored), items, runner)


def _trial_of(args: argparse.Namespace) -> Trial:
    if args.limit is not None and args.limit < 1:
        raise EvenmixError(f"--limit {args.limit}: at least one record is needed")
    fraction = 1.0 if args.sample_fraction is None else args.sample_fraction
    if not 0 < fraction <= 1:
        raise EvenmixError(f"--sample-fraction {fraction}: above 0, at most 1")
    return Trial(args.limit, fraction)


def _corpus_of(args: argparse.Namespace) -> Corpus:
    """Return what a command line wants to be ingested: of a recipe, or of the catalogue."""
    overrides = {
        "images.min_short_edge_px": args.min_short_edge,
        "images.max_pixels": args.max_pixels,
        "images.max_bytes": args.max_bytes,
    }
    if args.recipe is None:
        if not (args.dataset and args.root):
            raise EvenmixError(
                "name a recipe, or a dataset of the catalogue with --dataset NAME --root R"
            )
        datasets = {name: {"catalog": name} for name in args.dataset}
        document = {"root": args.root, "datasets": datasets}
        return configure("the command line", document, Corpus, overrides)
    if not args.recipe.endswith(".toml"):
        raise EvenmixError(
            f"{args.recipe} is no recipe, which is a .toml file; without one, write options of "
            "Beam's as --name=value"
        )
    recipe = recipe_of(args, overrides)
    absent = sorted(set(args.dataset or ()) - recipe.datasets.keys())
    if absent:
        raise EvenmixError(
            f"{args.recipe} has no dataset {', '.join(absent)}, only {', '.join(recipe.datasets)}"
        )
    wanted = args.dataset or recipe.datasets
    return recipe.model_copy(update={"datasets": {name: recipe.datasets[name] for name in wanted}})
