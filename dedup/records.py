"""The schemas of dedup's tables, and descriptors between Arrow and NumPy."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipeline import storage
from pipeline.errors import EvenmixError

Vectors = npt.NDArray[np.floating]
"""Descriptors, one a row: shape (n, d), float16 where stored, float32 where made."""

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]
Bools = npt.NDArray[np.bool_]

THUMBNAIL_BYTES = 1536
"""A thumbnail (:mod:`dedup.second_look`): 44 x 32 luminances, then both chromas 8 x 8, int8."""

_KEY = pa.binary(16)
_THUMBNAIL = pa.binary(THUMBNAIL_BYTES)

EDGES = pa.schema(
    [
        ("better", pa.int64()),
        ("worse", pa.int64()),
        ("better_key", _KEY),
        ("worse_key", _KEY),
        ("similarity", pa.float32()),
        ("equal", pa.bool_()),
        ("truncated", pa.bool_()),
    ]
)
"""Two pictures that count as copies, by their ranks in the declared order: ``better`` < ``worse``.

``equal`` ones have equal vectors and one rule: the worse stands aside for the better, and has no
other edges. ``truncated`` says that the worse picture has more better neighbours than are
listed."""

GRAPH = pa.schema(
    [
        ("key", pa.string()),
        ("neighbour", pa.string()),
        ("similarity", pa.float32()),
        ("equal", pa.bool_()),
        ("truncated", pa.bool_()),
        ("rank", pa.int64()),
        ("neighbour_rank", pa.int64()),
    ]
)
"""The graph of similar pairs: a picture, and one of its best neighbours among those better than it.

Sorted by ``rank`` and ``neighbour_rank``, the places in the declared order; each pair once.
``equal`` and ``truncated`` are as in EDGES."""

PICTURES = pa.schema(
    [
        ("rank", pa.int64()),
        ("key", _KEY),
        ("stand_in", pa.int64()),
        ("copies", pa.int64()),
        ("draw", pa.int64()),
        ("accepted", pa.bool_()),
        ("settled", pa.bool_()),
    ]
)
"""A picture of the corpus, or an evaluation picture, in the order of the shards and their rows.

``rank`` is its place in the declared order, 0 the best. ``stand_in`` is the rank of the picture
with whose fate its own is bound, its own rank if it is free. ``copies`` is the rank of the best
picture with equal bytes or equal pixels. ``draw`` is its place in a random order of those that are
searched for near-duplicates, -1 if it is not. ``accepted`` ones were kept by an earlier search,
``settled`` ones removed by it."""

REMOVALS = pa.schema(
    [
        ("place", pa.int64()),
        ("key", pa.string()),
        ("duplicate_of", pa.string()),
        ("keeper_dataset", pa.string()),
        ("keeper_shard", pa.string()),
        ("keeper_row", pa.int64()),
        ("similarity", pa.float32()),
        ("group", pa.string()),
        ("rule", pa.string()),
    ]
)
"""One removed picture; ``place`` is its row in its group of shards. ``keeper_dataset`` and the
columns beside it say where the picture ``duplicate_of`` is, null where only an earlier search knew
that. The others are as in DUPLICATES."""

DUPLICATES = pa.schema(
    [
        ("key", pa.string()),
        ("duplicate_of", pa.string()),
        ("similarity", pa.float32()),
        ("group", pa.string()),
        ("rule", pa.string()),
    ]
)
"""What became of a picture, row-aligned with the image index.

``duplicate_of`` is the key of the kept picture in whose favour this one goes, and null if it
stays. ``similarity`` is their cosine, 1.0 for exact copies, null if kept. ``group`` is the key of
the group's kept picture, its own if kept. ``rule`` is ``exact_copy``, ``near_duplicate`` or
``contamination`` (:class:`pipeline.reasons.RejectReason`), null if kept. What is removed for
``contamination`` is a duplicate of an evaluation picture, or in a group with one that is; the
latter have no similarity."""


def vector_type(dimension: int) -> pa.DataType:
    """Return the column type of descriptors and centroids of ``dimension``: float16."""
    return pa.list_(pa.float16(), dimension)


def embeddings_schema(dimension: int) -> pa.Schema:
    """Return the schema of R/embeddings: a picture's key and its unit-length descriptor.

    ``thumbnail`` and ``graphic`` are for the second look (:mod:`dedup.second_look`): the picture in
    1,536 bytes, and whether it is one of text or plain graphics.
    """
    return pa.schema(
        [
            ("key", pa.string()),
            ("embedding", vector_type(dimension)),
            ("thumbnail", _THUMBNAIL),
            ("graphic", pa.bool_()),
        ]
    )


def centroids_schema(dimension: int) -> pa.Schema:
    """Return the schema of a clustering: row i is the unit-length centre of cluster i.

    ``share`` is the part of the sample that lives in the cluster: all shares sum to 1.
    """
    return pa.schema([("centroid", vector_type(dimension)), ("share", pa.float64())])


def described_schema(dimension: int) -> pa.Schema:
    """Return the schema in which described pictures are exchanged; see :class:`Described`."""
    return pa.schema(
        [
            ("rank", pa.int64()),
            ("key", _KEY),
            ("dataset", pa.int32()),
            ("accepted", pa.bool_()),
            ("graphic", pa.bool_()),
            ("thumbnail", pa.binary()),
            ("cluster", pa.int32()),
            ("embedding", vector_type(dimension)),
        ]
    )


@dataclass(frozen=True)
class Described:
    """Described pictures, arrays with one entry each.

    ``rank`` is the place in the declared order, ``dataset`` the number among the rules' datasets,
    ``cluster`` the number of the home cluster, -1 where none is meant. ``thumbnail`` is int8
    (n, 1536), zeros where the rules need none; ``vector`` is float16 (n, d) of length about 1.
    ``key`` has dtype V16.
    """

    rank: Ints
    key: npt.NDArray[np.void]
    dataset: Ints
    accepted: Bools
    graphic: Bools
    thumbnail: npt.NDArray[np.int8]
    cluster: Ints
    vector: npt.NDArray[np.float16]

    def __len__(self) -> int:
        return len(self.rank)

    def take(self, rows: Ints) -> "Described":
        """Return some of the pictures."""
        return Described(
            self.rank[rows],
            self.key[rows],
            self.dataset[rows],
            self.accepted[rows],
            self.graphic[rows],
            self.thumbnail[rows],
            self.cluster[rows],
            self.vector[rows],
        )

    def in_clusters(self, cluster: Ints) -> "Described":
        """Return the pictures with other home clusters."""
        return replace(self, cluster=cluster)

    def to_table(self) -> pa.Table:
        """Return the pictures in the form in which they are exchanged.

        A thumbnail of zeros becomes null and takes no space.
        """
        lengths = self.thumbnail.any(axis=1) * THUMBNAIL_BYTES
        thumbnails = pa.BinaryArray.from_buffers(
            pa.binary(),
            len(self),
            [
                pa.py_buffer(np.packbits(lengths > 0, bitorder="little")),
                pa.py_buffer(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)),
                pa.py_buffer(np.ascontiguousarray(self.thumbnail[lengths > 0])),
            ],
        )
        columns = [
            pa.array(self.rank),
            key_column(self.key),
            pa.array(self.dataset, pa.int32()),
            pa.array(self.accepted),
            pa.array(self.graphic),
            thumbnails,
            pa.array(self.cluster, pa.int32()),
            to_column(self.vector),
        ]
        return pa.table(columns, schema=described_schema(self.vector.shape[1]))

    @classmethod
    def from_tables(cls, tables: Sequence[pa.Table], dimension: int) -> "Described":
        """Read what :meth:`to_table` gave, several tables one after the other."""
        table = pa.concat_tables([described_schema(dimension).empty_table(), *tables])
        columns = {name: table[name].combine_chunks() for name in table.column_names}
        is_there = columns["thumbnail"].is_valid().to_numpy(zero_copy_only=False)
        thumbnail = np.zeros((table.num_rows, THUMBNAIL_BYTES), np.int8)
        there = b"".join(columns["thumbnail"].drop_null().to_pylist())
        thumbnail[is_there] = np.frombuffer(there, np.int8).reshape(-1, THUMBNAIL_BYTES)
        return cls(
            columns["rank"].to_numpy(),
            keys_of(columns["key"]),
            columns["dataset"].to_numpy().astype(np.int64),
            columns["accepted"].to_numpy(zero_copy_only=False),
            columns["graphic"].to_numpy(zero_copy_only=False),
            thumbnail,
            columns["cluster"].to_numpy().astype(np.int64),
            from_column(columns["embedding"], dimension),
        )


def concatenate(parts: Sequence[Described], dimension: int) -> Described:
    """Return described pictures one part after the other."""
    if not parts:
        return Described.from_tables([], dimension)
    return Described(
        *(
            np.concatenate([getattr(part, field.name) for part in parts])
            for field in fields(Described)
        )
    )


def key_column(keys: npt.NDArray[np.void]) -> pa.Array:
    """Return keys, dtype V16, as a column of 16 bytes each."""
    return pa.FixedSizeBinaryArray.from_buffers(
        _KEY, len(keys), [None, pa.py_buffer(np.ascontiguousarray(keys))]
    )


def keys_of(column: pa.Array) -> npt.NDArray[np.void]:
    """Return a column of 16 bytes each, without nulls, as keys of dtype V16."""
    data = column.buffers()[1] or b""
    return np.frombuffer(data, "V16", len(column), column.offset * 16)


def keys_from_hex(column: pa.ChunkedArray) -> npt.NDArray[np.void]:
    """Return keys as they are in the image index, 32 hex digits without nulls, as dtype V16."""
    return np.frombuffer(b"".join(_bytes_of_hex(chunk) for chunk in column.chunks), "V16")


def _bytes_of_hex(column: pa.StringArray) -> bytes:
    _, offsets, digits = column.buffers()
    if not len(column):
        return b""
    ends = np.frombuffer(offsets, np.int32, len(column) + 1, column.offset * 4)
    return bytes.fromhex(digits[int(ends[0]) : int(ends[-1])].to_pybytes().decode("ascii"))


def to_hex(keys: npt.NDArray[np.void]) -> pa.StringArray:
    """Return keys, dtype V16, as they are in the image index: 32 hex digits each.

    They are fewer than 2^26, for a column of strings has less than 2 GiB.
    """
    digits = np.ascontiguousarray(keys).tobytes().hex().encode()
    ends = np.arange(0, len(digits) + 1, 32, dtype=np.int32)
    return pa.StringArray.from_buffers(len(keys), pa.py_buffer(ends), pa.py_buffer(digits))


def to_column(vectors: Vectors) -> pa.Array:
    """Return vectors (n, d) as a column of float16 lists."""
    flat = pa.array(np.ascontiguousarray(vectors, np.float16).reshape(-1))
    return pa.FixedSizeListArray.from_arrays(flat, vectors.shape[1])


def from_column(column: pa.Array, dimension: int) -> npt.NDArray[np.float16]:
    """Return a column of float16 lists as vectors (n, d)."""
    flat: npt.NDArray[np.float16] = column.flatten().to_numpy(zero_copy_only=False)
    return flat.reshape(-1, dimension)


def read_vectors(
    url: str, column: str, dimension: int, others: Sequence[str] = ()
) -> tuple[pa.Table, npt.NDArray[np.float16]]:
    """Read a column of vectors, and others, of a table.

    Returns the table and the vectors, float16 (n, ``dimension``).

    Raises:
        EvenmixError: the vectors are of another size or type, so made by another descriptor.
    """
    table = storage.read_parquet(url, [*others, column])
    if table.schema.field(column).type != vector_type(dimension):
        raise EvenmixError(
            f"{url} has no column {column} of {dimension} float16 numbers; it was made by another "
            "descriptor. Descriptors never mix: embed under another dedup.descriptor"
        )
    return table, from_column(table[column].combine_chunks(), dimension)
