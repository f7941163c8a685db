"""Lists of URLs: records that say where their picture is, in Parquet or JSON.

A source is a glob of Parquet files, of zip archives of JSON documents (as RedCaps is given out), or
of bare JSON documents. Parquet is streamed; a JSON document is parsed whole, so its size is checked
before a byte of it is read. Each part of a large one takes its share of the records, and a process
keeps the last document for the parts that follow.
"""

import json
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import PurePosixPath
from typing import Any
from zipfile import ZIP_DEFLATED, ZIP_STORED, BadZipFile, ZipFile, ZipInfo

from pipeline import storage
from pipeline.dataset import Dataset
from pipeline.errors import EvenmixError
from pipeline.mirror_manifest import with_known_versions
from pipeline.readers import rows
from pipeline.readers.items import plan_files, shard_name, states
from pipeline.readers.rules import Record, bad_record, describe
from pipeline.recipe import Images
from pipeline.stage import WorkItem
from pipeline.storage import FileInfo

MAX_DOCUMENT_BYTES = 256 << 20
"""The largest JSON document that is parsed; one of RedCaps' takes five times that in memory."""

_RECORD_BYTES = 600  # what a record of RedCaps takes, by which documents are cut into parts
_BATCH_ROWS = 512
_ENCRYPTED = 0x1  # of a zip member's flags


def plan(name: str, dataset: Dataset, images: Images) -> list[WorkItem]:
    """Cut the files into items of about ``records_per_shard`` records.

    Of Parquet the footers are read, of zip archives the directories, of JSON nothing.

    Raises:
        EvenmixError: some files cannot be read at all; every one is named.
    """
    files = with_known_versions(storage.glob_files(dataset.source))
    return plan_files(name, files, partial(_plan_file, name, dataset, images))


def read(dataset: Dataset, item: WorkItem, max_bytes: int) -> Iterator[Record]:
    """Yield an item's records; their pictures are still to be fetched.

    A document that is no JSON, or has no list of records, is one record with a reason.

    Raises:
        EvenmixError: the file is damaged.
    """
    if "rows" in item.inputs:
        return (record for record, _ in rows.read(dataset, item, _BATCH_ROWS))
    return _read_document(dataset, item)


def first_record(dataset: Dataset, file: FileInfo) -> dict[str, Any]:
    """Return the first record of a zip archive, or of a bare JSON document, as it is written.

    Raises:
        EvenmixError: there is none, or it cannot be read.
    """
    member = None
    if file.name.endswith(".zip"):
        with _open_zip(file.url, file.num_bytes) as archive:
            member = next(iter(_documents(file.url, archive)), None)
        if member is None:
            raise EvenmixError(f"{file.url} has no JSON document; correct the source")
    else:
        _check_size(file.url, file.num_bytes)
    place = _Document(file.url, file.num_bytes, file.version or file.modified, member)
    try:
        record = next(iter(_records(place, dataset.records_field)), None)
    except (ValueError, RecursionError) as error:
        raise EvenmixError(f"{place} has no records that can be read: {error}") from error
    if not isinstance(record, dict):
        raise EvenmixError(f"the first record of {place} is no object but {str(record)[:80]!r}")
    return record


def _plan_file(
    name: str, dataset: Dataset, images: Images, file: FileInfo, identity: Mapping[str, Any]
) -> list[WorkItem]:
    suffix = PurePosixPath(file.name).suffix.lower()
    if suffix == ".parquet":
        with storage.open_parquet(file.url, file.num_bytes) as opened:
            return rows.plan_file(name, dataset, images, file, identity, opened=opened)
    payload = {"url": file.url, "states": states([file])}
    if suffix == ".zip":
        with _open_zip(file.url, file.num_bytes) as archive:
            members = list(_documents(file.url, archive).values())
        return [
            WorkItem(
                name,
                shard_name(f"{file.name}/{member.filename}", part[0]),
                inputs={**identity, "member": member.filename, "part": part},
                payload=payload,
            )
            for member in members
            for part in _parts(member.file_size, images.records_per_shard)
        ]
    if suffix == ".json":
        _check_size(file.url, file.num_bytes)
        return [
            WorkItem(name, shard_name(file.name, part[0]), {**identity, "part": part}, payload)
            for part in _parts(file.num_bytes, images.records_per_shard)
        ]
    raise EvenmixError(f"{file.url} is no .parquet, .zip or .json; correct the source")


def _parts(num_bytes: int, per_shard: int) -> list[list[int]]:
    """Return the parts of a document, each as its number and that of all parts."""
    num_parts = max(1, -(-num_bytes // (per_shard * _RECORD_BYTES)))
    return [[part, num_parts] for part in range(num_parts)]


@dataclass(frozen=True)
class _Document:
    """Where a JSON document is: in a file of that size and version, or a member of such a zip."""

    url: str
    num_bytes: int
    version: str | None
    member: str | None

    def __str__(self) -> str:
        return self.url if self.member is None else f"{self.url}: {self.member}"


@contextmanager
def _open_zip(url: str, num_bytes: int) -> Iterator[ZipFile]:
    """Open a zip archive, of which only the directory is fetched.

    Raises:
        EvenmixError: it is damaged; also for what is found while its members are read.
    """
    try:
        with storage.open_file(url, num_bytes) as file, ZipFile(file) as archive:
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
    table = file_name if member is None else member
    locator = file_name if member is None else f"{file_name}/{member}"
    part, num_parts = item.inputs["part"]
    document = _Document(url, item.inputs["num_bytes"], item.inputs["version"], member)
    try:
        records = _records(document, dataset.records_field)
    except (ValueError, RecursionError) as error:
        if part == 0:
            yield bad_record(locator, f"none of its records can be read: {error}")
        return
    start, stop = (len(records) * cut // num_parts for cut in (part, part + 1))
    for row in range(start, stop):
        own = records[row]
        if isinstance(own, dict):
            values = rows.place_values(dataset, table, row) | own
            yield describe(dataset, f"{locator}:{row}", values)
        else:
            yield bad_record(f"{locator}:{row}", f"it is no object but {str(own)[:80]!r}")


@lru_cache(maxsize=1)
def _records(document: _Document, field: str | None) -> list[Any]:
    """Return the list of records of a document, which is its value at ``field``, or itself.

    Raises:
        ValueError: there is none.
        RecursionError: it is nested too deeply.
        EvenmixError: the file is out of reach, or its archive is damaged.
    """
    content = json.loads(_read(document))
    records = content.get(field) if field and isinstance(content, dict) else content
    if not isinstance(records, list):
        raise ValueError(f"no list at {field!r}" if field else "it is no list")
    return records


def _read(document: _Document) -> bytes:
    url, member = document.url, document.member
    if member is None:
        return storage.read_bytes(url, 0, document.num_bytes)
    with _open_zip(url, document.num_bytes) as archive:
        documents = _documents(url, archive)
        if member not in documents:
            raise EvenmixError(f"{url} has no {member} any more; start the command again")
        # Told no size, zipfile would unpack whatever the member holds, not what it claims.
        with archive.open(documents[member]) as file:
            return file.read(documents[member].file_size)
