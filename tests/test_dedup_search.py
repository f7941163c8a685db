"""Search against brute force, in any order, in small blocks, with few and with all probes."""

import numpy as np
import pytest

from dedup import clusters, search
from dedup.records import Vectors
from dedup.search import Floats, Pairs, find_pairs, nearest_clusters

NUM_ORIGINALS, COPIES, DIMENSION = 400, 4, 64


def unit(vectors: Vectors) -> Vectors:
    return np.asarray(vectors / np.linalg.norm(vectors, axis=1, keepdims=True), np.float16)


@pytest.fixture(scope="module")
def vectors() -> Vectors:
    """Return groups of near and less near copies around 20 centres."""
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((20, DIMENSION))
    originals = centres[rng.integers(0, 20, NUM_ORIGINALS)] + 1.2 * rng.standard_normal(
        (NUM_ORIGINALS, DIMENSION)
    )
    copies = np.repeat(originals, COPIES, axis=0)
    return unit(
        copies + rng.choice([0.0, 0.3, 0.9], (len(copies), 1)) * rng.standard_normal(copies.shape)
    )


@pytest.fixture(scope="module")
def thresholds(vectors: Vectors) -> Floats:
    return np.random.default_rng(1).choice(np.array([0.75, 0.9], np.float32), len(vectors))


def brute_force(vectors: Vectors, thresholds: Floats) -> dict[tuple[int, int], np.float32]:
    wide = vectors.astype(np.float64)
    lengths = np.sqrt((wide**2).sum(axis=1))
    cosines = (wide @ wide.T / np.outer(lengths, lengths)).astype(np.float32)
    needed = np.maximum.outer(thresholds, thresholds)
    a, b = np.nonzero(np.triu(cosines >= needed, k=1))
    return {(int(i), int(j)): cosines[i, j] for i, j in zip(a, b, strict=True)}


def as_dict(pairs: Pairs) -> dict[tuple[int, int], np.float32]:
    found = list(zip(pairs.a.tolist(), pairs.b.tolist(), strict=True))
    assert found == sorted(set(found))  # each once, in order
    return dict(zip(found, pairs.similarity, strict=True))


def fit(vectors: Vectors, num_clusters: int) -> Vectors:
    keys = [f"{row:032x}" for row in range(len(vectors))]
    sample = clusters.choose_sample(keys, len(keys), seed=0)
    return clusters.fit(vectors[sample], num_clusters, seed=0)


@pytest.mark.parametrize("block", [7, 100, 2048])
@pytest.mark.parametrize("num_clusters", [1, 5])
def test_all_probes_are_an_exact_search(
    vectors: Vectors,
    thresholds: Floats,
    num_clusters: int,
    block: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    few, their_thresholds = vectors[:500], thresholds[:500]
    monkeypatch.setattr(search, "BLOCK", block)
    nearest = nearest_clusters(few, fit(few, num_clusters), nprobe=5)
    assert nearest.shape == (500, num_clusters)
    found = as_dict(find_pairs(few, their_thresholds, nearest))
    assert found == brute_force(few, their_thresholds)
    assert len(found) > 200


def test_more_probes_find_more_of_the_pairs(vectors: Vectors, thresholds: Floats) -> None:
    truth = brute_force(vectors, thresholds)
    centroids = fit(vectors, 40)
    recall = []
    for nprobe in (1, 2, 8, 40):
        found = as_dict(
            find_pairs(vectors, thresholds, nearest_clusters(vectors, centroids, nprobe))
        )
        assert found.items() <= truth.items()
        recall.append(len(found) / len(truth))
    assert recall == sorted(recall)
    assert recall[0] < 1
    assert recall[2] >= 0.99
    assert recall[3] == 1


def test_a_pair_is_found_when_only_one_probes_the_other_s_home() -> None:
    vectors = unit(np.array([[1.0, 0.1], [1.0, -0.1]]))
    thresholds = np.array([0.9, 0.9], np.float32)
    for nearest in ([[0, 1], [1, 2]], [[0, 2], [1, 0]], [[0, 1], [1, 0]]):
        assert list(as_dict(find_pairs(vectors, thresholds, np.array(nearest)))) == [(0, 1)]
    assert not as_dict(find_pairs(vectors, thresholds, np.array([[0, 2], [1, 2]])))


def test_the_order_of_vectors_does_not_matter(vectors: Vectors, thresholds: Floats) -> None:
    centroids = fit(vectors, 40)
    straight = as_dict(find_pairs(vectors, thresholds, nearest_clusters(vectors, centroids, 3)))
    order = np.random.default_rng(2).permutation(len(vectors))
    shuffled = as_dict(
        find_pairs(
            vectors[order], thresholds[order], nearest_clusters(vectors[order], centroids, 3)
        )
    )
    renamed = {tuple(sorted((order[a], order[b]))): s for (a, b), s in shuffled.items()}
    assert renamed == straight


def test_equal_vectors_reach_a_threshold_of_one() -> None:
    rng = np.random.default_rng(3)
    vectors = np.repeat(unit(rng.standard_normal((50, 512))), 2, axis=0)
    one = np.ones(len(vectors), np.float32)
    found = as_dict(find_pairs(vectors, one, np.zeros((100, 1), np.int64)))
    assert found == {(i, i + 1): np.float32(1) for i in range(0, 100, 2)}


def test_the_threshold_itself_counts() -> None:
    vectors = np.array([[1, 0], [0.6, 0.8]], np.float16)
    cosine = next(iter(brute_force(vectors, np.zeros(2, np.float32)).values()))
    nearest = np.zeros((2, 1), np.int64)
    assert as_dict(find_pairs(vectors, np.array([0, cosine], np.float32), nearest))
    above = np.nextafter(cosine, np.float32(1))
    assert not as_dict(find_pairs(vectors, np.array([0, above], np.float32), nearest))


def test_no_vectors() -> None:
    nothing = np.empty((0, 8), np.float16)
    nearest = nearest_clusters(nothing, nothing, 8)
    assert not as_dict(find_pairs(nothing, np.empty(0, np.float32), nearest))
