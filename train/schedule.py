"""Which dataset each draw comes from, and which of its samples: integers in, integers out.

Draw k of a run (draws are numbered over all batches) goes to one dataset by a fixed cycle in which
every dataset gets its exact share and, after any number of draws k, has had fewer than one draw
more or less than weight * k. A dataset's own draws run through all its samples, epoch after epoch,
each in another order. Nothing here has a state: a run that knows its step knows its data.
"""

import hashlib
import heapq
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from itertools import islice, pairwise

import numpy as np

from mixing.manifest import MAX_COMMON_DENOMINATOR

SAMPLES_PER_RUN = 64
"""Samples that lie side by side in a shard and stay so in every order: one request fetches them."""


def dataset_cycle(weights: Sequence[Fraction]) -> np.ndarray:
    """Return the datasets of one cycle of draws, int32, of the length of the common denominator.

    The rule is Tijdeman's (1980, "The chairman assignment problem"). With e = 1 / (2 D - 2) for D
    datasets, draw number c (from 0) of a dataset may come when weight * k >= c + e, k the number of
    draws up to and with this one, and must come before weight * k > c + 1 - e. Never more draws
    must come than there is room for (his theorem), and serving the earliest deadline first then
    keeps them all. So no count is ever more than 1 - e away from weight * k.

    Raises:
        ValueError: the common denominator is above MAX_COMMON_DENOMINATOR.
    """
    length = math.lcm(*(weight.denominator for weight in weights))
    if length > MAX_COMMON_DENOMINATOR:
        raise ValueError(
            f"the weights' common denominator {length:,} is above {MAX_COMMON_DENOMINATOR:,}"
        )
    share = np.array([int(weight * length) for weight in weights])
    dataset = np.repeat(np.arange(len(share)), share)
    number = np.concatenate([np.arange(n) for n in share])
    n, parts = share[dataset], max(2 * len(share) - 2, 1)
    release = -(-(number * parts + 1) * length // (parts * n))
    # Deadlines in units of 1 / parts, as integers in the exact order of these fractions: with
    # denominators up to the length, two that differ do so by 1 / length**2 or more.
    whole, rest = np.divmod(((number + 1) * parts - 1) * length, n)
    deadline = whole * length**2 + rest * length**2 // n

    by_deadline = np.lexsort((dataset, deadline))
    release = release[by_deadline]
    ranks = iter(np.argsort(release, kind="stable").tolist())
    waiting: list[int] = []
    cycle = np.empty(length, np.int32)
    for draw, num_released in enumerate(np.bincount(release, minlength=length + 1)[1:].tolist()):
        for rank in islice(ranks, num_released):
            heapq.heappush(waiting, rank)
        cycle[draw] = dataset[by_deadline[heapq.heappop(waiting)]]
    return cycle


@dataclass(frozen=True)
class Schedule:
    """The cycle of a mixture, with running counts: ``counts[k, j]`` draws of j before draw k."""

    cycle: np.ndarray
    counts: np.ndarray

    @classmethod
    def of(cls, weights: Sequence[Fraction]) -> "Schedule":
        """Build the schedule of datasets with these weights, which sum to one."""
        cycle = dataset_cycle(weights)
        drawn = cycle[:, None] == np.arange(len(weights))
        return cls(cycle, np.concatenate([np.zeros((1, len(weights)), int), drawn.cumsum(axis=0)]))

    def deal(
        self, block: int, num_steps: int, batch_size: int, spans: Sequence[int]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return the datasets of a block of steps, and the positions in each dataset's own order.

        Both are (batch_size, num_steps). Batches are in the order of the draws, so the datasets
        keep to their shares row by row. The next positions of dataset j are dealt to its draws in
        ``spans[j]`` steps row by row, and from step to step in a row; then to those in the next
        ``spans[j]`` steps. So in a span any neighbouring rows, such as one process owns, have
        neighbouring positions.
        """
        first = block * num_steps * batch_size
        draws = first + np.arange(num_steps * batch_size)
        datasets = self.cycle[draws % len(self.cycle)].reshape(num_steps, batch_size).T
        positions = np.empty(datasets.shape, np.int64)
        turns, place = divmod(first, len(self.cycle))
        reached = turns * self.counts[-1] + self.counts[place]
        for dataset, span in enumerate(spans):
            for step in range(0, num_steps, span):
                drawn = datasets[:, step : step + span] == dataset
                count = np.count_nonzero(drawn)
                positions[:, step : step + span][drawn] = reached[dataset] + np.arange(count)
                reached[dataset] += count
        return datasets, positions


class EpochOrder:
    """A dataset's samples in the order in which they are drawn, epoch after epoch without end.

    An epoch takes shard after shard in an order of its own. A shard's samples are taken by runs of
    SAMPLES_PER_RUN neighbours (the first and the last may be shorter), in file order within a run;
    where runs begin, and their order, are the epoch's own too. Samples were shuffled over all
    shards when the mixture was written.
    """

    def __init__(self, seed: str, shard_sizes: Sequence[int]):
        self._seed = seed
        self._sizes = np.array(shard_sizes)
        self._num_samples = sum(shard_sizes)
        self._shards_of = lru_cache(maxsize=4)(self._shard_order)

    def places(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the epochs, the shards and the samples (by their place in the shard) at positions.

        All are (num_positions,).
        """
        # In ascending order those of an epoch are neighbours, and in it those of a shard.
        ascending, inverse = np.unique(positions, return_inverse=True)
        epochs, samples = np.divmod(ascending, self._num_samples)
        shards = np.empty_like(samples)
        for epoch, now in _groups(epochs):
            order, ends = self._shards_of(epoch)
            turns = np.searchsorted(ends, samples[now], side="right")
            shards[now] = order[turns]
            samples[now] -= (ends - self._sizes[order])[turns]
            for turn, here in _groups(turns):
                of_shard = self.samples_of(epoch, int(order[turn]))
                samples[now][here] = of_shard[samples[now][here]]
        return epochs[inverse], shards[inverse], samples[inverse]

    def samples_of(self, epoch: int, shard: int) -> np.ndarray:
        """Return the order in which an epoch takes the samples of a shard."""
        seed = hash_text(f"{self._seed}/{epoch}/{shard}")
        run = (np.arange(self._sizes[shard]) + seed % SAMPLES_PER_RUN) // SAMPLES_PER_RUN
        return np.argsort(hash_numbers(run, seed), kind="stable")

    def _shard_order(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Return an epoch's order of shards and the running sum of their samples."""
        seed = hash_text(f"{self._seed}/{epoch}")
        order = np.argsort(hash_numbers(np.arange(len(self._sizes)), seed), kind="stable")
        return order, np.cumsum(self._sizes[order])


def _groups(numbers: np.ndarray) -> Iterator[tuple[int, slice]]:
    """Yield each number of an ascending array, and where it stands."""
    different, begins = np.unique(numbers, return_index=True)
    for number, ends in zip(different.tolist(), pairwise([*begins, len(numbers)]), strict=True):
        yield number, slice(*ends)


def hash_text(text: str) -> int:
    """Hash a text to 56 bits, the same everywhere and always."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=7).digest(), "big")


def hash_numbers(numbers: np.ndarray, seed: int) -> np.ndarray:
    """Hash integers to uint64 (SplitMix64's step and finaliser, Steele et al. 2014)."""
    x = numbers.astype(np.uint64) + np.uint64(seed) + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
