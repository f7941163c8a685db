"""The mixture as batches: a batch is a pure function of (manifest, seed, step).

So the loader has no state to save, any step can be asked for, and preparing batches ahead is
nothing but calling the function early, in threads. With P processes each asks for its own rows of
the batch, and all rows together are the batch that one process would have.

Requests. Steps are read in blocks of K: so many that the samples of a block have about BLOCK_BYTES,
at most MAX_BLOCK_STEPS. For dataset j they are divided into n_j spans, of K steps or, if that is
less, of an epoch. In a span a process has one stretch of neighbouring positions of the dataset
(:meth:`Schedule.deal`), and reads it in runs of up to SAMPLES_PER_RUN samples, a request each, that
end early only where the stretch or a shard ends. With B samples a batch, and s shards passed a
batch (B times the sum of weight * shards / samples over the datasets), the requests a batch come to
at most

    B / 64 + 2 P sum(n_j) / K + 3 s

over all processes: B / 64 + 2 s runs, as a shard begins and ends with a shorter one; P sum(n_j) / K
stretches that begin within a run; and as many reads of offset indexes as there are pairs of a
stretch and a shard, P sum(n_j) / K + s. A broken sample costs one more for each that is tried in
its place. All processes together read a byte of the shards at most once an epoch of its dataset;
each reads the index of a shard. (A run that is resumed reads its first block from the beginning.)

Memory: with up to K threads three blocks at most, the one in use, the one before and the one after,
which is read ahead: 3 * max(BLOCK_BYTES, one batch) / P. In general it is 2 + threads / K blocks,
rounded up, as the slowest thread may still be at a step while the others are so many further. To
these come the pictures of the batches that are prepared, and some megabytes of offset indexes.
"""

import math
import threading
from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import TypeVar

import numpy as np

from mixing.manifest import Manifest, MixtureDataset
from pipeline import storage
from pipeline.errors import EvenmixError
from train.reader import BrokenSample, SampleReader, Stretch
from train.schedule import EpochOrder, Schedule

T = TypeVar("T")

BLOCK_BYTES = 256 << 20
MAX_BLOCK_STEPS = 64
WATCHED_SAMPLES = 10_000
"""A process stops when more than 1 % of its last so many samples had to be replaced."""

_MAX_TRIES = 100  # to find a whole sample in the place of a broken one


@dataclass(frozen=True)
class Sample:
    """One picture (R, R, 3) uint8 with the caption drawn for it."""

    picture: np.ndarray
    caption: str


@dataclass(frozen=True)
class Batch:
    """A process's rows of a batch, n = B / P of them.

    Pictures (n, R, R, 3) uint8, n captions, and how many samples stand in for broken ones.
    """

    pictures: np.ndarray
    captions: list[str]
    num_replaced: int


@dataclass(frozen=True)
class _Block:
    """The draws of a process in a block of steps: arrays (rows, steps), and what is read for them.

    ``sample`` is the place in the shard, ``stretch`` the place in ``stretches``.
    """

    dataset: np.ndarray
    epoch: np.ndarray
    shard: np.ndarray
    sample: np.ndarray
    stretch: np.ndarray
    stretches: list[Future[Stretch]]


class TrainingData:
    """The training split of a mixture, batch by batch.

    ``threads`` may ask for neighbouring steps at once, such as those of :func:`prefetch`, which is
    to be closed before this is.

    Raises:
        EvenmixError: the mixture cannot be trained from, or the batch not be divided.
    """

    def __init__(
        self,
        mixture_url: str,
        manifest: Manifest,
        seed: int,
        batch_size: int,
        *,
        process_index: int = 0,
        num_processes: int = 1,
        threads: int = 1,
    ):
        if batch_size % num_processes:
            raise EvenmixError(
                f"a batch of {batch_size} samples cannot be divided evenly among {num_processes} "
                "processes; change `batch_size`"
            )
        for dataset in manifest.datasets:
            if Fraction(dataset.weight) and not dataset.train.num_samples:
                raise EvenmixError(
                    f"{mixture_url}/mixture.json: dataset {dataset.name} has a weight but no "
                    "samples; mix without it"
                )
        try:
            self._schedule = Schedule.of([Fraction(d.weight) for d in manifest.datasets])
        except ValueError as error:
            raise EvenmixError(
                f"{mixture_url}/mixture.json: {error}; mix again with rounder weights"
            ) from error
        self._seed = seed
        self._batch_size = batch_size
        self._num_rows = batch_size // num_processes
        self._first_row = process_index * self._num_rows
        self._resolution = manifest.resolution
        self._block_steps = block_steps(manifest, batch_size)
        self._spans = [
            min(max(1, int(_epoch_steps(dataset, batch_size))), self._block_steps)
            for dataset in manifest.datasets
        ]
        sizes = [[shard.num_samples for shard in d.train.shards] for d in manifest.datasets]
        self._orders = [
            EpochOrder(f"{seed}/{dataset.name}", of_dataset)
            for dataset, of_dataset in zip(manifest.datasets, sizes, strict=True)
        ]
        self._reader = SampleReader(mixture_url, manifest, manifest.datasets, "train")
        # Shards are numbered through all datasets, samples through all shards.
        self._first_shard = np.cumsum([0, *map(len, sizes)])
        self._first_sample = np.cumsum([0, *(size for of_dataset in sizes for size in of_dataset)])
        num_blocks = 2 + math.ceil(threads / self._block_steps)
        self._blocks = lru_cache(maxsize=num_blocks)(self._read_block)
        self._replaced: deque[int] = deque(maxlen=max(1, WATCHED_SAMPLES // self._num_rows))
        self._lock = threading.Lock()

    def batch(self, step: int) -> Batch:
        """Return this process's rows of the batch of a step (counted from 0).

        A broken sample is replaced by the next one in the order of its shard.

        Raises:
            EvenmixError: a shard is missing or damaged, or too many samples are broken.
        """
        number, within = divmod(step, self._block_steps)
        with self._lock:
            block = self._blocks(number)
            self._blocks(number + 1)
        pictures = np.empty((self._num_rows, self._resolution, self._resolution, 3), np.uint8)
        captions, replaced = [], []
        for row, out in enumerate(pictures):
            stretch = block.stretches[block.stretch[row, within]].result()
            sample, seed = block.sample[row, within], f"{self._seed}/{block.epoch[row, within]}"
            try:
                captions.append(self._reader.decode(stretch, sample, seed, out))
            except BrokenSample as error:
                captions.append(self._replacement(error, block, (row, within), seed, out))
                replaced.append(error)
        self._watch(replaced)
        return Batch(pictures, captions, len(replaced))

    def keys(self, step: int) -> list[str]:
        """Return the keys of the samples that :meth:`batch` draws, broken ones among them."""
        number, within = divmod(step, self._block_steps)
        with self._lock:
            block = self._blocks(number)
        stretches = [block.stretches[stretch].result() for stretch in block.stretch[:, within]]
        places = zip(stretches, block.sample[:, within], strict=True)
        return [stretch.index.keys[sample] for stretch, sample in places]

    def close(self) -> None:
        """Give up what is being read ahead, so that nobody waits for it at the end."""
        self._reader.close()

    def _read_block(self, number: int) -> _Block:
        """Work out the draws of a block, and begin to read what they need."""
        datasets, positions = self._schedule.deal(
            number, self._block_steps, self._batch_size, self._spans
        )
        own = slice(self._first_row, self._first_row + self._num_rows)
        datasets, positions = datasets[own], positions[own]
        epochs, shards, samples = (np.empty_like(positions) for _ in range(3))
        for dataset, order in enumerate(self._orders):
            drawn = datasets == dataset
            epochs[drawn], shards[drawn], samples[drawn] = order.places(positions[drawn])
        shards += self._first_shard[datasets]

        numbers = self._first_sample[shards] + samples
        wanted, at = np.unique(numbers, return_index=True)
        shard, sample = shards.ravel()[at], samples.ravel()[at]
        begins = np.flatnonzero(
            (np.diff(wanted, prepend=-2) > 1) | (np.diff(shard, prepend=-1) > 0)
        )
        counts = np.diff(begins, append=len(wanted))
        stretches = [
            self._reader.fetch(int(shard[begin]), int(sample[begin]), int(count))
            for begin, count in zip(begins, counts, strict=True)
        ]
        of_draw = np.searchsorted(wanted[begins], numbers, side="right") - 1
        return _Block(datasets, epochs, shards, samples, of_draw, stretches)

    def _replacement(
        self, broken: BrokenSample, block: _Block, at: tuple[int, int], seed: str, out: np.ndarray
    ) -> str:
        """Decode the next whole sample in the order of a broken one's shard; return its caption."""
        dataset, shard = int(block.dataset[at]), int(block.shard[at])
        order = self._orders[dataset].samples_of(
            int(block.epoch[at]), shard - int(self._first_shard[dataset])
        )
        place = int(np.flatnonzero(order == block.sample[at])[0])
        following = np.roll(order, -place)[1:_MAX_TRIES].tolist()
        for sample in following:
            stretch = self._reader.fetch(shard, sample, 1).result()
            try:
                return self._reader.decode(stretch, sample, seed, out)
            except BrokenSample:
                continue
        raise EvenmixError(
            f"{broken} cannot be used, nor can the {len(following)} samples after it in this "
            "shard; copy or mix it again"
        )

    def _watch(self, replaced: list[BrokenSample]) -> None:
        """Stop the run when too many of the samples of late were broken."""
        with self._lock:
            self._replaced.append(len(replaced))
            if replaced and sum(self._replaced) > max(WATCHED_SAMPLES, self._num_rows) // 100:
                raise EvenmixError(
                    f"{sum(self._replaced):,} of the last {WATCHED_SAMPLES:,} samples are broken, "
                    f"more than 1 %, the latest in {replaced[-1]}; `evenmix verify --deep` finds "
                    "the damaged shards"
                )


def block_steps(manifest: Manifest, batch_size: int) -> int:
    """Return K, how many steps are read at a time: a function of the mixture and the batch."""
    batch_bytes = sum(
        sum(shard.bytes for shard in dataset.train.shards) / epoch
        for dataset in manifest.datasets
        if (epoch := _epoch_steps(dataset, batch_size))
    )
    return min(max(1, int(BLOCK_BYTES / batch_bytes)), MAX_BLOCK_STEPS)


def _epoch_steps(dataset: MixtureDataset, batch_size: int) -> Fraction:
    """Return how many steps an epoch of a dataset lasts; 0 if it is not drawn from."""
    drawn = batch_size * Fraction(dataset.weight)
    return Fraction(dataset.train.num_samples) / drawn if drawn else Fraction(0)


def check_mixture(mixture_url: str, manifest: Manifest, resolution: int) -> None:
    """Check before any work that a mixture is whole and fits the model.

    Raises:
        EvenmixError: another resolution, pictures that are not square or have no captions, a
            missing or truncated file.
    """
    name = storage.join(mixture_url, "mixture.json")
    if manifest.crop != "square":
        raise EvenmixError(
            f"{name}: its pictures keep their aspect, the trainer needs square ones; mix again "
            'with crop = "square"'
        )
    if manifest.resolution != resolution:
        raise EvenmixError(
            f"{name}: its pictures have {manifest.resolution} px, the training configuration says "
            f"{resolution} px; change `resolution` or mix again"
        )
    for dataset in manifest.datasets:
        if not any(map(Fraction, dataset.caption_sets.values())):
            raise EvenmixError(
                f"{name}: dataset {dataset.name} has no caption set; mix again with captions for it"
            )
    there = {file.name: file.num_bytes for file in storage.list_files(mixture_url)}
    for dataset in manifest.datasets:
        for shard in dataset.train.shards + dataset.validation.shards:
            url = storage.join(mixture_url, shard.name)
            if shard.name not in there or shard.name.removesuffix(".tar") + ".parquet" not in there:
                raise EvenmixError(f"{url} or its offset index is missing; copy or mix it again")
            if there[shard.name] != shard.bytes:
                raise EvenmixError(
                    f"{url} has {there[shard.name]:,} bytes, the manifest says {shard.bytes:,}; "
                    "copy or mix it again"
                )


def read_validation(
    mixture_url: str, manifest: Manifest, max_samples: int
) -> dict[str, list[Sample]]:
    """Read the held-out samples of each dataset, at most ``max_samples`` in all.

    Broken ones are left out.
    """
    quota = max_samples // max(1, len(manifest.datasets))
    held_out: dict[str, list[Sample]] = {}
    for dataset in manifest.datasets:
        samples: list[Sample] = []
        with closing(SampleReader(mixture_url, manifest, [dataset], "validation")) as reader:
            for shard, info in enumerate(reader.shards):
                count = min(info.num_samples, quota - len(samples))
                if not count:
                    break
                stretch = reader.fetch(shard, 0, count).result()
                for number in range(count):
                    picture = np.empty((manifest.resolution, manifest.resolution, 3), np.uint8)
                    try:
                        caption = reader.decode(stretch, number, "validation", picture)
                    except BrokenSample:
                        continue
                    samples.append(Sample(picture, caption))
        held_out[dataset.name] = samples
    return held_out


def prefetch(function: Callable[[int], T], first: int, threads: int) -> Generator[T]:
    """Yield function(first), function(first + 1), … without end, computed ahead in threads."""
    with ThreadPoolExecutor(threads, thread_name_prefix="loader") as pool:
        ahead: deque[Future[T]] = deque()
        argument = first
        try:
            while True:
                while len(ahead) <= threads:
                    ahead.append(pool.submit(function, argument))
                    argument += 1
                yield ahead.popleft().result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
