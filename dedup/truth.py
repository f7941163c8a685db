"""Truth: all near copies of some randomly chosen pictures, found by comparing them with everything.

The pictures are queries, so few that an exact search is cheap, and the pairs that it finds stand
for those of the whole corpus: :mod:`dedup.recall` estimates from them what a search within clusters
can reach and what it did find.

A query in a swarm of 50,000 near copies would give 50,000 pairs. Of each query's pairs with one
group of pictures at most 100 are kept, chosen by hash, and each stands for as many as its weight
says.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from dedup.clusters import mixed
from dedup.records import Bools, Described, Floats, Ints
from dedup.rules import Rules
from dedup.search import compare
from pipeline import storage

TRUE_PAIRS = pa.schema(
    [
        ("query", pa.int64()),
        ("other", pa.int64()),
        ("similarity", pa.float32()),
        ("weight", pa.float64()),
        ("meets", pa.list_(pa.bool_())),
    ]
)
"""A query and a picture that counts as its copy, by their ranks; sorted by both.

``weight`` is the number of pairs of this query for which the row stands, 1 unless it has very many.
``meets`` says for each clustering whether the two share their home cluster."""

MAX_PAIRS = 100
"""Pairs of one query with one group of pictures that are kept."""

_COMPARED_AT_ONCE = 1 << 24
"""Pairs in one comparison: even if all of them count, they take a few hundred MB."""

Homes = Callable[[npt.NDArray[np.float16]], Ints]
"""Gives the home clusters of n vectors in each of S clusterings: (n, S)."""


@dataclass(frozen=True)
class _Pairs:
    """Pairs of rows of queries and pictures, arrays with one entry each."""

    query: Ints
    picture: Ints
    similarity: Floats

    def take(self, rows: Ints) -> "_Pairs":
        return _Pairs(self.query[rows], self.picture[rows], self.similarity[rows])

    def and_also(self, other: "_Pairs") -> "_Pairs":
        return _Pairs(
            np.append(self.query, other.query),
            np.append(self.picture, other.picture),
            np.append(self.similarity, other.similarity),
        )


def true_pairs(
    queries: Described,
    pictures: Described,
    rules: Rules,
    homes: Homes,
) -> pa.Table:
    """Compare each of q queries with each of a group of n pictures; return TRUE_PAIRS.

    A query may be among the pictures; it is no pair with itself. ``homes`` is asked only about
    those in pairs.
    """
    pairs = _Pairs(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.float32))
    num_pairs = np.zeros(len(queries), np.int64)
    step = max(1, _COMPARED_AT_ONCE // max(1, len(queries)))
    for start in range(0, len(pictures), step):
        some = np.arange(start, min(start + step, len(pictures)))
        matches = compare(queries, pictures.take(some), rules)
        num_pairs += np.bincount(matches.left, minlength=len(queries))
        pairs = pairs.and_also(_Pairs(matches.left, some[matches.right], matches.similarity))
        pairs = pairs.take(_chosen(pairs, queries.rank, pictures.rank))
    pairs = pairs.take(np.lexsort((pictures.rank[pairs.picture], queries.rank[pairs.query])))
    num_kept = np.bincount(pairs.query, minlength=len(queries))
    query_homes = _homes_of(queries, pairs.query, homes)
    meets = query_homes == _homes_of(pictures, pairs.picture, homes)
    columns = [
        pa.array(queries.rank[pairs.query]),
        pa.array(pictures.rank[pairs.picture]),
        pa.array(pairs.similarity),
        pa.array(num_pairs[pairs.query] / num_kept[pairs.query]),
        pa.array(list(meets), TRUE_PAIRS.field("meets").type),
    ]
    return pa.table(columns, schema=TRUE_PAIRS)


def read_truth(urls: Sequence[str]) -> pa.Table:
    """Read the true pairs (TRUE_PAIRS) that were found in all groups."""
    return pa.concat_tables(
        [TRUE_PAIRS.empty_table(), *(storage.read_parquet(url) for url in urls)]
    ).combine_chunks()


def _homes_of(described: Described, rows: Ints, homes: Homes) -> Ints:
    """Return the home clusters of the pictures in some rows, each of which is asked once."""
    asked, places = np.unique(rows, return_inverse=True)
    return homes(described.vector[asked])[places]


def _chosen(pairs: _Pairs, query_ranks: Ints, picture_ranks: Ints) -> Ints:
    """Return the rows of at most MAX_PAIRS pairs of each query, those of the lowest hashes.

    The choice among all is that among the chosen of parts, so parts can be of any size.
    """
    hashes = mixed(_code(query_ranks[pairs.query], picture_ranks[pairs.picture]).astype(np.uint64))
    order = np.lexsort((hashes, pairs.query))
    _, starts, counts = np.unique(pairs.query[order], return_index=True, return_counts=True)
    place = np.arange(len(order)) - np.repeat(starts, counts)
    chosen: Ints = order[place < MAX_PAIRS]
    return chosen


@dataclass(frozen=True)
class Found:
    """What a graph has of true pairs, arrays with one entry each.

    ``found`` ones are joined in it. ``truncated`` ones may be missing on purpose: the worse picture
    has more better neighbours than the graph lists.
    """

    found: Bools
    truncated: Bools


def found_in(pairs: pa.Table, read_graph: Callable[[], Iterable[pa.Table]]) -> Found:
    """Look for true pairs (TRUE_PAIRS) in a graph.

    ``read_graph`` is called twice and gives the graph in parts (GRAPH, of which the columns
    ``rank``, ``neighbour_rank``, ``equal`` and ``truncated`` are enough). Pictures that stand aside
    for an equal one are joined with whatever that one is joined with.
    """
    query, other = pairs["query"].to_numpy(), pairs["other"].to_numpy()
    ranks = np.unique(np.append(query, other))
    stand_in = ranks.copy()
    for part in read_graph():
        equal = part.filter(part["equal"])
        aside, place = _among(equal["rank"].to_numpy(), ranks)
        stand_in[place] = equal["neighbour_rank"].to_numpy()[aside]
    a, b = stand_in[np.searchsorted(ranks, query)], stand_in[np.searchsorted(ranks, other)]
    better, worse = np.minimum(a, b), np.maximum(a, b)

    found, truncated = better == worse, np.zeros(len(worse), np.bool_)
    wanted = np.unique(worse)
    for part in read_graph():
        edges, _ = _among(part["rank"].to_numpy(), wanted)
        near = part.take(edges)
        rank, neighbour = near["rank"].to_numpy(), near["neighbour_rank"].to_numpy()
        found |= np.isin(_code(better, worse), _code(neighbour, rank))
        truncated |= np.isin(worse, rank[near["truncated"].to_numpy()])
    return Found(found, truncated & (better != worse))


def _among(numbers: Ints, wanted: Ints) -> tuple[Ints, Ints]:
    """Return which of ``numbers`` are ``wanted`` (ascending), and their places there."""
    if not len(wanted):
        return np.empty(0, np.int64), np.empty(0, np.int64)
    places = np.minimum(np.searchsorted(wanted, numbers), len(wanted) - 1)
    rows = np.flatnonzero(wanted[places] == numbers)
    return rows, places[rows]


def _code(a: Ints, b: Ints) -> Ints:
    """Return one number for each pair of ranks, which are below 2^31."""
    return (a << 32) | b
