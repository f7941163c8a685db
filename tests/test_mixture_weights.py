"""The datasets' shares of a mixture are exact fractions that sum to one."""

import math
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

import pytest

from mixing.manifest import MAX_COMMON_DENOMINATOR
from mixing.weights import Weight, check_weights, dataset_weights
from pipeline.catalog import CATALOG
from pipeline.errors import EvenmixError
from pipeline.recipe import Recipe


def recipe_of(weights: Any, *datasets: str) -> Recipe:
    folder = {"layout": "folder", "source": "s", "licence": "CC0 1.0"}
    return Recipe.model_validate(
        {
            "root": "corpus",
            "datasets": dict.fromkeys(datasets, folder),
            "captions": {"source": {"engine": "source"}},
            "mixture": {"name": "m", "resolution": 64, "captions": "source", "weights": weights},
        }
    )


def weights_of(weights: Any, sizes: Mapping[str, int]) -> dict[str, Weight]:
    return dataset_weights(recipe_of(weights, *sizes), sizes)


def test_equal_weights_are_exact_whatever_the_sizes() -> None:
    weights = weights_of("equal", {f"d{i:02}": 10**i for i in range(11)})
    assert weights == {f"d{i:02}": Weight(Fraction(1, 11)) for i in range(11)}


def test_given_weights_are_read_as_decimals() -> None:
    weights = weights_of({"a": 0.1, "b": 0.2, "c": 0.1}, {"a": 1, "b": 1, "c": 1})
    assert weights == {
        "a": Weight(Fraction(1, 4)),
        "b": Weight(Fraction(1, 2)),
        "c": Weight(Fraction(1, 4)),
    }


def test_given_weights_that_no_trainer_could_tabulate_are_refused_before_sizes_are_known() -> None:
    with pytest.raises(EvenmixError, match=r"common denominator 4,234,567, .* round them"):
        check_weights(recipe_of({"a": 0.1234567, "b": 0.3}, "a", "b"))
    check_weights(recipe_of({"a": 0.123, "b": 0.3}, "a", "b"))
    check_weights(recipe_of("size", "a", "b"))


def test_weights_by_size_are_exact_where_they_can_be_kept() -> None:
    weights = weights_of("size", {"large": 300, "middle": 200, "small": 100})
    assert weights == {
        "large": Weight(Fraction(1, 2)),
        "middle": Weight(Fraction(1, 3)),
        "small": Weight(Fraction(1, 6)),
    }


def test_weights_with_a_cap_count_no_dataset_beyond_it() -> None:
    sizes = {"large": 1_000_000, "middle": 2_000, "small": 1_000}
    assert weights_of("cap:2_000", sizes) == {
        "large": Weight(Fraction(2, 5)),
        "middle": Weight(Fraction(2, 5)),
        "small": Weight(Fraction(1, 5)),
    }


def test_sizes_of_a_large_denominator_are_rounded_and_the_exact_shares_are_recorded() -> None:
    # i1's baseline: all twelve datasets by size.
    sizes = {name: entry.in_i1.pictures for name, entry in CATALOG.items()}
    total = sum(sizes.values())
    weights = weights_of("size", sizes)
    assert sum(weight.share for weight in weights.values()) == 1
    for name, weight in weights.items():
        assert weight.before_rounding == Fraction(sizes[name], total)
        assert MAX_COMMON_DENOMINATOR % weight.share.denominator == 0
        assert abs(weight.share - weight.before_rounding) < Fraction(1, MAX_COMMON_DENOMINATOR)
    assert weights["midjourneyv6"].share == Fraction(485, 65_536)


def test_rounding_gives_the_parts_that_are_left_to_the_largest_remainders() -> None:
    # Of 65,536 parts: 32,768.25, 16,383.5 and 16,384.25; one part is left.
    sizes = {"a": 131_073, "b": 65_534, "c": 65_537}
    assert sum(sizes.values()) == 4 * MAX_COMMON_DENOMINATOR
    shares = {name: weight.share for name, weight in weights_of("size", sizes).items()}
    assert {name: share * MAX_COMMON_DENOMINATOR for name, share in shares.items()} == {
        "a": 32_768,
        "b": 16_384,
        "c": 16_384,
    }


def test_equal_remainders_are_rounded_up_in_order_of_the_names() -> None:
    # 13,106.3, 13,106.3 and 39,321.3 parts, the last with the least remainder.
    sizes = {"b": 100_001, "a": 100_001, "c": 300_030}
    quotas = {n: Fraction(size * 65_536, sum(sizes.values())) for n, size in sizes.items()}
    assert sum(map(math.floor, quotas.values())) == 65_535
    shares = {name: weight.share for name, weight in weights_of("size", sizes).items()}
    assert {name: share * 65_536 for name, share in shares.items()} == {
        "a": math.floor(quotas["a"]) + 1,
        "b": math.floor(quotas["b"]),
        "c": math.floor(quotas["c"]),
    }


def test_the_smallest_dataset_keeps_a_part_and_the_sum_stays_one() -> None:
    sizes = {"huge": 10**9} | {f"tiny{number}": number + 1 for number in range(40)}
    weights = weights_of("size", sizes)
    tiny = Fraction(1, MAX_COMMON_DENOMINATOR)
    assert weights["huge"].share == 1 - 40 * tiny
    assert all(weights[f"tiny{number}"].share == tiny for number in range(40))
    assert weights["tiny0"].before_rounding == Fraction(1, sum(sizes.values()))
