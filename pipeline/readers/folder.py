"""A folder: pictures, each with the text file of the same stem beside it, if there is one."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import PurePosixPath

from pipeline import storage
from pipeline.dataset import Dataset
from pipeline.readers.items import PICTURE_SUFFIXES, identities, plain, shard_name
from pipeline.readers.rules import Record, describe, path_values
from pipeline.reasons import RejectReason
from pipeline.receipts import fingerprint
from pipeline.recipe import Images
from pipeline.stage import WorkItem


def plan(name: str, dataset: Dataset, images: Images) -> list[WorkItem]:
    """Cut the listing into items of ``records_per_shard`` pictures; other files are no records."""
    files = storage.list_files(dataset.source)
    texts = {PurePosixPath(f.name).with_suffix(""): f for f in files if f.name.endswith(".txt")}
    pictures = [f for f in files if PurePosixPath(f.name).suffix.lower() in PICTURE_SUFFIXES]
    items = []
    for start in range(0, len(pictures), images.records_per_shard):
        part = pictures[start : start + images.records_per_shard]
        sidecars = [texts.get(PurePosixPath(f.name).with_suffix("")) for f in part]
        found = identities([*part, *filter(None, sidecars)])
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
                },
            )
        )
    return items


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
