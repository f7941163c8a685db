"""Which dataset each draw comes from, and which of its samples: integers in, integers out.

Draw k of a run (draws are numbered over all batches) goes to one dataset by a fixed cycle in which
every dataset gets its exact share and, after any number of draws k, has had fewer than one draw
more or less than weight * k (Tijdeman 1980, "The chairman assignment problem"). A dataset's own
draws run through all its samples, epoch after epoch, each in another order. Nothing here has a
state: a run that knows its step knows its data.
"""

import math
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from mixing.manifest import MAX_COMMON_DENOMINATOR

# Samples that lie side by side in a shard and stay together in every order: one read fetches them.
SAMPLES_PER_READ = 64


def dataset_cycle(weights: list[Fraction]) -> np.ndarray:
    """Return the datasets of one cycle of draws, int32, of the length of the common denominator.

    Raises:
        ValueError: the common denominator is above MAX_COMMON_DENOMINATOR.
    """
    length = math.lcm(*(weight.denominator for weight in weights))
    if length > MAX_COMMON_DENOMINATOR:
        raise ValueError(
            f"the weights' common denominator {length:,} is above {MAX_COMMON_DENOMINATOR:,}"
        )
    share = [int(weight * length) for weight in weights]
    counts = [0] * len(weights)
    # Tijdeman's rule: of the datasets that lag by at least 1 / parts of a draw, serve the one whose
    # lag would reach 1 - 1 / parts first. Lags are kept as integers, in units of 1 / length.
    parts = max(2 * len(weights) - 2, 1)
    cycle = np.empty(length, np.int32)
    for draw in range(length):
        lags = [n * (draw + 1) - count * length for n, count in zip(share, counts, strict=True)]
        due = [
            (Fraction((parts - 1) * length - parts * lag, n), dataset)
            for dataset, (n, lag) in enumerate(zip(share, lags, strict=True))
            if n and parts * lag >= length
        ]
        _, cycle[draw] = min(due)
        counts[cycle[draw]] += 1
    return cycle


@dataclass(frozen=True)
class Schedule:
    """The cycle of a mixture, with running counts: ``counts[k, j]`` draws of j before draw k."""

    cycle: np.ndarray
    counts: np.ndarray

    @classmethod
    def of(cls, weights: list[Fraction]) -> "Schedule":
        """Build the schedule of datasets with these weights, which sum to one."""
        cycle = dataset_cycle(weights)
        drawn = cycle[:, None] == np.arange(len(weights))
        return cls(cycle, np.concatenate([np.zeros((1, len(weights)), int), drawn.cumsum(axis=0)]))

    def __call__(self, draw: int) -> tuple[int, int]:
        """Return the dataset of a draw, and how many draws that dataset has had before."""
        turns, position = divmod(draw, len(self.cycle))
        dataset = int(self.cycle[position])
        return dataset, int(turns * self.counts[-1, dataset] + self.counts[position, dataset])


def hash_numbers(numbers: np.ndarray, seed: int) -> np.ndarray:
    """Hash integers to uint64 (SplitMix64's step and finaliser, Steele et al. 2014)."""
    x = numbers.astype(np.uint64) + np.uint64(seed) + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def shard_order(num_shards: int, seed: int) -> np.ndarray:
    """Return the order in which an epoch visits the shards of a dataset."""
    return np.argsort(hash_numbers(np.arange(num_shards), seed), kind="stable")


def sample_order(num_samples: int, seed: int) -> np.ndarray:
    """Return the order in which an epoch visits the samples of a shard.

    Runs of SAMPLES_PER_READ neighbours are visited in random order, and each in random order
    within. Samples are shuffled over all shards already when a mixture is written.
    """
    sample = np.arange(num_samples)
    of_run = hash_numbers(sample // SAMPLES_PER_READ, seed)
    order: np.ndarray = np.lexsort((hash_numbers(sample, seed + 1), of_run))
    return order
