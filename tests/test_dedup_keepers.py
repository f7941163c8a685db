"""Which pictures stay: on small graphs by hand, and on random ones against the plain definition."""

import numpy as np
import pytest

from dedup.keepers import choose_keepers, declared_order, nearest_keepers


def kept_of(num_pictures: int, edges: list[tuple[int, int]]) -> list[int]:
    pairs = np.array(edges, np.int64).reshape(-1, 2)
    kept = choose_keepers(num_pictures, pairs[:, 0], pairs[:, 1])
    return [int(picture) for picture in np.flatnonzero(kept)]


@pytest.mark.parametrize(
    ("num_pictures", "edges", "kept"),
    [
        (0, [], []),
        (3, [], [0, 1, 2]),
        (2, [(0, 1)], [0]),
        (3, [(0, 1), (1, 2)], [0, 2]),  # a chain: the last has no kept twin, so it stays
        (3, [(0, 2), (1, 2)], [0, 1]),  # two good pictures that are unlike
        (3, [(0, 1), (0, 2), (1, 2)], [0]),
        (6, [(0, 1), (1, 2), (2, 3), (3, 4), (4, 5)], [0, 2, 4]),
        (4, [(0, 3), (1, 3), (1, 2)], [0, 1]),
    ],
)
def test_small_graphs(num_pictures: int, edges: list[tuple[int, int]], kept: list[int]) -> None:
    assert kept_of(num_pictures, edges) == kept


def greedy(num_pictures: int, edges: set[tuple[int, int]]) -> list[int]:
    """Walk from best to worst, and keep what is like none kept so far."""
    kept: list[int] = []
    for picture in range(num_pictures):
        if not any((other, picture) in edges for other in kept):
            kept.append(picture)
    return kept


@pytest.mark.parametrize("seed", range(40))
def test_random_graphs_in_any_order_of_edges(seed: int) -> None:
    rng = np.random.default_rng(seed)
    num_pictures = int(rng.integers(2, 60))
    ends = rng.integers(0, num_pictures, size=(int(rng.integers(0, 4 * num_pictures)), 2))
    edges = {(int(min(a, b)), int(max(a, b))) for a, b in ends if a != b}
    shuffled = rng.permutation(np.array(sorted(edges), np.int64).reshape(-1, 2))
    kept = choose_keepers(num_pictures, shuffled[:, 0], shuffled[:, 1])
    assert np.flatnonzero(kept).tolist() == greedy(num_pictures, edges)

    similarity = rng.choice(np.array([0.75, 0.8, 0.9], np.float32), len(shuffled))
    keeper, edge = nearest_keepers(kept, shuffled[:, 0], shuffled[:, 1], similarity)
    for picture in range(num_pictures):
        twins = [
            (-float(similarity[i]), int(a))
            for i, (a, b) in enumerate(shuffled)
            if b == picture and kept[a]
        ]
        if kept[picture]:
            assert (keeper[picture], edge[picture]) == (picture, -1)
            assert not twins
        else:
            assert set(shuffled[edge[picture]]) == {picture, keeper[picture]}
            assert (-similarity[edge[picture]], keeper[picture]) == min(twins)


def test_long_chain() -> None:
    chain = np.arange(2_000)
    kept = choose_keepers(2_001, chain, chain + 1)
    np.testing.assert_array_equal(np.flatnonzero(kept), np.arange(0, 2_001, 2))


def test_declared_order_is_level_then_pixels_bytes_priority_key() -> None:
    level = np.array([2, 2, 2, 2, 2, 1])
    num_pixels = np.array([100, 400, 400, 400, 400, 1])
    num_bytes = np.array([9, 5, 7, 5, 5, 1])
    priority = np.array([0, 1, 1, 0, 1, 1])
    keys = np.frombuffer(b"".join(bytes([letter]) * 16 for letter in b"adcfeb"), "V16")
    order = declared_order(level, num_pixels, num_bytes, priority, keys)
    assert order.tolist() == [5, 2, 3, 1, 4, 0]
