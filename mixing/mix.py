"""`evenmix mix`: choose the pictures of a mixture, write its shards, and last its manifest."""

import argparse
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from mixing.corpus_check import check_corpus, check_recipe
from mixing.gather import Gather, Regroup, Route, exchange_folder, route_of
from mixing.manifest import MANIFEST, Manifest, MixtureDataset, Shard, Split, load_manifest
from mixing.plan import print_plan
from mixing.select import SHARD, Select, Selection, read_selection
from mixing.weights import Weight, dataset_weights
from mixing.write import Write
from pipeline import storage
from pipeline.beam_job import RunnerOptions
from pipeline.candidates import Candidates
from pipeline.command_options import add_runner_arguments, recipe_of, runner_of
from pipeline.errors import EvenmixError
from pipeline.exclusions import stored_exclusions
from pipeline.progress import console, reasons_text
from pipeline.reasons import RejectReason
from pipeline.receipts import Receipt, difference
from pipeline.recipe import Recipe, preset_recipe
from pipeline.records import captions_folder
from pipeline.run import run_stage
from pipeline.stage import committed_receipts, make_plan
from pipeline.summary import Summary

Inputs = Mapping[str, Mapping[str, Any]]
"""By dataset, what identifies all that its samples are made from."""

_CONCURRENT_REMOVALS = 16


def check(recipe: Recipe) -> None:
    """Check what can be known of the mixture before there is a corpus.

    Raises:
        EvenmixError: with all that stands in the way.
    """
    check_recipe(recipe)


def run_recipe(recipe: Recipe, runner: RunnerOptions) -> None:
    """Cut a recipe's mixture from the corpus.

    Raises:
        EvenmixError: the corpus lacks what the recipe needs, a dataset has no pictures for the
            mixture, or another mixture has its name.
    """
    check_corpus(recipe)
    exclusions = stored_exclusions(recipe.root, recipe.exclusions)
    recipe = recipe.model_copy(update={"exclusions": exclusions})
    selections, inputs = _select(recipe, runner)
    weights = dataset_weights(recipe, {name: s.num_train for name, s in selections.items()})
    _refuse_other_manifest(recipe, weights)
    _write(recipe, selections, inputs, runner)
    publish_manifest(recipe, weights)
    _remove_exchange(recipe)


def _select(recipe: Recipe, runner: RunnerOptions) -> tuple[dict[str, Selection], Inputs]:
    """Choose the pictures; the candidates among which they are chosen are needed only once."""
    select = Select(recipe)
    items = select.plan()
    if not make_plan(select, items).is_finished:
        candidates = Candidates(recipe, with_captions=True)
        # Nothing has the mixture's name yet, so that a recipe which is relaxed may keep it.
        refuse_empty(run_stage(candidates, candidates.plan(), runner))
    selected = run_stage(select, items, runner)
    tell_exhausted(recipe, selected)
    selections = {item.dataset: read_selection(recipe, item.dataset) for item in items}
    _refuse_untrained(selections)
    inputs = {
        item.dataset: {
            **item.inputs,
            "selection": selected[item.dataset].items[SHARD]["fingerprint"],
        }
        for item in items
    }
    return selections, inputs


def refuse_empty(summaries: Mapping[str, Summary]) -> None:
    """Raise an EvenmixError that names the datasets without candidates, and says why."""
    empty = [
        f"{dataset} ({reasons_text(summary.counts, ', ') or 'ingest kept none'})"
        for dataset, summary in sorted(summaries.items())
        if summary.counts.records_out == 0
    ]
    if empty:
        raise EvenmixError(
            f"no picture is left for the mixture in: {'; '.join(empty)}. Relax the recipe, or name "
            "these datasets in mixture.without"
        )


def _refuse_untrained(selections: Mapping[str, Selection]) -> None:
    held_out = [name for name, chosen in sorted(selections.items()) if chosen.num_train == 0]
    if held_out:
        raise EvenmixError(
            f"all selected pictures are held out for validation in: {', '.join(held_out)}. Lower "
            "mixture.validation_fraction and give mixture.name a new name, or name these datasets "
            "in mixture.without"
        )


def tell_exhausted(recipe: Recipe, summaries: Mapping[str, Summary]) -> None:
    """Say where more pictures might be had: all that have captions are taken, others never asked.

    The margin of a caption set that is made for a mixture was too small then.
    """
    for dataset, summary in sorted(summaries.items()):
        rejected = summary.counts.rejected
        captions = " or ".join(
            captions_folder(name) for name in recipe.mixture.caption_sets(dataset)
        )
        if RejectReason.NOT_ASKED in rejected and RejectReason.NOT_SAMPLED not in rejected:
            console.print(
                f"{dataset}: all pictures that {captions} has captions of are taken; "
                f"{rejected[RejectReason.NOT_ASKED]:,} more were not asked for. If they are too "
                "few, write another set, with that one as --parent and a larger --margin",
                soft_wrap=True,
            )


def _refuse_other_manifest(recipe: Recipe, weights: Mapping[str, Weight]) -> None:
    """Refuse, before work, to change what a finished mixture says of itself and not of its shards.

    What decides the shards is in their receipts.
    """
    folder = storage.join(recipe.root, Write(recipe).folder)
    if not storage.exists(storage.join(folder, MANIFEST)):
        return
    splits = {"train", "validation"}
    published = {of.name: of.model_dump(exclude=splits) for of in load_manifest(folder).datasets}
    planned = {
        name: _manifest_dataset(recipe, name, weight, {}).model_dump(exclude=splits)
        for name, weight in weights.items()
    }
    if published != planned:
        raise _another_mixture(folder, "; ".join(difference(published, planned)))


def _another_mixture(folder: str, what_differs: str) -> EvenmixError:
    return EvenmixError(
        f"{storage.join(folder, MANIFEST)} describes another mixture ({what_differs}); give "
        "mixture.name a new name in the recipe"
    )


def _write(
    recipe: Recipe, selections: Mapping[str, Selection], inputs: Inputs, runner: RunnerOptions
) -> None:
    """Write the shards, to which samples are brought in files that are not needed afterwards."""
    routes = {dataset: route_of(recipe, chosen) for dataset, chosen in selections.items()}
    write = Write(recipe)
    items = write.plan(inputs, routes)
    try:
        if not make_plan(write, items).is_finished:
            _bring(recipe, routes, inputs, runner)
        written = run_stage(write, items, runner)
    except EvenmixError:
        # Another build may have ended meanwhile, and removed what was brought.
        if not make_plan(write, items).is_finished:
            raise
        written = run_stage(write, items, runner)
    for dataset, chosen in selections.items():
        num_samples = chosen.num_train + chosen.num_validation
        if written[dataset].counts.records_out != num_samples:
            raise AssertionError(f"{dataset}: {num_samples} selected, {written[dataset].counts}")


def _bring(
    recipe: Recipe, routes: Mapping[str, Route], inputs: Inputs, runner: RunnerOptions
) -> None:
    gather = Gather(recipe, routes)
    run_stage(gather, gather.plan(inputs), runner)
    regroup = Regroup(recipe, routes)
    lots = regroup.plan(inputs)
    if lots:
        run_stage(regroup, lots, runner)


def _remove_exchange(recipe: Recipe) -> None:
    files = storage.list_files(storage.join(recipe.root, exchange_folder(recipe)))
    with ThreadPoolExecutor(_CONCURRENT_REMOVALS) as pool:
        for _ in pool.map(lambda file: storage.remove(file.url), files):
            pass


def publish_manifest(recipe: Recipe, weights: Mapping[str, Weight]) -> None:
    """Write ``mixture.json`` from the receipts of a mixture's shards."""
    mixture, write = recipe.mixture, Write(recipe)
    manifest = Manifest(
        name=mixture.name,
        resolution=mixture.resolution,
        crop=mixture.crop,
        image_format=mixture.image_format,
        seed=recipe.seed,
        datasets=[
            _manifest_dataset(recipe, name, weights[name], committed_receipts(write, name))
            for name in recipe.mixture_datasets()
        ],
    )
    folder = storage.join(recipe.root, write.folder)
    url = storage.join(folder, MANIFEST)
    data = (manifest.model_dump_json(indent=1) + "\n").encode()
    if not storage.exists(url):
        storage.publish(url, data)
    storage.sweep(folder)
    if storage.read_bytes(url) != data:
        raise _another_mixture(folder, "another build has published it meanwhile")
    console.print(f"mix: {url}", soft_wrap=True)


def _manifest_dataset(
    recipe: Recipe, name: str, weight: Weight, receipts: Mapping[str, Receipt]
) -> MixtureDataset:
    before = weight.before_rounding
    shares = recipe.mixture.caption_sets(name)
    return MixtureDataset(
        name=name,
        weight=str(weight.share),
        weight_before_rounding=None if before is None else str(before),
        licence=recipe.datasets[name].licence,
        caption_sets={captions: str(share) for captions, share in shares.items()},
        train=_manifest_split(name, "train", receipts),
        validation=_manifest_split(name, "validation", receipts),
    )


def _manifest_split(dataset: str, split: str, receipts: Mapping[str, Receipt]) -> Split:
    """Describe the shards of a split; those without samples have no tar."""
    shards = [
        Shard(
            name=f"{dataset}/{shard}.tar",
            num_samples=receipt.counts.records_out,
            bytes=receipt.tar.num_bytes,
            sha256=receipt.tar.sha256,
        )
        for shard, receipt in sorted(receipts.items())
        if shard.startswith(f"{split}-") and receipt.tar is not None
    ]
    return Split(num_samples=sum(shard.num_samples for shard in shards), shards=shards)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `evenmix mix`."""
    parser.add_argument(
        "recipe",
        nargs="?",
        help="the recipe (TOML), a path or any fsspec URL; --preset and --root go without one",
    )
    add_runner_arguments(parser)
    parser.add_argument(
        "--preset", metavar="NAME", help="one of i1's mixtures, of a corpus of the whole catalogue"
    )
    parser.add_argument(
        "--plan", action="store_true", help="print what would be written, and write nothing of it"
    )


def run(args: argparse.Namespace) -> int:
    """Run `evenmix mix`."""
    recipe = _recipe_of(args)
    runner = runner_of(args, recipe)
    if args.plan:
        print_plan(recipe, runner)
    else:
        run_recipe(recipe, runner)
    return 0


def _recipe_of(args: argparse.Namespace) -> Recipe:
    """Return the recipe that a command line names, or the one of a preset."""
    if args.recipe is None:
        if not (args.preset and args.root):
            raise EvenmixError("name a recipe, or one of i1's mixtures with --preset NAME --root R")
        return preset_recipe(args.preset, args.root)
    if args.preset:
        raise EvenmixError(
            f"--preset {args.preset} is instead of a recipe; in {args.recipe}, write "
            f'preset = "{args.preset}" below [mixture]'
        )
    if not args.recipe.endswith(".toml"):
        raise EvenmixError(
            f"{args.recipe} is no recipe, which is a .toml file; without one, write options of "
            "Beam's as --name=value"
        )
    return recipe_of(args)
