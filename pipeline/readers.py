"""Reading a dataset where it is: one reader per layout, all giving the same records.

A reader has two halves. ``plan`` lists a dataset's files once and cuts them into work items,
naming all that decides an item's content; ``read`` turns one item into records, on a worker. A
record that cannot be read is a record with a reason, never an exception.
"""

import json
import re
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import PurePosixPath
from typing import Any

import pyarrow as pa

from pipeline import storage
from pipeline.errors import EvenmixError
from pipeline.reasons import RejectReason
from pipeline.receipts import checksum, fingerprint
from pipeline.recipe import Dataset
from pipeline.stage import WorkItem
from pipeline.storage import FileInfo

PICTURE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"}
_BATCH_ROWS = 16
_CONCURRENT_CHECKSUMS = 8
_SHARD_NAME_CHARACTERS = 80


@dataclass(frozen=True)
class Record:
    """One record of a source: its picture's bytes, or the reason why there are none."""

    locator: str
    source_id: str | None
    picture: bytes = b""
    text: str | None = None
    source_url: str | None = None
    fields: Mapping[str, Any] = field(default_factory=dict)
    reason: RejectReason | None = None
    detail: str = ""


def plan(name: str, dataset: Dataset, records_per_shard: int) -> list[WorkItem]:
    """Cut a dataset into work items; the order in which its files are listed does not matter.

    Raises:
        EvenmixError: there are no files, or some cannot be read at all (every one is named).
    """
    if dataset.layout == "folder":
        items = _plan_folder(name, dataset, records_per_shard)
    elif dataset.layout == "parquet":
        items = _plan_parquet(name, dataset, records_per_shard)
    else:
        items = _plan_webdataset(name, dataset)
    if not items:
        raise EvenmixError(
            f"dataset {name}: no records at {dataset.source}; correct datasets.{name}.source"
        )
    return items


def read(dataset: Dataset, item: WorkItem, max_bytes: int) -> Iterator[Record]:
    """Read the records of a work item in the order of the source.

    Where the source says how large a file is, one above ``max_bytes`` is not read at all.
    """
    if dataset.layout == "folder":
        return _read_folder(item, max_bytes)
    if dataset.layout == "parquet":
        return _read_parquet(dataset, item)
    return _read_webdataset(dataset, item, max_bytes)


def _identities(files: Sequence[FileInfo]) -> list[dict[str, Any]]:
    """Identify files by name, size and CRC-32C, which is computed where the store has none."""

    def identity(file: FileInfo) -> dict[str, Any]:
        crc32c = file.crc32c or checksum(storage.read_chunks(file.url)).crc32c
        return {"file": file.name, "num_bytes": file.num_bytes, "crc32c": crc32c}

    with ThreadPoolExecutor(_CONCURRENT_CHECKSUMS) as pool:
        return list(pool.map(identity, files))


def _shard_name(file_name: str, start: int) -> str:
    """Name a shard after its source file and first record, within a bounded length."""
    stem = file_name.rsplit(".", 1)[0]
    plain = re.sub(r"[^A-Za-z0-9_-]+", "-", stem).strip("-")
    if plain != stem or len(plain) > _SHARD_NAME_CHARACTERS:
        # Two names may have become one.
        plain = f"{plain[-_SHARD_NAME_CHARACTERS:]}-{fingerprint({'file': file_name})[:8]}"
    return f"{plain}-{start:09d}".lstrip("-")


def _described_by(dataset: Dataset) -> list[str]:
    """Return the names of the fields that describe a record beside its id and picture."""
    named = [dataset.text_field, dataset.url_field, *dataset.extra_fields]
    return [name for name in named if name is not None]


def _description(dataset: Dataset, values: Mapping[str, Any]) -> dict[str, Any]:
    """Pick what describes a record out of its row or JSON; a missing name is a KeyError."""
    found = {name: values[name] for name in _described_by(dataset)}
    text, url = found.get(dataset.text_field or ""), found.get(dataset.url_field or "")
    return {
        "text": None if text is None else str(text),
        "source_url": None if url is None else str(url),
        "fields": {name: found[name] for name in dataset.extra_fields},
    }


# Folder: pictures with a text file of the same stem beside them.


def _plan_folder(name: str, dataset: Dataset, records_per_shard: int) -> list[WorkItem]:
    files = storage.list_files(dataset.source)
    texts = {PurePosixPath(f.name).with_suffix(""): f for f in files if f.name.endswith(".txt")}
    pictures = [f for f in files if PurePosixPath(f.name).suffix.lower() in PICTURE_SUFFIXES]
    items = []
    for start in range(0, len(pictures), records_per_shard):
        part = pictures[start : start + records_per_shard]
        sidecars = [texts.get(PurePosixPath(f.name).with_suffix("")) for f in part]
        identities = _identities([*part, *filter(None, sidecars)])
        items.append(
            WorkItem(
                name,
                _shard_name("folder", start),
                inputs={"num_files": len(identities), "files": fingerprint({"files": identities})},
                payload={
                    "pictures": [[f.name, f.url, f.num_bytes] for f in part],
                    "texts": [sidecar and sidecar.url for sidecar in sidecars],
                },
            )
        )
    return items


def _read_folder(item: WorkItem, max_bytes: int) -> Iterator[Record]:
    pictures, texts = item.payload["pictures"], item.payload["texts"]
    for (name, url, num_bytes), text_url in zip(pictures, texts, strict=True):
        # A local file's name need not be UTF-8, but a record's id is.
        plain = name.encode(errors="backslashreplace").decode()
        if num_bytes > max_bytes:
            yield _too_large(plain, plain, num_bytes)
            continue
        text = storage.read_bytes(text_url).decode(errors="replace").strip() if text_url else None
        yield Record(locator=plain, source_id=plain, picture=storage.read_bytes(url), text=text)


def _too_large(locator: str, source_id: str, num_bytes: int) -> Record:
    reason, detail = RejectReason.TOO_MANY_BYTES, f"{num_bytes} bytes"
    return Record(locator, source_id, reason=reason, detail=detail)


# Parquet: rows with an image struct of bytes and path, as Hugging Face writes them.


def _plan_parquet(name: str, dataset: Dataset, records_per_shard: int) -> list[WorkItem]:
    files = storage.glob_files(dataset.source)
    items, mistakes = [], []
    for file, identity in zip(files, _identities(files), strict=True):
        try:
            num_rows = _check_parquet(dataset, file.url)
        except EvenmixError as error:
            mistakes.append(str(error))
            continue
        for start in range(0, num_rows, records_per_shard):
            stop = min(start + records_per_shard, num_rows)
            items.append(
                WorkItem(
                    name,
                    _shard_name(file.name, start),
                    inputs=identity | {"rows": [start, stop]},
                    payload={"url": file.url},
                )
            )
    if mistakes:
        raise EvenmixError("\n  ".join([f"dataset {name} cannot be read:", *mistakes]))
    return items


def _columns(dataset: Dataset) -> list[str]:
    named = [dataset.id_field, dataset.image_field, *_described_by(dataset)]
    return [column for column in named if column is not None]


def _check_parquet(dataset: Dataset, url: str) -> int:
    """Check the columns of a Parquet file by its footer and return its number of rows."""
    with storage.open_parquet(url) as file:
        schema = file.schema_arrow
        missing = [column for column in _columns(dataset) if column not in schema.names]
        if missing:
            raise EvenmixError(
                f"{url} has no column {', '.join(missing)} (it has {', '.join(schema.names)}); "
                "correct the field names of the dataset in the recipe, or replace the file"
            )
        image = schema.field(dataset.image_field).type
        if not pa.types.is_struct(image) or image.get_field_index("bytes") < 0:
            raise EvenmixError(
                f"{url}: column {dataset.image_field} is {image}, not a struct with bytes; "
                "correct image_field in the recipe"
            )
        num_rows: int = file.metadata.num_rows
        return num_rows


def _read_parquet(dataset: Dataset, item: WorkItem) -> Iterator[Record]:
    url, file_name = item.payload["url"], item.inputs["file"]
    start, stop = item.inputs["rows"]
    with storage.open_parquet(url) as file:
        group_rows = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
        ends = list(accumulate(group_rows))
        groups = [i for i, end in enumerate(ends) if end > start and end - group_rows[i] < stop]
        row = ends[groups[0]] - group_rows[groups[0]]
        try:
            for batch in file.iter_batches(_BATCH_ROWS, groups, _columns(dataset)):
                begin = max(start - row, 0)
                wanted = batch.slice(begin, max(min(stop - row, batch.num_rows) - begin, 0))
                for place in range(wanted.num_rows):
                    locator = f"{file_name}:{row + begin + place}"
                    yield _parquet_record(dataset, locator, wanted.slice(place, 1))
                row += batch.num_rows
                if row >= stop:
                    break
        except (pa.ArrowException, OSError) as error:
            raise EvenmixError(
                f"{url} is damaged after row {row} ({error}); fetch the file again"
            ) from error


def _parquet_record(dataset: Dataset, locator: str, row: pa.RecordBatch) -> Record:
    try:
        (values,) = row.to_pylist()
    except UnicodeDecodeError as error:
        return Record(locator, None, reason=RejectReason.BAD_RECORD, detail=f"its text: {error}")
    source_id = values[dataset.id_field or ""]
    if source_id is None:
        return Record(locator, None, reason=RejectReason.BAD_RECORD, detail="its id is null")
    image = values[dataset.image_field]
    if image is None or image["bytes"] is None:
        return Record(
            locator, str(source_id), reason=RejectReason.MISSING_PICTURE, detail="null image"
        )
    return Record(locator, str(source_id), image["bytes"], **_description(dataset, values))


# WebDataset: consecutive members of a tar that share the name up to its first dot.


def _plan_webdataset(name: str, dataset: Dataset) -> list[WorkItem]:
    files = storage.glob_files(dataset.source)
    return [
        WorkItem(name, _shard_name(file.name, 0), inputs=identity, payload={"url": file.url})
        for file, identity in zip(files, _identities(files), strict=True)
    ]


def _read_webdataset(dataset: Dataset, item: WorkItem, max_bytes: int) -> Iterator[Record]:
    file_name = item.inputs["file"]
    fs, path = storage.filesystem(item.payload["url"])
    stem, members = "", dict[str, bytes | int]()
    with fs.open(path, "rb") as file:
        try:
            for member, data in _tar_members(file, item.inputs["num_bytes"], max_bytes):
                folder, _, base = member.rpartition("/")
                member_stem, _, suffix = base.partition(".")
                member_stem = f"{folder}/{member_stem}" if folder else member_stem
                if member_stem != stem and members:
                    yield _webdataset_record(dataset, f"{file_name}/{stem}", stem, members)
                    members = {}
                stem = member_stem
                members[suffix.lower()] = data
        except (tarfile.TarError, ValueError, OverflowError, MemoryError) as error:
            # The last three are what tarfile makes of headers that claim absurd sizes.
            # The sample at the cut may be incomplete without showing it: it goes with the rest.
            yield Record(
                f"{file_name}/{stem}",
                source_id=None,
                reason=RejectReason.TRUNCATED_ARCHIVE,
                detail=f"{error}; what follows {stem or 'the beginning'} is lost: fetch it again",
            )
            return
    if members:
        yield _webdataset_record(dataset, f"{file_name}/{stem}", stem, members)


def _tar_members(file: Any, num_bytes: int, max_bytes: int) -> Iterator[tuple[str, bytes | int]]:
    """Stream the regular members of a tar of ``num_bytes`` bytes: name and data.

    Of a member above ``max_bytes`` it is the size, and nothing is read.

    Raises:
        tarfile.ReadError: the archive is cut or damaged; also where the tarfile module takes a
            damaged header, or the lack of the block of zeros that closes every archive, for a
            proper end.
    """
    # A name need not be UTF-8, but a record's id and locator are.
    with tarfile.open(fileobj=file, mode="r:", encoding="utf-8", errors="backslashreplace") as tar:
        end = 0
        for info in tar:
            # tarfile believes negative sizes and goes back; it would never come to an end.
            if tar.offset <= end:
                raise tarfile.ReadError(f"{info.name} has a size of {info.size} bytes")
            end = tar.offset
            if info.issparse():
                yield info.name, b""  # it claims any size without having the bytes
            elif info.isreg():
                if info.offset_data + info.size > num_bytes:
                    raise tarfile.ReadError(f"{info.name} is cut")
                if info.size > max_bytes:
                    yield info.name, info.size
                    continue
                file.seek(info.offset_data)
                yield info.name, file.read(info.size)
        file.seek(tar.offset)
        if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise tarfile.ReadError("it goes on with a damaged header, or has no end")


def _webdataset_record(
    dataset: Dataset, locator: str, stem: str, members: Mapping[str, bytes | int]
) -> Record:
    suffixes = [suffix for suffix in members if f".{suffix}" in PICTURE_SUFFIXES]
    try:
        fields = json.loads(members.get("json", b"{}"))  # type: ignore[arg-type]  # or a TypeError
        # Half of a surrogate pair is JSON, but no text.
        json.dumps(fields, ensure_ascii=False).encode()
        source_id = fields[dataset.id_field] if dataset.id_field else stem
        description = _description(dataset, fields)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        detail = f"its JSON lacks or breaks {error}"
        return Record(locator, None, reason=RejectReason.BAD_RECORD, detail=detail)
    if source_id is None:
        return Record(locator, None, reason=RejectReason.BAD_RECORD, detail="its id is null")
    source_id = str(source_id)
    if not suffixes:
        detail = f"members: {', '.join(sorted(members))}"
        return Record(locator, source_id, reason=RejectReason.MISSING_PICTURE, detail=detail)
    picture, text = members[suffixes[0]], members.get("txt")
    if isinstance(picture, int):
        return _too_large(locator, source_id, picture)
    if dataset.text_field is None and isinstance(text, bytes):
        description["text"] = text.decode(errors="replace").strip()
    return Record(locator, source_id, picture, **description)
