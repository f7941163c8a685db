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

from captioning.outcomes import USABLE
from pipeline.errors import EvenmixError
from pipeline.exclusions import load_exclusions
from pipeline.reasons import RejectReason
from pipeline.receipts import Counts, fingerprint
from pipeline.recipe import Recipe
from pipeline.records import IMAGES, uniform_hash
from pipeline.stage import Output, WorkItem
from pipeline.summary import finished_shards, read_shard

SHARD = "selected"
_HASH_RANGE = 1 << 64
_INDEX_COLUMNS = [
    "key", "width", "height", "source_url", "final_url", "sha256", "pixels_sha256",
]  # fmt: skip

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
        index = self._read(IMAGES, dataset, shard, _INDEX_COLUMNS)
        exclusions = load_exclusions(self.recipe.exclusions)
        duplicates = self._read(
            f"duplicates/{self.recipe.dedup.name}", dataset, shard, ["key", "rule"]
        )
        captions = self._read(
            f"captions/{self.recipe.mixture.captions}", dataset, shard, ["key", "captions"]
        )
        least_px = min_short_edge_px(self.recipe)
        judged = []
        for row, (picture, duplicate, caption) in enumerate(
            zip(index, duplicates, captions, strict=True)
        ):
            if not picture["key"] == duplicate["key"] == caption["key"]:
                raise EvenmixError(
                    f"{dataset}/{shard} row {row}: its index, duplicates and captions speak of "
                    "different pictures; `evenmix verify` tells which file is damaged"
                )
            reason = None
            hashes = (picture["sha256"], picture["pixels_sha256"])
            urls = (picture["source_url"], picture["final_url"])
            if exclusions.reason(picture["key"], urls, hashes):
                reason = RejectReason.EXCLUDED
            elif duplicate["rule"] is not None:
                reason = RejectReason(duplicate["rule"])
            elif min(picture["width"], picture["height"]) < least_px:
                reason = RejectReason.TOO_SMALL
            elif not any(c["outcome"] in USABLE for c in caption["captions"]):
                reason = RejectReason.NO_CAPTION
            judged.append((Candidate(picture["key"], shard, row), reason))
        return judged

    def _read(
        self, folder: str, dataset: str, shard: str, columns: Sequence[str]
    ) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = read_shard(
            self.root, folder, dataset, shard, columns
        ).to_pylist()
        return rows

    def _choose(self, candidates: Sequence[Candidate]) -> list[dict[str, Any]]:
        """Take the smallest hashes, part train from validation, and assign destinations."""
        mixture, seed = self.recipe.mixture, self.recipe.seed
        held_out_below = int(mixture.validation_fraction * _HASH_RANGE)
        validation = {
            c.key for c in candidates if uniform_hash(seed, c.key, "validation") < held_out_below
        }
        train = [c for c in candidates if c.key not in validation]
        train.sort(key=lambda c: (uniform_hash(seed, c.key, "select"), c.key))
        chosen: list[dict[str, Any]] = []
        for split, part in (
            ("train", train[: mixture.images_per_dataset]),
            ("validation", [c for c in candidates if c.key in validation]),
        ):
            num_shards = -(-len(part) // mixture.samples_per_shard)
            for candidate in part:
                bucket = uniform_hash(seed, candidate.key, "shard") * num_shards // _HASH_RANGE
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


def min_short_edge_px(recipe: Recipe) -> int:
    """Return the least shorter edge that a mixture takes: its resolution unless the recipe says."""
    return recipe.mixture.min_short_edge_px or recipe.mixture.resolution


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
