"""The way of a mixture's samples from the shards of the corpus to its own: regrouping in files.

The samples of one shard of a mixture stand all over the corpus. Of few selected pictures each is a
request of its own in any case, so only where it stands is brought to the shard's writer. From a
tenth of the pictures on, reading everything in sequence is cheaper: tars are read whole, and what
is brought is the picture of the sample itself, resized and encoded. The samples are the same.

    gathered    consecutive image shards: all of their samples, by part
    regrouped   a part, from several of these files: its samples, by destination

A destination is a shard of the mixture; a part is a stretch of destinations. A files and B
destinations take A times B reads. Where that is few, each destination is a part of its own, and
there is nothing to regroup. Else there are about the square root of B parts, and A times the root
of B reads in each pass: 98 million pictures at 256 pixels, in 98,000 shards of 1000, take 27,000
files, 314 parts, and twice 8.6 million reads of 1.6 MB.

A file has about GROUP_BYTES of samples, and making it takes a worker process four times that, and
one tar and the picture that is just decoded.
"""

import math
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import pyarrow as pa

from mixing.sample import sample_config, sample_json, sample_picture
from mixing.select import Selection, SplitName, read_selection
from pipeline import storage
from pipeline.eligible import is_held_out, judge_shard, selection_hash
from pipeline.exchange import exchange_table, read_slices
from pipeline.originals import decode_original
from pipeline.receipts import Counts, fingerprint
from pipeline.recipe import Recipe
from pipeline.records import IMAGES, captions_folder
from pipeline.stage import Output, WorkItem
from pipeline.summary import dataset_url, finished_summary, read_shard

SHARE_READ_WHOLE = 0.1
"""From this share of a dataset's pictures on, tars are read whole."""

GROUP_BYTES = 512 << 20
SHARDS_PER_GROUP = 256
"""What one item gathers: so many bytes of samples by estimate, and at most so many image shards."""

FEW_FILES = 16
MIN_SAMPLES_PER_READ = 10
"""More files are regrouped if there would be fewer samples than that in a slice."""

_BYTES_PER_PIXEL = 2
"""Of a photograph as PNG."""

_ROW_BYTES = 8 << 10
"""What a sample takes beside its picture: mostly captions."""

_CONCURRENT_READS = 16

_INDEX_COLUMNS = [
    "key", "source_id", "source_url", "licence", "fields", "width", "height", "num_bytes",
    "sha256", "offset",
]  # fmt: skip
_CAPTION_COLUMNS = [f"captions.list.element.{name}" for name in ("text", "outcome", "model")]

_SPLITS: tuple[SplitName, ...] = ("train", "validation")

SAMPLES = pa.schema(
    [
        ("destination", pa.int64()),
        ("order", pa.uint64()),
        ("key", pa.string()),
        ("json", pa.binary()),
        ("picture", pa.binary()),
        ("shard", pa.string()),
        ("offset", pa.int64()),
        ("num_bytes", pa.int64()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("sha256", pa.string()),
    ]
)
"""One sample on its way: the number of its destination, its place there (by ``order``, then
``key``), its JSON, and its picture; if that is null, what follows says where the original is."""


@dataclass(frozen=True)
class Route:
    """How a dataset's samples come to their destinations; it has no say in what they are.

    ``reads_whole`` tells whether tars are read whole and pictures are brought along.
    """

    reads_whole: bool
    num_files: int
    num_parts: int
    num_destinations: int

    @property
    def is_direct(self) -> bool:
        """Tell whether each destination is a part of its own."""
        return self.num_parts == self.num_destinations

    @property
    def num_lots(self) -> int:
        """In how many lots the files of each part are regrouped.

        There are as many files in a lot as there are parts: they make a file of about their size.
        """
        return math.ceil(self.num_files / self.num_parts)

    def urls(self, recipe: Recipe, dataset: str, destination: int) -> list[str]:
        """Return the files that have samples for a destination."""
        step, items = "gathered", [_file_name(number) for number in range(self.num_files)]
        if not self.is_direct:
            part = destination * self.num_parts // self.num_destinations
            step, items = "regrouped", [_lot_name(part, lot) for lot in range(self.num_lots)]
        url = dataset_url(recipe.root, _folder(recipe, step), dataset)
        return [storage.join(url, f"{item}.parquet") for item in items]


def route_of(recipe: Recipe, selection: Selection) -> Route:
    """Choose the way of a dataset's samples."""
    num_samples = _num_samples(selection)
    num_pictures = _num_pictures(recipe, selection.dataset)
    reads_whole = num_samples >= SHARE_READ_WHOLE * sum(num_pictures.values())
    num_files = len(_groups(recipe, num_pictures, num_samples, reads_whole))
    num_parts = num_destinations = len(destinations(selection))
    num_reads = num_files * num_destinations
    if num_files > FEW_FILES and num_reads * MIN_SAMPLES_PER_READ > num_samples:
        num_parts = math.ceil(math.sqrt(num_destinations))
    return Route(reads_whole, num_files, num_parts, num_destinations)


def destinations(selection: Selection) -> list[str]:
    """Return the shards of a mixture that a dataset's samples go to, in order of their numbers."""
    return [
        f"{split}-{number:05d}"
        for split in _SPLITS
        for number in range(selection.num_shards(split))
    ]


@dataclass(frozen=True)
class _Exchange:
    """What the two stages share; ``routes`` are by dataset."""

    recipe: Recipe
    routes: Mapping[str, Route]
    version: int = 1
    resource_hints: Mapping[str, str] = field(default_factory=dict)
    items_at_once: int = 1

    @property
    def root(self) -> str:
        """The root R of the corpus."""
        return self.recipe.root

    def config(self, dataset: str) -> Mapping[str, Any]:
        """Return what decides the content of an item."""
        route = asdict(self.routes[dataset])
        return {**sample_config(self.recipe.mixture, dataset), "route": route}


@dataclass(frozen=True)
class Gather(_Exchange):
    """The stage that makes the samples of a group of image shards, and parts them."""

    name: str = "mix-gather"

    @property
    def folder(self) -> str:
        """The folder below R."""
        return _folder(self.recipe, "gathered")

    def plan(self, inputs: Mapping[str, Mapping[str, Any]]) -> list[WorkItem]:
        """Return one item a group; ``inputs``, by dataset, identify what samples are made from."""
        return [
            WorkItem(
                dataset,
                _file_name(number),
                inputs={**of_dataset, "shards": fingerprint({"shards": shards})},
                payload={"shards": shards},
            )
            for dataset, of_dataset in inputs.items()
            for number, shards in enumerate(self._groups(dataset))
        ]

    def _groups(self, dataset: str) -> list[list[str]]:
        num_pictures = _num_pictures(self.recipe, dataset)
        num_samples = _num_samples(read_selection(self.recipe, dataset))
        reads_whole = self.routes[dataset].reads_whole
        return _groups(self.recipe, num_pictures, num_samples, reads_whole)

    def process(self, item: WorkItem) -> Output:
        """Judge the pictures of each shard again, and bring on what is taken."""
        selection, route = read_selection(self.recipe, item.dataset), self.routes[item.dataset]
        numbers = {name: number for number, name in enumerate(destinations(selection))}
        samples_of = partial(self._samples, selection, numbers)
        tables = [SAMPLES.empty_table()]
        with ThreadPoolExecutor(_CONCURRENT_READS) as pool:
            for samples in pool.map(samples_of, item.payload["shards"]):
                if route.reads_whole and samples:
                    self._add_pictures(item.dataset, samples)
                tables.append(pa.Table.from_pylist(samples, schema=SAMPLES))
        rows = pa.concat_tables(tables)
        parts = rows["destination"].to_numpy() * route.num_parts // route.num_destinations
        return Output(exchange_table(rows, parts), Counts(rows.num_rows, rows.num_rows))

    def _samples(
        self, selection: Selection, numbers: Mapping[str, int], shard: str
    ) -> list[dict[str, Any]]:
        """Return the samples of one image shard, without their pictures.

        ``numbers`` are those of the destinations.
        """
        recipe, dataset = self.recipe, selection.dataset
        rows, taken = list[int](), list[int]()
        for row, (key, reason) in enumerate(judge_shard(recipe, dataset, shard, True)):
            held_out = is_held_out(recipe, key)
            if reason is None and selection.takes(selection_hash(recipe, key), held_out):
                rows.append(row)
                taken.append(numbers[selection.destination(key, held_out)])

        def read(folder: str, columns: Sequence[str]) -> list[dict[str, Any]]:
            table = read_shard(self.root, folder, dataset, shard, columns)
            read_rows: list[dict[str, Any]] = table.take(pa.array(rows, pa.int64())).to_pylist()
            return read_rows

        pictures = read(IMAGES, _INDEX_COLUMNS)
        captions = {
            name: read(captions_folder(name), _CAPTION_COLUMNS)
            for name in recipe.mixture.caption_sets(dataset)
        }
        return [
            {
                **picture,
                "destination": destination,
                "order": selection.order(picture["key"]),
                "shard": shard,
                "json": sample_json(
                    recipe.mixture,
                    dataset,
                    picture,
                    {name: of_set[place]["captions"] for name, of_set in captions.items()},
                ),
            }
            for place, (picture, destination) in enumerate(zip(pictures, taken, strict=True))
        ]

    def _add_pictures(self, dataset: str, samples: Sequence[dict[str, Any]]) -> None:
        """Read a shard's tar once, and make the pictures of its samples."""
        url = tar_url(self.root, dataset, samples[0]["shard"])
        tar = storage.read_bytes(url)

        # One after the other: there is a worker process for each core.
        for sample in samples:
            data = tar[sample["offset"] : sample["offset"] + sample["num_bytes"]]
            pixels = decode_original(url, sample, data)
            sample["picture"] = sample_picture(self.recipe.mixture, pixels)


@dataclass(frozen=True)
class Regroup(_Exchange):
    """The stage that parts the samples of a part by destination; an item has a lot of files."""

    name: str = "mix-regroup"

    @property
    def folder(self) -> str:
        """The folder below R."""
        return _folder(self.recipe, "regrouped")

    def plan(self, inputs: Mapping[str, Mapping[str, Any]]) -> list[WorkItem]:
        """Return the items of datasets whose samples do not go directly to their destinations."""
        return [
            WorkItem(dataset, _lot_name(part, lot), of_dataset, {"part": part, "lot": lot})
            for dataset, of_dataset in inputs.items()
            for route in [self.routes[dataset]]
            if not route.is_direct
            for part in range(route.num_parts)
            for lot in range(route.num_lots)
        ]

    def process(self, item: WorkItem) -> Output:
        """Read a part of each file."""
        route = self.routes[item.dataset]
        first = item.payload["lot"] * route.num_parts
        folder = dataset_url(self.root, _folder(self.recipe, "gathered"), item.dataset)
        urls = [
            storage.join(folder, f"{_file_name(number)}.parquet")
            for number in range(first, min(first + route.num_parts, route.num_files))
        ]
        slices = read_slices(urls, item.payload["part"])
        rows = pa.concat_tables([SAMPLES.empty_table(), *slices])
        table = exchange_table(rows, rows["destination"].to_numpy())
        return Output(table, Counts(rows.num_rows, rows.num_rows))


def exchange_folder(recipe: Recipe) -> str:
    """Return the folder below R that is of no use once the mixture is written."""
    return f"exchange/mixture-{recipe.mixture.name}"


def tar_url(root: str, dataset: str, shard: str) -> str:
    """Return the URL of the tar of an image shard."""
    return storage.join(dataset_url(root, IMAGES, dataset), f"{shard}.tar")


def _folder(recipe: Recipe, step: str) -> str:
    return f"{exchange_folder(recipe)}/{step}"


def _file_name(number: int) -> str:
    return f"{number:05d}"


def _lot_name(part: int, lot: int) -> str:
    return f"{part:05d}-{lot:05d}"


def _num_pictures(recipe: Recipe, dataset: str) -> dict[str, int]:
    """Return the number of pictures of each image shard, in order of their names."""
    summary = finished_summary(recipe.root, IMAGES, dataset, "ingest")
    return {shard: item["counts"]["records_out"] for shard, item in sorted(summary.items.items())}


def _num_samples(selection: Selection) -> int:
    return selection.num_train + selection.num_validation


def _groups(
    recipe: Recipe, num_pictures: Mapping[str, int], num_samples: int, reads_whole: bool
) -> list[list[str]]:
    """Put consecutive image shards together whose samples have about GROUP_BYTES.

    ``num_pictures`` are those of each shard, of which ``num_samples`` are selected in all.
    """
    picture_bytes = _BYTES_PER_PIXEL * recipe.mixture.resolution**2 if reads_whole else 0
    bytes_per_picture = (_ROW_BYTES + picture_bytes) * num_samples / sum(num_pictures.values())
    groups, group_bytes = list[list[str]](), 0.0
    for shard, number in num_pictures.items():
        shard_bytes = number * bytes_per_picture
        is_full = group_bytes + shard_bytes > GROUP_BYTES
        if not groups or is_full or len(groups[-1]) == SHARDS_PER_GROUP:
            groups.append([])
            group_bytes = 0.0
        groups[-1].append(shard)
        group_bytes += shard_bytes
    return groups
