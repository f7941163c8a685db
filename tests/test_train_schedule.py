"""Exact shares at every prefix, and orders that visit everything once."""

from fractions import Fraction

import numpy as np
import pytest

from train.schedule import (
    SAMPLES_PER_READ,
    Schedule,
    dataset_cycle,
    hash_numbers,
    sample_order,
    shard_order,
)


def fractions(*texts: str) -> list[Fraction]:
    return [Fraction(text) for text in texts]


@pytest.mark.parametrize(
    "weights",
    [
        fractions("1"),
        fractions(*["1/3"] * 3),
        fractions(*["1/11"] * 11),
        fractions("1/2", "1/3", "1/6"),
        fractions("97/100", "1/100", "1/50"),
        fractions("29/67", "3/67", "30/67", "5/67"),
        fractions("1/2", "0", "1/2"),
    ],
)
def test_no_prefix_is_a_whole_draw_off(weights: list[Fraction]) -> None:
    schedule = Schedule.of(weights)
    counts = [0] * len(weights)
    for draw in range(2 * len(schedule.cycle) + 1):
        dataset, before = schedule(draw)
        assert before == counts[dataset]
        counts[dataset] += 1
        for count, weight in zip(counts, weights, strict=True):
            assert abs(count - (draw + 1) * weight) < 1


def test_equal_weights_take_turns() -> None:
    np.testing.assert_array_equal(dataset_cycle(fractions(*["1/3"] * 3)), [0, 1, 2])


def test_weights_with_a_huge_denominator_are_refused() -> None:
    with pytest.raises(ValueError, match="common denominator 1,000,003 is above 1,000,000"):
        dataset_cycle(fractions("1/1000003", "1000002/1000003"))


def test_hash_is_that_of_splitmix64() -> None:
    # The first outputs of the published generator for seed 0 (java.util.SplittableRandom).
    golden_gamma = 0x9E3779B97F4A7C15
    states = np.array([0, golden_gamma], np.uint64)
    assert [hex(x) for x in hash_numbers(states, 0)] == ["0xe220a8397b1dcdaf", "0x6e789e6aa1b965f4"]


@pytest.mark.parametrize("num_samples", [1, 63, 64, 65, 1000])
def test_an_order_visits_everything_once_and_runs_stay_together(num_samples: int) -> None:
    order = sample_order(num_samples, seed=5)
    np.testing.assert_array_equal(np.sort(order), np.arange(num_samples))
    runs = order // SAMPLES_PER_READ
    changes = np.count_nonzero(np.diff(runs)) + 1
    assert changes == -(-num_samples // SAMPLES_PER_READ)


def test_epochs_have_different_orders() -> None:
    assert not np.array_equal(sample_order(1000, 5), sample_order(1000, 6))
    assert not np.array_equal(shard_order(50, 5), shard_order(50, 6))
    np.testing.assert_array_equal(np.sort(shard_order(50, 5)), np.arange(50))
