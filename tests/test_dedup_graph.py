"""The graph: each pair once, and the best neighbours of each picture."""

import numpy as np
import pyarrow as pa
import pytest

from dedup import graph
from dedup.graph import best_edges, merge
from dedup.records import EDGES, GRAPH

Edge = tuple[int, int, float, bool, bool]  # worse, better, similarity, equal, truncated


def key(rank: int) -> bytes:
    return rank.to_bytes(16, "big")


def edges(*rows: Edge) -> pa.Table:
    return pa.Table.from_pylist(
        [
            {
                "worse": worse,
                "better": better,
                "worse_key": key(worse),
                "better_key": key(better),
                "similarity": similarity,
                "equal": equal,
                "truncated": truncated,
            }
            for worse, better, similarity, equal, truncated in rows
        ],
        schema=EDGES,
    )


def test_a_pair_found_in_several_clusterings_is_one_edge() -> None:
    merged = merge(
        [
            edges((9, 3, 0.75, False, False), (7, 2, 1.0, True, False)),
            edges((7, 2, 1.0, True, False), (9, 5, 0.875, False, False)),
            edges((9, 3, 0.75, False, False)),
        ],
        max_neighbours=2,
    )
    assert (merged.num_repeated, merged.num_beyond) == (2, 0)
    assert merged.graph.schema == GRAPH
    assert merged.graph.to_pylist() == [
        {
            "key": key(worse).hex(),
            "neighbour": key(better).hex(),
            "similarity": similarity,
            "equal": equal,
            "truncated": False,
            "rank": worse,
            "neighbour_rank": better,
        }
        for worse, better, similarity, equal in [
            (7, 2, 1.0, True),
            (9, 3, 0.75, False),
            (9, 5, 0.875, False),
        ]
    ]


def test_the_best_neighbours_stay_and_say_that_others_were_cut() -> None:
    merged = merge(
        [
            edges(*((9, better, 0.8, False, False) for better in (4, 6, 8))),
            edges(*((9, better, 0.8, False, False) for better in (1, 4, 7))),
            edges((8, 1, 0.8, False, False), (8, 2, 0.8, False, False)),
        ],
        max_neighbours=2,
    )
    assert (merged.num_repeated, merged.num_beyond) == (1, 3)
    columns = [merged.graph[name].to_pylist() for name in ("rank", "neighbour_rank", "truncated")]
    assert list(zip(*columns, strict=True)) == [
        (8, 1, False),
        (8, 2, False),
        (9, 1, True),
        (9, 4, True),
    ]


def test_what_one_clustering_cut_is_truncated_even_if_no_more_is_known() -> None:
    tables = [
        edges((9, 1, 0.8, False, True), (9, 2, 0.8, False, True)),
        edges((9, 1, 0.8, False, False), (9, 2, 0.8, False, False), (7, 1, 0.8, False, False)),
    ]
    for order in (tables, tables[::-1]):
        merged = merge(order, max_neighbours=2).graph
        assert merged["rank"].to_pylist() == [7, 9, 9]
        assert merged["truncated"].to_pylist() == [False, True, True]


def test_no_edges() -> None:
    for nothing in ([], [EDGES.empty_table()]):
        merged = merge(nothing, 4)
        assert merged.graph.equals(GRAPH.empty_table())
        assert (merged.num_repeated, merged.num_beyond) == (0, 0)


def test_merging_in_steps_and_in_any_order_gives_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rng = np.random.default_rng(0)
    rows = [
        (int(worse), int(better), float(np.float32(0.75 + better / 1000)), False, False)
        for worse, better in rng.integers(0, 40, (1_000, 2))
        if better < worse
    ]
    tables = [edges(*rows[start : start + 100]) for start in range(0, len(rows), 100)]
    at_once = best_edges(pa.concat_tables(tables), 3)
    whole = merge(tables, 3)
    for edges_at_once in (1, 150):
        monkeypatch.setattr(graph, "EDGES_AT_ONCE", edges_at_once)
        for some_order in (tables, tables[::-1]):
            folded = merge(iter(some_order), 3)
            assert folded.graph.equals(whole.graph)
            dropped = folded.num_repeated + folded.num_beyond
            assert dropped == len(rows) - whole.graph.num_rows
    for number in range(3):
        order = np.random.default_rng(number).permutation(len(tables))
        some, others = (
            best_edges(pa.concat_tables([tables[i] for i in half]), 3)
            for half in np.split(order, [4])
        )
        assert best_edges(pa.concat_tables([others, some]), 3).equals(at_once)
    pairs: dict[int, set[int]] = {}
    for worse, better, *_ in rows:
        pairs.setdefault(worse, set()).add(better)
    expected = [
        (worse, better, len(pairs[worse]) > 3)
        for worse in sorted(pairs)
        for better in sorted(pairs[worse])[:3]
    ]
    columns = [at_once[name].to_pylist() for name in ("worse", "better", "truncated")]
    assert list(zip(*columns, strict=True)) == expected
