"""Groups of exact copies, and their pairs."""

import numpy as np

from dedup.exact import copy_groups, first_of_equal, pairs_between


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


def test_keys_and_hashes_of_16_bytes_that_end_in_zeros() -> None:
    labels = np.frombuffer(b"a" * 16 + b"a" * 15 + b"\0" + b"a" * 16 + b"\0" * 16, "V16")
    assert first_of_equal(labels).tolist() == [0, 1, 0, 3]


def test_all_pairs_between_two_datasets() -> None:
    groups = np.array([0, 1, 0, 1, 0, 5, 0])
    lower, higher = pairs_between(groups, np.array([2, 3, 5]), np.array([6, 0, 1, 4]))
    assert sorted(zip(lower.tolist(), higher.tolist(), strict=True)) == [
        (0, 2),
        (1, 3),
        (2, 4),
        (2, 6),
    ]


def test_no_pairs() -> None:
    nothing = np.empty(0, np.int64)
    for a, b in ((nothing, nothing), (np.array([0]), nothing), (np.array([0]), np.array([1]))):
        assert [side.tolist() for side in pairs_between(np.array([3, 4]), a, b)] == [[], []]
