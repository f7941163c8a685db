"""Recall: how many of the similar pairs a search finds, and how sure that is.

Queries are a simple random sample of the pictures, and all of their true pairs are known
(:mod:`dedup.truth`). A share of all pairs of the corpus is estimated by that share of the queries'
pairs. Pairs of one query stand or fall together, so an interval cannot take each as a draw of its
own: it is Wilson's with an effective number of pairs, which Franco, Little, Louis and Slud
(Comparative study of confidence intervals for proportions in complex sample surveys, Journal of
Survey Statistics and Methodology 7, 2019) find to cover well even near 0 and 1. Where every picture
is a query, a share is no estimate and has no interval.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from math import ceil, comb, sqrt

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from rich import box
from rich.table import Table

from dedup.records import Bools, Ints
from pipeline.errors import EvenmixError

RECALL = pa.schema(
    [
        ("measure", pa.string()),
        ("value", pa.float64()),
        ("low", pa.float64()),
        ("high", pa.float64()),
        ("num_queries", pa.int64()),
        ("num_pairs", pa.int64()),
    ]
)
"""The measures of a search; the columns are those of :class:`Estimate`."""

MIN_QUERIES, MAX_QUERIES = 2_000, 20_000
ENOUGH_PAIRS = 1_000
"""Of so many pairs, each a draw of its own, a recall of 0.99 is known to within 0.006."""

MAX_CLUSTERINGS = 64

Shares = npt.NDArray[np.float64]

_ROUNDING = 1e-12
"""Sums of shares that differ by less may be equal."""

_Z = 1.959964
"""95 % of a normal distribution lie within so many standard deviations."""


@dataclass(frozen=True)
class Estimate:
    """A share, and the ends of its 95 % interval, which are equal to it if it is exact.

    It was measured on ``num_queries`` pictures, and is a share of ``num_pairs`` pairs, or of the
    pictures themselves where that is 0.
    """

    value: float
    low: float
    high: float
    num_queries: int
    num_pairs: int


@dataclass(frozen=True)
class Needed:
    """How many clusterings would do, and about what they would reach."""

    clusterings: int
    reach: float


# The measures


def more_queries(num_queries: int, num_pairs: int, num_pictures: int) -> int:
    """Return how many more queries are wanted after so many with so many true pairs; 0: enough."""
    most = min(MAX_QUERIES, num_pictures)
    wanted = MIN_QUERIES
    if num_queries >= MIN_QUERIES and num_pairs < ENOUGH_PAIRS:
        wanted = ceil(num_queries * ENOUGH_PAIRS / num_pairs) if num_pairs else most
    return max(0, min(wanted, most) - num_queries)


def reach(
    pairs: pa.Table, num_clusterings: int, num_queries: int, num_pictures: int
) -> list[Estimate]:
    """Return what the first, the first two, … of the clusterings can find: pairs that meet in one.

    ``pairs`` are TRUE_PAIRS of ``num_queries`` of the ``num_pictures`` pictures.
    """
    met = np.logical_or.accumulate(_meets(pairs, num_clusterings), axis=1)
    return [share_of_pairs(pairs, each, num_queries, num_pictures) for each in met.T]


def share_of_pairs(
    pairs: pa.Table, counted: Bools, num_queries: int, num_pictures: int
) -> Estimate:
    """Estimate the share of the corpus's similar pairs that are like the ``counted`` ones.

    Of no pairs at all the share is 1, since none is missed, and anything between 0 and 1 is
    possible. ``pairs`` are TRUE_PAIRS of ``num_queries`` of the ``num_pictures`` pictures.
    """
    weight = pairs["weight"].to_numpy()
    _, query = np.unique(pairs["query"].to_numpy(), return_inverse=True)
    all_pairs = np.asarray(np.bincount(query, weight), np.float64)
    hits = np.asarray(np.bincount(query, weight * counted), np.float64)
    total = float(all_pairs.sum())
    value = float(hits.sum()) / total if total else 1.0
    effective = _effective_pairs(hits, all_pairs, value, num_queries) if total else 0.0
    low, high = _interval(value, effective, num_queries / num_pictures)
    return Estimate(value, low, high, num_queries, round(total))


def pair_recall(
    pairs: pa.Table, found: Bools, truncated: Bools, num_queries: int, num_pictures: int
) -> Estimate:
    """Estimate the share of the similar pairs that a search found.

    ``found`` and ``truncated`` are those of :class:`dedup.truth.Found`: pairs of a truncated
    picture may be dropped on purpose and are left out here, so ``num_pairs`` is smaller by theirs.
    """
    listed = pairs.filter(pa.array(~truncated))
    return share_of_pairs(listed, found[~truncated], num_queries, num_pictures)


def duplicates_left(pairs: pa.Table, queries: Ints, kept: Bools, num_pictures: int) -> Estimate:
    """Estimate the share of the kept pictures that have a kept copy.

    ``queries`` are the ranks of all queries, ``kept`` tells of each rank whether it is kept.
    ``num_pictures`` is the number from which the queries were drawn. Of a query in a swarm not all
    pairs are known (:mod:`dedup.truth`): a kept copy of it that is not among them is not seen, so
    where there are swarms the share is too low.
    """
    query, other = pairs["query"].to_numpy(), pairs["other"].to_numpy()
    both_kept = query[kept[query] & kept[other]]
    kept_queries = queries[kept[queries]]
    has_copy = np.isin(kept_queries, both_kept)
    value = float(has_copy.mean()) if len(has_copy) else 0.0
    low, high = _interval(value, len(has_copy), len(queries) / num_pictures)
    return Estimate(value, low, high, len(has_copy), 0)


def comparisons_share(comparisons: int, num_pictures: int) -> Estimate:
    """Return the share of all pairs of pictures that were compared.

    ``comparisons`` are the pairs within clusters, of all clusterings; a picture that was not
    compared with all of its cluster, since it had neighbours enough, counts as if it had been. The
    work of finding the clusters, and of comparing the queries with all, is not in it.
    """
    all_pairs = comb(num_pictures, 2)
    value = comparisons / all_pairs if all_pairs else 0.0
    return Estimate(value, value, value, num_pictures, all_pairs)


# How many clusterings would do


def needed_clusterings(pairs: pa.Table, num_clusterings: int, min_recall: float) -> Needed | None:
    """Return how many clusterings would reach ``min_recall``, where ``num_clusterings`` do not.

    It is extrapolated from the shares that s of the clusterings miss, averaged over all choices of
    s. Each clustering misses a larger part of what is left than the one before, since the pairs
    that are easily separated remain. If a pair is separated with a chance of its own, drawn from a
    beta distribution, then ``1 / (1 - ratio)`` of two misses in turn grows by the same with each
    clustering. None if more than MAX_CLUSTERINGS were needed, or the last one found nothing new.
    """
    misses = _misses(pairs, num_clusterings)
    missed = misses[-1]
    if min(before - after for before, after in pairwise(misses)) < _ROUNDING:
        return None
    terms = [1 / (1 - after / before) for before, after in pairwise(misses)]
    growth = max(0.0, terms[-1] - terms[0]) / max(1, num_clusterings - 1)
    for clusterings in range(num_clusterings + 1, MAX_CLUSTERINGS + 1):
        missed *= 1 - 1 / (terms[-1] + growth * (clusterings - num_clusterings))
        if 1 - missed >= min_recall:
            return Needed(clusterings, 1 - missed)
    return None


def check_reach(reachable: Sequence[Estimate], pairs: pa.Table, min_recall: float) -> str | None:
    """Return a warning if the clusterings of a search may find too little.

    With few true pairs an estimate may well be below the truth, so a search is refused only if
    the upper end of its interval is too low.

    Args:
        reachable: as from :func:`reach`; its last entry is of all clusterings.
        pairs: the TRUE_PAIRS that it was estimated from.
        min_recall: the recipe's ``dedup.min_recall``.

    Raises:
        EvenmixError: even the upper end is less than ``min_recall``.
    """
    best = reachable[-1]
    if best.value >= min_recall:
        return None
    needed = needed_clusterings(pairs, len(reachable), min_recall)
    remedy = (
        f"dedup.clusterings = {needed.clusterings} would reach about {needed.reach:.3f}"
        if needed
        else f"no number up to {MAX_CLUSTERINGS} would do: set a smaller dedup.num_clusters"
    )
    message = (
        f"dedup.clusterings = {len(reachable)} can find {best.value:.4f} of the similar pairs at "
        f"most ({best.low:.4f} to {best.high:.4f}, from {best.num_pairs:,} pairs of "
        f"{best.num_queries:,} pictures), less than dedup.min_recall = {min_recall}; {remedy}"
    )
    if best.high < min_recall:
        raise EvenmixError(message)
    return message


# What is shown and published


def reach_measures(reachable: Sequence[Estimate]) -> dict[str, Estimate]:
    """Return the names of what :func:`reach` gave: the first clustering, the first two, …"""
    return {
        f"reachable_recall_{number}": estimate for number, estimate in enumerate(reachable, start=1)
    }


def recall_rows(measures: Mapping[str, Estimate]) -> pa.Table:
    """Return the measures, by their names, as they are published (RECALL)."""
    rows = [{"measure": name} | asdict(estimate) for name, estimate in measures.items()]
    return pa.Table.from_pylist(rows, RECALL)


def recall_table(measures: pa.Table) -> Table:
    """Return measures (RECALL) as they are shown."""
    table = Table(title="recall", title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("measure", no_wrap=True)
    table.add_column("value", justify="right", no_wrap=True)
    table.add_column("95 % interval", no_wrap=True)
    table.add_column("pictures", justify="right")
    table.add_column("pairs", justify="right")
    for row in measures.to_pylist():
        interval = f"{_percent(row['low'])} to {_percent(row['high'])}"
        table.add_row(
            row["measure"].replace("_", " "),
            _percent(row["value"]),
            "exact" if row["low"] == row["high"] else interval,
            f"{row['num_queries']:,}",
            f"{row['num_pairs']:,}" if row["num_pairs"] else "",
        )
    return table


def _percent(share: float) -> str:
    return f"{100 * share:.4g} %"


# The statistics


def _meets(pairs: pa.Table, num_clusterings: int) -> Bools:
    """Return which pairs meet in which clustering: (pairs, num_clusterings)."""
    flat: Bools = pairs["meets"].combine_chunks().flatten().to_numpy(zero_copy_only=False)
    return flat.reshape(-1, num_clusterings)


def _misses(pairs: pa.Table, num_clusterings: int) -> list[float]:
    """Return the share of pairs that 0, 1, … clusterings miss, averaged over all choices of them.

    Of the choices of s clusterings, a pair that meets in k of all is missed by those that avoid
    these k.
    """
    weight = pairs["weight"].to_numpy()
    num_met = _meets(pairs, num_clusterings).sum(axis=1)
    weight_met = np.bincount(num_met, weight, num_clusterings + 1) / weight.sum()
    return [
        sum(
            float(share) * (comb(num_clusterings - met, chosen) / comb(num_clusterings, chosen))
            for met, share in enumerate(weight_met)
        )
        for chosen in range(num_clusterings + 1)
    ]


def _effective_pairs(hits: Shares, all_pairs: Shares, value: float, num_queries: int) -> float:
    """Return how many independent pairs would tell as much as those of the queries do.

    ``hits`` and ``all_pairs`` have those of each query that has pairs. The variance of a ratio is
    that of its linear terms, but near 0 and 1 too few of these differ from 0 to show it. So the
    result is never more than if the pairs of a query always stood or fell together (Kish, Survey
    Sampling, 1965).
    """
    total = all_pairs.sum()
    effective = total**2 / (all_pairs**2).sum()
    spread = ((hits - value * all_pairs) ** 2).sum() * num_queries / max(1, num_queries - 1)
    if spread:
        effective = min(effective, value * (1 - value) * total**2 / spread)
    return float(effective)


def _interval(value: float, effective: float, drawn: float) -> tuple[float, float]:
    """Return Wilson's interval of a share.

    ``effective`` is the number of independent draws that would tell as much. Since pictures are
    drawn without repetition, the part ``drawn`` of all of them tells more than that, and all of
    them leave nothing open.
    """
    if drawn == 1:
        return value, value
    effective /= 1 - drawn
    centre = (effective * value + _Z**2 / 2) / (effective + _Z**2)
    half = _Z * sqrt(effective * value * (1 - value) + _Z**2 / 4) / (effective + _Z**2)
    # Rounding must not exclude the value itself, which is an end where it is 0 or 1.
    return max(0.0, min(centre - half, value)), min(1.0, max(centre + half, value))
