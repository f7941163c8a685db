"""Search against brute force: rules, blocks, order, swarms of equal and nearly equal vectors."""

import tracemalloc
from collections import defaultdict

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pytest

from dedup import search, second_look
from dedup.records import EDGES, THUMBNAIL_BYTES, Described, Vectors, keys_of
from dedup.rules import Rule, Rules
from dedup.search import compare, find_edges, find_edges_between

Edge = tuple[int, int, float, bool, bool]  # worse, better, similarity, equal, truncated

NUM_PICTURES, DIMENSION = 300, 32
ONE_RULE = Rules(("a",), ((Rule("near", 0.75, "none", True),),))


def all_kinds_of_rules() -> Rules:
    """Return rules of five datasets, for whose pairs the stricter wish holds."""
    own = [
        Rule("near", 0.75, "none", True),
        Rule("near", 0.9, "graphics", False),
        Rule("near", 0.8, "all", True),
        Rule("exact", 0.75, "none", True),
        Rule("off", 0.75, "none", True),
    ]
    stricter = [["near", "exact", "off"], ["none", "graphics", "all"]]

    def between(a: Rule, b: Rule) -> Rule:
        return Rule(
            max(a.duplicates, b.duplicates, key=stricter[0].index),
            max(a.threshold, b.threshold),
            max(a.second_look, b.second_look, key=stricter[1].index),
            a.mirrored and b.mirrored,
        )

    return Rules(tuple("abcde"), tuple(tuple(between(a, b) for b in own) for a in own))


def unit(vectors: Vectors) -> npt.NDArray[np.float16]:
    return np.asarray(vectors / np.linalg.norm(vectors, axis=1, keepdims=True), np.float16)


def described(vectors: npt.NDArray[np.float16], seed: int = 0) -> Described:
    """Return pictures of one dataset in one cluster, with ranks in random order."""
    n = len(vectors)
    rank = np.random.default_rng(seed).permutation(n)
    key = np.frombuffer(b"".join(number.to_bytes(16, "big") for number in rank.tolist()), "V16")
    no = np.zeros(n, np.bool_)
    thumbnail = np.zeros((n, THUMBNAIL_BYTES), np.int8)
    zeros = np.zeros(n, np.int64)
    return Described(rank, key, zeros, no, no, thumbnail, zeros, vectors)


@pytest.fixture(scope="module")
def pictures() -> Described:
    """Return pictures of all kinds: near, less near and equal copies around a few centres."""
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((12, DIMENSION))
    originals = centres[rng.integers(0, 12, 40)] + 0.6 * rng.standard_normal((40, DIMENSION))
    which = rng.integers(0, 40, NUM_PICTURES)
    noise = rng.choice([0.0, 0.0, 0.3, 0.6], (NUM_PICTURES, 1))
    vectors = originals[which] + noise * rng.standard_normal((NUM_PICTURES, DIMENSION))
    scenes = rng.integers(0, 256, (6, 8, 8, 3), np.uint8).repeat(8, axis=1).repeat(8, axis=2)
    sights = [second_look.thumbnail(view) for s in scenes for view in (s, s[:, ::-1].copy())]
    basis = described(unit(vectors))
    return Described(
        basis.rank,
        basis.key,
        rng.choice(5, NUM_PICTURES, p=[0.4, 0.2, 0.2, 0.1, 0.1]),
        rng.random(NUM_PICTURES) < 0.2,
        rng.random(NUM_PICTURES) < 0.4,
        np.stack(sights)[2 * (which % 6) + (rng.random(NUM_PICTURES) < 0.2)],
        which % 3,  # equal vectors share a cluster
        basis.vector,
    )


def near_copies(pictures: Described, rules: Rules) -> dict[tuple[int, int], float]:
    """Compare all with all, a pair at a time: two rows, and their cosine."""
    wide = pictures.vector.astype(np.float64)
    lengths = np.sqrt((wide**2).sum(axis=1))
    cosines = (wide @ wide.T / np.outer(lengths, lengths)).astype(np.float32)
    found = {}
    for i, j in np.argwhere(cosines >= 0.7).tolist():
        rule = rules.between(pictures.dataset[i], pictures.dataset[j])
        if (
            i != j
            and rule.is_near
            and cosines[i, j] >= np.float32(rule.threshold)
            and not (pictures.accepted[i] and pictures.accepted[j])
            and passes_second_look(pictures, i, j, rule)
        ):
            found[i, j] = float(cosines[i, j])
    return found


def passes_second_look(pictures: Described, i: int, j: int, rule: Rule) -> bool:
    left, right = pictures.thumbnail[i : i + 1], pictures.thumbnail[j : j + 1]
    are_graphics = bool(pictures.graphic[i] and pictures.graphic[j])
    if rule.second_look == "all" or (rule.second_look == "graphics" and are_graphics):
        yes = np.ones((1, 1), np.bool_)
        if not second_look.agreeing(left, right, yes, rule.mirrored).all():
            return False
    return rule.mirrored or not second_look.is_mirrored(left, right).any()


def reference_edges(pictures: Described, rules: Rules, max_neighbours: int) -> list[Edge]:
    """Return the edges of a part as :func:`find_edges` documents them."""
    order = np.argsort(pictures.rank).tolist()
    stand_in: dict[int, int] = {}
    best: dict[object, int] = {}
    for row in order:
        dataset = pictures.dataset[row]
        alike: object = (
            dataset,
            pictures.graphic[row],
            *(bytes(array[row]) for array in (pictures.thumbnail, pictures.vector)),
        )
        if not rules.between(dataset, dataset).is_near or pictures.accepted[row]:
            alike = row
        stand_in[row] = best.setdefault(alike, row)
    neighbours = defaultdict(list)
    for (i, j), similarity in near_copies(pictures, rules).items():
        if (
            pictures.cluster[i] == pictures.cluster[j]
            and stand_in[i] == i
            and stand_in[j] == j
            and pictures.rank[j] < pictures.rank[i]
        ):
            neighbours[int(pictures.rank[i])].append((int(pictures.rank[j]), similarity))
    edges: list[Edge] = [
        (int(pictures.rank[row]), int(pictures.rank[stand]), 1.0, True, False)
        for row, stand in stand_in.items()
        if row != stand
    ]
    for worse, their in neighbours.items():
        is_cut = len(their) > max_neighbours
        for better, similarity in sorted(their)[:max_neighbours]:
            edges.append((worse, better, similarity, False, is_cut))
    return sorted(edges)


def as_list(edges: pa.Table) -> list[Edge]:
    assert edges.schema == EDGES
    for name in ("worse", "better"):
        keys = keys_of(edges[f"{name}_key"].combine_chunks())
        assert [int.from_bytes(bytes(key), "big") for key in keys] == edges[name].to_pylist()
    names = ("worse", "better", "similarity", "equal", "truncated")
    return list(zip(*(edges[name].to_pylist() for name in names), strict=True))


def in_blocks(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setattr(search, "ROWS", 2 * size)
    monkeypatch.setattr(search, "COLUMNS", size)


@pytest.mark.parametrize("block", [3, 7, 512])
def test_compare_is_brute_force(
    pictures: Described, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_blocks(monkeypatch, block)
    rules = all_kinds_of_rules()
    truth = near_copies(pictures, rules)
    assert len(truth) > 500
    everyone = compare(pictures, pictures, rules)
    rows = zip(everyone.left.tolist(), everyone.right.tolist(), strict=True)
    assert list(zip(rows, everyone.similarity.tolist(), strict=True)) == sorted(truth.items())

    left, right = np.split(np.random.default_rng(1).permutation(NUM_PICTURES), [10])
    some = compare(pictures.take(left), pictures.take(right), rules)
    rows = zip(left[some.left].tolist(), right[some.right].tolist(), strict=True)
    assert dict(zip(rows, some.similarity.tolist(), strict=True)) == {
        (i, j): similarity for (i, j), similarity in truth.items() if i in left and j in right
    }


@pytest.mark.parametrize("block", [3, 7, 512])
@pytest.mark.parametrize("max_neighbours", [1, 3, 64])
def test_edges_are_those_of_brute_force(
    pictures: Described, max_neighbours: int, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_blocks(monkeypatch, block)
    rules = all_kinds_of_rules()
    edges = find_edges(pictures, rules, max_neighbours)
    assert as_list(edges) == reference_edges(pictures, rules, max_neighbours)
    assert edges["equal"].to_pylist().count(True) > 5
    assert (edges["truncated"].to_pylist().count(True) > 20) == (max_neighbours < 64)
    order = np.random.default_rng(2).permutation(NUM_PICTURES)
    assert find_edges(pictures.take(order), rules, max_neighbours).equals(edges)


@pytest.mark.parametrize("block", [7, 512])
def test_a_large_cluster_in_parts_has_the_edges_of_a_whole_one(
    pictures: Described, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_blocks(monkeypatch, block)
    rules = all_kinds_of_rules()
    # Equal vectors are in one part, and in one cluster; a few are in another than the others.
    _, number = np.unique(pictures.vector, axis=0, return_inverse=True)
    cluster = pictures.in_clusters((number.ravel() % 7 == 0).astype(np.int64))
    parts = [cluster.take(np.flatnonzero(number.ravel() % 3 == part)) for part in range(3)]
    found = [find_edges(part, rules, 64) for part in parts]
    for a, b in ((0, 1), (0, 2), (1, 2)):
        edges = find_edges_between(parts[a], parts[b], rules, 64)
        assert find_edges_between(parts[b], parts[a], rules, 64).equals(edges)
        found.append(edges)
    assert sorted(edge for edges in found for edge in as_list(edges)) == as_list(
        find_edges(cluster, rules, 64)
    )


def test_the_threshold_itself_counts() -> None:
    pictures = described(np.array([[1, 0], [0.8, 0.6]], np.float16))
    cosine = near_copies(pictures, ONE_RULE)[0, 1]
    for threshold, num_edges in ((cosine, 1), (np.nextafter(np.float32(cosine), 1), 0)):
        rules = Rules(("a",), ((Rule("near", float(threshold), "none", True),),))
        assert find_edges(pictures, rules, 64).num_rows == num_edges


def test_equal_vectors_of_two_datasets_reach_a_threshold_of_one() -> None:
    vectors = np.repeat(unit(np.random.default_rng(3).standard_normal((50, 512))), 2, axis=0)
    one = Rule("near", 1.0, "none", True)
    pictures = described(vectors)
    pictures.dataset[1::2] = 1
    found = compare(pictures, pictures, Rules(("a", "b"), ((one, one), (one, one))))
    assert found.left.tolist() == list(range(100))
    assert found.right.tolist() == [row ^ 1 for row in range(100)]
    assert found.similarity.tolist() == [1.0] * 100


def test_no_pictures() -> None:
    nothing = described(np.empty((0, 8), np.float16))
    assert find_edges(nothing, ONE_RULE, 64).equals(EDGES.empty_table())
    assert find_edges_between(nothing, nothing, ONE_RULE, 64).equals(EDGES.empty_table())
    assert [len(array) for array in compare(nothing, nothing, ONE_RULE)] == [0, 0, 0]


def measured(pictures: Described, max_neighbours: int) -> tuple[pa.Table, int]:
    """Return the edges, and the most bytes that NumPy held at once for them."""
    tracemalloc.start()
    try:
        edges = find_edges(pictures, ONE_RULE, max_neighbours)
        return edges, tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_fifty_thousand_equal_vectors_have_one_keeper() -> None:
    vectors = np.repeat(unit(np.random.default_rng(4).standard_normal((1, 512))), 50_000, axis=0)
    edges, peak_bytes = measured(described(vectors), 64)
    assert edges["worse"].to_pylist() == list(range(1, 50_000))
    assert set(edges["better"].to_pylist()) == {0}
    assert edges["equal"].to_pylist() == [True] * 49_999
    assert peak_bytes < 50e6


def test_fifty_thousand_nearly_equal_vectors_take_bounded_memory_and_time() -> None:
    rng = np.random.default_rng(5)
    noise = rng.standard_normal((50_000, 128), np.float32)
    vectors = unit(rng.standard_normal(128, np.float32) + np.float32(0.2) * noise)
    edges, peak_bytes = measured(described(vectors), 8)
    # All are similar to all: each has the best eight, as far as there are better ones.
    expected = [(worse, better) for worse in range(50_000) for better in range(min(worse, 8))]
    assert list(zip(*(edges[name].to_pylist() for name in ("worse", "better")), strict=True)) == (
        expected
    )
    assert edges["truncated"].to_pylist() == [worse > 8 for worse, _ in expected]
    assert peak_bytes < 200e6  # a copy of the cluster, and blocks
