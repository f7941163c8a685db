"""The pictures that a caption set asks for when a mixture is all that it is made for.

A mixture takes its N pictures with the smallest hash among those it could take. Some of them will
have no usable caption, so a margin more is asked for: all below a bound of the hash. The bound is
found as the mixture's own is (:mod:`pipeline.candidates`), before there are captions; it is found
once for a dataset and noted, so that pictures which come in by a later `evenmix ingest --retry` do
not move it.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pipeline import storage
from pipeline.beam_job import RunnerOptions
from pipeline.candidates import Candidates, candidate_urls, smallest
from pipeline.eligible import (
    HASH_RANGE,
    filters_of,
    is_held_out,
    judge_shard,
    min_short_edge_px,
    selection_hash,
)
from pipeline.receipts import fingerprint
from pipeline.recipe import Recipe
from pipeline.records import NOTES
from pipeline.run import run_stage


@dataclass(frozen=True)
class Wanted:
    """What ``recipe``'s mixture may select: of each dataset the pictures up to its bound."""

    recipe: Recipe
    margin: float
    bounds: Mapping[str, int]

    def config(self, dataset: str) -> dict[str, Any]:
        """Return what decides the choice, for the identity of a caption set's shards.

        Neither the list of exclusions nor the search for duplicates is among it: a takedown, or the
        new search that a retry of ingest needs, must not make published captions look wrong.
        """
        config = _config(self.recipe, self.margin, dataset)
        return config | {"bound": f"{self.bounds[dataset]:x}"}

    def keys(self, dataset: str, shard: str) -> set[str]:
        """Return the keys of the pictures of a shard that are asked for."""
        bound = self.bounds[dataset]
        return {
            key
            for key, reason in judge_shard(self.recipe, dataset, shard, with_captions=False)
            if reason is None
            and (is_held_out(self.recipe, key) or selection_hash(self.recipe, key) < bound)
        }


def wanted_by(recipe: Recipe, margin: float, captions: str, runner: RunnerOptions) -> Wanted:
    """Find or read the bounds of the datasets of a recipe's mixture that a caption set is for.

    Raises:
        EvenmixError: ingest or dedup has not finished; the text says which command does that.
    """
    datasets = sorted(set(recipe.mixture_datasets()) & set(recipe.datasets_of_set(captions)))
    notes = {dataset: _note_url(recipe, margin, captions, dataset) for dataset in datasets}
    unknown = [dataset for dataset in datasets if not storage.exists(notes[dataset])]
    if unknown:
        for dataset, bound in _bounds(recipe, margin, unknown, runner).items():
            storage.publish(notes[dataset], json.dumps({"bound": bound}).encode())
    bounds = {
        dataset: int(json.loads(storage.read_bytes(url))["bound"]) for dataset, url in notes.items()
    }
    return Wanted(recipe, margin, bounds)


def _note_url(recipe: Recipe, margin: float, captions: str, dataset: str) -> str:
    choice = fingerprint(_config(recipe, margin, dataset))[:16]
    folder = storage.join(recipe.root, NOTES, "captions", captions)
    return storage.join(folder, f"wanted-{choice}-{dataset}.json")


def _config(recipe: Recipe, margin: float, dataset: str) -> dict[str, Any]:
    mixture = recipe.mixture
    config: dict[str, Any] = {
        "images_per_dataset": mixture.images_per_dataset,
        "margin": margin,
        "min_short_edge_px": min_short_edge_px(recipe),
        "validation_fraction": mixture.validation_fraction,
        "seed": recipe.seed,
    }
    filters = [wanted.model_dump(exclude={"datasets"}) for wanted in filters_of(recipe, dataset)]
    return config | ({"filters": filters} if filters else {})


def _bounds(
    recipe: Recipe, margin: float, datasets: list[str], runner: RunnerOptions
) -> dict[str, int]:
    """Return the hashes below which pictures are asked for: just above that of the last one."""
    if recipe.mixture.images_per_dataset is None:
        return dict.fromkeys(datasets, HASH_RANGE)
    number = math.ceil(recipe.mixture.images_per_dataset * (1 + margin))
    stage = Candidates(recipe, with_captions=False)
    run_stage(stage, stage.plan(datasets), runner)
    return {
        dataset: smallest(candidate_urls(recipe, dataset, with_captions=False), number).last_hash
        + 1
        for dataset in datasets
    }
