"""The pictures of a search: which shards it is about, in what groups, and where its tables are.

A search goes through the corpus a group of shards at a time. The evaluation pictures, where there
are any, are the last shards, of a dataset of their own (:data:`dedup.rules.AGAINST`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from dedup.records import (
    PICTURES,
    THUMBNAIL_BYTES,
    Described,
    Ints,
    concatenate,
    keys_from_hex,
    keys_of,
    read_vectors,
)
from dedup.rules import AGAINST, Rules
from pipeline import storage
from pipeline.errors import EvenmixError
from pipeline.exchange import read_slices
from pipeline.records import IMAGES, duplicates_folder
from pipeline.stage import WorkItem
from pipeline.summary import dataset_url

PICTURES_PER_GROUP = 200_000
"""What a worker process holds at a time: 500 MB with all thumbnails."""

ALL = "all"
"""The shard of a stage that has one item, or one for each of a few tables."""

BYTES_PER_PICTURE = 400
"""What deciding about all pictures at once takes for each of them: 64 GB for the 160 million of i1.

Of a million, a third of them removed, it was 310 in finding out who is who, 360 in the removals and
300 in the groups of the report."""


class Table(StrEnum):
    """The tables of the report: pseudo datasets beside the real ones of the outcome."""

    REMOVED = "_removed"
    GROUPS = "_groups"
    SUMMARY = "_summary"
    RECALL = "_recall"
    CONTAMINATION = "_contamination"


class Shard(NamedTuple):
    """An image shard, or one of evaluation pictures; an earlier search may have accepted it."""

    dataset: str
    name: str
    num_pictures: int
    is_accepted: bool


@dataclass(frozen=True)
class Places:
    """Where the tables of a search are: those of the outcome, and those on the way to it."""

    root: str
    name: str

    @property
    def folder(self) -> str:
        """The folder below R of the outcome."""
        return duplicates_folder(self.name)

    def outcome_url(self, dataset: str) -> str:
        """Return where a table of the report is, which is the only one of its pseudo dataset."""
        return storage.join(dataset_url(self.root, self.folder, dataset), f"{ALL}.parquet")

    def exchange_folder(self, step: str) -> str:
        """Return the folder below R of what one step hands to another; it may go afterwards."""
        return f"exchange/duplicates-{self.name}/{step}"

    def table_url(self, step: str, dataset: str, shard: str) -> str:
        """Return where a step's table is."""
        return storage.join(
            dataset_url(self.root, self.exchange_folder(step), dataset), f"{shard}.parquet"
        )


@dataclass(frozen=True)
class Search(Places):
    """What all stages of a search know.

    ``embeddings`` is the folder of the descriptors below R and ``descriptor`` their identity, empty
    where none are needed; ``accepted`` is an earlier search, ``priority`` the datasets that win a
    tie, the first first.
    """

    seed: int
    rules: Rules
    embeddings: str
    descriptor: Mapping[str, Any]
    max_neighbours: int
    priority: tuple[str, ...] = ()
    accepted: str | None = None

    @property
    def dimension(self) -> int:
        """The length of the descriptors."""
        return int(self.descriptor["dimension"])

    def index_url(self, dataset: str, shard: str) -> str:
        """Return where a shard's pictures are listed."""
        if dataset == AGAINST:
            return self.table_url("against", dataset, shard)
        return storage.join(dataset_url(self.root, IMAGES, dataset), f"{shard}.parquet")

    def embeddings_url(self, dataset: str, shard: str) -> str:
        """Return where a shard's descriptors are."""
        if dataset == AGAINST:
            return self.table_url("against", dataset, shard)
        return storage.join(dataset_url(self.root, self.embeddings, dataset), f"{shard}.parquet")

    def accepted_url(self, dataset: str, shard: str) -> str:
        """Return where the earlier search has the outcome of a shard that it accepted."""
        folder = Places(self.root, str(self.accepted)).folder
        return storage.join(dataset_url(self.root, folder, dataset), f"{shard}.parquet")

    def pictures(self, group: int) -> pa.Table:
        """Return what is known of the pictures of a group (PICTURES), row by row."""
        slices = read_slices([self.table_url("pictures", ALL, ALL)], group)
        return pa.concat_tables([PICTURES.empty_table(), *slices]).combine_chunks()


def group_shards(shards: Sequence[Shard]) -> list[list[Shard]]:
    """Part shards in groups of about PICTURES_PER_GROUP pictures."""
    groups: list[list[Shard]] = []
    room = 0
    for shard in shards:
        if room <= 0:
            groups.append([])
            room = PICTURES_PER_GROUP
        groups[-1].append(shard)
        room -= shard.num_pictures
    return groups


def memory_for(num_pictures: int) -> dict[str, str]:
    """Return the resource hint of a stage that decides about so many pictures at once."""
    return {"min_ram": f"{4 + num_pictures * BYTES_PER_PICTURE // 10**9}GB"}


def group_item(
    step_dataset: str,
    group: int,
    shards: Sequence[Shard],
    inputs: Mapping[str, Any],
    **payload: Any,
) -> WorkItem:
    """Return the work item about a group of shards; ``payload`` is what else it is told."""
    about = {"group": group, "shards": [list(shard) for shard in shards]}
    return WorkItem(step_dataset, group_name(group), inputs, about | payload)


def group_name(group: int) -> str:
    """Return the name under which a step's table about a group of shards stands."""
    return f"group-{group:05}"


def shards_of(payload: Mapping[str, Any]) -> list[Shard]:
    """Return the shards that a work item's payload lists."""
    return [Shard(*shard) for shard in payload["shards"]]


def read_described(search: Search, item: WorkItem) -> Described:
    """Read the pictures of an item's group that are searched, in the order of their rows.

    Their ``cluster`` is -1.

    Raises:
        EvenmixError: a file is of another size of descriptor, or does not belong to its index.
    """
    pictures = search.pictures(item.payload["group"])
    draw = pictures["draw"].to_numpy()
    parts = []
    start = 0
    for shard in shards_of(item.payload):
        rows = slice(start, start + shard.num_pictures)
        start = rows.stop
        searched = np.flatnonzero(draw[rows] >= 0)
        if len(searched):
            parts.append(_describe(search, shard, pictures[rows], searched))
    return concatenate(parts, search.dimension)


def _describe(search: Search, shard: Shard, pictures: pa.Table, searched: Ints) -> Described:
    """Join the rows of a shard that are searched with their descriptors."""
    url = search.embeddings_url(shard.dataset, shard.name)
    table, vectors = read_vectors(url, "embedding", search.dimension, ["key", "graphic"])
    key = keys_of(pictures["key"].combine_chunks())
    if not np.array_equal(keys_from_hex(table["key"]), key):
        raise EvenmixError(
            f"{url} does not belong to {search.index_url(shard.dataset, shard.name)}: their keys "
            "differ; embed under another dedup.descriptor"
        )
    dataset = search.rules.datasets.index(shard.dataset)
    graphic = table["graphic"].to_numpy()
    looked_at = graphic & search.rules.look_at_graphics(dataset) | search.rules.look_at_all(dataset)
    thumbnails = np.zeros((len(key), THUMBNAIL_BYTES), np.int8)
    if looked_at.any():
        stored = storage.read_parquet(url, ["thumbnail"])["thumbnail"].filter(pa.array(looked_at))
        rows = np.frombuffer(b"".join(stored.to_pylist()), np.int8)
        thumbnails[looked_at] = rows.reshape(-1, THUMBNAIL_BYTES)
    everything = Described(
        rank=pictures["rank"].to_numpy(),
        key=key,
        dataset=np.full(len(key), dataset),
        accepted=pictures["accepted"].to_numpy(),
        graphic=graphic,
        thumbnail=thumbnails,
        cluster=np.full(len(key), -1),
        vector=vectors,
    )
    return everything.take(searched)
