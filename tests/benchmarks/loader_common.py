"""What the sides of the loader's benchmark share: the samples, and how their batches are measured.

A side runs in a process of its own and prints two lines of JSON. The first comes with its first
batch: what was in it. The second comes after ``--batches`` further ones: what they cost. Nothing
here needs evenmix or torch, so that a side can run in an environment that has not both.
"""

import argparse
import hashlib
import json
import resource
import tarfile
import time
from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import psutil

BATCH_SIZE = 32

Pixels = npt.NDArray[np.uint8]
Batch = tuple[Collection[Pixels], Collection[str]]
"""BATCH_SIZE pictures (R, R, 3) uint8, each with its caption."""

_WARM_UP = 4
"""Batches after the first one that are not measured: reading ahead is under way then."""


@dataclass(frozen=True)
class First:
    """A side's first batch: the SHA-256 of the pixels of each caption's picture.

    ``since_imports_s`` is the time that it took since the side's modules were there.
    """

    digests: dict[str, str]
    since_imports_s: float
    peak_bytes: int


@dataclass(frozen=True)
class Rate:
    """What some samples cost; ``cpu_s`` is that of the side and all processes that it started."""

    samples: int
    wall_s: float
    cpu_s: float

    @property
    def per_s(self) -> float:
        """Samples per second."""
        return self.samples / self.wall_s

    @property
    def per_core_s(self) -> float:
        """Samples per second of CPU time."""
        return self.samples / self.cpu_s


def arguments() -> argparse.ArgumentParser:
    """Return a parser of the options that all sides have."""
    parser = argparse.ArgumentParser()
    parser.add_argument("mixture", type=Path, help="a mixture of PNG, its folder")
    parser.add_argument("--threads", type=int, default=1, help="or processes")
    parser.add_argument("--step", type=int, default=0, help="the first batch's number")
    parser.add_argument("--batches", type=int, default=0, help="how many are measured")
    return parser


def dataset_folders(mixture: Path) -> list[Path]:
    """Return the folders of a mixture's datasets."""
    return sorted(path for path in mixture.iterdir() if path.is_dir())


def shards(dataset_folder: Path) -> list[Path]:
    """Return the tars of a dataset."""
    return sorted(dataset_folder.glob("train-*.tar"))


def read_tar(path: Path) -> Iterator[tuple[bytes, str]]:
    """Read the PNG and the caption of each sample of a shard."""
    with tarfile.open(path) as tar:
        members = (tar.extractfile(member) for member in tar)
        for png, text in zip(members, members, strict=True):
            assert png is not None
            assert text is not None
            yield png.read(), caption_of(json.load(text))


def caption_of(sample: Mapping[str, Any]) -> str:
    """Return the caption of a sample, given its JSON; there is one."""
    (caption,) = sample["captions"]
    return str(caption["text"])


def report(batches: Iterator[Batch], started: float, num_batches: int) -> None:
    """Print what the first batch has and, of ``num_batches`` later ones, what they cost.

    ``started`` is the time, by ``time.monotonic()``, when the side began.
    """
    pictures, captions = _checked(next(batches))
    since_imports_s = time.monotonic() - started
    digests = {
        caption: sha256_of(picture) for picture, caption in zip(pictures, captions, strict=True)
    }
    peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux says KiB
    _print(First(digests, since_imports_s, peak_bytes))
    if num_batches:
        _take(batches, _WARM_UP)
        began, cpu_before = time.monotonic(), _cpu_s()
        _take(batches, num_batches)
        wall_s, cpu_s = time.monotonic() - began, _cpu_s() - cpu_before
        _print(Rate(num_batches * BATCH_SIZE, wall_s, cpu_s))


def sha256_of(picture: Pixels) -> str:
    """Return the SHA-256 (hex) of a picture's pixels."""
    return hashlib.sha256(picture.tobytes()).hexdigest()


def _take(batches: Iterator[Batch], number: int) -> None:
    for _ in range(number):
        _checked(next(batches))


def _checked(batch: Batch) -> Batch:
    pictures, captions = batch
    assert len(pictures) == len(captions) == BATCH_SIZE
    assert all(each.dtype == np.uint8 and each.shape[2:] == (3,) for each in pictures)
    return batch


def _cpu_s() -> float:
    own = psutil.Process()
    times = [each.cpu_times() for each in (own, *own.children(recursive=True))]
    return float(sum(each.user + each.system for each in times))


def _print(figures: First | Rate) -> None:
    print(json.dumps(asdict(figures)), flush=True)
