"""`evenmix embed`: describe the pictures whose near-duplicates are wanted.

Each image shard becomes one file of descriptors, row-aligned with the shard's index.
"""

import argparse
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import pyarrow as pa

from dedup.describe import describe
from dedup.descriptors import Descriptor, descriptor_of
from dedup.records import embeddings_schema
from dedup.rules import rules_of
from pipeline import originals, storage
from pipeline.beam_job import RunnerOptions
from pipeline.command_options import add_stage_arguments, recipe_of, runner_of
from pipeline.errors import EvenmixError
from pipeline.images import Pixels
from pipeline.receipts import Counts
from pipeline.recipe import Recipe
from pipeline.records import IMAGES, embeddings_folder
from pipeline.run import run_stage
from pipeline.stage import Output, WorkItem
from pipeline.summary import finished_shards

BATCH_SIZE = 16
"""Enough for the model's full rate; one read of a tar brings as many pictures."""


@dataclass(frozen=True)
class Embed:
    """The stage that makes R/embeddings/<name>.

    Where workers ``must_have_gpu``, none describes pictures slowly on an expensive machine's CPU.
    """

    root: str
    folder: str
    descriptor: Descriptor
    name: str = "embed"
    version: int = 2
    resource_hints: Mapping[str, str] = field(default_factory=dict)
    items_at_once: int = 1
    must_have_gpu: bool = False

    def config(self, dataset: str) -> Mapping[str, Any]:
        """Return the descriptor's identity, which has the hash of its weights."""
        return {"descriptor": self.descriptor.identity()}

    def process(self, item: WorkItem) -> Output:
        """Describe the pictures of one shard.

        Raises:
            EvenmixError: the descriptor does not run on the GPU that the stage was given.
        """
        if self.must_have_gpu and not self.descriptor.runs_on_gpu():
            raise EvenmixError(
                "the recipe has dedup.accelerator, but the worker cannot use one: ONNX weights "
                "need onnxruntime-gpu in dataflow.gpu_image, others torch with CUDA, both a driver "
                "that is new enough; or remove dedup.accelerator"
            )
        shard_url = storage.join(self.root, IMAGES, item.dataset, item.shard)
        index = storage.read_parquet(f"{shard_url}.parquet", originals.COLUMNS)
        batches = _batches(f"{shard_url}.tar", index, self.descriptor.short_edge_px)
        schema = embeddings_schema(self.descriptor.dimension)
        described = pa.concat_tables(
            [schema.remove(0).empty_table(), *(describe(self.descriptor, b) for b in batches)]
        )
        return Output(
            table=described.add_column(0, schema.field("key"), index["key"]).combine_chunks(),
            counts=Counts(index.num_rows, index.num_rows),
        )


def _batches(tar_url: str, index: pa.Table, short_edge_px: int) -> Iterator[Iterator[Pixels]]:
    """Decode a shard's pictures in the index's order; the tar is read once, a batch at a time.

    They may be reduced until their shorter edges are ``short_edge_px``.
    """
    for start in range(0, index.num_rows, BATCH_SIZE):
        rows = index.slice(start, BATCH_SIZE).to_pylist()
        begin = rows[0]["offset"]
        end = rows[-1]["offset"] + rows[-1]["num_bytes"]
        stretch = storage.read_bytes(tar_url, begin, end - begin)
        yield (_decode(tar_url, row, stretch, begin, short_edge_px) for row in rows)


def _decode(
    tar_url: str, row: Mapping[str, Any], stretch: bytes, begin: int, short_edge_px: int
) -> Pixels:
    """Decode the picture of an index row out of the part of the tar that starts at ``begin``."""
    start = row["offset"] - begin
    data = stretch[start : start + row["num_bytes"]]
    return originals.decode_original(tar_url, row, data, short_edge_px)


def near_datasets(recipe: Recipe) -> list[str]:
    """Return the datasets whose near-duplicates are wanted, in order of their names."""
    return rules_of(recipe).near_datasets()


def check(recipe: Recipe) -> None:
    """Check that the descriptor's weights are there, if any dataset needs them.

    Raises:
        EvenmixError: they are missing or not what they should be.
    """
    if near_datasets(recipe):
        descriptor_of(recipe.dedup)


def stage_of(recipe: Recipe) -> Embed:
    """Return the stage for a recipe, with the accelerator that it wants for the descriptor.

    Raises:
        EvenmixError: as :func:`check`.
    """
    accelerator = recipe.dedup.accelerator
    return Embed(
        recipe.root,
        embeddings_folder(recipe.dedup.descriptor),
        descriptor_of(recipe.dedup),
        resource_hints={"accelerator": accelerator} if accelerator else {},
    )


def run_recipe(recipe: Recipe, runner: RunnerOptions) -> None:
    """Embed the datasets of a recipe that ask for near-duplicates."""
    items = [
        WorkItem(dataset, shard, inputs={"images": digest})
        for dataset in near_datasets(recipe)
        for shard, digest in finished_shards(recipe.root, IMAGES, dataset, "ingest").items()
    ]
    if items:
        stage = stage_of(recipe)
        # Elsewhere the hint asks for nothing.
        must_have_gpu = runner.is_dataflow and "accelerator" in stage.resource_hints
        run_stage(replace(stage, must_have_gpu=must_have_gpu), items, runner)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `evenmix embed`."""
    parser.description = (
        "Describe pictures for `evenmix dedup`: with the copy detector SSCD, with its smaller "
        "student, or with an image tower of open_clip, as the recipe's dedup.model says."
    )
    add_stage_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Run `evenmix embed`."""
    recipe = recipe_of(args)
    run_recipe(recipe, runner_of(args, recipe))
    return 0
