"""Which pictures of the corpus go into a mixture, and into which of its shards.

A picture must not be on the list of exclusions, nor a duplicate, and must be large enough and
captioned; of those the recipe takes the ones with the smallest hash of (seed, key). So the choice
is random, the same on every run, and a smaller mixture is a subset of a larger one. Every picture
that is left out is counted under its reason.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from captioning.outcomes import USABLE, CaptionOutcome
from pipeline.eligible import (
    HASH_RANGE,
    is_held_out,
    judge_shard,
    min_short_edge_px,
    selection_hash,
)
from pipeline.errors import EvenmixError
from pipeline.exclusions import load_exclusions
from pipeline.reasons import RejectReason
from pipeline.receipts import Counts, fingerprint
from pipeline.recipe import Recipe
from pipeline.records import IMAGES, uniform_hash
from pipeline.stage import Output, WorkItem
from pipeline.summary import finished_shards, read_shard

SHARD = "selected"

SELECTION = pa.schema(
    [
        ("key", pa.string()),
        ("shard", pa.string()),
        ("row", pa.int32()),
        ("destination", pa.string()),
    ]
)
"""One picture of the mixture, in the order of its samples: where it stands in the corpus (image
shard and row) and which shard of the mixture it goes to."""


@dataclass(frozen=True)
class Candidate:
    """A picture that may be taken: its key, and where it stands in the corpus."""

    key: str
    shard: str
    row: int


@dataclass(frozen=True)
class Select:
    """The stage that makes R/selections/<mixture>."""

    recipe: Recipe
    name: str = "select"
    version: int = 1
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
        mixture = self.recipe.mixture
        config: dict[str, Any] = {
            "seed": self.recipe.seed,
            "min_short_edge_px": min_short_edge_px(self.recipe),
            "images_per_dataset": mixture.images_per_dataset,
            "validation_fraction": mixture.validation_fraction,
            "samples_per_shard": mixture.samples_per_shard,
        }
        if self.recipe.exclusions is not None:
            config["exclusions"] = load_exclusions(self.recipe.exclusions).digest
        return config

    def plan(self) -> list[WorkItem]:
        """Return one item a dataset, which needs all of its finished shards."""
        return [
            WorkItem(dataset, SHARD, inputs=corpus_digests(self.recipe, dataset))
            for dataset in self.recipe.mixture_datasets()
        ]

    def process(self, item: WorkItem) -> Output:
        """Choose the pictures of one dataset."""
        rejected: Counter[str] = Counter()
        candidates = []
        for shard in finished_shards(self.root, IMAGES, item.dataset, "ingest"):
            for candidate, reason in self._judge_shard(item.dataset, shard):
                if reason is None:
                    candidates.append(candidate)
                else:
                    rejected[reason] += 1
        total = len(candidates) + rejected.total()
        chosen = self._choose(candidates)
        if len(chosen) < len(candidates):
            rejected[RejectReason.NOT_SAMPLED] += len(candidates) - len(chosen)
        return Output(
            table=pa.Table.from_pylist(chosen, schema=SELECTION),
            counts=Counts(total, len(chosen), dict(sorted(rejected.items()))),
        )

    def _judge_shard(self, dataset: str, shard: str) -> list[tuple[Candidate, RejectReason | None]]:
        folder = f"captions/{self.recipe.mixture.captions}"
        captions = read_shard(self.root, folder, dataset, shard, ["key", "captions"]).to_pylist()
        judged = judge_shard(self.recipe, dataset, shard)
        if [key for key, _ in judged] != [row["key"] for row in captions]:
            raise EvenmixError(
                f"{dataset}/{shard}: its index and captions speak of different pictures; "
                "`evenmix verify` tells which file is damaged"
            )
        return [
            (Candidate(key, shard, row), reason or _lack_of_captions(captions[row]["captions"]))
            for row, (key, reason) in enumerate(judged)
        ]

    def _choose(self, candidates: Sequence[Candidate]) -> list[dict[str, Any]]:
        """Take the smallest hashes, part train from validation, and assign destinations."""
        mixture, seed = self.recipe.mixture, self.recipe.seed
        validation = {c.key for c in candidates if is_held_out(self.recipe, c.key)}
        train = [c for c in candidates if c.key not in validation]
        train.sort(key=lambda c: (selection_hash(self.recipe, c.key), c.key))
        chosen: list[dict[str, Any]] = []
        for split, part in (
            ("train", train[: mixture.images_per_dataset]),
            ("validation", [c for c in candidates if c.key in validation]),
        ):
            num_shards = -(-len(part) // mixture.samples_per_shard)
            for candidate in part:
                bucket = uniform_hash(seed, candidate.key, "shard") * num_shards // HASH_RANGE
                chosen.append(
                    {
                        "key": candidate.key,
                        "shard": candidate.shard,
                        "row": candidate.row,
                        "destination": f"{split}-{bucket:05d}",
                    }
                )
        # The shuffle: inside a shard, samples stand in the order of another hash.
        chosen.sort(
            key=lambda row: (
                row["destination"],
                uniform_hash(seed, row["key"], "order"),
                row["key"],
            )
        )
        return chosen


def _lack_of_captions(captions: Sequence[Mapping[str, Any]]) -> RejectReason | None:
    outcomes = {caption["outcome"] for caption in captions}
    if USABLE & outcomes:
        return None
    if CaptionOutcome.NOT_ASKED in outcomes:
        return RejectReason.NOT_ASKED
    return RejectReason.NO_CAPTION


def corpus_digests(recipe: Recipe, dataset: str) -> dict[str, str]:
    """Identify all that a mixture reads of a dataset.

    Raises:
        EvenmixError: a stage before has not finished; the text says which command does that.
    """
    captions = recipe.mixture.captions
    families = {
        "images": finished_shards(recipe.root, IMAGES, dataset, "ingest"),
        "duplicates": finished_shards(
            recipe.root, f"duplicates/{recipe.dedup.name}", dataset, "dedup"
        ),
        "captions": finished_shards(recipe.root, f"captions/{captions}", dataset, "caption"),
    }
    return {family: fingerprint(digests) for family, digests in families.items()}
