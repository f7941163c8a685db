"""Recall: estimates against the whole truth of drawn corpora, and what is said about them."""

from itertools import combinations
from math import comb, isclose, prod

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pytest
from rich.console import Console

from dedup import recall
from dedup.recall import (
    Estimate,
    check_reach,
    comparisons_share,
    duplicates_left,
    more_queries,
    needed_clusterings,
    pair_recall,
    reach,
    reach_measures,
    recall_rows,
    recall_table,
    share_of_pairs,
)
from dedup.records import Bools, Ints
from dedup.truth import TRUE_PAIRS
from pipeline.errors import EvenmixError

NUM_PICTURES = 20_000


def pairs_of(query: Ints, other: Ints, meets: Bools, weight: npt.NDArray[np.float64]) -> pa.Table:
    columns = [
        pa.array(query),
        pa.array(other),
        pa.array(np.full(len(query), 0.8, np.float32)),
        pa.array(weight),
        pa.array(list(meets), pa.list_(pa.bool_())),
    ]
    return pa.table(columns, schema=TRUE_PAIRS)


def small(rows: list[tuple[int, int, str]]) -> pa.Table:
    """Return true pairs of a query and another, with the clusterings in which they meet (1)."""
    query, other, meets = zip(*rows, strict=True)
    met = np.array([[digit == "1" for digit in digits] for digits in meets])
    return pairs_of(np.array(query), np.array(other), met, np.ones(len(rows)))


NOTHING = TRUE_PAIRS.empty_table()


def test_more_clusterings_reach_more() -> None:
    pairs = small([(0, 1, "110"), (0, 2, "010"), (1, 0, "110"), (2, 0, "010"), (5, 6, "000")])
    values = [each.value for each in reach(pairs, 3, num_queries=10, num_pictures=100)]
    assert values == [2 / 5, 4 / 5, 4 / 5]
    for each in reach(pairs, 3, 10, 100):
        assert 0 < each.low < each.value < each.high < 1
        assert (each.num_queries, each.num_pairs) == (10, 5)


def test_a_row_counts_as_much_as_it_stands_for() -> None:
    pairs = pairs_of(
        np.array([0, 0, 1]),
        np.array([5, 6, 7]),
        np.array([[True], [False], [True]]),
        np.array([3.0, 3.0, 1.0]),
    )
    (estimate,) = reach(pairs, 1, 10, 100)
    assert (estimate.value, estimate.num_pairs) == (4 / 7, 7)


def test_at_the_ends_an_interval_has_a_width_unless_all_pictures_are_queries() -> None:
    pairs = small([(0, 1, "1"), (1, 0, "1"), (2, 3, "1")])
    all_met, none_met = np.ones(3, np.bool_), np.zeros(3, np.bool_)
    # Wilson's bound for 3 draws of which all hit is n / (n + z^2), here with n = 3 / (1 - 50/100).
    hit = share_of_pairs(pairs, all_met, 50, 100)
    assert hit.value == hit.high == 1
    assert isclose(hit.low, 6 / (6 + 1.959964**2))
    miss = share_of_pairs(pairs, none_met, 50, 100)
    assert miss.value == miss.low == 0
    assert isclose(miss.high, 1 - hit.low)
    for met in (all_met, none_met, np.array([True, False, True])):
        census = share_of_pairs(pairs, met, 100, 100)
        assert census.low == census.value == census.high == met.mean()


def test_no_pairs_say_nothing() -> None:
    for estimate in (*reach(NOTHING, 2, 10, 100), pair_recall(NOTHING, *_no_rows(), 10, 100)):
        assert estimate == Estimate(1.0, 0.0, 1.0, 10, 0)
    assert share_of_pairs(NOTHING, np.empty(0, np.bool_), 100, 100) == Estimate(1, 1, 1, 100, 0)


def _no_rows() -> tuple[Bools, Bools]:
    return np.empty(0, np.bool_), np.empty(0, np.bool_)


def test_pairs_of_one_query_are_not_as_good_as_those_of_many() -> None:
    together = small([(0, other, "1") for other in range(1, 41)])
    apart = small([(query, query + 1, "1") for query in range(0, 80, 2)])
    (one,), (many,) = (reach(pairs, 1, 2_000, 10**6) for pairs in (together, apart))
    assert one.low < 0.21
    assert many.low > 0.91


def test_truncated_pairs_are_left_out() -> None:
    pairs = small([(0, 1, "1"), (2, 3, "1"), (4, 5, "1"), (6, 7, "1")])
    found = np.array([True, False, False, True])
    truncated = np.array([False, True, False, True])
    estimate = pair_recall(pairs, found, truncated, 10, 100)
    assert (estimate.value, estimate.num_pairs) == (0.5, 2)


def test_duplicates_left_are_kept_pictures_with_a_kept_copy() -> None:
    pairs = small([(0, 1, "1"), (2, 3, "1"), (3, 2, "1"), (4, 5, "1")])
    kept = np.ones(100, np.bool_)
    kept[[1, 4]] = False
    queries = np.array([0, 2, 3, 4, 6, 7])
    estimate = duplicates_left(pairs, queries, kept, 100)
    assert (estimate.value, estimate.num_queries, estimate.num_pairs) == (2 / 5, 5, 0)
    assert 0 < estimate.low < 2 / 5 < estimate.high < 1
    none = duplicates_left(NOTHING, queries, kept, 100)
    assert none.value == none.low == 0 < none.high
    everything = duplicates_left(pairs, np.arange(100), kept, 100)
    assert everything == Estimate(2 / 98, 2 / 98, 2 / 98, 98, 0)
    assert duplicates_left(NOTHING, queries[:0], kept, 100) == Estimate(0.0, 0.0, 1.0, 0, 0)


def draw_corpus(rng: np.random.Generator) -> tuple[Ints, Bools]:
    """Return a corpus's pairs: pictures in groups of copies, some of which are not found.

    Groups have 2 to 12 pictures, all of them pairs. A picture that is hard loses all of its pairs
    but one in four. Returns the pairs, (2, P), and which are found.
    """
    sizes = 2 + np.minimum(rng.pareto(1.5, 1_500) * 1.5, 10).astype(np.int64)
    starts = np.cumsum(sizes) - sizes
    pairs = np.concatenate(
        [
            starts[sizes == size][:, None, None] + np.stack(np.triu_indices(size, 1), axis=1)
            for size in np.unique(sizes)
            if (sizes == size).any()
        ],
        axis=None,
    ).reshape(-1, 2)
    hard = rng.random(NUM_PICTURES) < 0.01
    missed = hard[pairs].any(axis=1) & (rng.random(len(pairs)) < 0.75)
    return pairs.T, ~missed


def test_intervals_hold_the_truth_as_often_as_they_promise() -> None:
    rng = np.random.default_rng(0)
    pairs, found = draw_corpus(rng)
    truth = found.mean()
    assert 0.97 < truth < 0.99
    # Each pair is one of either of its pictures.
    query, found = np.append(*pairs), np.append(found, found)
    held, width = 0, 0.0
    for _ in range(500):
        drawn = np.zeros(NUM_PICTURES, np.bool_)
        drawn[rng.choice(NUM_PICTURES, 2_000, replace=False)] = True
        rows = drawn[query]
        some = pa.table({"query": query[rows], "weight": np.ones(int(rows.sum()))})
        estimate = share_of_pairs(some, found[rows], 2_000, NUM_PICTURES)
        held += estimate.low <= truth <= estimate.high
        width += estimate.high - estimate.low
    assert held / 500 >= 0.93
    assert width / 500 < 0.03  # and they are of use


def test_share_of_comparisons() -> None:
    estimate = comparisons_share(45, 100)
    assert estimate.low == estimate.value == estimate.high == 45 / 4950
    assert comparisons_share(0, 1).value == 0


@pytest.mark.parametrize(
    ("num_queries", "num_pairs", "num_pictures", "more"),
    [
        (0, 0, 10**8, 2_000),
        (0, 0, 300, 300),
        (300, 7, 300, 0),
        (2_000, 1_000, 10**8, 0),
        (2_000, 400, 10**8, 3_000),
        (2_000, 400, 4_500, 2_500),
        (2_000, 3, 10**8, 18_000),
        (2_000, 0, 10**8, 18_000),
        (20_000, 0, 10**8, 0),
    ],
)
def test_queries_are_drawn_until_pairs_are_seen(
    num_queries: int, num_pairs: int, num_pictures: int, more: int
) -> None:
    assert more_queries(num_queries, num_pairs, num_pictures) == more


def beta_pairs(num_pairs: int, num_clusterings: int) -> pa.Table:
    """Return pairs each of which is separated with a chance of its own, from Beta(1, 4)."""
    rng = np.random.default_rng(0)
    chance = rng.beta(1, 4, num_pairs)
    meets = rng.random((num_pairs, num_clusterings)) >= chance[:, None]
    query = np.arange(num_pairs)
    return pairs_of(query, query + num_pairs, meets, np.ones(num_pairs))


def missed_by(num_clusterings: int) -> float:
    """Return the mean of that power of a Beta(1, 4) chance."""
    return prod((1 + i) / (5 + i) for i in range(num_clusterings))


@pytest.mark.parametrize("num_clusterings", [2, 3, 4])
def test_what_more_clusterings_would_reach_is_foreseen(num_clusterings: int) -> None:
    assert missed_by(5) > 0.0065 > missed_by(6)
    needed = needed_clusterings(beta_pairs(40_000, num_clusterings), num_clusterings, 0.9935)
    assert needed is not None
    assert needed.clusterings == 6
    assert 1 - needed.reach == pytest.approx(missed_by(6), rel=0.1)


def test_misses_are_averaged_over_all_choices_of_clusterings() -> None:
    pairs = beta_pairs(500, 4)
    meets = np.array(pairs["meets"].to_pylist())
    expected = [
        np.mean([~meets[:, list(some)].any(axis=1) for some in combinations(range(4), chosen)])
        for chosen in range(5)
    ]
    assert recall._misses(pairs, 4) == pytest.approx(expected, abs=1e-12)


def test_pairs_that_never_meet_cannot_be_helped_by_more() -> None:
    assert needed_clusterings(small([(0, 1, "00"), (2, 3, "00")]), 2, 0.99) is None
    one = needed_clusterings(small([(0, 1, "1"), (2, 3, "0")]), 1, 0.99)
    assert one == recall.Needed(7, 1 - 0.5**7)
    # Half of the pairs never meet, the others always do.
    assert needed_clusterings(small([(0, 1, "1111"), (2, 3, "0000")]), 4, 0.99) is None


def test_what_rounding_leaves_is_no_progress() -> None:
    rng = np.random.default_rng(0)
    for num_clusterings in range(1, 8):
        for num_pairs in range(2, 40):
            met = np.arange(num_pairs) % 2 == 0
            query = np.arange(num_pairs)
            meets = np.repeat(met[:, None], num_clusterings, axis=1)
            pairs = pairs_of(query, query + num_pairs, meets, rng.random(num_pairs))
            misses = recall._misses(pairs, num_clusterings)
            assert len(set(misses[1:])) == 1
            if num_clusterings > 1:
                assert needed_clusterings(pairs, num_clusterings, 0.99) is None


def few_meet_nowhere(num_pairs: int) -> pa.Table:
    """Return pairs of which one in 50 meets in neither of two clusterings."""
    return small(
        [
            (query, query + 1, ("01", "10", "11")[query % 3] if query % 50 else "00")
            for query in range(num_pairs)
        ]
    )


def test_low_reach_is_refused_with_the_remedy() -> None:
    pairs = few_meet_nowhere(200)
    reachable = reach(pairs, 2, 2_000, 10**6)
    assert check_reach(reachable, pairs, 0.98) is None
    needed = needed_clusterings(pairs, 2, 0.995)
    assert needed is not None
    with pytest.raises(EvenmixError) as refused:
        check_reach(reachable, pairs, 0.995)
    assert str(refused.value) == (
        "dedup.clusterings = 2 can find 0.9800 of the similar pairs at most (0.9497 to 0.9922, "
        "from 200 pairs of 2,000 pictures), less than dedup.min_recall = 0.995; "
        f"dedup.clusterings = {needed.clusterings} would reach about {needed.reach:.3f}"
    )
    hopeless = small([(query, query + 1, "11" if query % 50 else "00") for query in range(200)])
    with pytest.raises(EvenmixError, match=r"no number up to 64 would do.*dedup\.num_clusters"):
        check_reach(reach(hopeless, 2, 2_000, 10**6), hopeless, 0.995)


def test_what_may_be_chance_is_a_warning() -> None:
    """With ten pairs, one of which meets nowhere, .99 may well be reached."""
    pairs = small([(query, query + 1, "11" if query else "00") for query in range(0, 20, 2)])
    reachable = reach(pairs, 2, 2_000, 10**6)
    assert reachable[-1].value == 0.9
    assert 0.98 < reachable[-1].high < 0.99
    warning = check_reach(reachable, pairs, 0.98)
    assert warning is not None
    assert "can find 0.9000 of the similar pairs" in warning
    with pytest.raises(EvenmixError):
        check_reach(reachable, pairs, 0.99)


def test_what_is_shown_is_what_is_published() -> None:
    pairs = small([(0, 1, "10"), (2, 3, "11")])
    measures = {
        **reach_measures(reach(pairs, 2, 100, 100)),
        "duplicates_left": Estimate(0.002, 0.0011, 0.00423456, 1_900, 0),
        "comparisons_share": comparisons_share(comb(1_000, 2) // 80, 1_000),
    }
    rows = recall_rows(measures)
    assert rows.schema == recall.RECALL
    assert [Estimate(**dict(list(row.items())[1:])) for row in rows.to_pylist()] == [
        *measures.values()
    ]
    assert rows["measure"].to_pylist() == list(measures)
    console = Console(width=100)
    with console.capture() as shown:
        console.print(recall_table(rows))
    assert [" ".join(line.split()) for line in shown.get().splitlines()[4:] if line.strip()] == [
        "reachable recall 1 100 % exact 100 2",
        "reachable recall 2 100 % exact 100 2",
        "duplicates left 0.2 % 0.11 % to 0.4235 % 1,900",
        "comparisons share 1.25 % exact 1,000 499,500",
    ]
