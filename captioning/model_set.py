"""Writing a caption set with a model: what is asked for, with which model, and how fast it went."""

import json
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from captioning.efficiency import measure_bare_engine, print_efficiency
from captioning.engine import models
from captioning.engine.arguments import check_arguments
from captioning.engine.models import ModelIdentity
from captioning.from_model import VllmCaptioning, rule_of
from captioning.wanted import wanted_by
from pipeline import storage
from pipeline.beam_job import RunnerOptions
from pipeline.eligible import input_digests
from pipeline.errors import EvenmixError
from pipeline.exclusions import stored_exclusions
from pipeline.receipts import fingerprint, read_receipt
from pipeline.recipe import Recipe, VllmCaptions
from pipeline.records import IMAGES, NOTES, captions_folder
from pipeline.run import run_stage
from pipeline.stage import WorkItem, committed_items
from pipeline.summary import dataset_url, finished_shards


def check(recipe: Recipe, captions: str, settings: VllmCaptions) -> ModelIdentity:
    """Check the model, the engine's arguments, and that the datasets have what prompts ask for.

    Returns which model it is.

    Raises:
        EvenmixError: with all that is not so.
    """
    obstacles = []
    for dataset in sorted(recipe.datasets):
        try:
            rule_of(captions, settings, dataset, recipe.datasets[dataset])
        except EvenmixError as error:
            obstacles.append(str(error))
    try:
        check_arguments(settings.arguments)
    except EvenmixError as error:
        obstacles.append(f"captions.{captions}.arguments: {error}")
    try:
        model = _model(recipe.root, captions, settings)
    except EvenmixError as error:
        obstacles.append(str(error))
    if obstacles:
        raise EvenmixError("\n  ".join(obstacles))
    return model


def write(
    recipe: Recipe,
    captions: str,
    settings: VllmCaptions,
    runner: RunnerOptions,
    *,
    mixture_of: Recipe,
    bare_engine_captions: int | None = None,
) -> None:
    """Write a caption set.

    Where not all pictures are asked for, they are those that ``mixture_of``'s mixture may select.
    ``bare_engine_captions`` of them are then asked of the engine alone, for comparison.

    Raises:
        EvenmixError: the model cannot be found, or a stage before has not finished.
    """
    model = check(recipe, captions, settings)
    _note_model(recipe.root, captions, model)
    wanted = None
    if settings.pictures == "selected":
        stored = stored_exclusions(recipe.root, mixture_of.exclusions)
        mixture_of = mixture_of.model_copy(update={"exclusions": stored})
        wanted = wanted_by(mixture_of, settings.margin, captions, runner)
    stage = VllmCaptioning(
        recipe.root,
        captions,
        settings,
        model,
        recipe.datasets,
        recipe.seed,
        wanted,
        _processes(settings, runner),
    )
    items = _plan(stage, mixture_of)
    already = committed_items(stage, items)
    began = datetime.now(UTC)
    run_stage(stage, items, runner)
    settings_url = _note_url(recipe.root, captions, "settings")
    storage.replace(settings_url, settings.model_dump_json(exclude_unset=True).encode())
    if bare_engine_captions is not None:
        measure_bare_engine(stage, items, bare_engine_captions)
    done = [item for item in items if (item.dataset, item.shard) not in already]
    print_efficiency(stage, done, began)


def _processes(settings: VllmCaptions, runner: RunnerOptions) -> int | None:
    """Return how many workers share a machine's engine, None where that is not known."""
    if runner.is_local:
        return runner.workers
    # Dataflow's machines with an accelerator have one (pipeline/dataflow.py).
    return 1 if runner.is_dataflow and settings.accelerator else None


def noted_settings(root: str, captions: str) -> dict[str, Any] | None:
    """Return the settings that a finished set was made with last, None if there is no such set."""
    url = _note_url(root, captions, "settings")
    return dict(json.loads(storage.read_bytes(url))) if storage.exists(url) else None


def _note_url(root: str, captions: str, what: str) -> str:
    return storage.join(root, NOTES, "captions", captions, f"{what}.json")


def _plan(stage: VllmCaptioning, mixture_of: Recipe) -> list[WorkItem]:
    """Return one item for each image shard of the datasets that are asked about."""
    root, parent = stage.root, stage.settings.parent
    datasets = (
        sorted(stage.wanted.bounds)
        if stage.wanted is not None
        else mixture_of.datasets_of_set(stage.captions)
    )
    items = []
    for dataset in datasets:
        families: dict[str, Mapping[str, str]] = {
            "images": finished_shards(root, IMAGES, dataset, "ingest")
        }
        if parent is not None:
            families["parent"] = _parent_shards(stage, parent, dataset)
        for shard in families["images"]:
            inputs = {
                family: digests[shard] for family, digests in families.items() if shard in digests
            }
            items.append(WorkItem(dataset, shard, inputs))
        if stage.wanted is not None:
            # It refuses a search for duplicates that does not know all shards.
            input_digests(mixture_of, dataset, with_captions=False)
    return items


def _parent_shards(stage: VllmCaptioning, parent: str, dataset: str) -> Mapping[str, str]:
    """Return the digests of a parent set's shards, which may be fewer than there are by now.

    Raises:
        EvenmixError: it is not finished, was not made with a model, or has more captions a picture.
    """
    folder = captions_folder(parent)
    digests = finished_shards(stage.root, folder, dataset, f"caption --captions {parent}")
    first = storage.join(dataset_url(stage.root, folder, dataset), f"{min(digests)}.parquet")
    config = read_receipt(first).identity["config"]
    if config["engine"] != "vllm":
        raise EvenmixError(
            f"the parent set {parent} was made by engine {config['engine']}, not by a model; "
            "nothing of it can be taken over"
        )
    if config["captions_per_image"] > stage.settings.captions_per_image:
        raise EvenmixError(
            f"the parent set {parent} has {config['captions_per_image']} captions a picture, of "
            f"which {stage.captions} would keep {stage.settings.captions_per_image}; raise "
            "captions_per_image"
        )
    return digests


def _model(root: str, captions: str, settings: VllmCaptions) -> ModelIdentity:
    """Find out which model it is, to the commit: that of the set's first run with it."""
    url = _model_url(root, captions, settings.model)
    revision = settings.revision
    if revision is None and settings.endpoint is None and storage.exists(url):
        revision = str(json.loads(storage.read_bytes(url))["revision"])
    return models.resolve(settings.model, revision, settings.endpoint)


def _note_model(root: str, captions: str, model: ModelIdentity) -> None:
    """Note the commit: a model which moves on at the Hub must not end up in the same set."""
    if model.hub_commit is not None:
        note = {"model": model.name, "revision": model.hub_commit}
        storage.publish(_model_url(root, captions, model.name), json.dumps(note).encode())


def _model_url(root: str, captions: str, model: str) -> str:
    return _note_url(root, captions, f"model-{fingerprint({'model': model})[:16]}")
