"""WebDataset: consecutive members of a tar that share the name up to its first dot are a sample."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import BinaryIO

from pipeline import storage
from pipeline.dataset import Dataset
from pipeline.readers.items import PICTURE_SUFFIXES, identities, shard_name, states
from pipeline.readers.rules import Record, bad_record, describe, path_values
from pipeline.readers.tar_ranges import (
    DamagedTar,
    Member,
    Part,
    read_part,
    refuse_compressed,
    split,
    truncated,
)
from pipeline.reasons import RejectReason
from pipeline.recipe import Images
from pipeline.stage import WorkItem

_READ_SUFFIXES = {"json", "txt", *(suffix.removeprefix(".") for suffix in PICTURE_SUFFIXES)}

File = tuple[str, bytes | int]
"""A file of a sample: its path and content; of one above the cap its size."""


def plan(name: str, dataset: Dataset, images: Images) -> list[WorkItem]:
    """Make an item of each tar, or of each part of a large one; only the listing is read.

    Raises:
        EvenmixError: a tar is compressed.
    """
    files = storage.glob_files(dataset.source)
    for file in files:
        refuse_compressed(file.url)
    return [
        WorkItem(
            name,
            shard_name(file.name, number),
            inputs={**identity, "bytes": [part.begin, part.end]},
            payload={"url": file.url, "states": states([file])},
        )
        for file, identity in zip(files, identities(files), strict=True)
        for number, part in enumerate(split(0, file.num_bytes, images.bytes_per_shard))
    ]


def read(dataset: Dataset, item: WorkItem, max_bytes: int) -> Iterator[Record]:
    """Yield the samples of a part of a tar; a damaged one ends with a ``truncated_archive``.

    Files above ``max_bytes``, and those that are no picture, ``.json`` or ``.txt``, are not read.

    Raises:
        EvenmixError: the tar is out of reach, or a member holds a tar.
    """
    url, name, num_bytes = item.payload["url"], item.inputs["file"], item.inputs["num_bytes"]
    begin, end = item.inputs["bytes"]
    with storage.open_file(url, num_bytes, storage.stream_bytes(url)) as file:
        key, files = "", dict[str, File]()
        try:
            for member in read_part(file, Part(0, num_bytes, begin, end), sample_key, url):
                if not member.is_file:
                    continue
                if sample_key(member.name) != key and files:
                    yield _record(dataset, f"{name}/{key}", key, files)
                    files = {}
                key = sample_key(member.name)
                suffix = member.name[len(key) + 1 :].lower()
                files[suffix] = (member.name, _content(file, member, suffix, max_bytes))
        except DamagedTar as error:
            # The sample at the cut may be incomplete without showing it: it goes with the rest.
            yield truncated(f"{name}/{key}", key, error)
            return
    if files:
        yield _record(dataset, f"{name}/{key}", key, files)


def sample_key(path: str) -> str:
    """Return the path up to the first dot of the file's name."""
    folder, slash, base = path.rpartition("/")
    return folder + slash + base.partition(".")[0]


def _content(file: BinaryIO, member: Member, suffix: str, max_bytes: int) -> bytes | int:
    if suffix not in _READ_SUFFIXES:
        return b""
    if member.num_bytes > max_bytes:
        return member.num_bytes
    file.seek(member.data)
    return file.read(member.num_bytes)


def _record(dataset: Dataset, locator: str, key: str, files: Mapping[str, File]) -> Record:
    suffixes = [suffix for suffix in files if f".{suffix}" in PICTURE_SUFFIXES]
    path, picture = files[suffixes[0] if suffixes else next(iter(files))]
    _, document = files.get("json", ("", b"{}"))
    _, text = files.get("txt", ("", 0))
    try:
        fields = json.loads(document) if isinstance(document, bytes) else None
    except (ValueError, RecursionError) as error:
        return bad_record(locator, f"its JSON: {error}")
    if not isinstance(fields, dict):
        return bad_record(locator, "its JSON is too large, or no object")
    values = path_values(path, dataset.path_pattern) | {"key": key} | fields
    record = describe(dataset, locator, values)
    if record.reason is not None:
        return record
    if not suffixes:
        detail = f"members: {', '.join(sorted(files))}"
        return replace(record, reason=RejectReason.MISSING_PICTURE, detail=detail)
    if isinstance(picture, int):
        reason, detail = RejectReason.TOO_MANY_BYTES, f"{picture} bytes"
        return replace(record, reason=reason, detail=detail)
    if dataset.text_field is None and isinstance(text, bytes):
        record = replace(record, text=text.decode(errors="replace").strip())
    return replace(record, picture=picture)
