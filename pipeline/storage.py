"""Files under any fsspec URL: publish once and atomically, list, read ranges, read Parquet.

Publishing is the only way evenmix writes. A file appears under its final name whole or not at
all, and only if that name was free, so that of two attempts at the same work one wins and the
other learns of it.
"""

import io
import os
import re
import uuid
from base64 import b64decode
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.implementations.local import LocalFileSystem

from pipeline import gcs
from pipeline.errors import EvenmixError
from pipeline.stores import ask, is_absence, no_ranges

TEMPORARY_PREFIX = ".temporary-"
"""Begins the name of every file that is of no use once the work of its folder is published."""

_BUFFER_BYTES = 4 << 20
_FAR_BUFFER_BYTES = 16 << 20
_FOOTER_BYTES = 64 << 10  # what Arrow reads from the end of a Parquet file
_WHOLE_ROW_GROUP_BYTES = 32 << 20
_WILDCARD = re.compile(r"[*?\[]")

_CONNECT_TIMEOUT_S, _STALL_TIMEOUT_S = 30, 60
"""How long gs:// may take to accept a connection, and to give or take anything at all; gcsfs waits
for ever by default. A file as a whole takes as long as it does."""


@dataclass(frozen=True)
class FileInfo:
    """A file in a listing: its full URL, its path relative to the listed folder, its size.

    ``version`` is what the store itself says of the content: ``crc32c:`` (hex, GCS), ``sha256:`` or
    ``git:`` (a blob's id, Hugging Face), ``etag:`` (http, S3). Local files have None. ``modified``
    is when it was changed last, in the words of a store that has no version.
    """

    url: str
    name: str
    num_bytes: int
    version: str | None
    modified: str | None = None


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
    if url.startswith(("http:", "https:")):
        # Sizes and ranges are of the plain bytes.
        return {"use_listings_cache": False, "headers": {"Accept-Encoding": "identity"}}
    if url.startswith("gs:"):
        from aiohttp import ClientTimeout  # noqa: PLC0415  # local corpora do without

        timeout = ClientTimeout(sock_connect=_CONNECT_TIMEOUT_S, sock_read=_STALL_TIMEOUT_S)
        return {"use_listings_cache": False, "requests_timeout": timeout}
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
    if _is_gcs(fs):
        return gcs.upload(fs, url, path, data, create=not replace)
    if not isinstance(fs, LocalFileSystem):
        return ask(url, partial(_write_object, fs, path, data, replace), "written")
    try:
        return _write_local(Path(path), data, replace)
    except OSError as error:
        raise EvenmixError(
            f"cannot write {url} ({len(data):,} bytes): {error}. Nothing that was published is "
            "lost; free some space or check the permissions and start the same command again."
        ) from error


def _is_gcs(fs: fsspec.AbstractFileSystem) -> bool:
    return "gs" in fs.protocol


def _write_object(fs: fsspec.AbstractFileSystem, path: str, data: bytes, replace: bool) -> bool:
    try:
        fs.pipe_file(path, data, mode="overwrite" if replace else "create")
    except FileExistsError:
        return False
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
            # Swept by a build that had finished all work here: it has our file too, or is about to
            # publish it.
            if path.exists():
                return False
            if temporary.exists():
                raise
            return _write_local(path, data, replace)
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

    def remove_there() -> None:
        try:
            fs.rm_file(path)
        except FileNotFoundError as error:
            if not is_absence(error):
                raise

    ask(url, remove_there, "removed")


def exists(url: str) -> bool:
    """Tell whether a file exists; or a folder, where the store has such, which gs:// has not."""
    fs, path = filesystem(url)
    return ask(url, partial(_exists, fs, path))


def _exists(fs: fsspec.AbstractFileSystem, path: str) -> bool:
    if not _is_gcs(fs):
        return bool(fs.exists(path))
    try:
        gcs.object_info(fs, path)
    except FileNotFoundError:
        return False
    return True


def read_bytes(url: str, offset: int = 0, length: int | None = None) -> bytes:
    """Read a file, or ``length`` bytes of it from ``offset``.

    Raises:
        EvenmixError: the file does not exist, cannot be read (also after further attempts, where
            they may help), or ends before ``offset + length``.
    """
    fs, path = filesystem(url)
    if length is None:
        # An empty object has no range, not even one from its start.
        return bytes(ask(url, lambda: fs.cat_file(path, start=offset or None)))
    data = ask(url, lambda: _read_range(fs, path, offset, length))
    if len(data) != length:
        raise EvenmixError(
            f"{url} is shorter than expected: {length} bytes asked for at {offset}, "
            f"{len(data)} there. It is damaged or has changed; in a corpus, `evenmix verify` tells "
            "more."
        )
    return data


def _read_range(fs: fsspec.AbstractFileSystem, path: str, offset: int, length: int) -> bytes:
    if _is_gcs(fs):
        # One request, where an open file asks for the object's details first.
        return bytes(fs.cat_file(path, start=offset, end=offset + length))
    # Told the size, no library asks the store for it first; and unlike cat_file, which would take
    # the whole file, this notices that an HTTP server ignores ranges.
    with fs.open(path, "rb", cache_type="none", size=offset + length) as file:
        file.seek(offset)
        return bytes(file.read(length))


def file_info(url: str) -> FileInfo:
    """Return what a store says of one file now.

    Raises:
        EvenmixError: it does not exist or is out of reach, or its server does not tell the size.
    """
    fs, path = filesystem(url)
    look = partial(gcs.object_info, fs) if _is_gcs(fs) else fs.info
    return _file_info(url, url.rpartition("/")[2], ask(url, lambda: look(path)))


def stream_bytes(url: str) -> int:
    """Return how much to ask for at once of a file that is read from one end to the other.

    Far away every request costs time, and the Hugging Face Hub limits their number.
    """
    fs, _ = filesystem(url)
    return _BUFFER_BYTES if isinstance(fs, LocalFileSystem) else _FAR_BUFFER_BYTES


def open_file(
    url: str, num_bytes: int | None = None, buffer_bytes: int = _BUFFER_BYTES
) -> BinaryIO:
    """Open a file of ``num_bytes`` bytes (None: ask the store) for reading from any place.

    At least ``buffer_bytes`` are asked for at once. Reading raises what :func:`read_bytes` raises.
    """
    size = file_info(url).num_bytes if num_bytes is None else num_bytes
    return open_ranges(partial(read_bytes, url), size, buffer_bytes)


def open_ranges(
    read: Callable[[int, int], bytes], num_bytes: int, buffer_bytes: int = _BUFFER_BYTES
) -> BinaryIO:
    """Make a file of a function that returns its bytes by offset and length."""
    return io.BufferedReader(_Ranges(read, num_bytes), buffer_bytes)


class _Ranges(io.RawIOBase):
    """A read-only file that asks for the range of each read."""

    def __init__(self, read: Callable[[int, int], bytes], num_bytes: int) -> None:
        self._read, self._num_bytes, self._position = read, num_bytes, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._num_bytes}
        if base[whence] + offset < 0:
            raise ValueError(f"seek to {base[whence] + offset}")
        self._position = base[whence] + offset
        return self._position

    def read(self, size: int | None = -1) -> bytes:
        left = max(0, self._num_bytes - self._position)
        length = left if size is None or size < 0 else min(size, left)
        data = self._read(self._position, length) if length else b""
        self._position += length
        return data

    def readinto(self, buffer: Any) -> int:
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)


def list_files(url: str) -> list[FileInfo]:
    """List all files below a folder, sorted by name; a folder that does not exist is empty.

    Raises:
        EvenmixError: the store is out of reach or does not let us list it.
    """
    return list(walk_files(url))


def walk_files(url: str, boundaries: Sequence[str] = (), prefix: str = "") -> Iterator[FileInfo]:
    """Yield what :func:`list_files` lists, of the files whose names begin with ``prefix``.

    gs:// lists the parts between ``boundaries``, which are names in order, at once: a folder of a
    million objects takes seconds rather than minutes.
    """
    fs, path = filesystem(url)
    if not _is_gcs(fs):
        found = _file_infos(fs, url, path, ask(url, partial(_find, fs, path)))
        yield from (file for file in found if file.name.startswith(prefix))
        return
    root = path.rstrip("/") + "/"
    for path_found, info in gcs.list_objects(fs, url, path, boundaries, prefix):
        if not path_found.endswith("/"):  # as the console's empty folders do
            name = path_found.removeprefix(root)
            yield _file_info(join(url, name), name, info)


def _find(fs: fsspec.AbstractFileSystem, path: str) -> dict[str, dict[str, Any]]:
    try:
        return dict(fs.find(path, detail=True))
    except FileNotFoundError as error:
        if is_absence(error):
            return {}
        raise


def glob_files(pattern: str) -> list[FileInfo]:
    """List the files that match a pattern such as ``gs://bucket/data/*.tar``, sorted by name.

    Names are relative to the last folder before the first wildcard (``*``, ``?``, ``[``). A pattern
    without one is a single file.

    Raises:
        EvenmixError: the store is out of reach or does not let us list it.
    """
    fs, path = filesystem(pattern)

    def find() -> dict[str, dict[str, Any]]:
        if not ("http" in fs.protocol and "*" not in path and "[" not in path):
            return dict(fs.glob(path, detail=True))
        try:
            # Its glob takes a server out of reach for a file that is not there.
            return {path: fs.info(path)}
        except FileNotFoundError as error:
            if is_absence(error):
                return {}
            raise

    found = {name: info for name, info in ask(pattern, find).items() if info["type"] == "file"}
    folder, slash, _ = _WILDCARD.split(pattern, 1)[0].rpartition("/")
    return _file_infos(
        fs, folder or slash or ".", _WILDCARD.split(path, 1)[0].rpartition("/")[0], found
    )


def _file_infos(
    fs: fsspec.AbstractFileSystem, url: str, path: str, found: dict[str, dict[str, Any]]
) -> list[FileInfo]:
    root = path.rstrip("/")
    files = []
    for path_found, listed in found.items():
        if path_found.startswith(root + "/"):
            name = path_found[len(root) + 1 :]
            file_url = join(url, name)
            info = listed
            if listed["size"] is None:  # as links on a web page are
                info = ask(file_url, partial(fs.info, path_found))
            files.append(_file_info(file_url, name, info))
    return sorted(files, key=lambda file: file.name)


def _file_info(url: str, name: str, info: dict[str, Any]) -> FileInfo:
    if info["size"] is None or not info.get("partial", True):
        raise EvenmixError(no_ranges(url))
    version = _version(info)
    modified = info.get("mtime", info.get("Last-Modified"))
    return FileInfo(
        url,
        name,
        int(info["size"]),
        version,
        str(modified) if version is None and modified is not None else None,
    )


def _version(info: dict[str, Any]) -> str | None:
    """Return what a store says of a file's content, in the words of :class:`FileInfo`."""
    if "crc32c" in info:
        return f"crc32c:{b64decode(info['crc32c']).hex()}"
    if info.get("lfs"):
        return f"sha256:{info['lfs']['sha256']}"
    if info.get("blob_id"):
        return f"git:{info['blob_id']}"
    return f"etag:{info['ETag']}" if info.get("ETag") else None


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
    # An exchange's cells are hundreds of megabytes, of which neither is worth its time.
    has_values = not all(pa.types.is_binary(column) for column in table.schema.types)
    pq.write_table(
        table,
        sink,
        compression="zstd",
        row_group_size=16_384,
        use_dictionary=has_values,
        write_statistics=has_values,
    )
    return bytes(sink.getvalue().to_pybytes())


def read_parquet(url: str, columns: Sequence[str] | None = None) -> pa.Table:
    """Read a Parquet file.

    ``columns`` are names, or the paths of nested ones (``captions.list.element.outcome``).

    Raises:
        EvenmixError: the file is missing, is not Parquet, or lacks one of ``columns``.
    """
    with open_parquet(url) as file:
        leaves = {file.schema.column(number).path for number in range(len(file.schema))}
        missing = sorted(set(columns or ()) - {*file.schema_arrow.names, *leaves})
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
def open_parquet(url: str, num_bytes: int | None = None) -> Iterator[pq.ParquetFile]:
    """Open a Parquet file of ``num_bytes`` bytes (None: ask the store); its footer is fetched.

    Large row groups are then read in steps of :func:`stream_bytes` of each column.

    Raises:
        EvenmixError: the file is missing or is not Parquet.
    """
    with _ranges_of_parquet(url, num_bytes) as source:
        try:
            file = pq.ParquetFile(source)
            _ = file.schema_arrow.names  # decodes them: they may be no UTF-8
            groups = [file.metadata.row_group(i) for i in range(file.num_row_groups)]
            if any(group.total_byte_size > _WHOLE_ROW_GROUP_BYTES for group in groups):
                file = pq.ParquetFile(
                    source,
                    metadata=file.metadata,
                    pre_buffer=False,
                    buffer_size=stream_bytes(url),
                )
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            raise EvenmixError(
                f"{url} cannot be read as Parquet ({error}); fetch or write it again"
            ) from error
        yield file


def _ranges_of_parquet(url: str, num_bytes: int | None) -> _Ranges:
    """Return a file to be read by ranges, of a store that may be asked for its size."""
    fs, path = filesystem(url)
    if num_bytes is not None or not _is_gcs(fs):
        size = file_info(url).num_bytes if num_bytes is None else num_bytes
        return _Ranges(partial(read_bytes, url), size)
    # The size comes with the footer, and with it all of a small file: one request for a receipt.
    tail, size = ask(url, partial(gcs.read_tail, fs, path, _FOOTER_BYTES))

    def read(offset: int, length: int) -> bytes:
        start = offset - (size - len(tail))
        return tail[start : start + length] if start >= 0 else read_bytes(url, offset, length)

    return _Ranges(read, size)


def read_chunks(url: str, chunk_bytes: int = 1 << 22) -> Iterator[bytes]:
    """Stream a file in chunks, for checksums of files that may not fit into memory."""
    with open_file(url, buffer_bytes=chunk_bytes) as file:
        while chunk := file.read(chunk_bytes):
            yield chunk
