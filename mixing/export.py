"""`evenmix tfrecords`: a finished mixture once more, as the TFRecords that i1's trainers read.

R/tfrecords/<mixture>/<dataset> is a folder of TFDS for each dataset: for each shard of the mixture
a file of records with its samples in the same order, and last the metadata. An item's commit has
the shard's name and the keys of its samples; the records stand beside it under TFDS's names.

What such a folder cannot say: i1's trainers take weights from their own configuration (the command
prints what to put there), draw each caption of a sample as often as the others, whatever the shares
of caption sets, and need pictures of one size for a batch, so ``crop = "square"``.
"""

import argparse
import io
import json
import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

import pyarrow as pa

from mixing import tfrecord
from mixing.manifest import Manifest, MixtureDataset, Split, load_manifest
from mixing.tfrecord import RecordFile
from pipeline import storage
from pipeline.beam_job import RunnerOptions
from pipeline.command_options import add_stage_arguments, recipe_of, runner_of
from pipeline.errors import EvenmixError
from pipeline.progress import console
from pipeline.receipts import Counts, checksum
from pipeline.recipe import Recipe
from pipeline.run import run_stage
from pipeline.stage import Output, WorkItem, committed_receipts
from pipeline.summary import dataset_url

KEYS = pa.schema([("key", pa.string())])
"""What commits a file of records: the keys of its samples, in order."""


@dataclass(frozen=True)
class Export:
    """The stage that makes R/tfrecords/<mixture>. An item holds its shard twice in memory."""

    root: str
    mixture: str
    name: str = "tfrecords"
    version: int = 1
    resource_hints: Mapping[str, str] = field(default_factory=dict)
    items_at_once: int = 1

    @property
    def folder(self) -> str:
        """The folder below R."""
        return f"tfrecords/{self.mixture}"

    @property
    def mixture_url(self) -> str:
        """The folder of the mixture."""
        return storage.join(self.root, "mixtures", self.mixture)

    def config(self, dataset: str) -> Mapping[str, Any]:
        """Return nothing: the shard decides."""
        return {}

    def plan(self, manifest: Manifest) -> list[WorkItem]:
        """Return one item a shard of the mixture."""
        return [
            WorkItem(
                dataset.name,
                shard=PurePosixPath(shard.name).stem,
                inputs={
                    "tar": shard.name,
                    "sha256": shard.sha256,
                    "num_samples": shard.num_samples,
                    "file": file_name,
                },
            )
            for dataset in manifest.datasets
            for name, split in _splits(dataset).items()
            for shard, file_name in zip(split.shards, _file_names(name, split), strict=True)
        ]

    def process(self, item: WorkItem) -> Output:
        """Write one file of records.

        Raises:
            EvenmixError: the shard is not the one of which the mixture's manifest tells.
        """
        url = storage.join(self.mixture_url, item.inputs["tar"])
        tar = storage.read_bytes(url)
        if checksum([tar]).sha256 != item.inputs["sha256"]:
            raise EvenmixError(
                f"{url} is damaged: its sha256 is not that of mixture.json; remove the mixture and "
                "make it again with `evenmix mix`"
            )
        keys, records = [], io.BytesIO()
        for image, sample in _samples(tar):
            keys.append(sample["key"])
            captions = [caption["text"] for caption in sample["captions"]]
            shape = sample["height"], sample["width"]
            example = tfrecord.example(image, *shape, captions, sample["source_id"])
            records.write(tfrecord.frame(example))
        return Output(
            table=pa.table({"key": keys}, schema=KEYS),
            counts=Counts(item.inputs["num_samples"], len(keys)),
            files={item.inputs["file"]: records.getvalue()},
        )


def _splits(dataset: MixtureDataset) -> dict[str, Split]:
    return {"train": dataset.train, "validation": dataset.validation}


def _file_names(name: str, split: Split) -> list[str]:
    """Return the names of a split's files of records, in the order of its shards."""
    num_files = len(split.shards)
    return [tfrecord.file_name(name, number, num_files) for number in range(num_files)]


def _samples(tar: bytes) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """Yield the picture and the JSON of each sample of a shard."""
    with tarfile.open(fileobj=io.BytesIO(tar), mode="r:") as file:
        places = [slice(m.offset_data, m.offset_data + m.size) for m in file]
    for image, text in zip(places[::2], places[1::2], strict=True):
        yield tar[image], json.loads(tar[text])


def run_recipe(recipe: Recipe, runner: RunnerOptions) -> None:
    """Export a recipe's mixture.

    Raises:
        EvenmixError: the mixture is not finished or damaged, TFDS cannot read its pictures, or the
            export has been made from another mixture of this name.
    """
    export = Export(recipe.root, recipe.mixture.name)
    manifest = load_manifest(export.mixture_url)
    if manifest.image_format == "webp":
        raise EvenmixError(
            f"{export.mixture_url} has WebP pictures, but TFDS knows PNG and JPEG only; make a "
            'mixture of another name with image_format = "png"'
        )
    run_stage(export, export.plan(manifest), runner)
    for dataset in manifest.datasets:
        publish_metadata(export, manifest, dataset)
    # As i1's configuration has them, so that they can be put there.
    folders = [
        f"    ({dataset_url(export.root, export.folder, dataset.name)!r}, {dataset.weight}),"
        for dataset in manifest.datasets
    ]
    console.print("\n".join(["tfrecords: folders and weights", *folders]), soft_wrap=True)


def publish_metadata(export: Export, manifest: Manifest, dataset: MixtureDataset) -> None:
    """Write TFDS's metadata of a dataset whose files of records are all published.

    Raises:
        EvenmixError: other metadata are there.
    """
    folder = dataset_url(export.root, export.folder, dataset.name)
    receipts = committed_receipts(export, dataset.name)
    files = {name: file for receipt in receipts.values() for name, file in receipt.files.items()}
    splits = {
        name: [
            RecordFile(shard.num_samples, files[file_name].num_bytes)
            for shard, file_name in zip(split.shards, _file_names(name, split), strict=True)
        ]
        for name, split in _splits(dataset).items()
    }
    for file in storage.list_files(folder):
        # A killed run may have left some of a mixture of this name with more shards or fewer.
        if file.name.startswith(tfrecord.PREFIX) and file.name not in files:
            storage.remove(file.url)
    description = (
        f"{dataset.name} as it is in the mixture {manifest.name}, at {manifest.resolution} px."
    )
    info = tfrecord.dataset_info_json(description, dataset.licence, splits)
    # Without the latter a folder is none of TFDS.
    for name, data in (
        (tfrecord.FEATURES, tfrecord.features_json(manifest.image_format)),
        (tfrecord.DATASET_INFO, info),
    ):
        url = storage.join(folder, name)
        if not storage.publish(url, data) and storage.read_bytes(url) != data:
            raise EvenmixError(
                f"{url} was made in another way; remove {folder} and start the same command again"
            )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `evenmix tfrecords`."""
    add_stage_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Run `evenmix tfrecords`."""
    recipe = recipe_of(args)
    run_recipe(recipe, runner_of(args, recipe))
    return 0
