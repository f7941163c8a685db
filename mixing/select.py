"""Which pictures of the corpus go into a mixture, and into which of its shards.

Of the pictures that could be taken (:mod:`pipeline.candidates`) a mixture takes the ones with the
smallest hash of (seed, key), and all that are held out. So the choice is random, the same on every
run, and a smaller mixture is a subset of a larger one. A selection is therefore one number, and
whoever meets a picture can tell by its key whether it is taken and where it goes.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import pyarrow as pa

from pipeline.candidates import candidate_counts, candidate_urls, smallest
from pipeline.eligible import HASH_RANGE, input_digests, judging_config
from pipeline.reasons import RejectReason
from pipeline.receipts import Counts, fingerprint
from pipeline.recipe import Recipe
from pipeline.records import uniform_hash
from pipeline.stage import Output, WorkItem
from pipeline.summary import read_shard

SHARD = "selected"

SELECTION = pa.schema(
    [("last_hash", pa.uint64()), ("num_train", pa.int64()), ("num_validation", pa.int64())]
)
"""The one row of a dataset's selection, as in :class:`Selection`."""

SplitName = Literal["train", "validation"]


@dataclass(frozen=True)
class Selection:
    """What a mixture takes of a dataset: for training the candidates up to ``last_hash``."""

    dataset: str
    last_hash: int
    num_train: int
    num_validation: int
    samples_per_shard: int
    seed: int

    def takes(self, selection_hash: int, held_out: bool) -> bool:
        """Tell whether a candidate is taken."""
        return held_out or selection_hash <= self.last_hash

    def num_shards(self, split: SplitName) -> int:
        """Return how many shards the samples of a split are spread over."""
        number = self.num_train if split == "train" else self.num_validation
        return -(-number // self.samples_per_shard)

    def destination(self, key: str, held_out: bool) -> str:
        """Return the shard of the mixture that a picture which is taken goes to."""
        split: SplitName = "validation" if held_out else "train"
        bucket = uniform_hash(self.seed, key, "shard") * self.num_shards(split) // HASH_RANGE
        return f"{split}-{bucket:05d}"

    def order(self, key: str) -> int:
        """Return by what samples are sorted inside their shard, before their keys: a shuffle."""
        return uniform_hash(self.seed, key, "order")


def choose(recipe: Recipe, dataset: str) -> Selection:
    """Find the selection of a dataset among its published candidates.

    Raises:
        EvenmixError: the candidates have not all been found.
    """
    mixture = recipe.mixture
    found = smallest(candidate_urls(recipe, dataset, True), mixture.images_per_dataset)
    return Selection(
        dataset,
        found.last_hash,
        found.num_train,
        found.num_held_out,
        mixture.samples_per_shard,
        recipe.seed,
    )


def read_selection(recipe: Recipe, dataset: str) -> Selection:
    """Read the published selection of a dataset.

    Raises:
        EvenmixError: there is none.
    """
    (row,) = read_shard(recipe.root, Select(recipe).folder, dataset, SHARD).to_pylist()
    return Selection(
        dataset, samples_per_shard=recipe.mixture.samples_per_shard, seed=recipe.seed, **row
    )


@dataclass(frozen=True)
class Select:
    """The stage that makes R/selections/<mixture>: one item a dataset, from its candidates."""

    recipe: Recipe
    name: str = "select"
    version: int = 2
    resource_hints: Mapping[str, str] = field(default_factory=dict)
    items_at_once: int = 1

    @property
    def root(self) -> str:
        """The root R of the corpus."""
        return self.recipe.root

    @property
    def folder(self) -> str:
        """The folder below R."""
        return f"selections/{self.recipe.mixture.name}"

    def config(self, dataset: str) -> Mapping[str, Any]:
        """Return what decides the choice."""
        judging = judging_config(self.recipe, dataset, with_captions=True)
        return judging | {"images_per_dataset": self.recipe.mixture.images_per_dataset}

    def plan(self) -> list[WorkItem]:
        """Return one item a dataset, identified by the corpus and not by the candidates' files.

        Raises:
            EvenmixError: a stage before has not finished.
        """
        return [
            WorkItem(dataset, SHARD, inputs=corpus_digests(self.recipe, dataset))
            for dataset in self.recipe.mixture_datasets()
        ]

    def process(self, item: WorkItem) -> Output:
        """Choose the pictures of one dataset; the counts are about all that it has."""
        chosen = choose(self.recipe, item.dataset)
        counts = candidate_counts(self.recipe, item.dataset)
        num_chosen = chosen.num_train + chosen.num_validation
        rejected: Counter[str] = Counter()
        for reason, number in counts.rejected.items():
            # A filter's own words are the plan's; here all filters are one reason.
            rejected[reason.partition(":")[0]] += number
        if num_chosen < counts.records_out:
            rejected[RejectReason.NOT_SAMPLED] = counts.records_out - num_chosen
        row = [chosen.last_hash, chosen.num_train, chosen.num_validation]
        return Output(
            table=pa.table([[value] for value in row], schema=SELECTION),
            counts=Counts(counts.records_in, num_chosen, dict(sorted(rejected.items()))),
        )


def corpus_digests(recipe: Recipe, dataset: str) -> dict[str, str]:
    """Identify all that a mixture reads of a dataset, by folder below R.

    Raises:
        EvenmixError: a stage before has not finished; the text says which command does that.
    """
    digests = input_digests(recipe, dataset, with_captions=True)
    return {folder: fingerprint(found) for folder, found in digests.items()}
