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
    _, first, codes = np.unique(_sortable(labels), return_index=True, return_inverse=True)
    return first[codes]


def _sortable(labels: Labels) -> Labels:
    """Return labels as NumPy can sort them: V16 as S16, which compares all 16 bytes."""
    return labels.view("S16") if labels.dtype == "V16" else labels


def copy_groups(sha256: Labels, pixels_sha256: Labels) -> Ints:
    """Return for each row the lowest row that is joined with it by equal bytes or equal pixels.

    Equal bytes decode to equal pixels, so one round settles every group; more are needed only
    where two versions of a decoder disagree.
    """
    _, by_bytes = np.unique(_sortable(sha256), return_inverse=True)
    _, by_pixels = np.unique(_sortable(pixels_sha256), return_inverse=True)
    groups = np.arange(len(sha256))
    while True:
        before = groups
        for codes in (by_bytes, by_pixels):
            lowest = np.full(len(groups), len(groups))
            np.minimum.at(lowest, codes, groups)
            groups = lowest[codes]
        if np.array_equal(groups, before):
            return groups


def pairs_between(groups: Ints, a: Ints, b: Ints) -> tuple[Ints, Ints]:
    """Return all pairs of a row of ``a`` and one of ``b`` that are in one group.

    Shapes (pairs,), the lower row first. ``groups`` has the group of every row.
    """
    b = b[np.argsort(groups[b], kind="stable")]
    begin = np.searchsorted(groups[b], groups[a], "left")
    lengths = np.searchsorted(groups[b], groups[a], "right") - begin
    left = np.repeat(a, lengths)
    within = np.arange(len(left)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    right = b[np.repeat(begin, lengths) + within]
    return np.minimum(left, right), np.maximum(left, right)
