"""Search: all pairs of pictures that count as near copies, within a cluster.

Cosines are exact numbers, hence the result depends on neither order, blocks, threads nor machine.
For vectors are stored as float16 of length about 1: a product of two is a multiple of 2^-48, and
partial sums stay below 2, so float64 adds them without rounding, in whatever order a matrix
product takes. What remains is one division, a rounding to float32, and the comparison. Few pairs
are near copies, so a product in float32, twice as fast, says first which can be.

Memory is bounded by the size of blocks, also where all pictures of a cluster are alike: of those
with equal vectors the best one stands for all, and a picture is compared with better ones, from
the best on, until it has more neighbours than are kept.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from dedup import second_look
from dedup.clusters import rounding, vector_hashes
from dedup.graph import best_edges
from dedup.records import EDGES, Bools, Described, Floats, Ints, key_column
from dedup.rules import Rules

ROWS, COLUMNS = 2048, 256
"""Pictures on the two sides of one product of matrices: its result takes 2 MiB."""

_PAIRS = 1024
"""Pairs whose vectors, or whose thumbnails, are compared one by one at once."""

_DENSE = 1 / 32
"""Where more than this part of a product is asked for, all of it is faster than one by one."""


class Matches(NamedTuple):
    """Pairs of a row on the left and a row on the right that are near copies, and their cosine."""

    left: Ints
    right: Ints
    similarity: Floats


def compare(left: Described, right: Described, rules: Rules) -> Matches:
    """Return all pairs of a picture on the left and one on the right that count as near copies.

    They reach the threshold of their datasets' rule and pass its second look. A picture is no copy
    of itself (one of equal rank), nor are two accepted pictures copies. Sorted by row on the left,
    then on the right.
    """
    conditions = _Conditions.of(rules)
    found = [Matches(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.float32))]
    left_lengths, right_lengths = _lengths(left), _lengths(right)
    for rows in _blocks(left, left_lengths, ROWS):
        found += [
            _compare(rows, columns, conditions)
            for columns in _blocks(right, right_lengths, COLUMNS)
        ]
    i, j, similarity = (np.concatenate(arrays) for arrays in zip(*found, strict=True))
    order = np.lexsort((j, i))
    return Matches(i[order], j[order], similarity[order])


def find_edges(pictures: Described, rules: Rules, max_neighbours: int) -> pa.Table:
    """Return the EDGES within each cluster of a part, sorted by the worse and the better picture.

    Pictures with equal vectors, for which all rules are the same, get one ``equal`` edge to the
    best of them, and have no others.
    """
    stand_ins = _stand_ins(pictures, rules)
    aside = np.flatnonzero(stand_ins != np.arange(len(pictures)))
    ones = np.ones(len(aside), np.float32)
    found = [_edges(pictures, aside, pictures, stand_ins[aside], ones, equal=True)]
    for rows in _clusters(pictures, stand_ins).values():
        cluster = pictures.take(rows)
        found += _search(cluster, cluster, rules, max_neighbours)
    return _sorted(found)


def find_edges_between(a: Described, b: Described, rules: Rules, max_neighbours: int) -> pa.Table:
    """Return the EDGES within clusters between two parts, sorted likewise.

    Pictures with equal vectors must be in one part.
    """
    in_a, in_b = (_clusters(part, _stand_ins(part, rules)) for part in (a, b))
    found = list[pa.Table]()
    for cluster in in_a.keys() & in_b.keys():
        one, other = a.take(in_a[cluster]), b.take(in_b[cluster])
        found += _search(one, other, rules, max_neighbours)
        found += _search(other, one, rules, max_neighbours)
    return _sorted(found)


def _stand_ins(pictures: Described, rules: Rules) -> Ints:
    """Return for each picture the row of the best with an equal vector, or its own: (n,).

    Only if they are copies of each other and all rules are the same for both.
    """
    stand_ins = np.arange(len(pictures))
    own_rule_is_near = np.isfinite(_Conditions.of(rules).threshold.diagonal())
    can_go = own_rule_is_near[pictures.dataset] & ~pictures.accepted
    _, number, count = np.unique(
        vector_hashes(pictures.vector), return_inverse=True, return_counts=True
    )
    rows = np.flatnonzero(can_go & (count[number] > 1))
    best: dict[tuple[int, bool, bytes, bytes], int] = {}
    for row in rows[np.argsort(pictures.rank[rows])].tolist():
        alike = (
            int(pictures.dataset[row]),
            bool(pictures.graphic[row]),
            pictures.thumbnail[row].tobytes(),
            pictures.vector[row].tobytes(),
        )
        stand_ins[row] = best.setdefault(alike, row)
    return stand_ins


def _clusters(pictures: Described, stand_ins: Ints) -> dict[int, Ints]:
    """Return the rows of the pictures that stand for themselves, by cluster and in it by rank."""
    order = np.lexsort((pictures.rank, pictures.cluster))
    order = order[stand_ins[order] == order]
    numbers, starts = np.unique(pictures.cluster[order], return_index=True)
    return dict(zip(numbers.tolist(), np.split(order, starts[1:]), strict=False))


def _search(
    worse: Described, better: Described, rules: Rules, max_neighbours: int
) -> Iterator[pa.Table]:
    """Yield EDGES of the pictures of one side to better ones of the other, both sorted by rank.

    Better ones come in order, so a picture that has more neighbours than are kept is done.
    """
    conditions = _Conditions.of(rules)
    count = np.zeros(len(worse), np.int64)
    better_lengths = _lengths(better)
    for rows in _blocks(worse, _lengths(worse), ROWS):
        found = [EDGES.empty_table()]
        asking = rows
        for columns in _blocks(better, better_lengths, COLUMNS):
            ranks = worse.rank[asking.rows]
            asking = asking.take(slice(np.searchsorted(ranks, better.rank[columns.rows[0]]), None))
            if not len(asking.rows):
                break
            i, j, similarity = _compare(asking, columns, conditions)
            upwards = better.rank[j] < worse.rank[i]
            i, j, similarity = i[upwards], j[upwards], similarity[upwards]
            # One more than are kept tells that there are more.
            first = np.arange(len(i)) - np.searchsorted(i, i) + count[i] <= max_neighbours
            found.append(_edges(worse, i[first], better, j[first], similarity[first]))
            np.add.at(count, i[first], 1)
            is_done = count[asking.rows] > max_neighbours
            if is_done.any():
                asking = asking.take(np.flatnonzero(~is_done))
        yield best_edges(pa.concat_tables(found), max_neighbours)


def _edges(
    worse: Described,
    worse_rows: Ints,
    better: Described,
    better_rows: Ints,
    similarity: Floats,
    *,
    equal: bool = False,
) -> pa.Table:
    columns = [
        pa.array(better.rank[better_rows]),
        pa.array(worse.rank[worse_rows]),
        key_column(better.key[better_rows]),
        key_column(worse.key[worse_rows]),
        pa.array(similarity),
        pa.array(np.full(len(similarity), equal)),
        pa.array(np.zeros(len(similarity), np.bool_)),
    ]
    return pa.table(columns, schema=EDGES)


def _sorted(found: Sequence[pa.Table]) -> pa.Table:
    edges = pa.concat_tables([EDGES.empty_table(), *found])
    return edges.sort_by([("worse", "ascending"), ("better", "ascending")])


@dataclass(frozen=True)
class _Conditions:
    """The rules as arrays, by the numbers of two datasets: (D, D) each.

    ``threshold`` is float32, and infinite where near copies do not count.
    """

    threshold: Floats
    looks_at_all: Bools
    looks_at_graphics: Bools
    mirrored: Bools

    @classmethod
    def of(cls, rules: Rules) -> "_Conditions":
        table = rules.table
        threshold = [[rule.threshold if rule.is_near else np.inf for rule in row] for row in table]
        return cls(
            np.array(threshold, np.float32),
            np.array([[rule.second_look == "all" for rule in row] for row in table]),
            np.array([[rule.second_look == "graphics" for rule in row] for row in table]),
            np.array([[rule.mirrored for rule in row] for row in table]),
        )


@dataclass(frozen=True)
class _Block:
    """Some rows of some pictures, with their vectors as float32 and the lengths of these."""

    pictures: Described
    rows: Ints
    vectors: Floats
    lengths: npt.NDArray[np.float64]

    def take(self, places: Ints | slice) -> "_Block":
        return _Block(self.pictures, self.rows[places], self.vectors[places], self.lengths[places])


def _lengths(pictures: Described) -> npt.NDArray[np.float64]:
    """Return the exact lengths of the vectors: (n,)."""
    lengths = np.empty(len(pictures))
    for start in range(0, len(pictures), ROWS):
        some = slice(start, start + ROWS)
        lengths[some] = np.linalg.norm(pictures.vector[some].astype(np.float64), axis=1)
    return lengths


def _blocks(pictures: Described, lengths: npt.NDArray[np.float64], size: int) -> Iterator[_Block]:
    rows = np.arange(len(pictures))
    for start in range(0, len(pictures), size):
        some = slice(start, start + size)
        vectors = pictures.vector[some].astype(np.float32)
        yield _Block(pictures, rows[some], vectors, lengths[some])


def _compare(left: _Block, right: _Block, conditions: _Conditions) -> Matches:
    """Return the near copies of two blocks, by the rows of their pictures, in order."""
    i, j = _candidates(left, right, conditions)
    products = _products(left, right, i, j)
    similarity = (products / (left.lengths[i] * right.lengths[j])).astype(np.float32)
    datasets = left.pictures.dataset[left.rows[i]], right.pictures.dataset[right.rows[j]]
    reach = similarity >= conditions.threshold[datasets]
    i, j, similarity = i[reach], j[reach], similarity[reach]
    passed = _second_look(left, right, i, j, conditions)
    return Matches(left.rows[i[passed]], right.rows[j[passed]], similarity[passed])


def _candidates(left: _Block, right: _Block, conditions: _Conditions) -> tuple[Ints, Ints]:
    """Return the pairs that may reach the lowest threshold of any, for all that float32 can say."""
    one, other = left.pictures, right.pictures
    datasets = np.ix_(np.unique(one.dataset[left.rows]), np.unique(other.dataset[right.rows]))
    lowest = conditions.threshold[datasets].min()
    if np.isinf(lowest) or (one.accepted[left.rows].all() and other.accepted[right.rows].all()):
        return np.empty(0, np.int64), np.empty(0, np.int64)
    enough = lowest * left.lengths.min() * right.lengths.min() - rounding(left.vectors.shape[1])
    is_enough = left.vectors @ right.vectors.T >= np.float32(enough)
    i, j = np.divmod(np.flatnonzero(is_enough), len(right.rows))
    a, b = left.rows[i], right.rows[j]
    can_go = (one.rank[a] != other.rank[b]) & ~(one.accepted[a] & other.accepted[b])
    return i[can_go], j[can_go]


def _products(left: _Block, right: _Block, i: Ints, j: Ints) -> npt.NDArray[np.float64]:
    """Return the exact products of pairs of vectors."""
    if len(i) > _DENSE * len(left.rows) * len(right.rows):
        whole = left.vectors.astype(np.float64) @ right.vectors.astype(np.float64).T
        return np.asarray(whole[i, j])
    products = np.empty(len(i))
    for start in range(0, len(i), _PAIRS):
        some = slice(start, start + _PAIRS)
        one, other = left.vectors[i[some]], right.vectors[j[some]]
        products[some] = np.einsum("ij,ij->i", one, other, dtype=np.float64)
    return products


def _second_look(left: _Block, right: _Block, i: Ints, j: Ints, conditions: _Conditions) -> Bools:
    """Tell which pairs are copies for their thumbnails too, or need no second look."""
    one, other = left.pictures, right.pictures
    a, b = left.rows[i], right.rows[j]
    datasets = one.dataset[a], other.dataset[b]
    are_graphics = one.graphic[a] & other.graphic[b]
    asked = (
        conditions.looks_at_all[datasets] | conditions.looks_at_graphics[datasets] & are_graphics
    )
    mirrored = conditions.mirrored[datasets]
    passed = ~asked
    for pairs, may_be_mirrored in ((asked & ~mirrored, False), (asked & mirrored, True)):
        if pairs.any():
            candidates = np.zeros((len(left.rows), len(right.rows)), np.bool_)
            candidates[i[pairs], j[pairs]] = True
            thumbnails = one.thumbnail[left.rows], other.thumbnail[right.rows]
            agree = second_look.agreeing(*thumbnails, candidates, may_be_mirrored)
            passed[pairs] = agree[i[pairs], j[pairs]]
    straight = np.flatnonzero(passed & ~mirrored)
    for start in range(0, len(straight), _PAIRS):
        some = straight[start : start + _PAIRS]
        passed[some] = ~second_look.is_mirrored(one.thumbnail[a[some]], other.thumbnail[b[some]])
    return passed
