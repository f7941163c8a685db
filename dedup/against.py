"""Evaluation pictures: a folder of them, described as the pictures of the corpus are.

What is like one of them would be learnt by heart, so a search compares the corpus with them. They
are no part of it: only what a comparison needs is kept of them, and they may be of any size. A file
that is no picture is rejected with its reason.
"""

import hashlib
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from dedup.corpus import Places
from dedup.describe import describe
from dedup.descriptors import Descriptor, descriptor_of
from dedup.records import embeddings_schema
from dedup.rules import AGAINST
from pipeline import images, storage
from pipeline.errors import EvenmixError
from pipeline.images import Limits, Pixels
from pipeline.readers.items import identities, plain, require_unchanged, shard_name, states
from pipeline.reasons import PictureError, RejectReason
from pipeline.receipts import Counts, difference, fingerprint
from pipeline.recipe import Recipe
from pipeline.records import REJECTED, key_of
from pipeline.stage import Output, WorkItem
from pipeline.storage import FileInfo

FILES_PER_ITEM = 512
_BATCH_SIZE = 16

_SEEN = pa.schema(
    [
        ("key", pa.string()),
        ("source_id", pa.string()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("num_bytes", pa.int64()),
        ("sha256", pa.string()),
        ("pixels_sha256", pa.string()),
    ]
)


def against_schema(dimension: int | None) -> pa.Schema:
    """Return the schema of the evaluation pictures, in the order of their paths.

    ``source_id`` is the path below the folder; the other columns are as in the image index and in
    :func:`dedup.records.embeddings_schema`. The latter's are there if there are descriptors, of
    length ``dimension``.
    """
    if dimension is None:
        return _SEEN
    return pa.schema([*_SEEN, *embeddings_schema(dimension).remove(0)])


@dataclass(frozen=True)
class DescribeAgainst:
    """The stage that describes the evaluation pictures.

    ``descriptor`` is None where no near-duplicates are wanted. ``max_pixels`` and ``max_bytes`` are
    those of a picture.
    """

    root: str
    folder: str
    descriptor: Descriptor | None
    max_pixels: int
    max_bytes: int
    name: str = "dedup-against"
    version: int = 2
    resource_hints: Mapping[str, str] = field(default_factory=dict)
    items_at_once: int = 1

    def config(self, dataset: str) -> Mapping[str, Any]:
        """Return the limits, and the descriptor's identity."""
        return {
            "descriptor": self.descriptor and self.descriptor.identity(),
            "max_pixels": self.max_pixels,
            "max_bytes": self.max_bytes,
        }

    def process(self, item: WorkItem) -> Output:
        """Judge the files of an item, and describe those that are pictures."""
        limits = Limits(1, self.max_pixels, self.max_bytes)
        files = item.payload["files"]
        seen, rejected = list[dict[str, Any]](), list[dict[str, Any]]()

        def pictures(some: Sequence[Any]) -> Iterator[Pixels]:
            for name, url, num_bytes in some:
                try:
                    row, pixels = self._look(name, url, num_bytes, limits)
                except PictureError as error:
                    rejected.append(_rejected_row(name, error))
                else:
                    seen.append(row)
                    yield pixels

        descriptor, columns = self.descriptor, list[pa.ChunkedArray]()
        if descriptor is None:
            deque(pictures(files), maxlen=0)
        else:
            batches = range(0, len(files), _BATCH_SIZE)
            described = [
                describe(descriptor, pictures(files[start : start + _BATCH_SIZE]))
                for start in batches
            ]
            columns = pa.concat_tables(described).columns
        require_unchanged(item.payload["states"])
        schema = against_schema(None if descriptor is None else descriptor.dimension)
        columns = [*pa.Table.from_pylist(seen, schema=_SEEN).columns, *columns]
        reasons = Counter(str(row["reason"]) for row in rejected)
        return Output(
            table=pa.table(columns, schema=schema),
            counts=Counts(len(files), len(seen), dict(sorted(reasons.items()))),
            rejected=pa.Table.from_pylist(rejected, schema=REJECTED),
        )

    def _look(
        self, name: str, url: str, num_bytes: int, limits: Limits
    ) -> tuple[dict[str, Any], Pixels]:
        """Read a file and return what is kept of it, and its pixels as they are described.

        Raises:
            PictureError: it is no picture, or not within the limits.
            EvenmixError: it cannot be read.
        """
        if num_bytes > limits.max_bytes:
            raise PictureError(RejectReason.TOO_MANY_BYTES, f"{num_bytes} bytes")
        data = storage.read_bytes(url)
        header, pixels = images.read(data, limits)
        row = {
            "key": key_of(AGAINST, plain(name)),
            "source_id": plain(name),
            "width": header.width,
            "height": header.height,
            "num_bytes": len(data),
            "sha256": hashlib.sha256(data).hexdigest(),
            "pixels_sha256": images.sha256_of_pixels(pixels),
        }
        if self.descriptor is not None:
            # As the corpus is, so that a copy of one of its files has the same vector.
            pixels = images.decode(data, limits, self.descriptor.short_edge_px)
        return row, pixels


def _rejected_row(name: str, error: PictureError) -> dict[str, Any]:
    return {
        "key": key_of(AGAINST, plain(name)),
        "source_id": plain(name),
        "locator": plain(name),
        "reason": error.reason,
        "detail": error.detail,
        "attempts": 0,
        "retryable": False,
    }


def folder_of(recipe: Recipe) -> str:
    """Return the folder below R that has a search's evaluation pictures."""
    return Places(recipe.root, recipe.dedup.name).exchange_folder("against")


def describe_against(recipe: Recipe, descriptor: Mapping[str, Any]) -> DescribeAgainst:
    """Return the stage for a recipe.

    ``descriptor`` is the identity of what has described the corpus, empty where nothing has.

    Raises:
        EvenmixError: the recipe's descriptor is another one, or cannot be loaded.
    """
    limits = recipe.images.max_pixels, recipe.images.max_bytes
    if not descriptor:
        return DescribeAgainst(recipe.root, folder_of(recipe), None, *limits)
    own = descriptor_of(recipe.dedup)
    differences = difference(dict(descriptor), own.identity())
    if differences:
        raise EvenmixError(
            f"{recipe.dedup.against} would be described in another way than the corpus was "
            f"({'; '.join(differences)}), and cannot be compared with it; use dedup.model and "
            "dedup.weights as `evenmix embed` did, or embed under another dedup.descriptor"
        )
    return DescribeAgainst(recipe.root, folder_of(recipe), own, *limits)


def check(recipe: Recipe) -> None:
    """Check that there are evaluation pictures, if the recipe names a folder of them.

    Raises:
        EvenmixError: the folder is empty, missing or out of reach.
    """
    if recipe.dedup.against is not None:
        _list(recipe.dedup.against)


def require_pictures(recipe: Recipe, counts: Counts) -> None:
    """Check that some files were pictures: a corpus that is compared with none would look clean.

    Raises:
        EvenmixError: none was; the text says why.
    """
    if counts.records_out == 0:
        reasons = ", ".join(f"{number} {reason}" for reason, number in counts.rejected.items())
        raise EvenmixError(
            f"none of the {counts.records_in} files of {recipe.dedup.against} is a picture "
            f"({reasons}); let dedup.against name a folder of picture files, not one of Parquet "
            "files or archives, or remove it"
        )


def against_items(recipe: Recipe) -> list[WorkItem]:
    """Cut the folder of evaluation pictures into items; without one there are none.

    Raises:
        EvenmixError: the folder is empty, missing or out of reach.
    """
    if recipe.dedup.against is None:
        return []
    files = _list(recipe.dedup.against)
    return [
        _item(start, files[start : start + FILES_PER_ITEM])
        for start in range(0, len(files), FILES_PER_ITEM)
    ]


def _item(start: int, files: Sequence[FileInfo]) -> WorkItem:
    return WorkItem(
        AGAINST,
        shard_name("against", start),
        inputs={
            "num_files": len(files),
            "num_bytes": sum(file.num_bytes for file in files),
            "files": fingerprint({"files": identities(files)}),
        },
        payload={
            "files": [[file.name, file.url, file.num_bytes] for file in files],
            "states": states(files),
        },
    )


def _list(url: str) -> list[FileInfo]:
    files = storage.list_files(url)
    if not files:
        raise EvenmixError(
            f"{url} has no files, so nothing can be compared with them; let dedup.against name the "
            "folder of the evaluation pictures, or remove it"
        )
    return files
