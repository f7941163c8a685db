"""`evenmix mix`: choose the pictures of a mixture, write its shards, and last its manifest."""

import argparse
from collections.abc import Mapping

from mixing.manifest import Manifest, MixtureDataset, Shard, Split
from mixing.select import Select
from mixing.weights import dataset_weights
from mixing.write import Write
from pipeline import storage
from pipeline.beam_job import RunnerOptions
from pipeline.command_options import add_stage_arguments, recipe_of, runner_of
from pipeline.errors import EvenmixError
from pipeline.exclusions import stored_exclusions
from pipeline.progress import console, reasons_text
from pipeline.reasons import RejectReason
from pipeline.receipts import Receipt
from pipeline.recipe import Recipe
from pipeline.run import run_stage
from pipeline.stage import committed_receipts
from pipeline.summary import Summary


def check(recipe: Recipe) -> None:
    """Check that the mixture's weights can be kept exactly.

    Raises:
        EvenmixError: they cannot.
    """
    dataset_weights(recipe.mixture_datasets(), recipe.mixture.weights)


def run_recipe(recipe: Recipe, runner: RunnerOptions) -> None:
    """Cut a recipe's mixture from the corpus.

    Raises:
        EvenmixError: a dataset has no pictures for it, or another mixture has its name.
    """
    exclusions = stored_exclusions(recipe.root, recipe.exclusions)
    recipe = recipe.model_copy(update={"exclusions": exclusions})
    select = Select(recipe)
    selected = run_stage(select, select.plan(), runner)
    refuse_empty(selected)
    tell_exhausted(recipe, selected)
    write = Write(recipe)
    run_stage(write, write.plan(), runner)
    publish_manifest(recipe, write)


def refuse_empty(summaries: Mapping[str, Summary]) -> None:
    """Raise an EvenmixError that names the datasets of which nothing was selected, and why."""
    empty = [
        f"{dataset} ({reasons_text(summary.counts, ', ') or 'ingest kept none'})"
        for dataset, summary in sorted(summaries.items())
        if summary.counts.records_out == 0
    ]
    if empty:
        raise EvenmixError(
            f"no picture is left for the mixture in: {'; '.join(empty)}. Relax the recipe, or name "
            "the other datasets in mixture.datasets"
        )


def tell_exhausted(recipe: Recipe, summaries: Mapping[str, Summary]) -> None:
    """Say where more pictures might be had: all that have captions are taken, others never asked.

    The margin of a caption set that is made for a mixture was too small then.
    """
    captions = recipe.mixture.captions
    for dataset, summary in sorted(summaries.items()):
        rejected = summary.counts.rejected
        if RejectReason.NOT_ASKED in rejected and RejectReason.NOT_SAMPLED not in rejected:
            console.print(
                f"{dataset}: all pictures that captions/{captions} has captions of are taken; "
                f"{rejected[RejectReason.NOT_ASKED]:,} more were not asked for. If they are too "
                f"few, write another set with --parent {captions} and a larger --margin",
                soft_wrap=True,
            )


def publish_manifest(recipe: Recipe, write: Write) -> None:
    """Write ``mixture.json`` from the receipts of a mixture's shards."""
    mixture = recipe.mixture
    datasets = recipe.mixture_datasets()
    weights = dataset_weights(datasets, mixture.weights)
    manifest = Manifest(
        name=mixture.name,
        resolution=mixture.resolution,
        image_format=mixture.image_format,
        seed=recipe.seed,
        caption_sets={str(mixture.captions): "1"},
        datasets=[
            _manifest_dataset(name, str(weights[name]), recipe.datasets[name].licence, receipts)
            for name in datasets
            for receipts in [committed_receipts(write, name)]
        ],
    )
    folder = storage.join(recipe.root, write.folder)
    url = storage.join(folder, "mixture.json")
    data = (manifest.model_dump_json(indent=1) + "\n").encode()
    if not storage.exists(url):
        storage.publish(url, data)
    storage.sweep(folder)
    if storage.read_bytes(url) != data:
        raise EvenmixError(
            f"{url} describes another mixture (other weights or datasets); give mixture.name a new "
            "name in the recipe"
        )
    console.print(f"mix: {url}", soft_wrap=True)


def _manifest_dataset(
    name: str, weight: str, licence: str, receipts: Mapping[str, Receipt]
) -> MixtureDataset:
    splits = {}
    for split in ("train", "validation"):
        shards = []
        for shard, receipt in sorted(receipts.items()):
            if shard.startswith(f"{split}-") and receipt.tar is not None:
                shards.append(
                    Shard(
                        name=f"{name}/{shard}.tar",
                        num_samples=receipt.counts.records_out,
                        bytes=receipt.tar.num_bytes,
                        sha256=receipt.tar.sha256,
                    )
                )
        splits[split] = Split(num_samples=sum(s.num_samples for s in shards), shards=shards)
    return MixtureDataset(name=name, weight=weight, licence=licence, **splits)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `evenmix mix`."""
    add_stage_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Run `evenmix mix`."""
    run_recipe(recipe_of(args), runner_of(args))
    return 0
