"""A folder: pictures, each with the text file of the same stem beside it, if there is one."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import PurePosixPath

from pipeline import storage
from pipeline.dataset import Dataset
from pipeline.readers.items import PICTURE_SUFFIXES, identities, plain, shard_name, states
from pipeline.readers.rules import Record, describe, path_values
from pipeline.reasons import RejectReason
from pipeline.receipts import fingerprint
from pipeline.recipe import Images
from pipeline.stage import WorkItem
from pipeline.storage import FileInfo


def plan(name: str, dataset: Dataset, images: Images) -> list[WorkItem]:
    """Cut the listing into items of pictures, by number and size; other files are no records."""
    files = storage.list_files(dataset.source)
    texts = {PurePosixPath(f.name).with_suffix(""): f for f in files if f.name.endswith(".txt")}
    pictures = [f for f in files if PurePosixPath(f.name).suffix.lower() in PICTURE_SUFFIXES]
    items = []
    for start, stop in _ranges(pictures, images):
        part = pictures[start:stop]
        sidecars = [texts.get(PurePosixPath(f.name).with_suffix("")) for f in part]
        sources = [*part, *filter(None, sidecars)]
        found = identities(sources)
        items.append(
            WorkItem(
                name,
                shard_name("folder", start),
                inputs={
                    "num_files": len(found),
                    "num_bytes": sum(file["num_bytes"] for file in found),
                    "files": fingerprint({"files": found}),
                },
                payload={
                    "pictures": [[f.name, f.url, f.num_bytes] for f in part],
                    "texts": [sidecar and sidecar.url for sidecar in sidecars],
                    "states": states(sources),
                },
            )
        )
    return items


def _ranges(pictures: Sequence[FileInfo], images: Images) -> Iterator[tuple[int, int]]:
    """Cut a list of pictures into ranges [start, stop); one that is too large is alone."""
    start, num_bytes = 0, 0
    for place, picture in enumerate(pictures):
        num_bytes += picture.num_bytes
        is_full = place - start == images.records_per_shard or num_bytes > images.bytes_per_shard
        if is_full and place > start:
            yield start, place
            start, num_bytes = place, picture.num_bytes
    if pictures:
        yield start, len(pictures)


def read(dataset: Dataset, item: WorkItem, max_bytes: int) -> Iterator[Record]:
    """Yield the pictures of an item, with their text where no rule names another one."""
    pictures, texts = item.payload["pictures"], item.payload["texts"]
    for (name, url, num_bytes), text_url in zip(pictures, texts, strict=True):
        path = plain(name)
        record = describe(dataset, path, path_values(path, dataset.path_pattern))
        if record.reason is None and num_bytes > max_bytes:
            reason, detail = RejectReason.TOO_MANY_BYTES, f"{num_bytes} bytes"
            record = replace(record, reason=reason, detail=detail)
        if record.reason is None:
            record = replace(record, picture=storage.read_bytes(url))
            if text_url and dataset.text_field is None:
                text = storage.read_bytes(text_url).decode(errors="replace").strip()
                record = replace(record, text=text)
        yield record
