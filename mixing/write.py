"""The shards of a mixture: samples packed in random order, with an index of where each stands.

A shard is known by its selection and its settings, not by the files in which its samples are
brought (:mod:`mixing.gather`): one that is finished needs these no longer.
"""

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from threading import Lock
from typing import Any

import pyarrow as pa

from mixing.gather import SAMPLES, Route, destinations, tar_url
from mixing.manifest import OFFSETS
from mixing.sample import sample_config, sample_picture
from mixing.select import read_selection
from pipeline import images, storage
from pipeline.exchange import read_slices
from pipeline.originals import decode_original
from pipeline.receipts import Counts
from pipeline.recipe import Recipe
from pipeline.records import mixture_folder
from pipeline.stage import Output, WorkItem
from pipeline.tars import TarWriter

_CONCURRENT_READS = 16


@dataclass(frozen=True)
class Write:
    """The stage that makes R/mixtures/<name>; an item is one of its shards.

    It takes a few times the memory of the shard, and that of the pictures in hand: 16 originals as
    they are stored, of which one is decoded.
    """

    recipe: Recipe
    name: str = "mix"
    version: int = 2
    resource_hints: Mapping[str, str] = field(default_factory=dict)
    items_at_once: int = 1

    @property
    def root(self) -> str:
        """The root R of the corpus."""
        return self.recipe.root

    @property
    def folder(self) -> str:
        """The folder below R."""
        return mixture_folder(self.recipe.mixture.name)

    def config(self, dataset: str) -> Mapping[str, Any]:
        """Return what decides the samples, given their selection."""
        mixture = self.recipe.mixture
        sizes = {"samples_per_shard": mixture.samples_per_shard}
        return {**sample_config(mixture, dataset), **sizes}

    def plan(
        self, inputs: Mapping[str, Mapping[str, Any]], routes: Mapping[str, Route]
    ) -> list[WorkItem]:
        """Return one item a shard.

        ``inputs``, by dataset, identify what samples are made from; ``routes`` are how they come.
        A shard that has none by chance is published without a tar.
        """
        return [
            WorkItem(
                dataset,
                shard,
                of_dataset,
                payload={"destination": destination, "route": asdict(routes[dataset])},
            )
            for dataset, of_dataset in inputs.items()
            for destination, shard in enumerate(destinations(read_selection(self.recipe, dataset)))
        ]

    def process(self, item: WorkItem) -> Output:
        """Write one shard of samples."""
        route = Route(**item.payload["route"])
        destination = item.payload["destination"]
        slices = read_slices(route.urls(self.recipe, item.dataset, destination), destination)
        rows = pa.concat_tables([SAMPLES.empty_table(), *slices])
        # The shuffle: inside a shard, samples stand in the order of a hash.
        samples = rows.sort_by([("order", "ascending"), ("key", "ascending")]).to_pylist()
        if not samples:
            return Output(OFFSETS.empty_table(), Counts())
        extension = images.EXTENSIONS[self.recipe.mixture.image_format]
        tar, offsets = TarWriter(), []
        decoding = Lock()
        with ThreadPoolExecutor(_CONCURRENT_READS) as pool:
            pictures = pool.map(lambda s: self._picture(item.dataset, s, decoding), samples)
            for sample, picture in zip(samples, pictures, strict=True):
                offsets.append(
                    {
                        "key": sample["key"],
                        "image_offset": tar.add(f"{sample['key']}.{extension}", picture),
                        "image_bytes": len(picture),
                        "json_offset": tar.add(f"{sample['key']}.json", sample["json"]),
                        "json_bytes": len(sample["json"]),
                    }
                )
        return Output(
            table=pa.Table.from_pylist(offsets, schema=OFFSETS),
            counts=Counts(len(samples), len(offsets)),
            tar=tar.close(),
        )

    def _picture(self, dataset: str, sample: Mapping[str, Any], decoding: Lock) -> bytes:
        """Return a sample's picture, which is made from its original if that is what has come."""
        made: bytes | None = sample["picture"]
        if made is not None:
            return made
        url = tar_url(self.root, dataset, sample["shard"])
        data = storage.read_bytes(url, sample["offset"], sample["num_bytes"])
        with decoding:
            return sample_picture(self.recipe.mixture, decode_original(url, sample, data))
