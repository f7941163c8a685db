"""Joining published captions with pictures by identifier, when neither side has a useful order.

Any picture's captions may be in any file, so both sides are parted by a hash of the identifier, and
each part is joined on its own. What was joined goes to groups of image shards, and within these to
shards. Four stages do that, below R/exchange/<caption set>:

    published   a range of rows of a published file      by part: identifier, captions
    pictures    a group of image shards                  by part: identifier, shard
    joined      a part: all its captions and pictures    by group: shard, identifier, captions
    gathered    a group: what all parts have for it      by shard: identifier, captions

The hash only says where two identifiers meet; they are compared as texts.

A part, a group and a range of rows have at most about PART_BYTES of text each, and take a worker
process four times that, 2 GB. The number of parts P follows from it, there are about as many groups
and ranges, and each of the three exchanges takes P times P reads. YFCC, the largest dataset, has 98
million rows with about 2.1 KB of text: 200 GB, P = 400, three times 160,000 slices of about 500 KB
(the pictures': 30 KB), and 194,000 reads of a shard's slice of 1 MB. One exchange from parts to
shards would take 400 times 194,000 reads of 2.6 KB. A map from identifiers to shards would spare an
exchange, but take 1.2 GB of each worker process, and be built in one place.

The sizes are those of the footers, which count a text once that a dictionary gives to many rows. So
a row counts as 2 KB at least, and a range with more than three times the text is refused: at worst
ranges and parts have 1.5 GB, below the 2 GB of an exchange's slice. Identifiers that repeat come to
one part, where all but the first are passed over as they are read.

A retry's pictures are a generation of their own. Its items have all published captions once more,
and count those that no earlier generation had a picture for.
"""

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any

import numpy as np
import pyarrow as pa

from captioning.published.files import read_rows
from pipeline import storage
from pipeline.exchange import exchange_table, read_slices
from pipeline.readers.items import require_unchanged
from pipeline.receipts import Counts
from pipeline.records import IMAGES, uniform_hash
from pipeline.stage import Output, WorkItem
from pipeline.summary import dataset_url, finished_shards, generation_of, read_shard

PART_BYTES = 512 << 20
"""The text that is joined at a time."""

PUBLISHED, PICTURES, JOINED, GATHERED = "published", "pictures", "joined", "gathered"

_PUBLISHED_ROWS = pa.schema([("join_id", pa.string()), ("captions", pa.list_(pa.string()))])
_PICTURE_ROWS = pa.schema(
    [
        ("join_id", pa.string()),
        ("ambiguous", pa.bool_()),
        ("group", pa.int64()),
        ("place", pa.int64()),
    ]
)
_JOINED_ROWS = pa.schema(
    [("place", pa.int64()), ("join_id", pa.string()), ("captions", pa.list_(pa.string()))]
)


class NotJoined(StrEnum):
    """Why a published caption, or a picture, is joined with nothing: a closed list."""

    NO_KEY = "no_key"
    """A row of published captions whose identifier is missing, no UTF-8, or too long."""
    REPEATED_KEY = "repeated_key"
    """An earlier row has the identifier: the first one by file and row counts."""
    NO_PICTURE = "no_picture"
    """No picture of the corpus has the identifier."""
    AMBIGUOUS = "ambiguous"
    """The identifier stands for several pictures."""
    NO_JOIN_ID = "no_join_id"
    """A picture whose identifier in the published captions is not known."""


@dataclass(frozen=True)
class Source:
    """Where a dataset's published captions come from, and in how many parts they are joined.

    ``origin`` and ``revision`` are those of :class:`captioning.published.files.Subset`;
    ``files`` is the hash of the identities of all its files.
    """

    subset: str
    origin: str
    revision: str | None
    files: str
    num_parts: int

    def identity(self) -> dict[str, Any]:
        """Return what decides the captions."""
        return {"subset": self.subset, "origin": self.origin, "revision": self.revision}


@dataclass(frozen=True)
class _Exchange:
    """What the four stages share; ``sources`` are by dataset."""

    root: str
    captions: str
    sources: Mapping[str, Source]
    version: int = 1
    resource_hints: Mapping[str, str] = field(default_factory=dict)
    items_at_once: int = 1

    def config(self, dataset: str) -> Mapping[str, Any]:
        """Return what decides the content of an item."""
        source = self.sources[dataset]
        return source.identity() | {"num_parts": source.num_parts}

    def _urls(self, dataset: str, step: str, generation: int) -> list[str]:
        """Return the files of a step and a generation, in order."""
        folder = exchange_folder(self.captions, step)
        items = sorted(finished_shards(self.root, folder, dataset, "caption"))
        url = dataset_url(self.root, folder, dataset)
        return [
            storage.join(url, f"{item}.parquet")
            for item in items
            if generation_of(item) == generation
        ]


def exchange_folder(captions: str, step: str) -> str:
    """Return the folder below R of one step of a caption set's exchange."""
    return f"exchange/{captions}/{step}"


@dataclass(frozen=True)
class PartPublished(_Exchange):
    """The stage that parts the published captions; an item is a range of rows of a file."""

    name: str = "caption-published"

    @property
    def folder(self) -> str:
        """The folder below R."""
        return exchange_folder(self.captions, PUBLISHED)

    def process(self, item: WorkItem) -> Output:
        """Read the item's rows."""
        num_parts = self.sources[item.dataset].num_parts
        start, stop = item.inputs["rows"]
        tables, parts = [_PUBLISHED_ROWS.empty_table()], list[int]()
        num_rows = 0
        try:
            for rows in read_rows(
                item.payload["url"], item.inputs["num_bytes"], item.payload["columns"], start, stop
            ):
                num_rows += len(rows)
                named = [(key, texts) for key, texts in rows if key]
                columns = [[key for key, _ in named], [texts for _, texts in named]]
                tables.append(pa.table(columns, schema=_PUBLISHED_ROWS))
                parts += [_part(key, num_parts) for key, _ in named]
        finally:
            # A change explains what looks like damage.
            require_unchanged(item.payload["states"])
        without_key = num_rows - len(parts)
        return Output(
            table=exchange_table(pa.concat_tables(tables), np.array(parts, np.int64)),
            counts=_counts(len(parts), {NotJoined.NO_KEY: without_key}),
        )


@dataclass(frozen=True)
class PartPictures(_Exchange):
    """The stage that parts the pictures' identifiers; an item is a group of image shards."""

    name: str = "caption-pictures"

    @property
    def folder(self) -> str:
        """The folder below R."""
        return exchange_folder(self.captions, PICTURES)

    def process(self, item: WorkItem) -> Output:
        """Read the indexes of the item's shards."""
        num_parts = self.sources[item.dataset].num_parts
        rows = []
        num_pictures = 0
        for place, shard in item.payload["shards"]:
            index = read_shard(
                self.root, IMAGES, item.dataset, shard, ["join_id", "join_ambiguous"]
            )
            num_pictures += index.num_rows
            rows += [
                (picture["join_id"], picture["join_ambiguous"], item.payload["group"], place)
                for picture in index.to_pylist()
                if picture["join_id"] is not None
            ]
        parts = [_part(join_id, num_parts) for join_id, *_ in rows]
        unknown = num_pictures - len(rows)
        return Output(
            table=exchange_table(_table(rows, _PICTURE_ROWS), np.array(parts, np.int64)),
            counts=_counts(len(rows), {NotJoined.NO_JOIN_ID: unknown}),
        )


@dataclass(frozen=True)
class JoinParts(_Exchange):
    """The stage that joins; an item is a part, in a generation of pictures.

    It counts published captions: those with a picture, and the others by reason.
    """

    name: str = "caption-joined"

    @property
    def folder(self) -> str:
        """The folder below R."""
        return exchange_folder(self.captions, JOINED)

    def process(self, item: WorkItem) -> Output:
        """Give each picture of a part its captions."""
        part, generation = item.payload["part"], generation_of(item.shard)
        pictures = list(self._pictures(item.dataset, part, generation))
        places = defaultdict[str, set[tuple[int, int]]](set)
        for picture in pictures:
            places[picture["join_id"]].add((picture["group"], picture["place"]))
        ambiguous = {picture["join_id"] for picture in pictures if picture["ambiguous"]}
        earlier = {
            picture["join_id"]
            for before in range(generation)
            for picture in self._pictures(item.dataset, part, before)
        }
        seen = set[str]()
        joined, reasons = 0, Counter[str]()
        tables, groups = [_JOINED_ROWS.empty_table()], list[int]()
        for captions in read_slices(self._urls(item.dataset, PUBLISHED, 0), part):
            found = list[tuple[int, int]]()
            for row, join_id in enumerate(captions["join_id"].to_pylist()):
                if join_id in seen:
                    reasons[NotJoined.REPEATED_KEY] += generation == 0
                    continue
                seen.add(join_id)
                is_new = join_id not in earlier
                if join_id not in places:
                    reasons[NotJoined.NO_PICTURE] += is_new
                elif join_id in ambiguous:
                    reasons[NotJoined.AMBIGUOUS] += is_new
                else:
                    joined += is_new
                    for group, place in sorted(places[join_id]):
                        groups.append(group)
                        found.append((row, place))
            rows = captions.take(np.array([row for row, _ in found], np.int64))
            place_column = pa.array([place for _, place in found], pa.int64())
            tables.append(rows.add_column(0, _JOINED_ROWS.field("place"), place_column))
        counts = _counts(joined, reasons)
        if generation:
            # What the earlier generations had no picture for is tried again.
            counts = replace(counts, retried={str(NotJoined.NO_PICTURE): counts.records_in})
        table = exchange_table(pa.concat_tables(tables), np.array(groups, np.int64))
        return Output(table, counts)

    def _pictures(self, dataset: str, part: int, generation: int) -> Iterator[dict[str, Any]]:
        for rows in read_slices(self._urls(dataset, PICTURES, generation), part):
            yield from rows.to_pylist()


@dataclass(frozen=True)
class GatherGroups(_Exchange):
    """The stage that parts what was joined by shards; an item is a group of shards."""

    name: str = "caption-gathered"

    @property
    def folder(self) -> str:
        """The folder below R."""
        return exchange_folder(self.captions, GATHERED)

    def process(self, item: WorkItem) -> Output:
        """Read what all parts have for the group."""
        urls = self._urls(item.dataset, JOINED, generation_of(item.shard))
        slices = read_slices(urls, item.payload["group"])
        rows = pa.concat_tables([_JOINED_ROWS.empty_table(), *slices])
        table = exchange_table(rows.drop_columns("place"), rows["place"].to_numpy())
        return Output(table, Counts(rows.num_rows, rows.num_rows))


def read_gathered(url: str, place: int) -> dict[str, list[str | None]]:
    """Return the published captions of a shard's pictures, by identifier.

    ``url`` is the file of the shard's group, ``place`` the shard's number.
    """
    return {
        row["join_id"]: row["captions"]
        for rows in read_slices([url], place)
        for row in rows.to_pylist()
    }


def _part(join_id: str, num_parts: int) -> int:
    return uniform_hash(0, join_id, "join") * num_parts >> 64


def _table(rows: Sequence[Sequence[Any]], schema: pa.Schema) -> pa.Table:
    columns = list(zip(*rows, strict=True)) or [()] * len(schema)
    return pa.table([list(column) for column in columns], schema=schema)


def _counts(records_out: int, rejected: Mapping[str, int]) -> Counts:
    found = {str(reason): n for reason, n in sorted(rejected.items()) if n}
    return Counts(records_out + sum(found.values()), records_out, found)
