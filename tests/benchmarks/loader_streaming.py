"""The side of the loader's benchmark that runs MosaicML streaming, in an environment of its own.

python -m tests.benchmarks.loader_streaming MIXTURE --write    the mixture in streaming's format
python -m tests.benchmarks.loader_streaming MIXTURE [OPTIONS]  its batches
"""

import io
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from streaming import (  # type: ignore[import-not-found]
    MDSWriter,
    Stream,
    StreamingDataLoader,
    StreamingDataset,
)

from tests.benchmarks.loader_common import (
    BATCH_SIZE,
    Batch,
    arguments,
    dataset_folders,
    read_tar,
    report,
    shards,
)

_EPOCH_SIZE = 1 << 16
"""Samples after which it begins anew; they come several times, so that no pause is measured."""


def write(mixture: Path) -> None:
    """Write the same PNG bytes and captions, each dataset into a folder beside the mixture."""
    for folder in dataset_folders(mixture):
        columns = {"png": "bytes", "caption": "str"}
        with MDSWriter(out=str(_mds(mixture) / folder.name), columns=columns) as writer:
            for tar in shards(folder):
                for png, caption in read_tar(tar):
                    writer.write({"png": png, "caption": caption})


def read(mixture: Path, threads: int, step: int) -> Iterator[Batch]:
    """Read with equal shares of the datasets; ``step`` is reached through the library's own state.

    With one thread all of it runs in this process, else in as many worker processes.
    """
    folders = dataset_folders(_mds(mixture))
    streams = [Stream(local=str(each), proportion=1 / len(folders)) for each in folders]
    dataset = StreamingDataset(
        streams=streams, shuffle=True, batch_size=BATCH_SIZE, epoch_size=_EPOCH_SIZE
    )
    loader = StreamingDataLoader(
        dataset,
        batch_size=BATCH_SIZE,
        num_workers=0 if threads == 1 else threads,
        persistent_workers=threads > 1,
        collate_fn=_collate,
        drop_last=True,
    )
    if step:
        epoch, within = divmod(step * BATCH_SIZE, dataset.epoch_size)
        state = dataset.state_dict(0, from_beginning=True)
        loader.load_state_dict(state | {"epoch": epoch, "sample_in_epoch": within})
    while True:
        for pictures, captions in loader:
            yield pictures.numpy(), captions


def _mds(mixture: Path) -> Path:
    return mixture.with_name(f"{mixture.name}-mds")


def _collate(samples: list[dict[str, Any]]) -> tuple[torch.Tensor, list[str]]:
    pictures = [np.asarray(Image.open(io.BytesIO(sample["png"]))) for sample in samples]
    return torch.from_numpy(np.stack(pictures)), [sample["caption"] for sample in samples]


def main() -> None:
    """Write the samples, or read them."""
    started = time.monotonic()
    parser = arguments()
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    if options.write:
        write(options.mixture)
    else:
        report(read(options.mixture, options.threads, options.step), started, options.batches)


if __name__ == "__main__":
    main()
