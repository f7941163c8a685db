"""Truth: exact search for queries, in pieces of any size, and what a graph has of its pairs."""

from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pytest

from dedup import truth
from dedup.graph import merge
from dedup.records import GRAPH, THUMBNAIL_BYTES, Described, Ints, Vectors
from dedup.rules import Rule, Rules
from dedup.search import find_edges
from dedup.truth import MAX_PAIRS, TRUE_PAIRS, Homes, found_in, read_truth, true_pairs
from pipeline import storage

RULES = Rules(("a",), ((Rule("near", 0.75, "none", True),),))
NUM_PICTURES, DIMENSION, NUM_CLUSTERINGS = 300, 32, 3


def described(vectors: Vectors, seed: int = 0) -> Described:
    """Return pictures of one dataset in one cluster, with ranks in random order."""
    n = len(vectors)
    rank = np.random.default_rng(seed).permutation(n)
    return Described(
        rank=rank,
        key=np.frombuffer(b"".join(number.to_bytes(16, "big") for number in rank.tolist()), "V16"),
        dataset=np.zeros(n, np.int64),
        accepted=np.zeros(n, np.bool_),
        graphic=np.zeros(n, np.bool_),
        thumbnail=np.zeros((n, THUMBNAIL_BYTES), np.int8),
        cluster=np.zeros(n, np.int64),
        vector=np.asarray(vectors / np.linalg.norm(vectors, axis=1, keepdims=True), np.float16),
    )


@pytest.fixture(scope="module")
def pictures() -> Described:
    """Return groups of near and of equal copies."""
    rng = np.random.default_rng(0)
    originals = rng.standard_normal((60, DIMENSION))
    noise = rng.choice([0.0, 0.2, 0.5], (NUM_PICTURES, 1))
    which = rng.integers(0, 60, NUM_PICTURES)
    return described(originals[which] + noise * rng.standard_normal((NUM_PICTURES, DIMENSION)))


@pytest.fixture(scope="module")
def homes(pictures: Described) -> Ints:
    """Return homes drawn at random; pictures with equal vectors have equal ones."""
    drawn = np.random.default_rng(1).integers(0, 2, (NUM_PICTURES, NUM_CLUSTERINGS))
    _, first, same = np.unique(pictures.vector, axis=0, return_index=True, return_inverse=True)
    return drawn[first[same.ravel()]]


def as_drawn(pictures: Described, homes: Ints) -> Homes:
    """Return what looks up the homes of the pictures' vectors, those of the first of equal ones."""
    by_vector = dict(zip(map(bytes, pictures.vector[::-1]), homes[::-1].tolist(), strict=True))

    def look_up(vectors: npt.NDArray[np.float16]) -> Ints:
        found = [by_vector[bytes(vector)] for vector in vectors]
        return np.array(found, np.int64).reshape(len(vectors), homes.shape[1])

    return look_up


def search(pictures: Described, homes: Ints, queries: Ints) -> pa.Table:
    return true_pairs(pictures.take(queries), pictures, RULES, as_drawn(pictures, homes))


def swarm(size: int) -> Described:
    """Return pictures all of which are alike."""
    rng = np.random.default_rng(2)
    return described(rng.standard_normal(DIMENSION) + 0.1 * rng.standard_normal((size, DIMENSION)))


def test_true_pairs_are_all_pairs_of_the_queries(pictures: Described, homes: Ints) -> None:
    queries = np.random.default_rng(3).permutation(NUM_PICTURES)[:80]
    wide = pictures.vector.astype(np.float64)
    lengths = np.linalg.norm(wide, axis=1)
    cosines = (wide @ wide.T / np.outer(lengths, lengths)).astype(np.float32)
    expected = [
        {
            "query": int(pictures.rank[i]),
            "other": int(pictures.rank[j]),
            "similarity": float(cosines[i, j]),
            "weight": 1.0,
            "meets": (homes[i] == homes[j]).tolist(),
        }
        for i in queries.tolist()
        for j in range(NUM_PICTURES)
        if i != j and cosines[i, j] >= 0.75
    ]
    expected.sort(key=lambda row: (row["query"], row["other"]))
    found = search(pictures, homes, queries)
    assert found.schema == TRUE_PAIRS
    assert found.to_pylist() == expected
    assert len(expected) > 200


def test_neither_order_nor_pieces_matter(
    pictures: Described, homes: Ints, monkeypatch: pytest.MonkeyPatch
) -> None:
    queries = np.arange(0, NUM_PICTURES, 3)
    at_once = search(pictures, homes, queries)
    order = np.random.default_rng(4).permutation(NUM_PICTURES)
    monkeypatch.setattr(truth, "_COMPARED_AT_ONCE", 700)  # seven pictures with a hundred queries
    in_pieces = search(pictures.take(order), homes[order], np.argsort(order)[queries][::-1])
    assert in_pieces.equals(at_once)


def test_of_a_swarm_s_pairs_some_stand_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    pictures, size = swarm(1_500), 1_500
    homes, queries = np.zeros((size, 1), np.int64), np.arange(10)
    found = search(pictures, homes, queries)
    ranks = pictures.rank[queries].tolist()
    assert Counter(found["query"].to_pylist()) == dict.fromkeys(ranks, MAX_PAIRS)
    assert set(found["weight"].to_pylist()) == {(size - 1) / MAX_PAIRS}
    # They were not chosen by rank, nor are they the same ones for all queries.
    others = found["other"].to_numpy()
    assert abs(others.mean() - size / 2) < 4 * size / np.sqrt(12 * len(others))
    assert len(set(others.tolist())) > 600
    monkeypatch.setattr(truth, "_COMPARED_AT_ONCE", 990)
    assert search(pictures, homes, queries).equals(found)


def test_no_queries_and_no_pictures(pictures: Described, homes: Ints) -> None:
    nobody = np.empty(0, np.int64)
    assert search(pictures, homes, nobody).equals(TRUE_PAIRS.empty_table())
    few, look_up = pictures.take(np.arange(5)), as_drawn(pictures, homes)
    found = true_pairs(few, pictures.take(nobody), RULES, look_up)
    assert found.equals(TRUE_PAIRS.empty_table())


def test_homes_are_asked_only_for_what_is_in_pairs_and_once_each(
    pictures: Described, homes: Ints
) -> None:
    asked = list[npt.NDArray[np.float16]]()
    look_up = as_drawn(pictures, homes)

    def counting(vectors: npt.NDArray[np.float16]) -> Ints:
        asked.append(vectors)
        return look_up(vectors)

    queries = pictures.take(np.arange(40))
    pairs = true_pairs(queries, pictures, RULES, counting)
    sizes = [len(np.unique(pairs[side].to_numpy())) for side in ("query", "other")]
    assert [len(vectors) for vectors in asked] == sizes
    assert sizes[0] <= 40
    assert sizes[1] < NUM_PICTURES


def test_true_pairs_of_all_groups_are_read_together(
    pictures: Described, homes: Ints, tmp_path: Path
) -> None:
    pairs = search(pictures, homes, np.arange(20))
    urls = [str(tmp_path / f"{number}.parquet") for number in range(3)]
    for url, part in zip(urls, (pairs[:30], pairs[:0], pairs[30:]), strict=True):
        assert storage.publish(url, storage.parquet_bytes(part, {}))
    assert read_truth(urls).equals(pairs)
    assert read_truth([]).equals(TRUE_PAIRS.empty_table())


# What a graph has of them


def in_parts(graph: pa.Table) -> Callable[[], Iterable[pa.Table]]:
    """Return what reads a graph in parts: those of ranks up to 100, above, and none."""
    rank = graph["rank"].to_numpy()
    parts = [graph.filter(rank < 100), graph.filter(rank >= 100), GRAPH.empty_table()]
    return lambda: iter(parts)


def test_an_exact_search_without_a_limit_finds_everything(pictures: Described, homes: Ints) -> None:
    pairs = search(pictures, homes, np.arange(NUM_PICTURES))
    edges = find_edges(pictures, RULES, max_neighbours=NUM_PICTURES)
    assert edges["equal"].to_numpy().sum() > 50
    graph = merge([edges], NUM_PICTURES).graph
    found = found_in(pairs, in_parts(graph))
    assert found.found.all()
    assert not found.truncated.any()
    nothing = found_in(TRUE_PAIRS.empty_table(), in_parts(graph))
    assert len(nothing.found) == len(nothing.truncated) == 0


def test_what_a_limit_drops_is_told_from_what_is_missed(pictures: Described, homes: Ints) -> None:
    pairs = search(pictures, homes, np.arange(NUM_PICTURES))
    graph = merge([find_edges(pictures, RULES, max_neighbours=2)], 2).graph
    found = found_in(pairs, in_parts(graph))
    assert not found.found.all()
    assert (found.found | found.truncated).all()

    # Without one picture's edges, its pairs with better ones are missed, whoever asks.
    (lost,) = graph.filter(~graph["truncated"].to_numpy() & ~graph["equal"].to_numpy())["rank"][-1:]
    without = graph.filter(graph["rank"].to_numpy() != lost.as_py())
    missed = found_in(pairs, in_parts(without))
    rows = np.flatnonzero(~missed.found & ~missed.truncated)
    assert len(rows)
    for row in pairs.take(rows).to_pylist():
        assert lost.as_py() in (row["query"], row["other"])
    assert sorted(pairs["query"].to_numpy()[rows]) == sorted(pairs["other"].to_numpy()[rows])


def test_pictures_that_stand_aside_have_the_pairs_of_those_that_stand_for_them() -> None:
    def edge(rank: int, neighbour: int, equal: bool, truncated: bool = False) -> dict[str, object]:
        return {"rank": rank, "neighbour_rank": neighbour, "equal": equal, "truncated": truncated}

    # 9 and 7 are equal to 2, 8 is equal to 5; 5 is like 2, and 30 has too many neighbours.
    rows = [edge(5, 2, False), edge(7, 2, True), edge(8, 5, True), edge(9, 2, True)]
    graph = pa.Table.from_pylist([*rows, edge(30, 1, False, truncated=True)])
    asked = {
        (9, 7): (True, False),
        (9, 8): (True, False),
        (5, 7): (True, False),
        (9, 6): (False, False),
        (30, 1): (True, True),
        (2, 30): (False, True),
        (31, 30): (False, False),  # the worse one lists all of its neighbours
    }
    query, other = np.array(list(asked)).T
    pairs = pa.table({"query": query, "other": other})
    found = found_in(pairs, lambda: [graph])
    assert list(zip(found.found.tolist(), found.truncated.tolist(), strict=True)) == list(
        asked.values()
    )
