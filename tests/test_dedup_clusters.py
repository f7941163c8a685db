"""Clusters: equal for any order of arrival and any number of threads."""

import faiss
import numpy as np
import pytest

from dedup.clusters import choose_sample, default_num_clusters, fit

KEYS = [f"{row:032x}" for row in range(3_000)]
VECTORS = np.random.default_rng(0).standard_normal((3_000, 32)).astype(np.float16)


@pytest.mark.parametrize(
    ("num_pictures", "num_clusters"),
    [(0, 1), (100, 1), (19_999, 1), (20_000, 2), (1_000_000, 100), (160_000_000, 16_000)],
)
def test_default_number(num_pictures: int, num_clusters: int) -> None:
    assert default_num_clusters(num_pictures) == num_clusters


def test_order_of_arrival_and_threads_do_not_matter() -> None:
    straight = fit(VECTORS[choose_sample(KEYS, 2_000, seed=0)], 10, seed=0)
    assert straight.shape == (10, 32)
    np.testing.assert_allclose(np.linalg.norm(straight, axis=1), 1, atol=1e-5)

    order = np.random.default_rng(1).permutation(len(KEYS))
    sample = choose_sample([KEYS[i] for i in order], 2_000, seed=0)
    threads = faiss.omp_get_max_threads()
    try:
        for count in (1, 2):
            faiss.omp_set_num_threads(count)
            np.testing.assert_array_equal(fit(VECTORS[order[sample]], 10, seed=0), straight)
            assert faiss.omp_get_max_threads() == count
    finally:
        faiss.omp_set_num_threads(threads)


def test_the_seed_chooses_another_sample() -> None:
    one, other = (choose_sample(KEYS, 500, seed) for seed in (0, 1))
    assert len(set(one)) == len(set(other)) == 500
    assert set(one) != set(other)


def test_fewer_vectors_than_clusters() -> None:
    assert fit(VECTORS[:3], 10, seed=0).shape == (3, 32)
    assert fit(VECTORS[:0], 10, seed=0).shape == (0, 32)
