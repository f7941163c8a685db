"""Who goes, and in whose favour: from the graph of copies to a row for each removed picture.

One graph decides. Its edges join exact copies, and pictures that are similar by the rules. Kept is
a maximal independent set of it (:mod:`dedup.keepers`), so each removed picture has a kept
neighbour. What is like an evaluation picture goes afterwards, with its whole group: all that is
joined to the same kept picture (as in DINOv2, Oquab et al. 2023, section 3).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from dedup.exact import pairs_between
from dedup.keepers import choose_keepers, nearest_keepers
from dedup.records import Bools, Floats, Ints
from dedup.rules import Rules
from pipeline.reasons import RejectReason

RULES = (
    str(RejectReason.EXACT_COPY),
    str(RejectReason.NEAR_DUPLICATE),
    str(RejectReason.CONTAMINATION),
)
"""What a removal's rule can be; ``Removals.rule`` has the numbers."""

EXACT, NEAR, CONTAMINATED = range(3)


@dataclass(frozen=True)
class Edges:
    """Pairs of pictures by rank, the better first: arrays of one length, each pair once.

    ``rule`` is EXACT or NEAR.
    """

    better: Ints
    worse: Ints
    similarity: Floats
    rule: npt.NDArray[np.int8]

    @classmethod
    def near(cls, better: Ints, worse: Ints, similarity: Floats) -> "Edges":
        """Return similar pairs."""
        return cls(better, worse, similarity, np.full(len(better), NEAR, np.int8))

    @classmethod
    def exact(cls, better: Ints, worse: Ints) -> "Edges":
        """Return exact copies."""
        num_pairs = len(better)
        return cls(
            better, worse, np.ones(num_pairs, np.float32), np.full(num_pairs, EXACT, np.int8)
        )

    def take(self, rows: npt.NDArray[np.generic]) -> "Edges":
        """Return some of the pairs."""
        return Edges(self.better[rows], self.worse[rows], self.similarity[rows], self.rule[rows])


@dataclass(frozen=True)
class Graph:
    """All pictures by rank, and what joins them.

    ``stand_in``, ``copies``, ``accepted`` and ``settled`` are as in PICTURES, ``dataset`` is the
    number among the rules' datasets. ``near`` are the similar pairs; of ``equal`` ones the worse
    goes with the better. The first ``num_evaluation`` ranks are evaluation pictures.
    """

    stand_in: Ints
    copies: Ints
    dataset: npt.NDArray[np.int16]
    accepted: Bools
    settled: Bools
    near: Edges
    equal: Edges
    num_evaluation: int


@dataclass(frozen=True)
class Removals:
    """The removed pictures, arrays of one length: all are ranks but the last two.

    ``removed`` is ascending; ``duplicate_of`` is the picture in whose favour one goes, ``group``
    the best of its group. ``similarity`` is NaN for what goes because another of its group does.
    ``rule`` numbers RULES.
    """

    removed: Ints
    duplicate_of: Ints
    group: Ints
    similarity: Floats
    rule: npt.NDArray[np.int8]


def choose_removals(graph: Graph, rules: Rules, *, remove_contamination: bool) -> Removals:
    """Decide who goes. Without ``remove_contamination`` evaluation pictures join nothing here.

    Yet in the graph they are among a picture's best neighbours, of which it has a limited number.

    What an earlier search has removed (``settled``) is among the removed only if the picture that
    it went for goes now; it stays removed anyway.
    """
    everyone = np.arange(len(graph.stand_in))
    exact = _exact_edges(graph, rules)
    joined = _concatenate([exact, graph.near])  # of a pair that is in both the first counts
    is_evaluation = joined.better < graph.num_evaluation
    inside = joined.take(~is_evaluation)
    kept = choose_keepers(len(everyone), inside.better, inside.worse)
    keeper, edge = nearest_keepers(kept, inside.better, inside.worse, inside.similarity)

    # Whoever has a stand-in goes where that one goes, or is its copy if it stays (edge -1).
    exact_root = _roots(graph.stand_in)
    bound = graph.stand_in.copy()
    bound[graph.equal.worse] = graph.equal.better
    root = _roots(bound)
    joining = edge[root]
    similarity = np.append(inside.similarity, np.float32(1))[joining]
    rule = np.append(inside.rule, np.int8(EXACT))[joining]
    rule[(joining < 0) & (root != exact_root)] = NEAR
    group = keeper[root]
    duplicate_of = group.copy()
    gone = (group != everyone) & ~graph.settled
    if remove_contamination:
        like = joined.take(is_evaluation)
        contaminated, source, own = _contaminate(len(everyone), like, root, group)
        contaminated[: graph.num_evaluation] = False
        gone |= contaminated
        rule[contaminated] = CONTAMINATED
        duplicate_of[contaminated] = source[contaminated]
        similarity[contaminated] = own[contaminated]
    gone[: graph.num_evaluation] = False
    removed = np.flatnonzero(gone)
    return Removals(
        removed, duplicate_of[removed], group[removed], similarity[removed], rule[removed]
    )


def _exact_edges(graph: Graph, rules: Rules) -> Edges:
    """Return the pairs of exact copies of different datasets; within one there is a stand-in."""
    free = graph.stand_in == np.arange(len(graph.stand_in))
    _, group, size = np.unique(graph.copies, return_inverse=True, return_counts=True)
    rows = np.flatnonzero(free & ~graph.settled & (size[group] > 1))
    of_dataset = [rows[graph.dataset[rows] == number] for number in range(len(rules.datasets))]
    found = [
        pairs_between(graph.copies, of_dataset[a], of_dataset[b])
        for a in range(len(rules.datasets))
        for b in range(a)
        if rules.between(a, b).is_exact
    ]
    better, worse = (
        np.concatenate([np.empty(0, np.int64), *(pair[side] for pair in found)]) for side in (0, 1)
    )
    counts = ~(graph.accepted[better] & graph.accepted[worse])
    return Edges.exact(better[counts], worse[counts])


def _contaminate(
    num_pictures: int, like: Edges, root: Ints, group: Ints
) -> tuple[Bools, Ints, Floats]:
    """Find the pictures of groups in which one is like an evaluation picture.

    ``like`` joins evaluation pictures (better) with others. Returns for each picture whether it is
    one of these, the evaluation picture that is most like it or, if none is, most like one of its
    group, and its own similarity, NaN if it has none.
    """
    by_similarity = np.lexsort((like.better, -like.similarity))
    like = like.take(by_similarity)
    own_source, own = _first(num_pictures, like.worse, like)
    of_group, _ = _first(num_pictures, group[like.worse], like)
    own_source, own = own_source[root], own[root]
    source = np.where(own_source >= 0, own_source, of_group[group])
    return source >= 0, source, own


def _first(num_pictures: int, place: Ints, edges: Edges) -> tuple[Ints, Floats]:
    """Return better end and similarity of the first edge at each place, or -1 and NaN."""
    source = np.full(num_pictures, -1)
    similarity = np.full(num_pictures, np.nan, np.float32)
    found, first = np.unique(place, return_index=True)
    source[found], similarity[found] = edges.better[first], edges.similarity[first]
    return source, similarity


def _roots(bound: Ints) -> Ints:
    """Follow stand-ins to their ends."""
    while True:
        further = bound[bound]
        if np.array_equal(further, bound):
            return bound
        bound = further


def _concatenate(parts: Sequence[Edges]) -> Edges:
    return Edges(
        np.concatenate([part.better for part in parts]),
        np.concatenate([part.worse for part in parts]),
        np.concatenate([part.similarity for part in parts]),
        np.concatenate([part.rule for part in parts]),
    )


def rule_names(rule: npt.NDArray[np.int8]) -> pa.Array:
    """Return the numbers of RULES as their names."""
    return pa.array(RULES).take(pa.array(rule))
