"""The pictures that a mixture could take, counted and reduced to their hashes, in parallel.

A mixture takes the N pictures of a dataset with the smallest hash of (seed, key). Which N these are
needs no sort: pass one, a stage, judges the pictures of each group of shards and publishes the
hashes of those that could be taken; then the N-th smallest hash of all is found by reading these
small files one after the other. It is the bound below which pass two, whoever it is (the shard
writer, a captioner), takes what it sees. So a smaller choice is a part of a larger one, and one
dataset's choice does not depend on another's.

The files are in R/exchange/candidates-<what judges>. How many are taken is no part of that: all
mixtures that differ in nothing else share them, and they may go at any time.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipeline import storage
from pipeline.eligible import (
    HASH_RANGE,
    input_digests,
    is_held_out,
    judge_shard,
    judging_config,
    min_short_edge_px,
    selection_hash,
)
from pipeline.exclusions import load_exclusions
from pipeline.receipts import Counts, fingerprint
from pipeline.recipe import Recipe
from pipeline.records import IMAGES
from pipeline.stage import Output, WorkItem
from pipeline.summary import dataset_url, finished_summary

CANDIDATES = pa.schema([("hash", pa.uint64()), ("held_out", pa.bool_())])
"""One picture that could be taken, in order of the hashes: that of
:func:`pipeline.eligible.selection_hash`, and whether it is held out for validation."""

SHARDS_PER_GROUP = 64
"""Image shards that one work item judges: of 512 pictures, 33,000 hashes or 0.3 MB."""

_CONCURRENT_READS = 16

Hashes = npt.NDArray[np.uint64]


@dataclass(frozen=True)
class Candidates:
    """The stage that finds the pictures that could be taken, with captions or before any.

    ``recipe.exclusions`` is a stored copy (:func:`pipeline.exclusions.stored_exclusions`).
    """

    recipe: Recipe
    with_captions: bool
    name: str = "candidates"
    version: int = 2
    resource_hints: Mapping[str, str] = field(default_factory=dict)
    items_at_once: int = 1

    @property
    def root(self) -> str:
        """The root R of the corpus."""
        return self.recipe.root

    @property
    def folder(self) -> str:
        """The folder below R, named after all settings of the recipe that judge."""
        mixture = self.recipe.mixture
        judges: dict[str, Any] = {
            "version": self.version,
            "seed": self.recipe.seed,
            "validation_fraction": mixture.validation_fraction,
            "min_short_edge_px": min_short_edge_px(self.recipe),
            "filters": [wanted.model_dump() for wanted in mixture.filters],
            "duplicates": self.recipe.dedup.name,
            "exclusions": load_exclusions(self.recipe.exclusions).digest,
        }
        if self.with_captions:
            judges |= {
                "captions": _names(mixture.captions),
                "captions_of": {name: _names(sets) for name, sets in mixture.captions_of.items()},
                "outcomes": sorted(mixture.outcomes),
            }
        return f"exchange/candidates-{fingerprint(judges)[:16]}"

    def config(self, dataset: str) -> Mapping[str, Any]:
        """Return what decides which pictures could be taken."""
        return judging_config(self.recipe, dataset, self.with_captions)

    def plan(self, datasets: Sequence[str] | None = None) -> list[WorkItem]:
        """Return the groups of shards of some datasets, by default of all that are in the mixture.

        Raises:
            EvenmixError: a stage before has not finished.
        """
        items = []
        for dataset in self.recipe.mixture_datasets() if datasets is None else datasets:
            digests = input_digests(self.recipe, dataset, self.with_captions)
            shards = sorted(digests[IMAGES])
            for number, start in enumerate(range(0, len(shards), SHARDS_PER_GROUP)):
                group = shards[start : start + SHARDS_PER_GROUP]
                inputs = {
                    folder: fingerprint({shard: found[shard] for shard in group})
                    for folder, found in digests.items()
                }
                items.append(
                    WorkItem(dataset, f"group-{number:05}", inputs, payload={"shards": group})
                )
        return items

    def process(self, item: WorkItem) -> Output:
        """Judge the pictures of a group of shards."""
        judge = partial(judge_shard, self.recipe, item.dataset, with_captions=self.with_captions)
        with ThreadPoolExecutor(_CONCURRENT_READS) as pool:
            judged = [row for rows in pool.map(judge, item.payload["shards"]) for row in rows]
        rejected = Counter(reason for _, reason in judged if reason is not None)
        keys = [key for key, reason in judged if reason is None]
        hashes = np.array([selection_hash(self.recipe, key) for key in keys], np.uint64)
        held_out = np.array([is_held_out(self.recipe, key) for key in keys], np.bool_)
        order = np.lexsort((held_out, hashes))
        return Output(
            table=pa.table([hashes[order], held_out[order]], schema=CANDIDATES),
            counts=Counts(len(judged), len(keys), dict(sorted(rejected.items()))),
        )


def _names(sets: str | Mapping[str, Any]) -> list[str]:
    return [sets] if isinstance(sets, str) else sorted(sets)


def candidate_counts(recipe: Recipe, dataset: str, with_captions: bool = True) -> Counts:
    """Return how many pictures of a dataset could be taken, and how many not, by reason.

    Raises:
        EvenmixError: the candidates have not all been found.
    """
    folder = Candidates(recipe, with_captions).folder
    return finished_summary(recipe.root, folder, dataset, "mix").counts


def candidate_urls(recipe: Recipe, dataset: str, with_captions: bool) -> list[str]:
    """Return the files with the candidates of a dataset.

    Raises:
        EvenmixError: the candidates have not all been found.
    """
    folder = Candidates(recipe, with_captions).folder
    groups = finished_summary(recipe.root, folder, dataset, "mix").items
    url = dataset_url(recipe.root, folder, dataset)
    return [storage.join(url, f"{group}.parquet") for group in sorted(groups)]


@dataclass(frozen=True)
class Smallest:
    """The candidates with the smallest hashes: those for training up to ``last_hash``.

    ``num_train`` are those, ``num_held_out`` all that are held out, which have no bound.
    """

    last_hash: int
    num_train: int
    num_held_out: int


def smallest(urls: Sequence[str], num_train: int | None) -> Smallest:
    """Find the bound of the ``num_train`` candidates with the smallest hashes; None: of all.

    If there are no more than these, the bound is that of all hashes. Candidates whose hash is equal
    to the last one's are all taken, so that there could be one more; two of 100 million pictures
    have equal 64 bits in one of 3,700 datasets, and then hardly at the bound.

    Memory: four times ``num_train`` hashes of 8 bytes, and the files that are read at once.
    """
    last = np.uint64(HASH_RANGE - 1)
    kept: list[Hashes] = []
    num_kept = num_seen = num_held_out = 0
    for table in _read_some_at_once(urls):
        held_out = table["held_out"].to_numpy()
        hashes = table["hash"].to_numpy()[~held_out]
        num_held_out += int(held_out.sum())
        num_seen += len(hashes)
        if num_train is None:
            continue
        # Copied, since a part of an array keeps all of it in memory.
        kept.append(hashes[: np.searchsorted(hashes, last, side="right")].copy())
        num_kept += len(kept[-1])
        if num_kept > num_train + num_train // 4:
            kept = [_up_to(kept, num_train)]
            last, num_kept = kept[0].max(), len(kept[0])
    if num_train is None or num_seen <= num_train:
        return Smallest(HASH_RANGE - 1, num_seen, num_held_out)
    taken = _up_to(kept, num_train)
    return Smallest(int(taken.max()), len(taken), num_held_out)


def _read_some_at_once(urls: Sequence[str]) -> Iterator[pa.Table]:
    """Yield the tables of files in order, of which few wait at any time."""
    with ThreadPoolExecutor(_CONCURRENT_READS) as pool:
        for start in range(0, len(urls), _CONCURRENT_READS):
            yield from pool.map(storage.read_parquet, urls[start : start + _CONCURRENT_READS])


def _up_to(hashes: Sequence[Hashes], number: int) -> Hashes:
    """Return the hashes, more than ``number``, up to that of this rank, in no order."""
    merged = np.concatenate(hashes)
    merged.partition(number - 1)
    taken: Hashes = merged[merged <= merged[number - 1]]
    return taken
