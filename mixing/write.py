"""The shards of a mixture: pictures resized and cropped, packed with all that is known of them."""

import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pyarrow as pa

from captioning.outcomes import USABLE
from mixing.manifest import OFFSETS
from mixing.select import SHARD as SELECTED
from mixing.select import Select, corpus_digests
from pipeline import images, storage
from pipeline.originals import read_original
from pipeline.receipts import Counts
from pipeline.recipe import Recipe
from pipeline.records import IMAGES
from pipeline.stage import Output, WorkItem
from pipeline.summary import dataset_url, finished_shards, read_shard
from pipeline.tars import TarWriter

_THREADS = 8


@dataclass(frozen=True)
class Write:
    """The stage that makes R/mixtures/<name>."""

    recipe: Recipe
    name: str = "mix"
    version: int = 1
    resource_hints: Mapping[str, str] = field(default_factory=dict)
    items_at_once: int = 1

    @property
    def root(self) -> str:
        """The root R of the corpus."""
        return self.recipe.root

    @property
    def folder(self) -> str:
        """The folder below R."""
        return f"mixtures/{self.recipe.mixture.name}"

    def config(self, dataset: str) -> Mapping[str, Any]:
        """Return what decides the samples, given their selection."""
        mixture = self.recipe.mixture
        return {
            "resolution": mixture.resolution,
            "image_format": mixture.image_format,
            "captions": mixture.captions,
        }

    def plan(self) -> list[WorkItem]:
        """Return one item a shard of the mixture."""
        items = []
        selections = Select(self.recipe).folder
        for dataset in self.recipe.mixture_datasets():
            inputs = corpus_digests(self.recipe, dataset)
            inputs |= {
                "selection": finished_shards(self.root, selections, dataset, "mix")[SELECTED]
            }
            destinations = self._selection(dataset, ["destination"])["destination"]
            for shard in sorted(destinations.unique().to_pylist()):
                items.append(WorkItem(dataset, shard, inputs))
        return items

    def _selection(self, dataset: str, columns: Sequence[str] | None = None) -> pa.Table:
        return read_shard(self.root, Select(self.recipe).folder, dataset, SELECTED, columns)

    def process(self, item: WorkItem) -> Output:
        """Write one shard of samples."""
        selection = self._selection(item.dataset)
        rows = selection.filter(pa.compute.equal(selection["destination"], item.shard)).to_pylist()
        described = self._describe(item.dataset, rows)
        extension = images.EXTENSIONS[self.recipe.mixture.image_format]
        tar, offsets = TarWriter(), []
        with ThreadPoolExecutor(_THREADS) as pool:
            # A thread holds one decoded picture; what waits for the tar is small.
            samples = pool.map(partial(self._sample, item.dataset), described)
            for picture, (image, sample) in zip(described, samples, strict=True):
                text = json.dumps(sample, ensure_ascii=False, sort_keys=True).encode()
                offsets.append(
                    {
                        "key": picture["key"],
                        "image_offset": tar.add(f"{picture['key']}.{extension}", image),
                        "image_bytes": len(image),
                        "json_offset": tar.add(f"{picture['key']}.json", text),
                        "json_bytes": len(text),
                    }
                )
        return Output(
            table=pa.Table.from_pylist(offsets, schema=OFFSETS),
            counts=Counts(len(rows), len(offsets)),
            tar=tar.close(),
        )

    def _describe(self, dataset: str, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Join the index and the captions of selected pictures, in their order."""
        found: dict[tuple[str, int], dict[str, Any]] = {}
        for shard in sorted({row["shard"] for row in rows}):
            wanted = sorted(row["row"] for row in rows if row["shard"] == shard)
            index = self._take(IMAGES, dataset, shard, wanted)
            captions = self._take(
                f"captions/{self.recipe.mixture.captions}", dataset, shard, wanted
            )
            tar_url = storage.join(dataset_url(self.root, IMAGES, dataset), f"{shard}.tar")
            for row, picture, caption in zip(wanted, index, captions, strict=True):
                found[shard, row] = picture | {"captions": caption["captions"], "tar_url": tar_url}
        return [found[row["shard"], row["row"]] for row in rows]

    def _take(
        self, folder: str, dataset: str, shard: str, rows: Sequence[int]
    ) -> list[dict[str, Any]]:
        table = read_shard(self.root, folder, dataset, shard)
        taken: list[dict[str, Any]] = table.take(rows).to_pylist()
        return taken

    def _sample(self, dataset: str, picture: Mapping[str, Any]) -> tuple[bytes, dict[str, Any]]:
        """Return a sample's encoded picture and its JSON."""
        mixture = self.recipe.mixture
        pixels = read_original(picture["tar_url"], picture)
        square, crop = images.resize_and_crop_square(pixels, mixture.resolution)
        sample = {
            "key": picture["key"],
            "dataset": dataset,
            "source_id": picture["source_id"],
            "source_url": picture["source_url"],
            "licence": picture["licence"],
            "height": mixture.resolution,
            "width": mixture.resolution,
            "captions": [
                {"text": c["text"], "caption_set": mixture.captions, "model": c["model"]}
                for c in picture["captions"]
                if c["outcome"] in USABLE
            ],
            "fields": json.loads(picture["fields"]),
            "original_height": picture["height"],
            "original_width": picture["width"],
            "crop": list(crop),
            "original_sha256": picture["sha256"],
        }
        return images.encode(square, mixture.image_format), sample
