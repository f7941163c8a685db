"""The mixture as batches: a batch is a pure function of (manifest, seed, step).

So the loader has no state to save, any step can be asked for, and preparing batches ahead is
nothing but calling the function early, in threads. Shards are plain tars; a run of neighbouring
samples is fetched by one range read, located by the shard's offset index.
"""

import hashlib
import io
import json
from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import Any, TypeVar

import numpy as np
from PIL import Image

from mixing.manifest import OFFSETS, Manifest, Split
from pipeline import storage
from pipeline.errors import EvenmixError
from train.schedule import SAMPLES_PER_READ, Schedule, sample_order, shard_order

T = TypeVar("T")


class BrokenSample(Exception):
    """A member of a shard that cannot be used; another sample takes its place."""


@dataclass(frozen=True)
class Sample:
    """One picture (R, R, 3) uint8 with the caption drawn for it."""

    key: str
    picture: np.ndarray
    caption: str


@dataclass(frozen=True)
class Batch:
    """A global batch: pictures (B, R, R, 3) uint8, B captions, and how many were replaced."""

    pictures: np.ndarray
    captions: list[str]
    num_replaced: int


def hash_text(text: str) -> int:
    """Hash a text to 56 bits, the same everywhere and always."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=7).digest(), "big")


def draw_caption(
    captions: list[dict[str, Any]], set_weights: dict[str, Fraction], draw: int
) -> str:
    """Choose one of a sample's captions: a caption set by weight, then a caption of that set.

    ``draw`` is a 56-bit hash. Sets that the sample lacks leave their share to the others.
    """
    by_set: dict[str, list[str]] = {}
    for caption in captions:
        if set_weights.get(caption["caption_set"]):
            by_set.setdefault(caption["caption_set"], []).append(caption["text"])
    if not by_set:
        raise BrokenSample("no caption of the mixture's caption sets")
    names = sorted(by_set)
    point = Fraction(draw, 1 << 56) * sum(set_weights[name] for name in names)
    for name in names:
        if point < set_weights[name]:
            break
        point -= set_weights[name]
    texts = by_set[name]
    return texts[int(point / set_weights[name] * len(texts))]


class SplitReader:
    """Random access to the samples of one split of one dataset.

    A few runs of samples are kept in memory, because draws that follow each other mostly fall into
    the same run.
    """

    def __init__(self, mixture_url: str, manifest: Manifest, split: Split, cached_runs: int):
        self.shards = split.shards
        self._num_samples = sum(shard.num_samples for shard in split.shards)
        self._mixture_url = mixture_url
        self._resolution = manifest.resolution
        self._set_weights = {name: Fraction(w) for name, w in manifest.caption_sets.items()}
        self._index = lru_cache(maxsize=16)(self._read_index)
        self._run = lru_cache(maxsize=cached_runs)(self._read_run)

    def __len__(self) -> int:
        return self._num_samples

    def shard_url(self, shard: int) -> str:
        """Return the URL of a shard's tar."""
        return storage.join(self._mixture_url, self.shards[shard].name)

    def read(self, shard: int, sample: int, seed: str) -> Sample:
        """Read a sample; ``seed`` and its key decide which of its captions is drawn.

        Raises:
            BrokenSample: the picture or its JSON cannot be decoded.
            EvenmixError: the shard is missing or damaged, or its pictures have the wrong size.
        """
        index = self._index(shard)
        start, run = self._run(shard, sample // SAMPLES_PER_READ)
        key = str(index["key"][sample])

        def member(kind: str) -> bytes:
            offset = index[f"{kind}_offset"][sample] - start
            return run[offset : offset + index[f"{kind}_bytes"][sample]]

        picture = self._decode(member("image"), f"{self.shard_url(shard)}, sample {key}")
        try:
            captions = json.loads(member("json"))["captions"]
            caption = draw_caption(captions, self._set_weights, hash_text(f"{seed}/{key}"))
        except (ValueError, KeyError, TypeError) as error:
            raise BrokenSample(f"its JSON cannot be used: {error}") from error
        return Sample(key, picture, caption)

    def _decode(self, data: bytes, name: str) -> np.ndarray:
        expected = (self._resolution, self._resolution)
        try:
            with Image.open(io.BytesIO(data)) as picture:
                if picture.size != expected:
                    raise EvenmixError(
                        f"{name}: a picture of {picture.width} x {picture.height} pixels, where "
                        f"the trainer needs {expected[0]} x {expected[1]}. Mix square samples of "
                        "one resolution for this model."
                    )
                return np.asarray(picture.convert("RGB"))
        # Pillow raises SyntaxError for broken PNG chunks.
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise BrokenSample(f"its picture cannot be decoded: {error}") from error

    def _read_index(self, shard: int) -> dict[str, np.ndarray]:
        url = self.shard_url(shard).removesuffix(".tar") + ".parquet"
        table = storage.read_parquet(url, OFFSETS.names)
        if len(table) != self.shards[shard].num_samples:
            raise EvenmixError(
                f"{url} lists {len(table)} samples, the manifest {self.shards[shard].num_samples}. "
                "The mixture is damaged; `evenmix verify` tells more."
            )
        return {name: table[name].to_numpy() for name in OFFSETS.names}

    def _read_run(self, shard: int, run: int) -> tuple[int, bytes]:
        """Fetch a run of neighbouring samples: the offset of its first byte, and its bytes."""
        index = self._index(shard)
        members = slice(run * SAMPLES_PER_READ, (run + 1) * SAMPLES_PER_READ)
        starts = [index[f"{kind}_offset"][members] for kind in ("image", "json")]
        sizes = [index[f"{kind}_bytes"][members] for kind in ("image", "json")]
        start = int(np.min(starts))
        end = int(np.max(np.add(starts, sizes)))
        return start, storage.read_bytes(self.shard_url(shard), start, end - start)


class TrainingData:
    """The training split of a mixture, batch by batch."""

    def __init__(self, mixture_url: str, manifest: Manifest, seed: int, batch_size: int):
        self._seed = seed
        self._batch_size = batch_size
        self._names = [dataset.name for dataset in manifest.datasets]
        try:
            self._schedule = Schedule.of([Fraction(d.weight) for d in manifest.datasets])
        except ValueError as error:
            raise EvenmixError(
                f"{mixture_url}/mixture.json: {error}; mix again with rounder weights"
            ) from error
        # A batch reads each run of a dataset in one go; neighbouring batches share one.
        cached_runs = 4 + batch_size // SAMPLES_PER_READ
        self._readers = [
            SplitReader(mixture_url, manifest, dataset.train, cached_runs)
            for dataset in manifest.datasets
        ]
        self._shard_orders = lru_cache(maxsize=4 * len(self._names))(self._shard_order)
        self._sample_orders = lru_cache(maxsize=4 * len(self._names))(self._sample_order)

    def batch(self, step: int) -> Batch:
        """Return the batch of a step (counted from 0)."""
        first = step * self._batch_size
        drawn = [self._draw(draw) for draw in range(first, first + self._batch_size)]
        samples = [sample for sample, _ in drawn]
        return Batch(
            np.stack([sample.picture for sample in samples]),
            [sample.caption for sample in samples],
            sum(replaced for _, replaced in drawn),
        )

    def _draw(self, draw: int) -> tuple[Sample, bool]:
        """Return a draw's sample, and whether it stands in for a broken one.

        A broken sample is replaced by the next one in the order of its shard.
        """
        dataset, number = self._schedule(draw)
        reader = self._readers[dataset]
        epoch, position = divmod(number, len(reader))
        shards, ends = self._shard_orders(dataset, epoch)
        place = int(np.searchsorted(ends, position, side="right"))
        shard = int(shards[place])
        order = self._sample_orders(dataset, epoch, shard)
        within = position - (int(ends[place]) - len(order))
        for attempt in range(len(order)):
            sample = int(order[(within + attempt) % len(order)])
            try:
                return reader.read(shard, sample, f"{self._seed}/{epoch}"), attempt > 0
            except BrokenSample:
                continue
        raise EvenmixError(
            f"{reader.shard_url(shard)}: none of its {len(order)} samples can be decoded; "
            "mix this shard again"
        )

    def _shard_order(self, dataset: int, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Return an epoch's order of shards and the running sum of their samples."""
        shards = self._readers[dataset].shards
        order = shard_order(len(shards), hash_text(f"{self._seed}/{self._names[dataset]}/{epoch}"))
        return order, np.cumsum([shards[shard].num_samples for shard in order])

    def _sample_order(self, dataset: int, epoch: int, shard: int) -> np.ndarray:
        chosen = self._readers[dataset].shards[shard]
        return sample_order(chosen.num_samples, hash_text(f"{self._seed}/{chosen.name}/{epoch}"))


def check_mixture(mixture_url: str, manifest: Manifest, resolution: int) -> None:
    """Check before any work that a mixture is whole and fits the model.

    Raises:
        EvenmixError: another resolution, a missing or truncated file, or a dataset without samples.
    """
    name = storage.join(mixture_url, "mixture.json")
    if manifest.resolution != resolution:
        raise EvenmixError(
            f"{name}: its pictures have {manifest.resolution} px, the training configuration says "
            f"{resolution} px; change `resolution` or mix again"
        )
    there = {file.name: file.num_bytes for file in storage.list_files(mixture_url)}
    for dataset in manifest.datasets:
        if Fraction(dataset.weight) and not dataset.train.num_samples:
            raise EvenmixError(f"{name}: dataset {dataset.name} has a weight but no samples")
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
        reader = SplitReader(mixture_url, manifest, dataset.validation, cached_runs=1)
        samples: list[Sample] = []
        for shard, info in enumerate(reader.shards):
            for number in range(min(info.num_samples, quota - len(samples))):
                try:
                    samples.append(reader.read(shard, number, "validation"))
                except BrokenSample:
                    continue
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
