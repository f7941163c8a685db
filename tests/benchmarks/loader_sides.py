"""The sides of the loader's benchmark that evenmix's own environment can run.

python -m tests.benchmarks.loader_sides --side SIDE MIXTURE [OPTIONS]
"""

import io
import itertools
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import webdataset as wds
from PIL import Image

from mixing.manifest import load_manifest
from tests.benchmarks.loader_common import (
    BATCH_SIZE,
    Batch,
    Pixels,
    arguments,
    caption_of,
    dataset_folders,
    read_tar,
    report,
    shards,
)
from train.data import TrainingData, check_mixture, prefetch

_IN_MEMORY = 16 * BATCH_SIZE
_SHUFFLED = 256
"""Samples among which webdataset draws the next one; its first batch waits for so many."""


def bare(mixture: Path, threads: int, step: int) -> Iterator[Batch]:
    """Decode pictures that are in memory, and do nothing else."""
    tars = (tar for folder in dataset_folders(mixture) for tar in shards(folder))
    samples = itertools.chain.from_iterable(map(read_tar, tars))
    in_memory = list(itertools.islice(samples, _IN_MEMORY))

    def batch(number: int) -> Batch:
        start = number * BATCH_SIZE % len(in_memory)
        some = in_memory[start : start + BATCH_SIZE]
        pictures = [np.asarray(Image.open(io.BytesIO(png))) for png, _ in some]
        return pictures, [caption for _, caption in some]

    return prefetch(batch, step, threads)


def evenmix(mixture: Path, threads: int, step: int) -> Iterator[Batch]:
    """Read as evenmix's trainer does, which can begin at any step."""
    url = str(mixture)
    manifest = load_manifest(url)
    check_mixture(url, manifest, manifest.resolution)
    data = TrainingData(url, manifest, seed=0, batch_size=BATCH_SIZE, threads=threads)
    return ((each.pictures, each.captions) for each in prefetch(data.batch, step, threads))


def webdataset(mixture: Path, threads: int, step: int) -> Iterator[Batch]:
    """Read as the documentation of the webdataset library does; it can only begin at the start.

    With one thread all of it runs in this one, else in as many worker processes.
    """
    assert step == 0
    datasets = [
        wds.WebDataset(list(map(str, shards(folder))), shardshuffle=100)
        .repeat()
        .shuffle(_SHUFFLED, initial=_SHUFFLED)
        .decode("rgb8")
        .to_tuple("png", "json")
        for folder in dataset_folders(mixture)
    ]
    batched = wds.batched(BATCH_SIZE, collation_fn=_collate)
    mixed = wds.DataPipeline(wds.RandomMix(datasets), batched)
    if threads == 1:
        return iter(mixed)
    # A worker makes a tensor of the pictures, which comes here in shared memory.
    loader = wds.WebLoader(mixed, batch_size=None, num_workers=threads)
    return ((pictures.numpy(), captions) for pictures, captions in loader)


def _collate(samples: list[tuple[Pixels, Mapping[str, Any]]]) -> Batch:
    return np.stack([picture for picture, _ in samples]), [caption_of(text) for _, text in samples]


SIDES: Mapping[str, Callable[[Path, int, int], Iterator[Batch]]] = {
    "bare": bare,
    "evenmix": evenmix,
    "webdataset": webdataset,
}


def main() -> None:
    """Run one side."""
    started = time.monotonic()
    parser = arguments()
    parser.add_argument("--side", choices=SIDES, required=True)
    options = parser.parse_args()
    batches = SIDES[options.side](options.mixture, options.threads, options.step)
    report(batches, started, options.batches)


if __name__ == "__main__":
    main()
