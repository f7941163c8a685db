"""Writing a caption set with a model: what is asked for, with which model, and how fast it went."""

import json
from collections.abc import Mapping
from datetime import UTC, datetime

from captioning.efficiency import print_efficiency
from captioning.engine import models
from captioning.engine.models import ModelIdentity
from captioning.from_model import VllmCaptioning, rule_of
from captioning.wanted import wanted_by
from pipeline import storage
from pipeline.beam_job import RunnerOptions
from pipeline.errors import EvenmixError
from pipeline.receipts import read_receipt
from pipeline.recipe import Recipe, VllmCaptions
from pipeline.records import IMAGES, NOTES
from pipeline.run import run_stage
from pipeline.stage import WorkItem, committed_shards
from pipeline.summary import dataset_url, finished_shards


def check(recipe: Recipe, captions: str, settings: VllmCaptions) -> ModelIdentity:
    """Check that the model is there, and that the datasets have what the prompts ask for.

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
    wanted = None
    if settings.pictures == "selected":
        wanted = wanted_by(mixture_of, settings.margin, captions)
    stage = VllmCaptioning(
        recipe.root, captions, settings, model, recipe.datasets, recipe.seed, wanted
    )
    items = _plan(stage, mixture_of)
    already = {
        (dataset, shard)
        for dataset in {item.dataset for item in items}
        for shard in committed_shards(dataset_url(recipe.root, stage.folder, dataset))
    }
    began = datetime.now(UTC)
    run_stage(stage, items, runner)
    done = [item for item in items if (item.dataset, item.shard) not in already]
    print_efficiency(stage, done, began, bare_engine_captions)


def _plan(stage: VllmCaptioning, mixture_of: Recipe) -> list[WorkItem]:
    """Return one item for each image shard of the datasets that are asked about."""
    root, parent = stage.root, stage.settings.parent
    datasets = mixture_of.mixture_datasets() if stage.wanted else sorted(stage.datasets)
    items = []
    for dataset in datasets:
        families: dict[str, Mapping[str, str]] = {
            "images": finished_shards(root, IMAGES, dataset, "ingest")
        }
        if stage.wanted is not None:
            folder = f"duplicates/{mixture_of.dedup.name}"
            families["duplicates"] = finished_shards(root, folder, dataset, "dedup")
        if parent is not None:
            families["parent"] = _parent_shards(stage, parent, dataset, families["images"])
        for shard in families["images"]:
            inputs = {family: digests[shard] for family, digests in families.items()}
            items.append(WorkItem(dataset, shard, inputs))
    return items


def _parent_shards(
    stage: VllmCaptioning, parent: str, dataset: str, shards: Mapping[str, str]
) -> Mapping[str, str]:
    """Return the digests of a parent set's shards.

    Raises:
        EvenmixError: it lacks some, or was not made with a model.
    """
    folder = f"captions/{parent}"
    digests = finished_shards(stage.root, folder, dataset, f"caption --captions {parent}")
    missing = sorted(shards.keys() - digests.keys())
    if missing:
        raise EvenmixError(
            f"{folder}/{dataset} lacks {len(missing)} shards, such as {missing[0]}; run `evenmix "
            f"caption --captions {parent}` first"
        )
    first = storage.join(dataset_url(stage.root, folder, dataset), f"{min(digests)}.parquet")
    engine = read_receipt(first).identity["config"]["engine"]
    if engine != "vllm":
        raise EvenmixError(
            f"the parent set {parent} was made by engine {engine}, not by a model; nothing of it "
            "can be taken over"
        )
    return digests


def _model(root: str, captions: str, settings: VllmCaptions) -> ModelIdentity:
    """Find out which model it is, to the commit.

    That of the first run is noted: a model which moves on at the Hub must not end up in the same
    set.
    """
    url = storage.join(root, NOTES, "captions", captions, "model.json")
    noted = json.loads(storage.read_bytes(url)) if storage.exists(url) else {}
    revision = settings.revision
    if revision is None and noted.get("model") == settings.model:
        revision = noted["revision"]
    model = models.resolve(settings.model, revision, settings.endpoint)
    if model.hub_commit is not None and not noted:
        note = {"model": model.name, "revision": model.hub_commit}
        storage.publish(url, json.dumps(note).encode())
    return model
