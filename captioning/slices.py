"""Answers kept until their shard is published, so that a killed worker loses few of them.

A shard's answers are published as they come, in slices, beside the place of the shard and under
temporary names. The next attempt at the shard takes them over; when the dataset is finished they
are swept. Names are numbered, so no folder has to be listed: two attempts at a shard that are alive
at once both add slices, and a caption that is in two of them counts in the first.
"""

from collections.abc import Mapping
from itertools import count
from typing import Any

import pyarrow as pa

from captioning.tables import CAPTIONS
from pipeline import storage

SLICE_CAPTIONS = 128
"""Captions in a slice, so of as many pictures at most. A worker has two shards in hand at once: it
loses less than two slices."""

_SLICE = pa.schema(
    [
        ("key", pa.string()),
        ("number", pa.int32()),
        ("caption", CAPTIONS.field("captions").type.value_type),
    ]
)

Captions = dict[tuple[str, int], dict[str, Any]]
"""Captions, as rows of the table have them, by their picture's key and their number."""


def read_slices(folder: str, shard: str, identity: str) -> Captions:
    """Return what earlier attempts at a shard have kept; ``identity`` is the item's fingerprint."""
    found: Captions = {}
    for number in count():
        url = _url(folder, shard, identity, number)
        if not storage.exists(url):
            return found
        for row in storage.read_parquet(url).to_pylist():
            found.setdefault((row["key"], row["number"]), row["caption"])
    raise AssertionError("counting does not end")


def keep_slice(folder: str, shard: str, identity: str, captions: Mapping[Any, Any]) -> None:
    """Publish a slice under the next free name."""
    rows = [
        {"key": key, "number": number, "caption": caption}
        for (key, number), caption in captions.items()
    ]
    data = storage.parquet_bytes(pa.Table.from_pylist(rows, schema=_SLICE), {})
    for number in count():
        if storage.publish(_url(folder, shard, identity, number), data):
            return


def _url(folder: str, shard: str, identity: str, number: int) -> str:
    name = f"{storage.TEMPORARY_PREFIX}slice-{identity[:16]}-{number}-{shard}.parquet"
    return storage.join(folder, name)
