"""Files under any fsspec URL: publish once and atomically, list, read ranges, read Parquet.

Publishing is the only way evenmix writes. A file appears under its final name whole or not at
all, and only if that name was free, so that of two attempts at the same work one wins and the
other learns of it.
"""

import os
import re
import uuid
from base64 import b64decode
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.implementations.local import LocalFileSystem

from pipeline.errors import EvenmixError

TEMPORARY_PREFIX = ".temporary-"
"""Begins the name of every file that is of no use once the work of its folder is published."""

_UPLOAD_CHUNK_BYTES = 8 << 20
_WILDCARD = re.compile(r"[*?\[]")


@dataclass(frozen=True)
class FileInfo:
    """A file in a listing: its full URL, its path relative to the listed folder, its size.

    ``crc32c`` (hex) is there where the store keeps one, as GCS does.
    """

    url: str
    name: str
    num_bytes: int
    crc32c: str | None


def join(url: str, *parts: str) -> str:
    """Append path parts to a URL or a local path."""
    return "/".join([url.rstrip("/"), *parts])


def filesystem(url: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """Return the file system of a URL and the path inside it.

    Listings are never cached: another process may publish at any time.

    Raises:
        EvenmixError: no such kind of store is known, or its library is not installed.
    """
    try:
        fs, path = fsspec.url_to_fs(url, **_filesystem_options(url))
    except (ValueError, ImportError) as error:
        raise EvenmixError(f"{url} cannot be opened: {error}; correct the URL") from error
    return fs, path


def _filesystem_options(url: str) -> dict[str, Any]:
    return {"use_listings_cache": False} if "://" in url and not url.startswith("file:") else {}


def publish(url: str, data: bytes) -> bool:
    """Write a file under a free name, all of it or nothing.

    Local files are written under a temporary name, synced and linked; object stores get one upload
    that demands that the object does not exist yet (``ifGenerationMatch=0`` on GCS).

    Returns False, and changes nothing, if the name is taken; perhaps by an earlier try of this very
    call whose answer was lost, so a caller who cares compares what is there.

    Raises:
        EvenmixError: the file cannot be written (disk full, no permission, store out of reach).
    """
    return _write(url, data, replace=False)


def replace(url: str, data: bytes) -> None:
    """Write a file in place of what has the name, if anything: at every moment one or the other.

    Raises:
        EvenmixError: the file cannot be written.
    """
    _write(url, data, replace=True)


def _write(url: str, data: bytes, replace: bool) -> bool:
    """Write a file and return True, or return False because the name is taken."""
    fs, path = filesystem(url)
    try:
        if isinstance(fs, LocalFileSystem):
            return _write_local(Path(path), data, replace)
        return _write_object(fs, path, data, replace)
    except OSError as error:
        raise EvenmixError(
            f"cannot write {url} ({len(data):,} bytes): {error}. Nothing that was published is "
            "lost; free some space or check the permissions and start the same command again."
        ) from error


def _write_object(fs: fsspec.AbstractFileSystem, path: str, data: bytes, replace: bool) -> bool:
    options: dict[str, int] = {}
    if "gs" in fs.protocol:
        # gcsfs frames small uploads as MIME parts with a constant boundary, which the bytes of a
        # picture may contain: such an object is cut short silently. Resumable uploads carry plain
        # bytes, and gcsfs takes them from chunksize up.
        options["chunksize"] = min(max(len(data), 1), _UPLOAD_CHUNK_BYTES)
    try:
        fs.pipe_file(path, data, mode="overwrite" if replace else "create", **options)
    except FileExistsError:
        return False
    except OSError:
        raise
    except Exception as error:
        # The libraries of object stores raise types of their own for what they give up on.
        raise OSError(f"{type(error).__name__}: {error}") from error
    return True


def _write_local(path: Path, data: bytes, replace: bool) -> bool:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f"{TEMPORARY_PREFIX}{uuid.uuid4().hex}-{path.name}"
    try:
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        try:
            # A link, unlike a rename, fails when the name is taken.
            (os.replace if replace else os.link)(temporary, path)
        except FileExistsError:
            return False
        except FileNotFoundError:
            # Swept by a build that had finished all work here: it has our file too.
            if path.exists():
                return False
            raise
    finally:
        temporary.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
    return True


def remove(url: str) -> None:
    """Remove a file; a file that is gone already is no error."""
    fs, path = filesystem(url)
    try:
        fs.rm_file(path)
    except FileNotFoundError:
        return


def exists(url: str) -> bool:
    """Tell whether a file or folder exists."""
    fs, path = filesystem(url)
    return bool(fs.exists(path))


def read_bytes(url: str, offset: int = 0, length: int | None = None) -> bytes:
    """Read a file, or ``length`` bytes of it from ``offset``.

    Raises:
        EvenmixError: the file does not exist, cannot be read, or ends before ``offset + length``.
    """
    fs, path = filesystem(url)
    end = None if length is None else offset + length
    try:
        data: bytes = fs.cat_file(path, start=offset, end=end)
    except FileNotFoundError as error:
        raise EvenmixError(f"{url} does not exist") from error
    except OSError as error:
        raise EvenmixError(f"{url} cannot be read: {error}") from error
    if length is not None and len(data) != length:
        raise EvenmixError(
            f"{url} is shorter than expected: {length} bytes asked for at {offset}, "
            f"{len(data)} there. The file is damaged; `evenmix verify` tells more."
        )
    return data


def list_files(url: str) -> list[FileInfo]:
    """List all files below a folder, sorted by name; a folder that does not exist is empty."""
    fs, path = filesystem(url)
    try:
        found: dict[str, dict[str, Any]] = fs.find(path, detail=True)
    except FileNotFoundError:
        return []
    return _file_infos(url, path, found)


def glob_files(pattern: str) -> list[FileInfo]:
    """List the files that match a pattern such as ``gs://bucket/data/*.tar``, sorted by name.

    Names are relative to the last folder before the first wildcard (``*``, ``?``, ``[``). A pattern
    without one is a single file.
    """
    fs, path = filesystem(pattern)
    found = {
        name: info for name, info in fs.glob(path, detail=True).items() if info["type"] == "file"
    }
    folder, slash, _ = _WILDCARD.split(pattern, 1)[0].rpartition("/")
    return _file_infos(
        folder or slash or ".", _WILDCARD.split(path, 1)[0].rpartition("/")[0], found
    )


def _file_infos(url: str, path: str, found: dict[str, dict[str, Any]]) -> list[FileInfo]:
    root = path.rstrip("/")
    files = []
    for path_found, info in found.items():
        if path_found.startswith(root + "/"):
            name = path_found[len(root) + 1 :]
            crc32c = b64decode(info["crc32c"]).hex() if "crc32c" in info else None
            files.append(FileInfo(join(url, name), name, int(info["size"]), crc32c))
    return sorted(files, key=lambda file: file.name)


def sweep(url: str) -> None:
    """Remove the temporary files below a folder.

    Call it when all work there is published: a writer that is still busy then has lost anyway.
    """
    for file in list_files(url):
        if file.name.rsplit("/", 1)[-1].startswith(TEMPORARY_PREFIX):
            remove(file.url)


def parquet_bytes(table: pa.Table, metadata: dict[str, str]) -> bytes:
    """Serialise a table as Parquet with ``metadata`` in its footer; equal input, equal bytes."""
    table = table.replace_schema_metadata(metadata)
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd", row_group_size=16_384)
    return bytes(sink.getvalue().to_pybytes())


def read_parquet(url: str, columns: Sequence[str] | None = None) -> pa.Table:
    """Read a Parquet file.

    Raises:
        EvenmixError: the file is missing, is not Parquet, or lacks one of ``columns``.
    """
    with open_parquet(url) as file:
        missing = sorted(set(columns or ()) - set(file.schema_arrow.names))
        if missing:
            raise EvenmixError(
                f"{url} has no column {', '.join(missing)}; it has "
                f"{', '.join(file.schema_arrow.names)}"
            )
        try:
            return file.read(columns=list(columns) if columns is not None else None)
        except (pa.ArrowException, OSError) as error:
            raise EvenmixError(f"{url} is damaged ({error}); fetch or write it again") from error


def parquet_metadata(url: str) -> dict[str, str]:
    """Return the key-value metadata of a Parquet file's footer, reading only the footer."""
    with open_parquet(url) as file:
        raw = file.schema_arrow.metadata or {}
    return {
        key.decode(errors="replace"): value.decode(errors="replace") for key, value in raw.items()
    }


@contextmanager
def open_parquet(url: str) -> Iterator[pq.ParquetFile]:
    """Open a Parquet file for reading; only its footer is fetched.

    Raises:
        EvenmixError: the file is missing or is not Parquet.
    """
    fs, path = filesystem(url)
    with ExitStack() as opened:
        try:
            # ParquetFile does not close a file that it is given.
            file = pq.ParquetFile(opened.enter_context(fs.open(path, "rb")))
            _ = file.schema_arrow.names  # decodes them: they may be no UTF-8
        except FileNotFoundError as error:
            raise EvenmixError(f"{url} does not exist") from error
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            raise EvenmixError(
                f"{url} cannot be read as Parquet ({error}); fetch or write it again"
            ) from error
        yield file


def read_chunks(url: str, chunk_bytes: int = 1 << 22) -> Iterator[bytes]:
    """Stream a file in chunks, for checksums of files that may not fit into memory."""
    fs, path = filesystem(url)
    with fs.open(path, "rb") as file:
        while chunk := file.read(chunk_bytes):
            yield chunk
