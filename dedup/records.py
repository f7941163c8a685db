"""The schemas of dedup's tables, and descriptors between Arrow and NumPy."""

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipeline import storage
from pipeline.errors import EvenmixError

Vectors = npt.NDArray[np.floating]
"""Descriptors, one a row: shape (n, d), float16 where stored, float32 where made."""

PAIRS = pa.schema([("key_a", pa.string()), ("key_b", pa.string()), ("similarity", pa.float32())])
"""Two pictures whose cosine reaches both datasets' thresholds: each pair once, key_a < key_b,
sorted."""

REMOVALS = pa.schema(
    [
        ("dataset", pa.string()),
        ("shard", pa.string()),
        ("row", pa.int64()),
        ("key", pa.string()),
        ("duplicate_of", pa.string()),
        ("similarity", pa.float32()),
        ("rule", pa.string()),
    ]
)
"""One removed picture, by its place: ``row`` is that of the shard's image index."""

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
the group's kept picture, its own if kept. ``rule`` is ``exact_copy`` or ``near_duplicate``
(:class:`pipeline.reasons.RejectReason`), null if kept."""


def vector_type(dimension: int) -> pa.DataType:
    """Return the column type of descriptors and centroids of ``dimension``: float16."""
    return pa.list_(pa.float16(), dimension)


def embeddings_schema(dimension: int) -> pa.Schema:
    """Return the schema of R/embeddings: a picture's key and its unit-length descriptor."""
    return pa.schema([("key", pa.string()), ("embedding", vector_type(dimension))])


def centroids_schema(dimension: int) -> pa.Schema:
    """Return the schema of the clusters: row i is the unit-length centre of cluster i."""
    return pa.schema([("centroid", vector_type(dimension))])


def to_column(vectors: Vectors) -> pa.Array:
    """Return vectors (n, d) as a column of float16 lists."""
    flat = pa.array(np.ascontiguousarray(vectors, np.float16).reshape(-1))
    return pa.FixedSizeListArray.from_arrays(flat, vectors.shape[1])


def read_vectors(url: str, column: str, dimension: int) -> tuple[pa.Table, Vectors]:
    """Read a table with a column of vectors; return it and they as float16 (n, ``dimension``).

    Raises:
        EvenmixError: the vectors are of another size or type, so made by another descriptor.
    """
    table = storage.read_parquet(url)
    expected = vector_type(dimension)
    if column not in table.column_names or table.schema.field(column).type != expected:
        raise EvenmixError(
            f"{url} has no column {column} of {dimension} float16 numbers; it was made by another "
            "descriptor. Descriptors never mix: embed under another dedup.descriptor"
        )
    flat = table[column].combine_chunks().flatten().to_numpy(zero_copy_only=False)
    return table, flat.reshape(-1, dimension)
