"""Search: all pairs of pictures whose cosine reaches their thresholds.

Each vector lives in its nearest cluster and is compared with those that live in its ``nprobe``
nearest clusters: one probe alone loses about 10 % of real pairs at the borders, eight lose under
1 %. With as many probes as clusters the search is exact.

Cosines are exact numbers, hence the result depends on neither order, blocks, threads nor machine.
For vectors are stored as float16 of length about 1: a product of two is a multiple of 2^-48, and
partial sums stay below 2, so float64 adds them without rounding, in whatever order a matrix
product takes. What remains is one division, a rounding to float32, and the comparison.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dedup.records import Vectors

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]

BLOCK = 2048
"""Vectors on each side of one comparison: scores take 32 MiB, whatever a cluster's size."""


@dataclass(frozen=True)
class Pairs:
    """Pairs of rows, ``a`` < ``b``, sorted, each once, with their cosine."""

    a: Ints
    b: Ints
    similarity: Floats


def nearest_clusters(vectors: Vectors, centroids: Vectors, nprobe: int) -> Ints:
    """Return for each of n float16 vectors its nearest clusters, best first: (n, nprobe).

    Of equally near clusters the lower number comes first.
    """
    nprobe = min(nprobe, len(centroids))
    columns = centroids.astype(np.float64).T
    nearest = np.empty((len(vectors), nprobe), np.int64)
    for start in range(0, len(vectors), BLOCK):
        scores = vectors[start : start + BLOCK].astype(np.float64) @ columns
        nearest[start : start + BLOCK] = np.argsort(-scores, axis=1, kind="stable")[:, :nprobe]
    return nearest


def find_pairs(vectors: Vectors, thresholds: Floats, nearest: Ints) -> Pairs:
    """Return the pairs whose cosine is at or above the larger of their two thresholds.

    Args:
        vectors: float16 (n, d) of length about 1.
        thresholds: float32 (n,), one a vector.
        nearest: (n, nprobe) as from :func:`nearest_clusters`. Two vectors are compared if one
            probes the other's home cluster, which is its first.
    """
    found = [
        _compare(vectors, thresholds, queries, members)
        for visitors, residents in _clusters(nearest)
        for queries, members in _comparisons(visitors, residents)
    ]
    if not found:
        return Pairs(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.float32))
    a, b, similarity = (np.concatenate(parts) for parts in zip(*found, strict=True))
    # Two vectors that probe each other's homes are found twice.
    _, first = np.unique(a * len(vectors) + b, return_index=True)
    return Pairs(a[first], b[first], similarity[first])


def _clusters(nearest: Ints) -> Iterator[tuple[Ints, Ints]]:
    """Yield for each cluster the rows that only visit it, and those that live in it, ascending."""
    if not nearest.size:
        return
    probed = nearest.ravel()
    order = np.argsort(probed, kind="stable")
    _, starts = np.unique(probed[order], return_index=True)
    for places in np.split(order, starts[1:]):
        rows, probe = np.divmod(places, nearest.shape[1])
        yield rows[probe > 0], rows[probe == 0]


def _comparisons(visitors: Ints, residents: Ints) -> Iterator[tuple[Ints, Ints]]:
    """Split one cluster's comparisons into blocks: residents with each other and with visitors."""
    blocks = [residents[start : start + BLOCK] for start in range(0, len(residents), BLOCK)]
    for i, queries in enumerate(blocks):
        for members in blocks[i:]:
            yield queries, members
    for start in range(0, len(visitors), BLOCK):
        for members in blocks:
            yield visitors[start : start + BLOCK], members


def _compare(
    vectors: Vectors, thresholds: Floats, queries: Ints, members: Ints
) -> tuple[Ints, Ints, Floats]:
    """Compare two blocks; return the pairs that count, the lower row first."""
    left, right = vectors[queries].astype(np.float64), vectors[members].astype(np.float64)
    left_lengths, right_lengths = np.linalg.norm(left, axis=1), np.linalg.norm(right, axis=1)
    lowest = max(thresholds[queries].min(), thresholds[members].min())
    # Few products reach this, and only they are worth a division; the slack is for its rounding.
    enough = lowest * left_lengths.min() * right_lengths.min() * (1 - 1e-6)
    products = left @ right.T
    candidates = products >= enough
    if queries is members:  # which has each pair twice, and each vector with itself
        candidates = np.triu(candidates, k=1)
    i, j = np.nonzero(candidates)
    a, b = queries[i], members[j]
    similarity = (products[i, j] / (left_lengths[i] * right_lengths[j])).astype(np.float32)
    counts = similarity >= np.maximum(thresholds[a], thresholds[b])
    a, b = np.minimum(a[counts], b[counts]), np.maximum(a[counts], b[counts])
    return a, b, similarity[counts]
