"""Clusters: k-means over descriptors, so that a search need not compare all with all.

A pair at a border lives in two clusters and is lost: about one real pair in ten. Several
clusterings that know nothing of each other lose far fewer, and at equal cost fewer than one whose
vectors are compared within several near clusters each.

Spherical k-means of FAISS. Its result depends on the order of its input (measured: it changed which
true pairs share a cluster for 22 % of them) and on the number of threads, so the sample is chosen
and ordered by a hash of the keys, and one thread fits it.
"""

import math
from dataclasses import dataclass

import faiss
import numpy as np
import numpy.typing as npt

from dedup.records import Floats, Ints, Vectors

SAMPLE_PER_CLUSTER = 125
"""Vectors a cluster in the sample that is fitted: HiDream-I1 has 2 million for 16,000."""

_FITTED_BYTES = 10
"""What a number of a sample takes: as it is read, put together and sorted, and in float32."""

ROWS_PER_PART = 200_000
"""Pictures in one part of a clustering, which are searched in memory: about 0.5 GB of them."""

BLOCK = 1024
"""Vectors that are assigned at once: at 16,000 clusters their products take 64 MiB."""

ITERATIONS = 10
"""Twice as many take twice the time, and four clusterings then reach .9963 of the pairs instead of
.9955 (200,000 vectors in 186 clusters)."""

_EXACT_BELOW = 20_000


def default_num_clusters(num_vectors: int) -> int:
    """Return how many clusters a corpus gets when the recipe does not say.

    HiDream-I1's 16,000 for the 160 million pictures of i1, and one, an exact search, below 20,000.
    Between them the number grows as the square root: assigning takes N C products, and comparing
    within clusters N^2 / C of them. More clusters also lose fewer pairs, for pictures that are
    alike are then most of a cluster.
    """
    if num_vectors < _EXACT_BELOW:
        return 1
    return round(16_000 * math.sqrt(num_vectors / 160e6))


def fit_memory(num_clusters: int, num_vectors: int, dimension: int) -> dict[str, str]:
    """Return the resource hint of fitting so many clusters to a sample of the vectors."""
    num_sampled = min(num_clusters * SAMPLE_PER_CLUSTER, num_vectors)
    return {"min_ram": f"{4 + num_sampled * dimension * _FITTED_BYTES // 10**9}GB"}


def fit(sample: Vectors, num_clusters: int, seed: int) -> Floats:
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
            niter=ITERATIONS,
            seed=seed % 2**31,  # FAISS takes a C int
            spherical=True,
            min_points_per_centroid=1,
            max_points_per_centroid=len(sample),
        )
        kmeans.train(np.ascontiguousarray(sample, np.float32))
    finally:
        faiss.omp_set_num_threads(threads)
    return np.asarray(kmeans.centroids, np.float32)


def shares(sample: npt.NDArray[np.float16], centroids: Vectors) -> npt.NDArray[np.float64]:
    """Return the part of a sample (n, d) that lives in each of the clusters: float64 (C,)."""
    homes = home(sample, np.asarray(centroids, np.float16))
    return np.bincount(homes, minlength=len(centroids)) / max(1, len(sample))


def home(vectors: npt.NDArray[np.float16], centroids: npt.NDArray[np.float16]) -> Ints:
    """Return the home cluster of each vector: (n,), that of the greatest product.

    Of equally near clusters it is the lower number. float32 says which are nearest but for its
    rounding, and float64, which adds such products exactly (:mod:`dedup.search`), decides between
    those. So the result depends on neither blocks, threads nor machine.
    """
    homes = np.empty(len(vectors), np.int64)
    columns = centroids.astype(np.float32).T
    for start in range(0, len(vectors), BLOCK):
        block = vectors[start : start + BLOCK]
        products = block.astype(np.float32) @ columns
        nearest = products.argmax(axis=1)
        enough = products.max(axis=1, keepdims=True) - 2 * rounding(vectors.shape[1])
        unsure = np.flatnonzero(np.count_nonzero(products >= enough, axis=1) > 1)
        if len(unsure):
            exact = block[unsure].astype(np.float64) @ centroids.astype(np.float64).T
            nearest[unsure] = exact.argmax(axis=1)
        homes[start : start + BLOCK] = nearest
    return homes


def rounding(dimension: int) -> float:
    """Return how far a float32 product of vectors of length about 1 can be from the exact one.

    The bound for sums in any order (Higham, Accuracy and Stability of Numerical Algorithms, 3.1),
    twice, so that it holds for vectors that are not quite of length 1.
    """
    return 2 * dimension * 2.0**-24


def vector_hashes(vectors: npt.NDArray[np.float16]) -> npt.NDArray[np.uint64]:
    """Return a hash of each vector's bytes: (n,). Equal vectors have equal ones."""
    weights = mixed(np.arange(vectors.shape[1], dtype=np.uint64)) | np.uint64(1)
    words = np.ascontiguousarray(vectors).view(np.uint16)
    sums = [
        words[start : start + BLOCK].astype(np.uint64) @ weights
        for start in range(0, len(words), BLOCK)
    ]
    return mixed(np.concatenate([np.empty(0, np.uint64), *sums]))


def mixed(numbers: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Return 64 bits that stand for random ones of each number, no two of them the same.

    SplitMix64 (Steele, Lea and Flood, Fast splittable pseudorandom number generators, OOPSLA 2014).
    """
    x = numbers + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@dataclass(frozen=True)
class Layout:
    """Which parts hold the clusters of a clustering.

    Cluster c has ``num[c]`` parts from part ``first[c]`` on. Several small clusters share a part;
    a large one has several of its own.
    """

    first: Ints
    num: Ints

    @property
    def num_parts(self) -> int:
        """Return the number of parts."""
        return int((self.first + self.num).max(initial=0))

    def parts_of(self, clusters: Ints, vectors: npt.NDArray[np.float16]) -> Ints:
        """Return the part of each of n vectors (n, d), whose home clusters are ``clusters`` (n,).

        Equal vectors are in one part.
        """
        parts = self.first[clusters]
        split = np.flatnonzero(self.num[clusters] > 1)
        num = self.num[clusters[split]].astype(np.uint64)
        parts[split] += (vector_hashes(vectors[split]) % num).astype(np.int64)
        return parts

    def comparisons(self) -> list[tuple[int, ...]]:
        """Return what is compared: each part with itself, and two parts of one large cluster."""
        own = [(part,) for part in range(self.num_parts)]
        large = np.flatnonzero(self.num > 1)
        crosswise = [
            (part, other)
            for first, num in zip(self.first[large].tolist(), self.num[large].tolist(), strict=True)
            for part in range(first, first + num)
            for other in range(part + 1, first + num)
        ]
        return [*own, *crosswise]


def lay_out(shares: npt.NDArray[np.float64], num_vectors: int) -> Layout:
    """Put the clusters into parts of at most ROWS_PER_PART vectors, going by their shares (C,).

    Shares are those of a sample, so that a part can turn out somewhat larger, and a cluster of
    which the sample has nothing can have vectors. A large cluster has parts to itself, and
    each of them is compared with each other: a swarm of millions takes the square of its parts.
    """
    first, num = np.empty(len(shares), np.int64), np.ones(len(shares), np.int64)
    part, rows = 0, 0.0  # the part that is being filled
    for cluster, expected in enumerate(np.maximum(shares * num_vectors, 1).tolist()):
        if rows and rows + expected > ROWS_PER_PART:
            part, rows = part + 1, 0.0
        first[cluster] = part
        rows += expected
        if expected > ROWS_PER_PART:
            num[cluster] = math.ceil(expected / ROWS_PER_PART)
            part, rows = part + int(num[cluster]), 0.0
    return Layout(first, num)
