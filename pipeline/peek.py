"""The beginning of a source's file: its columns and first records, of which little is read.

A file can have 500 GB and stand on a server far away. Tables are read by their own readers, which
stream; of an archive the first megabytes are read and taken apart here, also of a compressed one.
"""

import io
import json
import tarfile
import zlib
from dataclasses import replace
from itertools import islice
from pathlib import PurePosixPath
from typing import IO

from pipeline import readers, storage
from pipeline.dataset import Dataset
from pipeline.errors import EvenmixError
from pipeline.readers.items import PICTURE_SUFFIXES
from pipeline.readers.rules import Record, describe, path_values
from pipeline.readers.sqlite import find_table
from pipeline.readers.url_list import first_record
from pipeline.recipe import Images
from pipeline.storage import FileInfo

_BEGINNING_BYTES = 4 << 20


def columns(dataset: Dataset, file: FileInfo) -> list[str]:
    """Return the columns of a table, or the keys of the first record's JSON; of pictures none.

    Raises:
        EvenmixError: the file is not what its layout says, or is out of reach.
    """
    try:
        if dataset.layout == "sqlite":
            return list(find_table(file.url, dataset.table or "", file.num_bytes).columns)
        if dataset.layout == "webdataset":
            return _keys_in_tar(file)
        if file.name.endswith((".zip", ".json")):
            return list(first_record(dataset, file))
        if file.name.endswith(".parquet"):
            with storage.open_parquet(file.url, file.num_bytes) as table:
                return list(table.schema_arrow.names)
    except (tarfile.TarError, ValueError, TypeError, RecursionError) as error:
        raise EvenmixError(f"the first record of {file.url} cannot be read: {error!r}") from error
    return []


def first_records(
    name: str, dataset: Dataset, file: FileInfo, count: int, max_bytes: int
) -> list[Record]:
    """Return the first ``count`` records of a file; of an archive of pictures only one.

    Raises:
        EvenmixError: the file is not what its layout says, or is out of reach.
    """
    if dataset.layout == "tar":
        return [_first_of_tar(dataset, file)]
    alone = dataset.model_copy(update={"source": _only(file), "mirror": False})
    item = readers.plan(name, alone, Images())[0]
    return list(islice(readers.read(alone, item, max_bytes), count))


def _only(file: FileInfo) -> str:
    """Return a pattern that matches one file of a listing and gives it the same name.

    Names, which may become part of ids, begin at the folder of a pattern's first wildcard.
    """
    folder = file.url.removesuffix(file.name)
    return f"{folder}[{file.name[0]}]{file.name[1:]}" if "/" in file.name else file.url


def _first_of_tar(dataset: Dataset, file: FileInfo) -> Record:
    beginning = _beginning(file)
    try:
        if file.name.endswith((".gz", ".tgz")):
            gzip_format = zlib.MAX_WBITS | 16
            beginning = zlib.decompressobj(gzip_format).decompress(beginning, _BEGINNING_BYTES)
        path, picture = _first_picture(io.BytesIO(beginning))
    except (tarfile.TarError, zlib.error) as error:
        raise EvenmixError(
            f"{file.url} has no whole picture in its first {_BEGINNING_BYTES:,} bytes: {error}"
        ) from error
    record = describe(dataset, path, path_values(path, dataset.path_pattern))
    return replace(record, picture=picture)


def _first_picture(stream: IO[bytes]) -> tuple[str, bytes]:
    """Return path and bytes of a tar's first picture; a tar inside it counts as a folder."""
    with tarfile.open(fileobj=stream, mode="r|") as tar:
        for member in tar:
            content = tar.extractfile(member)
            if content is None:
                continue
            path = PurePosixPath(member.name)
            if path.suffix == ".tar":
                inner, picture = _first_picture(content)
                return f"{path.with_suffix('')}/{inner}", picture
            if path.suffix.lower() in PICTURE_SUFFIXES:
                return str(path), content.read(_BEGINNING_BYTES)
    raise tarfile.ReadError("it has none at all")


def _keys_in_tar(file: FileInfo) -> list[str]:
    with tarfile.open(fileobj=io.BytesIO(_beginning(file)), mode="r:") as tar:
        for member in tar:
            content = tar.extractfile(member)
            if member.name.endswith(".json") and content is not None:
                return list(json.loads(content.read(_BEGINNING_BYTES)))
    return []


def _beginning(file: FileInfo) -> bytes:
    return storage.read_bytes(file.url, 0, min(file.num_bytes, _BEGINNING_BYTES))
