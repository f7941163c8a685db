"""Groups of exact copies, and who stands for whom."""

import numpy as np

from dedup.exact import copy_groups, first_of_equal, pairs_within, stand_ins


def test_equal_bytes_or_equal_pixels_make_a_group() -> None:
    sha256 = np.array([b"a", b"b", b"b", b"c", b"d", b"e"])
    pixels = np.array([b"p", b"q", b"q", b"p", b"r", b"q"])
    assert copy_groups(sha256, pixels).tolist() == [0, 1, 1, 0, 4, 1]


def test_groups_join_through_rows_whose_decoders_disagree() -> None:
    # 4 and 3 have equal bytes, 3 and 2 equal pixels, and so on down to 0.
    sha256 = np.array([b"a", b"b", b"b", b"c", b"c"])
    pixels = np.array([b"p", b"p", b"q", b"q", b"r"])
    assert copy_groups(sha256, pixels).tolist() == [0, 0, 0, 0, 0]


def test_no_pictures() -> None:
    nothing = np.array([], "S1")
    assert copy_groups(nothing, nothing).tolist() == []
    assert first_of_equal(nothing).tolist() == []


def test_one_stands_for_its_copies_under_one_threshold() -> None:
    groups = np.array([0, 1, 0, 0, 1, 0])
    thresholds = np.array([0.75, np.inf, np.inf, 0.75, np.inf, np.inf], np.float32)
    representatives = stand_ins(groups, thresholds)
    assert representatives.tolist() == [0, 1, 2, 0, 1, 2]
    rows = np.array([0, 1, 2])
    lower, higher = pairs_within(groups, rows)
    assert (lower.tolist(), higher.tolist()) == ([0], [2])


def test_all_pairs_within_groups() -> None:
    groups = np.array([0, 1, 0, 1, 0, 5])
    lower, higher = pairs_within(groups, np.arange(6))
    assert sorted(zip(lower.tolist(), higher.tolist(), strict=True)) == [
        (0, 2),
        (0, 4),
        (1, 3),
        (2, 4),
    ]
