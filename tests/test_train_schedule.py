"""Exact shares at every prefix, and orders that visit everything once."""

import math
from fractions import Fraction

import numpy as np
import pytest

from mixing.manifest import MAX_COMMON_DENOMINATOR
from train.schedule import SAMPLES_PER_RUN, EpochOrder, Schedule, dataset_cycle, hash_numbers

# The counts that i1 weights its twelve datasets by.
I1_SIZES = (
    13_673_551, 98_121_424, 4_817_431, 9_393_971, 8_026_628, 2_810_634, 4_813_543, 5_890_279,
    1_240_185, 1_553_575, 5_397_762, 11_977_824,
)  # fmt: skip


def fractions(*texts: str) -> list[Fraction]:
    return [Fraction(text) for text in texts]


def size_weights(sizes: tuple[int, ...]) -> list[Fraction]:
    """Shares of sizes, rounded down to 65,536ths; the largest dataset gets what is left."""
    shares = [size * MAX_COMMON_DENOMINATOR // sum(sizes) for size in sizes]
    shares[int(np.argmax(sizes))] += MAX_COMMON_DENOMINATOR - sum(shares)
    return [Fraction(share, MAX_COMMON_DENOMINATOR) for share in shares]


WEIGHTS = {
    "one": fractions("1"),
    "two equal": fractions("1/2", "1/2"),
    "eleven equal": fractions(*["1/11"] * 11),
    "0.3 and 0.7": fractions("3/10", "7/10"),
    "0.9 and ten small": fractions("9/10", *["1/100"] * 10),
    "i1's sizes": size_weights(I1_SIZES),
    "uneven": fractions("29/67", "3/67", "30/67", "5/67"),
    "one without": fractions("1/2", "0", "1/2"),
}


@pytest.mark.parametrize("weights", WEIGHTS.values(), ids=WEIGHTS)
def test_no_prefix_is_a_whole_draw_off(weights: list[Fraction]) -> None:
    """Over 100,000 draws, row by row of the batches that blocks of any length deal."""
    schedule = Schedule.of(weights)
    spans = [1] * len(weights)
    blocks = [schedule.deal(block, 5, batch_size=200, spans=spans)[0] for block in range(100)]
    draws = np.concatenate([block.T.ravel() for block in blocks])
    assert len(draws) == 100_000
    length = math.lcm(*(weight.denominator for weight in weights))
    prefix = np.arange(1, len(draws) + 1)
    for dataset, weight in enumerate(weights):
        off = np.cumsum(draws == dataset) * length - prefix * int(weight * length)
        parts = max(2 * len(weights) - 2, 1)
        assert np.abs(off).max() * parts <= length * (parts - 1)  # Tijdeman's, sharper than a draw
        assert np.abs(off).max() < length


def cycle_by_definition(weights: list[Fraction]) -> list[int]:
    """Tijdeman's rule as he states it: of those that lag, serve the first to reach its limit."""
    length = math.lcm(*(weight.denominator for weight in weights))
    margin = Fraction(1, max(2 * len(weights) - 2, 1))
    counts, cycle = [0] * len(weights), []
    for draw in range(1, length + 1):
        lags = [weight * draw - count for weight, count in zip(weights, counts, strict=True)]
        due = [
            ((1 - margin - lag) / weight, dataset)
            for dataset, (weight, lag) in enumerate(zip(weights, lags, strict=True))
            if weight and lag >= margin
        ]
        cycle.append(min(due)[1])
        counts[cycle[-1]] += 1
    return cycle


def test_the_cycle_is_that_of_the_rule() -> None:
    rng = np.random.default_rng(0)
    for _ in range(60):
        shares = rng.integers(0, rng.integers(2, 60), size=rng.integers(1, 12)) + (
            rng.random() < 0.5
        )
        if shares.sum():
            weights = [Fraction(int(share), int(shares.sum())) for share in shares]
            assert dataset_cycle(weights).tolist() == cycle_by_definition(weights)


def test_equal_weights_take_turns() -> None:
    np.testing.assert_array_equal(dataset_cycle(fractions(*["1/3"] * 3)), [0, 1, 2])


def test_weights_with_a_huge_denominator_are_refused() -> None:
    with pytest.raises(ValueError, match="common denominator 65,537 is above 65,536"):
        dataset_cycle(fractions("1/65537", "65536/65537"))


@pytest.mark.parametrize("num_processes", [1, 2, 4, 8])
def test_rows_of_a_process_are_a_stretch_of_each_dataset(num_processes: int) -> None:
    schedule, spans = Schedule.of(WEIGHTS["uneven"]), [7, 1, 3, 7]
    reached = [0] * 4
    for block in range(5):
        datasets, positions = schedule.deal(block, 7, batch_size=24, spans=spans)
        for dataset, span in enumerate(spans):
            for step in range(0, 7, span):
                for rows in np.split(np.arange(24), num_processes):
                    part = np.s_[rows, step : step + span]
                    own = positions[part][datasets[part] == dataset]
                    np.testing.assert_array_equal(own, reached[dataset] + np.arange(len(own)))
                    reached[dataset] += len(own)


def test_a_late_block_is_dealt_like_any_other() -> None:
    weights, cycle = WEIGHTS["i1's sizes"], dataset_cycle(WEIGHTS["i1's sizes"])
    turns, rest = divmod(1_000_000 * 1024, MAX_COMMON_DENOMINATOR)
    datasets, positions = Schedule.of(weights).deal(250_000, 4, batch_size=1024, spans=[4] * 12)
    np.testing.assert_array_equal(datasets.T.ravel(), np.resize(np.roll(cycle, -rest), 4096))
    for dataset, weight in enumerate(weights):
        before = turns * int(weight * MAX_COMMON_DENOMINATOR) + int(np.sum(cycle[:rest] == dataset))
        drawn = positions[datasets == dataset]
        np.testing.assert_array_equal(drawn, before + np.arange(len(drawn)))


def test_hash_is_that_of_splitmix64() -> None:
    # The first outputs of the published generator for seed 0 (java.util.SplittableRandom).
    golden_gamma = 0x9E3779B97F4A7C15
    states = np.array([0, golden_gamma], np.uint64)
    assert [hex(x) for x in hash_numbers(states, 0)] == ["0xe220a8397b1dcdaf", "0x6e789e6aa1b965f4"]


SHARD_SIZES = [1, 63, 64, 65, 1000]


def test_an_epoch_has_every_sample_once_by_runs_of_neighbours() -> None:
    order = EpochOrder("seed", SHARD_SIZES)
    num_samples = sum(SHARD_SIZES)
    everything = [(shard, i) for shard, size in enumerate(SHARD_SIZES) for i in range(size)]
    for epoch in range(20):
        epochs, shards, samples = order.places(epoch * num_samples + np.arange(num_samples))
        assert set(epochs) == {epoch}
        assert sorted(zip(shards, samples, strict=True)) == everything
        assert np.count_nonzero(np.diff(shards)) == len(SHARD_SIZES) - 1
        for shard, size in enumerate(SHARD_SIZES):
            jumps = np.count_nonzero(np.diff(samples[shards == shard]) != 1)
            assert jumps + 1 < size / SAMPLES_PER_RUN + 2


def test_any_position_is_found_at_once() -> None:
    total = sum(SHARD_SIZES)
    whole = np.stack(EpochOrder("seed", SHARD_SIZES).places(np.arange(3 * total)))
    fresh = EpochOrder("seed", SHARD_SIZES)
    for positions in (np.array([2 * total]), np.arange(0), np.arange(3 * total)[::-7]):
        np.testing.assert_array_equal(np.stack(fresh.places(positions)), whole[:, positions])


def test_epochs_differ_in_shards_runs_and_where_these_begin() -> None:
    order = EpochOrder("seed", [1000] * 10)
    first, second = (order.places(epoch * 10_000 + np.arange(10_000))[1] for epoch in range(2))
    assert first.tolist() != second.tolist()
    one, other = (order.samples_of(epoch, 3) for epoch in range(2))
    begins = [
        set(samples[np.diff(samples, prepend=-2) != 1] % 64) - {0} for samples in (one, other)
    ]
    assert begins[0] != begins[1]
    assert one.tolist() != other.tolist()
    assert EpochOrder("other seed", [1000] * 10).samples_of(0, 3).tolist() != one.tolist()
