"""What dedup knows of every picture of a corpus, read from the image indexes and embeddings."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from dedup import keepers
from dedup.exact import copy_groups, first_of_equal, stand_ins
from dedup.records import Vectors, read_vectors
from pipeline import storage
from pipeline.errors import EvenmixError
from pipeline.records import IMAGES

Ints = npt.NDArray[np.int64]

EXACT_ONLY = float("inf")
"""The threshold of a dataset that loses exact copies only: no cosine reaches it."""


@dataclass(frozen=True)
class Pictures:
    """All pictures of a corpus, arrays with one entry each, in the declared order.

    Records that repeat the key of an earlier one (by dataset, shard, row) stand at the end.
    ``shard`` indexes ``shards``, pairs of dataset and shard name; ``row`` is that of the index.
    ``group`` and ``stand_in`` are as in :mod:`dedup.exact`; a repeated record has those of the
    first.
    """

    shards: Sequence[tuple[str, str]]
    shard: Ints
    row: Ints
    key: npt.NDArray[np.bytes_]
    threshold: npt.NDArray[np.float32]
    group: Ints
    stand_in: Ints

    def to_compare(self) -> Ints:
        """Return the rows that are searched for near-duplicates, in order of their keys."""
        is_node = self.stand_in == np.arange(len(self.key))
        rows = np.flatnonzero(is_node & np.isfinite(self.threshold))
        return rows[np.argsort(self.key[rows])]


def read_pictures(
    root: str, shards: Sequence[tuple[str, str]], thresholds: Mapping[str, float]
) -> Pictures:
    """Read the image indexes of ``shards``, which are in order of dataset and shard name."""
    columns = ["key", "width", "height", "num_bytes", "sha256", "pixels_sha256"]
    parts = [
        storage.read_parquet(_index_url(root, dataset, shard), columns) for dataset, shard in shards
    ]

    def column(name: str, dtype: npt.DTypeLike) -> npt.NDArray[Any]:
        return np.concatenate(
            [part[name].to_numpy(zero_copy_only=False).astype(dtype) for part in parts]
        )

    key = column("key", "S32")
    num_pixels = column("width", np.int64) * column("height", np.int64)
    is_repeat = first_of_equal(key) != np.arange(len(key))
    order = keepers.declared_order(num_pixels, column("num_bytes", np.int64), key)
    order = order[np.argsort(is_repeat[order], kind="stable")]

    lengths = [part.num_rows for part in parts]
    threshold = np.repeat(
        np.array([thresholds[dataset] for dataset, _ in shards], np.float32), lengths
    )
    num_first = len(key) - int(is_repeat.sum())
    records = order[:num_first]
    groups = copy_groups(column("sha256", "S64")[records], column("pixels_sha256", "S64")[records])
    first = first_of_equal(key[order])
    return Pictures(
        shards=shards,
        shard=np.repeat(np.arange(len(shards)), lengths)[order],
        row=np.concatenate([np.arange(length) for length in lengths])[order],
        key=key[order],
        threshold=threshold[order],
        group=groups[first],
        stand_in=stand_ins(groups, threshold[records])[first],
    )


def read_descriptors(
    root: str, folder: str, dimension: int, pictures: Pictures, rows: Ints
) -> Vectors:
    """Read the descriptors of some pictures: float16 (len(rows), dimension).

    Raises:
        EvenmixError: a file is of another size of descriptor, or does not belong to its index.
    """
    vectors = np.empty((len(rows), dimension), np.float16)
    for shard in np.unique(pictures.shard[rows]):
        dataset, name = pictures.shards[shard]
        url = storage.join(root, folder, dataset, f"{name}.parquet")
        table, stored = read_vectors(url, "embedding", dimension)
        places = np.flatnonzero(pictures.shard[rows] == shard)
        wanted = pictures.row[rows[places]]
        keys = table["key"].to_numpy(zero_copy_only=False).astype("S32")
        if wanted.max() >= len(keys) or (keys[wanted] != pictures.key[rows[places]]).any():
            raise EvenmixError(
                f"{url} does not belong to {_index_url(root, dataset, name)}: their keys differ; "
                "embed under another dedup.descriptor"
            )
        vectors[places] = stored[wanted]
    return vectors


def _index_url(root: str, dataset: str, shard: str) -> str:
    return storage.join(root, IMAGES, dataset, f"{shard}.parquet")
