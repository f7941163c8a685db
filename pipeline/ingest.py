"""`evenmix ingest`: read the sources, keep the pictures that are whole and large enough.

Each work item becomes one shard: a tar of original bytes, its index, and the records that were
not kept with their reasons.
"""

import argparse
import hashlib
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from pipeline import images, readers, storage
from pipeline.beam_job import RunnerOptions
from pipeline.command_options import add_stage_arguments, recipe_of, runner_of
from pipeline.errors import EvenmixError
from pipeline.images import Limits
from pipeline.reasons import PictureError, RejectReason
from pipeline.receipts import Counts
from pipeline.recipe import Dataset, Recipe
from pipeline.records import IMAGES, INDEX, REJECTED, key_of
from pipeline.run import run_stage
from pipeline.stage import Output, WorkItem
from pipeline.tars import TarWriter


@dataclass(frozen=True)
class Ingest:
    """The stage that makes R/images."""

    root: str
    datasets: Mapping[str, Dataset]
    limits: Limits
    name: str = "ingest"
    version: int = 1
    folder: str = IMAGES
    resource_hints: Mapping[str, str] = field(default_factory=dict)

    def config(self, dataset: str) -> Mapping[str, Any]:
        """Return what decides the content of a shard: how records are read, what is kept."""
        spec = self.datasets[dataset]
        return {
            "layout": spec.layout,
            "licence": spec.licence,
            "id_field": spec.id_field,
            "image_field": spec.image_field,
            "text_field": spec.text_field,
            "url_field": spec.url_field,
            "extra_fields": spec.extra_fields,
            "min_short_edge_px": self.limits.min_short_edge_px,
            "max_pixels": self.limits.max_pixels,
            "max_bytes": self.limits.max_bytes,
        }

    def process(self, item: WorkItem) -> Output:
        """Read one item's records and judge each of them."""
        dataset = self.datasets[item.dataset]
        tar, kept, rejected = TarWriter(), list[dict[str, Any]](), list[dict[str, Any]]()
        for record in readers.read(dataset, item, self.limits.max_bytes):
            key = key_of(item.dataset, record.source_id) if record.source_id else None
            try:
                row = _judge(record, self.limits)
            except PictureError as error:
                rejected.append(
                    {
                        "key": key,
                        "source_id": record.source_id,
                        "locator": record.locator,
                        "reason": error.reason,
                        "detail": error.detail,
                    }
                )
                continue
            row |= {"key": key, "licence": dataset.licence}
            offset = tar.add(f"{key}.{images.EXTENSIONS[row['format']]}", record.picture)
            tar.add(f"{key}.json", json.dumps(row, sort_keys=True, ensure_ascii=False).encode())
            kept.append(row | {"offset": offset})
        reasons = Counter(str(row["reason"]) for row in rejected)
        return Output(
            table=pa.Table.from_pylist(kept, schema=INDEX),
            counts=Counts(len(kept) + len(rejected), len(kept), dict(sorted(reasons.items()))),
            tar=tar.close(),
            rejected=pa.Table.from_pylist(rejected, schema=REJECTED),
        )


def _judge(record: readers.Record, limits: Limits) -> dict[str, Any]:
    """Return the index row of a record that is kept.

    Raises:
        PictureError: the record is not kept, with the reason.
    """
    if record.reason is not None:
        raise PictureError(record.reason, record.detail)
    if not record.source_id:
        raise PictureError(RejectReason.BAD_RECORD, "it has no id")
    pixels = images.decode(record.picture, limits)
    header = images.probe(record.picture)
    return {
        "source_id": record.source_id,
        "locator": record.locator,
        "source_url": record.source_url,
        "text": record.text,
        "fields": json.dumps(record.fields, sort_keys=True, ensure_ascii=False, default=str),
        "format": header.format,
        "width": header.width,
        "height": header.height,
        "num_bytes": len(record.picture),
        "sha256": hashlib.sha256(record.picture).hexdigest(),
        "pixels_sha256": images.sha256_of_pixels(pixels),
    }


def check(recipe: Recipe) -> None:
    """Check that every dataset's source is there.

    Raises:
        EvenmixError: with all that are not.
    """
    absent = [
        f"dataset {name}: nothing at {dataset.source}; correct datasets.{name}.source"
        for name, dataset in recipe.datasets.items()
        if not storage.glob_files(dataset.source) and not storage.list_files(dataset.source)
    ]
    if absent:
        raise EvenmixError("\n  ".join(absent))


def run_recipe(recipe: Recipe, runner: RunnerOptions) -> None:
    """Ingest all datasets of a recipe."""
    items = [
        item
        for name, dataset in sorted(recipe.datasets.items())
        for item in readers.plan(name, dataset, recipe.images.records_per_shard)
    ]
    run_stage(stage_of(recipe), items, runner)


def stage_of(recipe: Recipe) -> Ingest:
    """Return the ingest stage of a recipe."""
    limits = Limits(
        recipe.images.min_short_edge_px, recipe.images.max_pixels, recipe.images.max_bytes
    )
    return Ingest(recipe.root, recipe.datasets, limits)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `evenmix ingest`."""
    add_stage_arguments(parser)
    parser.add_argument("--min-short-edge", type=int, metavar="PX", help="least shorter edge kept")
    parser.add_argument("--max-pixels", type=int, help="most pixels of a picture kept")
    parser.add_argument("--max-bytes", type=int, help="largest picture file kept")


def run(args: argparse.Namespace) -> int:
    """Run `evenmix ingest`."""
    overrides = {
        "images.min_short_edge_px": args.min_short_edge,
        "images.max_pixels": args.max_pixels,
        "images.max_bytes": args.max_bytes,
    }
    run_recipe(recipe_of(args, overrides), runner_of(args))
    return 0
