"""Lists of URLs: records that say where their picture is, in Parquet or JSON.

A source is a glob of Parquet files, of zip archives of JSON documents (as RedCaps is given out), or
of bare JSON documents. Parquet is streamed; a JSON document is parsed whole, so its size is checked
before a byte of it is read, and each part of a large one parses it anew and takes its share.
"""

import json
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import accumulate, pairwise
from pathlib import PurePosixPath
from typing import Any
from zipfile import ZIP_DEFLATED, ZIP_STORED, BadZipFile, ZipFile, ZipInfo

import pyarrow as pa

from pipeline import storage
from pipeline.dataset import Dataset
from pipeline.errors import EvenmixError
from pipeline.readers.items import identities, shard_name
from pipeline.readers.parquet import item_rows
from pipeline.readers.rules import Record, describe, path_values, value_names
from pipeline.reasons import RejectReason
from pipeline.recipe import Images
from pipeline.stage import WorkItem
from pipeline.storage import FileInfo

MAX_DOCUMENT_BYTES = 512 << 20
"""The largest JSON document that is parsed, which takes about five times that in memory."""

_RECORD_BYTES = 600  # what a record of RedCaps takes, by which documents are cut into parts
_BATCH_ROWS = 512
_ENCRYPTED = 0x1  # of a zip member's flags


def plan(name: str, dataset: Dataset, images: Images) -> list[WorkItem]:
    """Cut the files into items of about ``records_per_shard`` records.

    Of Parquet the footers are read, of zip archives the directories, of JSON nothing.

    Raises:
        EvenmixError: some files cannot be read at all; every one is named.
    """
    files = storage.glob_files(dataset.source)
    items, mistakes = list[WorkItem](), list[str]()
    for file, identity in zip(files, identities(files), strict=True):
        try:
            items += _plan_file(name, dataset, images.records_per_shard, file, identity)
        except EvenmixError as error:
            mistakes.append(str(error))
    if mistakes:
        raise EvenmixError("\n  ".join([f"dataset {name} cannot be read:", *mistakes]))
    return items


def read(dataset: Dataset, item: WorkItem, max_bytes: int) -> Iterator[Record]:
    """Yield an item's records; their pictures are still to be fetched.

    A document that is no JSON, or has no list of records, is one record with a reason.

    Raises:
        EvenmixError: the file is damaged.
    """
    if "rows" in item.inputs:
        return _read_parquet(dataset, item)
    return _read_document(dataset, item)


def _plan_file(
    name: str, dataset: Dataset, per_shard: int, file: FileInfo, identity: Mapping[str, Any]
) -> Iterator[WorkItem]:
    payload = {"url": file.url}
    suffix = PurePosixPath(file.name).suffix.lower()
    if suffix == ".parquet":
        group_rows = _check_parquet(dataset, file.name, file.url)
        for start, stop in item_rows(group_rows, per_shard):
            inputs = {**identity, "rows": [start, stop]}
            yield WorkItem(name, shard_name(file.name, start), inputs, payload)
    elif suffix == ".zip":
        with _open_zip(file.url) as archive:
            members = list(_documents(file.url, archive).values())
        for member in members:
            for part in _parts(member.file_size, per_shard):
                shard = shard_name(f"{file.name}/{member.filename}", part[0])
                inputs = {**identity, "member": member.filename, "part": part}
                yield WorkItem(name, shard, inputs, payload)
    elif suffix == ".json":
        _check_size(file.url, file.num_bytes)
        for part in _parts(file.num_bytes, per_shard):
            inputs = {**identity, "part": part}
            yield WorkItem(name, shard_name(file.name, part[0]), inputs, payload)
    else:
        raise EvenmixError(f"{file.url} is no .parquet, .zip or .json; correct the source")


def _parts(num_bytes: int, per_shard: int) -> list[list[int]]:
    """Return the parts of a document, each as its number and that of all parts."""
    num_parts = max(1, -(-num_bytes // (per_shard * _RECORD_BYTES)))
    return [[part, num_parts] for part in range(num_parts)]


def _place(dataset: Dataset, table: str, row: int) -> dict[str, Any]:
    """Return what the place of a row tells; ``table`` is its file's path in source or archive."""
    file = str(PurePosixPath(table).with_suffix(""))
    return path_values(table, dataset.path_pattern) | {"file": file, "row": row}


# Parquet


def _check_parquet(dataset: Dataset, name: str, url: str) -> list[int]:
    """Check the columns of a Parquet file by its footer; return the rows of its row groups."""
    with storage.open_parquet(url) as file:
        columns, metadata = file.schema_arrow.names, file.metadata
    known = {*columns, *_place(dataset, name, row=0)}
    missing = [value for value in value_names(dataset) if value not in known]
    if missing:
        raise EvenmixError(
            f"{url} has no column {', '.join(missing)} (it has {', '.join(columns)}); correct "
            "the rules and field names of the dataset in the recipe, or replace the file"
        )
    return [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]


def _read_parquet(dataset: Dataset, item: WorkItem) -> Iterator[Record]:
    url, name = item.payload["url"], item.inputs["file"]
    row, stop = item.inputs["rows"]
    with storage.open_parquet(url) as file:
        columns = [value for value in value_names(dataset) if value in file.schema_arrow.names]
        sizes = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
        bounds = list(pairwise(accumulate(sizes, initial=0)))
        groups = [i for i, (begin, end) in enumerate(bounds) if begin < stop and end > row]
        skip = row - bounds[groups[0]][0]
        try:
            for batch in file.iter_batches(_BATCH_ROWS, groups, columns, use_threads=False):
                wanted = batch.slice(skip, stop - row)
                for place in range(wanted.num_rows):
                    yield _parquet_record(dataset, name, row + place, wanted.slice(place, 1))
                row, skip = row + wanted.num_rows, max(skip - batch.num_rows, 0)
                if row == stop:
                    return
        except (pa.ArrowException, OSError) as error:
            raise EvenmixError(
                f"{url} is damaged after row {row} ({error}); fetch the file again"
            ) from error


def _parquet_record(dataset: Dataset, name: str, row: int, values: pa.RecordBatch) -> Record:
    locator = f"{name}:{row}"
    try:
        (own,) = values.to_pylist()
    except UnicodeDecodeError as error:
        return _bad_record(locator, f"its text: {error}")
    return describe(dataset, locator, _place(dataset, name, row) | own)


# JSON, by itself or in a zip archive


@contextmanager
def _open_zip(url: str) -> Iterator[ZipFile]:
    """Open a zip archive, of which only the directory is fetched.

    Raises:
        EvenmixError: it is damaged; also for what is found while its members are read.
    """
    try:
        with storage.open_file(url) as file, ZipFile(file) as archive:
            yield archive
    except (BadZipFile, EOFError, zlib.error, ValueError, NotImplementedError) as error:
        # The last two are what zipfile makes of absurd offsets, names and versions.
        raise EvenmixError(
            f"{url} cannot be read as a zip archive ({error}); fetch it again"
        ) from error


def _documents(url: str, archive: ZipFile) -> dict[str, ZipInfo]:
    """Return the JSON members of an archive by name; of equal names the last one counts.

    Raises:
        EvenmixError: one is encrypted, too large, or compressed in a way that nothing bounds.
    """
    documents = {
        info.filename: info for info in archive.infolist() if info.filename.endswith(".json")
    }
    for member, info in documents.items():
        if info.flag_bits & _ENCRYPTED:
            raise EvenmixError(f"{url}: {member} is encrypted; decrypt the archive first")
        if info.compress_type not in (ZIP_STORED, ZIP_DEFLATED):
            raise EvenmixError(
                f"{url}: {member} is neither stored nor deflated; write the archive again"
            )
        _check_size(f"{url}: {member}", info.file_size)
    return documents


def _check_size(place: str, num_bytes: int) -> None:
    if num_bytes > MAX_DOCUMENT_BYTES:
        raise EvenmixError(
            f"{place} claims {num_bytes:,} bytes; a JSON document is parsed whole, so the limit is "
            f"{MAX_DOCUMENT_BYTES:,}: cut it into several, or make Parquet of it"
        )


def _read_document(dataset: Dataset, item: WorkItem) -> Iterator[Record]:
    url, file_name, member = item.payload["url"], item.inputs["file"], item.inputs.get("member")
    part, num_parts = item.inputs["part"]
    if member is None:
        data, table, locator = storage.read_bytes(url), file_name, file_name
    else:
        data, table, locator = _read_member(url, member), member, f"{file_name}/{member}"
    try:
        records = _records(dataset, json.loads(data))
    except (ValueError, RecursionError) as error:
        if part == 0:
            yield _bad_record(locator, f"none of its records can be read: {error}")
        return
    del data
    start, stop = (len(records) * cut // num_parts for cut in (part, part + 1))
    for row in range(start, stop):
        own = records[row]
        if isinstance(own, dict):
            yield describe(dataset, f"{locator}:{row}", _place(dataset, table, row) | own)
        else:
            yield _bad_record(f"{locator}:{row}", f"it is no object but {str(own)[:80]!r}")


def _read_member(url: str, member: str) -> bytes:
    with _open_zip(url) as archive:
        documents = _documents(url, archive)
        if member not in documents:
            raise EvenmixError(f"{url} has no {member} any more; start the command again")
        # Told no size, zipfile would unpack whatever the member holds, not what it claims.
        with archive.open(documents[member]) as file:
            return file.read(documents[member].file_size)


def _records(dataset: Dataset, document: Any) -> list[Any]:
    """Return the list of records of a parsed document.

    Raises:
        ValueError: there is none.
    """
    field = dataset.records_field
    records = document.get(field) if field and isinstance(document, dict) else document
    if not isinstance(records, list):
        raise ValueError(f"no list at {field!r}" if field else "it is no list")
    return records


def _bad_record(locator: str, detail: str) -> Record:
    return Record(locator, None, reason=RejectReason.BAD_RECORD, detail=detail[:200])
