"""Exact copies: pictures with equal bytes, or with equal pixels in other bytes.

Rows are in the declared order of :mod:`dedup.keepers`, so the lowest row of a group is its best.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
Labels = npt.NDArray[Any]


def first_of_equal(labels: Labels) -> Ints:
    """Return for each row the lowest row of equal label."""
    _, first, codes = np.unique(labels, return_index=True, return_inverse=True)
    return first[codes]


def copy_groups(sha256: Labels, pixels_sha256: Labels) -> Ints:
    """Return for each row the lowest row that is joined with it by equal bytes or equal pixels.

    Equal bytes decode to equal pixels, so one round settles every group; more are needed only
    where two versions of a decoder disagree.
    """
    _, by_bytes = np.unique(sha256, return_inverse=True)
    _, by_pixels = np.unique(pixels_sha256, return_inverse=True)
    groups = np.arange(len(sha256))
    while True:
        before = groups
        for codes in (by_bytes, by_pixels):
            lowest = np.full(len(groups), len(groups))
            np.minimum.at(lowest, codes, groups)
            groups = lowest[codes]
        if np.array_equal(groups, before):
            return groups


def stand_ins(groups: Ints, thresholds: npt.NDArray[np.float32]) -> Ints:
    """Return for each row the lowest row of its group under the same threshold.

    Exact copies under one threshold have the same neighbours in the graph of similar pairs. So
    one stands for all: they stay or go with it, and a million copies make no pairs.
    """
    _, rules = np.unique(thresholds, return_inverse=True)
    return first_of_equal(groups * (rules.max(initial=0) + 1) + rules)


def pairs_within(groups: Ints, rows: Ints) -> tuple[Ints, Ints]:
    """Return all pairs of ``rows`` (ascending) that are in one group, the lower row first.

    For stand-ins a group has at most one row a threshold, so these are few.
    """
    order = rows[np.argsort(groups[rows], kind="stable")]
    lower, higher = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    for distance in range(1, len(order)):
        left, right = order[:-distance], order[distance:]
        same = groups[left] == groups[right]
        if not same.any():
            break
        lower.append(left[same])
        higher.append(right[same])
    return np.concatenate(lower), np.concatenate(higher)
