"""The pictures that a caption set asks for when a mixture is all that it is made for.

A mixture takes its N pictures with the smallest hash among those it could take. Some of them will
have no usable caption, so a margin more is asked for: all below a bound of the hash. The bound is
found once for a dataset and noted, so that pictures which come in by a later `evenmix ingest
--retry` do not move it.
"""

import json
import math
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline import storage
from pipeline.eligible import (
    HASH_RANGE,
    is_held_out,
    judge_shard,
    min_short_edge_px,
    selection_hash,
)
from pipeline.receipts import fingerprint
from pipeline.recipe import Recipe
from pipeline.records import IMAGES, NOTES
from pipeline.summary import finished_shards


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
        return _config(self.recipe, self.margin) | {"bound": f"{self.bounds[dataset]:x}"}

    def keys(self, dataset: str, shard: str) -> set[str]:
        """Return the keys of the pictures of a shard that are asked for."""
        bound = self.bounds[dataset]
        return {
            key
            for key, reason in judge_shard(self.recipe, dataset, shard)
            if reason is None
            and (is_held_out(self.recipe, key) or selection_hash(self.recipe, key) < bound)
        }


def wanted_by(recipe: Recipe, margin: float, captions: str) -> Wanted:
    """Find or read the bounds of all datasets of a recipe's mixture.

    Raises:
        EvenmixError: ingest or dedup has not finished; the text says which command does that.
    """
    bounds = {}
    folder = storage.join(recipe.root, NOTES, "captions", captions)
    choice = fingerprint(_config(recipe, margin))[:16]
    for dataset in recipe.mixture_datasets():
        url = storage.join(folder, f"wanted-{choice}-{dataset}.json")
        if not storage.exists(url):
            storage.publish(url, json.dumps({"bound": _bound(recipe, margin, dataset)}).encode())
        bounds[dataset] = int(json.loads(storage.read_bytes(url))["bound"])
    return Wanted(recipe, margin, bounds)


def _config(recipe: Recipe, margin: float) -> dict[str, Any]:
    mixture = recipe.mixture
    return {
        "images_per_dataset": mixture.images_per_dataset,
        "margin": margin,
        "min_short_edge_px": min_short_edge_px(recipe),
        "validation_fraction": mixture.validation_fraction,
        "seed": recipe.seed,
    }


def _bound(recipe: Recipe, margin: float, dataset: str) -> int:
    """Return the hash below which pictures are asked for: just above that of the last one.

    At 100M pictures their hashes are an array of 0.8 GB.
    """
    shards = finished_shards(recipe.root, IMAGES, dataset, "ingest")
    if recipe.mixture.images_per_dataset is None:
        return HASH_RANGE
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = list(pool.map(lambda shard: _hashes(recipe, dataset, shard), shards))
    hashes = np.concatenate([np.empty(0, np.uint64), *found])
    last = math.ceil(recipe.mixture.images_per_dataset * (1 + margin)) - 1
    if last >= len(hashes):
        return HASH_RANGE
    return int(np.partition(hashes, last)[last]) + 1


def _hashes(recipe: Recipe, dataset: str, shard: str) -> np.ndarray[Any, np.dtype[np.uint64]]:
    hashes = [
        selection_hash(recipe, key)
        for key, reason in judge_shard(recipe, dataset, shard)
        if reason is None and not is_held_out(recipe, key)
    ]
    return np.array(hashes, np.uint64)
