"""The graph of similar pairs: what the searches of all clusterings found, put together.

Two pictures that share clusters in several clusterings are found several times, with one and the
same cosine. Of the better neighbours of a picture only the best are kept, by the declared order: a
picture that is like a thousand others would otherwise have a thousand edges, and a swarm of them a
million. What is cut can lose removals, but never leaves a removed picture without a kept one.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from dedup.records import EDGES, GRAPH, Bools, Ints, keys_of, to_hex

EDGES_AT_ONCE = 1 << 23
"""Found edges that are brought together at once, beside the best of those before: 0.5 GB."""


@dataclass(frozen=True)
class Merged:
    """A part of the GRAPH, and why it has fewer edges than were found.

    ``num_repeated`` were found again, ``num_beyond`` are of pictures that have better ones enough.
    """

    graph: pa.Table
    num_repeated: int
    num_beyond: int


def merge(found: Iterable[pa.Table], max_neighbours: int) -> Merged:
    """Return the graph of one range of pictures, from all EDGES whose worse picture is in it.

    Equal vectors meet in every clustering, so the edges of a picture that stands aside for an
    equal one are the same in all of them.
    """
    best = EDGES.empty_table()
    num_repeated = num_beyond = 0
    for edges in _gathered(found):
        num_edges = best.num_rows + edges.num_rows
        distinct = _each_once(pa.concat_tables([best, edges]))
        best = _best(distinct, max_neighbours)
        num_repeated += num_edges - distinct.num_rows
        num_beyond += distinct.num_rows - best.num_rows
    worse, better = (
        pa.array(to_hex(keys_of(best[name].combine_chunks())), pa.string())
        for name in ("worse_key", "better_key")
    )
    columns = [worse, better, *(best[name] for name in ("similarity", "equal", "truncated"))]
    graph = pa.table([*columns, best["worse"], best["better"]], schema=GRAPH)
    return Merged(graph, num_repeated, num_beyond)


def _gathered(tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
    """Yield the rows of many tables in few of at least EDGES_AT_ONCE rows, but for the last."""
    some, num_rows = list[pa.Table](), 0
    for table in tables:
        some.append(table)
        num_rows += table.num_rows
        if num_rows >= EDGES_AT_ONCE:
            yield pa.concat_tables(some)
            some, num_rows = [], 0
    if some:
        yield pa.concat_tables(some)


def best_edges(edges: pa.Table, max_neighbours: int) -> pa.Table:
    """Return EDGES by worse and better picture, each once, at most ``max_neighbours`` a worse one.

    Where some were cut, now or before, those that remain say ``truncated``.
    """
    return _best(_each_once(edges), max_neighbours)


def _each_once(edges: pa.Table) -> pa.Table:
    """Return edges by worse and better picture; ``truncated`` if any of the worse one's says so."""
    worse, better = edges["worse"].to_numpy(), edges["better"].to_numpy()
    truncated = np.isin(worse, worse[edges["truncated"].to_numpy()])
    order = np.lexsort((better, worse))
    order = order[_changes(worse[order]) | _changes(better[order])]
    return _with_truncated(edges.take(order), truncated[order])


def _best(edges: pa.Table, max_neighbours: int) -> pa.Table:
    """Return the first edges of each worse picture, of sorted ones."""
    _, starts, sizes = np.unique(edges["worse"].to_numpy(), return_index=True, return_counts=True)
    truncated = np.repeat(sizes > max_neighbours, sizes) | edges["truncated"].to_numpy()
    is_best = np.arange(len(truncated)) - np.repeat(starts, sizes) < max_neighbours
    return _with_truncated(edges, truncated).filter(pa.array(is_best))


def _with_truncated(edges: pa.Table, truncated: Bools) -> pa.Table:
    place = EDGES.get_field_index("truncated")
    return edges.set_column(place, EDGES.field(place), pa.array(truncated))


def _changes(numbers: Ints) -> Bools:
    """Tell where a number differs from the one before it; the first always does."""
    changes = np.ones(len(numbers), np.bool_)
    changes[1:] = numbers[1:] != numbers[:-1]
    return changes
