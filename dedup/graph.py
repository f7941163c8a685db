"""The graph of similar pairs: what the searches of all clusterings found, put together.

Two pictures that share clusters in several clusterings are found several times, with one and the
same cosine. Of the better neighbours of a picture only the best are kept, by the declared order: a
picture that is like a thousand others would otherwise have a thousand edges, and a swarm of them a
million. What is cut can lose removals, but never leaves a removed picture without a kept one.
"""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from dedup.records import EDGES, GRAPH, Bools, Ints, keys_of, to_hex


def merge(edges: Sequence[pa.Table], max_neighbours: int) -> pa.Table:
    """Return the GRAPH of one range of pictures, from all EDGES whose worse picture is in it.

    Equal vectors meet in every clustering, so the edges of a picture that stands aside for an
    equal one are the same in all of them.
    """
    best = best_edges(pa.concat_tables([EDGES.empty_table(), *edges]), max_neighbours)
    worse, better = (
        pa.array(to_hex(keys_of(best[name].combine_chunks())), pa.string())
        for name in ("worse_key", "better_key")
    )
    columns = [worse, better, *(best[name] for name in ("similarity", "equal", "truncated"))]
    return pa.table([*columns, best["worse"], best["better"]], schema=GRAPH)


def best_edges(edges: pa.Table, max_neighbours: int) -> pa.Table:
    """Return EDGES by worse and better picture, each once, at most ``max_neighbours`` a worse one.

    Where some were cut, now or before, those that remain say ``truncated``.
    """
    worse, better = edges["worse"].to_numpy(), edges["better"].to_numpy()
    cut_before = np.unique(worse[edges["truncated"].to_numpy()])
    order = np.lexsort((better, worse))
    order = order[_changes(worse[order]) | _changes(better[order])]
    worse, starts, sizes = np.unique(worse[order], return_index=True, return_counts=True)
    truncated = (sizes > max_neighbours) | np.isin(worse, cut_before)
    is_best = np.arange(len(order)) - np.repeat(starts, sizes) < max_neighbours
    best = edges.take(order[is_best])
    column = pa.array(np.repeat(truncated, sizes)[is_best])
    return best.set_column(EDGES.get_field_index("truncated"), EDGES.field("truncated"), column)


def _changes(numbers: Ints) -> Bools:
    """Tell where a number differs from the one before it; the first always does."""
    changes = np.ones(len(numbers), np.bool_)
    changes[1:] = numbers[1:] != numbers[:-1]
    return changes
