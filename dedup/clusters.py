"""Clusters: k-means over descriptors, so that a search need not compare all with all.

Spherical k-means of FAISS. Its result depends on the order of its input (measured: it changed
which true pairs share a cluster for 22 % of them) and can depend on the number of threads, so the
sample is chosen and ordered by a hash of the keys, and one thread fits it.
"""

from collections.abc import Sequence

import faiss
import numpy as np

from dedup.records import Vectors
from pipeline.records import uniform_hash

PICTURES_PER_CLUSTER = 10_000
"""HiDream-I1 has 16,000 clusters; this gives as many for the 160 million pictures of i1, and one
cluster, an exact search, below 20,000 pictures."""

SAMPLE_PER_CLUSTER = 256
"""FAISS's own limit of points a centroid; more change the centroids little."""

_ITERATIONS = 20


def default_num_clusters(num_pictures: int) -> int:
    """Return how many clusters a corpus gets when the recipe does not say."""
    return max(1, num_pictures // PICTURES_PER_CLUSTER)


def choose_sample(keys: Sequence[str], size: int, seed: int) -> list[int]:
    """Return the indices of at most ``size`` keys, chosen and ordered by hash."""
    return sorted(range(len(keys)), key=lambda i: uniform_hash(seed, keys[i], "clusters"))[:size]


def fit(sample: Vectors, num_clusters: int, seed: int) -> Vectors:
    """Return unit-length centroids, float32 (num_clusters, d), of a sample (n, d).

    A sample of fewer vectors than clusters gives one cluster a vector.
    """
    num_clusters = min(num_clusters, len(sample))
    if num_clusters == 0:
        return np.empty(sample.shape, np.float32)
    threads = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    try:
        kmeans = faiss.Kmeans(
            sample.shape[1],
            num_clusters,
            niter=_ITERATIONS,
            seed=seed % 2**31,  # FAISS takes a C int
            spherical=True,
            min_points_per_centroid=1,
            max_points_per_centroid=len(sample),
        )
        kmeans.train(np.ascontiguousarray(sample, np.float32))
    finally:
        faiss.omp_set_num_threads(threads)
    return np.asarray(kmeans.centroids, np.float32)
