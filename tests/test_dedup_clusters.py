"""Clusters: equal for any threads and blocks, and laid out in parts of bounded size."""

from collections.abc import Iterator
from contextlib import contextmanager

import faiss
import numpy as np
import numpy.typing as npt
import pytest

from dedup import clusters
from dedup.clusters import default_num_clusters, fit, home, lay_out, shares, vector_hashes
from dedup.records import Vectors


def unit(vectors: Vectors) -> npt.NDArray[np.float16]:
    return np.asarray(vectors / np.linalg.norm(vectors, axis=1, keepdims=True), np.float16)


VECTORS = unit(np.random.default_rng(0).standard_normal((3_000, 32)))
CENTROIDS = unit(np.random.default_rng(1).standard_normal((50, 32)))


@pytest.mark.parametrize(
    ("num_vectors", "num_clusters"),
    [(0, 1), (100, 1), (19_999, 1), (20_000, 179), (1_000_000, 1_265), (160_000_000, 16_000)],
)
def test_default_number(num_vectors: int, num_clusters: int) -> None:
    assert default_num_clusters(num_vectors) == num_clusters


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(count)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(before)


def test_threads_do_not_matter_and_are_left_as_they_were() -> None:
    straight = fit(VECTORS, 10, seed=0)
    assert straight.shape == (10, 32)
    assert straight.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(straight, axis=1), 1, atol=1e-5)
    for count in (1, 2):
        with threads(count):
            np.testing.assert_array_equal(fit(VECTORS, 10, seed=0), straight)
            assert faiss.omp_get_max_threads() == count
    assert not np.array_equal(fit(VECTORS, 10, seed=1), straight)


def test_planted_clusters_are_found() -> None:
    topics = np.repeat(np.arange(10), 100)
    noise = np.random.default_rng(2).standard_normal((1_000, 32))
    vectors = unit(CENTROIDS[topics].astype(np.float32) + 0.02 * noise)
    order = np.random.default_rng(3).permutation(1_000)
    centroids = fit(vectors[order], 20, seed=0)
    homes = home(vectors, centroids.astype(np.float16))
    assert all(len(set(topics[homes == cluster].tolist())) <= 1 for cluster in range(20))


def test_fewer_vectors_than_clusters() -> None:
    assert fit(VECTORS[:3], 10, seed=0).shape == (3, 32)
    assert fit(VECTORS[:0], 10, seed=0).shape == (0, 32)
    assert shares(VECTORS[:0], fit(VECTORS[:0], 10, seed=0)).shape == (0,)


def test_many_equal_vectors() -> None:
    sample = np.concatenate([np.repeat(VECTORS[:1], 900, axis=0), VECTORS[:100]])
    centroids = fit(sample, 50, seed=0)
    assert np.isfinite(centroids).all()
    np.testing.assert_allclose(np.linalg.norm(centroids, axis=1), 1, atol=1e-5)
    found = shares(sample, centroids)
    assert found.max() >= 0.9
    assert found.sum() == pytest.approx(1)


def test_shares_are_those_of_the_sample() -> None:
    centroids = fit(VECTORS, 10, seed=0)
    found = shares(VECTORS, centroids)
    homes = home(VECTORS, centroids.astype(np.float16))
    assert found.dtype == np.float64
    assert (found * len(VECTORS)).tolist() == [np.sum(homes == i) for i in range(10)]


@pytest.mark.parametrize("block", [3, 7, 1024])
def test_home_is_the_greatest_product_whatever_the_block(
    block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(clusters, "BLOCK", block)
    products = VECTORS.astype(np.float64) @ CENTROIDS.astype(np.float64).T
    np.testing.assert_array_equal(home(VECTORS, CENTROIDS), products.argmax(axis=1))


def test_float64_decides_between_centroids_that_float32_cannot_tell_apart() -> None:
    # The two products are 2^-25 apart, which is lost beside 1 in float32.
    vector = np.array([[1, 2**-13, 0]], np.float16)
    near, nearer = [1, 0, 1], [1, 2**-12, 0]
    assert np.float32(1) + np.float32(2**-25) == np.float32(1)
    for centroids, expected in (([near, nearer], 1), ([nearer, near], 0), ([nearer, nearer], 0)):
        assert home(vector, np.array(centroids, np.float16)).tolist() == [expected]


def test_equal_vectors_have_equal_hashes_and_others_have_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    hashes = vector_hashes(VECTORS)
    assert len(np.unique(hashes)) == len(VECTORS)
    monkeypatch.setattr(clusters, "BLOCK", 7)
    np.testing.assert_array_equal(vector_hashes(VECTORS.copy()), hashes)
    # A result that ever changes would part what an interrupted run has put together.
    assert vector_hashes(np.array([[1, 0], [0, 1]], np.float16)).tolist() == [
        14464952180924913990,
        8142529404631713777,
    ]


def test_layout_packs_small_clusters_and_splits_large_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clusters, "ROWS_PER_PART", 100)
    layout = lay_out(np.array([0.04, 0.05, 0.02, 0.45, 0.099, 0.0, 0.34]), 1_000)
    assert layout.first.tolist() == [0, 0, 1, 2, 7, 7, 8]
    assert layout.num.tolist() == [1, 1, 1, 5, 1, 1, 4]
    assert layout.num_parts == 12
    assert layout.comparisons() == [
        *((part,) for part in range(12)),
        *((a, b) for a in range(2, 7) for b in range(a + 1, 7)),
        *((a, b) for a in range(8, 12) for b in range(a + 1, 12)),
    ]


@pytest.mark.parametrize("shares", [[0, 0.9, 0.1], [0.5, 0, 0.5], [0, 0, 1], [0.9, 0, 0, 0.1]])
def test_a_large_cluster_shares_no_part_even_with_what_the_sample_has_nothing_of(
    shares: list[float],
) -> None:
    layout = lay_out(np.array(shares), 1_000_000)
    parts = [
        set(range(first, first + num)) for first, num in zip(layout.first, layout.num, strict=True)
    ]
    assert max(layout.num) > 1
    for cluster in np.flatnonzero(layout.num > 1):
        others = [part for number, part in enumerate(parts) if number != cluster]
        assert not parts[cluster] & set.union(*others)
    assert set.union(*parts) == set(range(layout.num_parts))


def test_one_small_cluster_is_one_part_and_none_is_none() -> None:
    assert lay_out(np.array([1.0]), 200_000).comparisons() == [(0,)]
    assert lay_out(np.array([1.0]), 200_001).comparisons() == [(0,), (1,), (0, 1)]
    assert lay_out(np.empty(0), 0).comparisons() == []


def test_parts_are_filled_evenly_and_equal_vectors_stay_together(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(clusters, "ROWS_PER_PART", 500)
    vectors = np.concatenate([VECTORS, VECTORS])
    homes = home(vectors, CENTROIDS[:5])
    found = np.bincount(homes, minlength=5) / len(homes)
    layout = lay_out(found, len(vectors))
    assert (layout.num > 1).all()
    parts = layout.parts_of(homes, vectors)
    np.testing.assert_array_equal(parts[:3_000], parts[3_000:])
    sizes = np.bincount(parts, minlength=layout.num_parts)
    assert sizes.sum() == 6_000
    assert sizes.max() <= 600
    for cluster in range(5):
        its = np.unique(parts[homes == cluster])
        first, num = layout.first[cluster], layout.num[cluster]
        assert its.tolist() == list(range(first, first + num))
    order = np.random.default_rng(4).permutation(6_000)
    np.testing.assert_array_equal(layout.parts_of(homes[order], vectors[order]), parts[order])
    assert layout.parts_of(homes[:0], vectors[:0]).tolist() == []


def test_parts_of_i1_are_bounded_and_few() -> None:
    sizes = np.random.default_rng(5).pareto(2.0, 16_000) + 0.2
    found = sizes / sizes.sum()
    layout = lay_out(found, 160_000_000)
    rows = np.zeros(layout.num_parts)
    for cluster, expected in enumerate(found * 160e6):
        first, num = layout.first[cluster], layout.num[cluster]
        rows[first : first + num] += expected / num
    assert rows.max() <= 200_000
    assert layout.num_parts < 2 * 160e6 / 200_000
