"""From the copy of a large file to files that many workers can read at once.

A compressed tar becomes a tar in parts, a SQLite file becomes Parquet files. Both are cut in the
same places every time, and what is published already is not written again.
"""

import gzip
import tempfile
import zlib
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa

from pipeline import storage
from pipeline.byte_progress import ByteProgress
from pipeline.copying import Copy, part_sizes
from pipeline.errors import EvenmixError
from pipeline.readers import sqlite
from pipeline.readers.parts import part_name
from pipeline.receipts import Checksum, checksum

ROWS_PER_FILE = 100_000
"""The row ids that a Parquet file spans."""

_CHUNK_BYTES = 4 << 20
_MAX_EXPANSION = 50
_FREE_EXPANSION_BYTES = 64 << 20
"""Pictures hardly shrink: what unpacks to more than 50 times its size, beyond this, is a bomb."""


def gunzip(copy: Copy, target: str, progress: ByteProgress) -> dict[str, Checksum]:
    """Decompress a copy into parts of ``target`` and return their checksums by URL.

    Raises:
        EvenmixError: the data are no gzip, are cut, or unpack to far too much; or a part is there
            that they do not give.
    """
    sizes = part_sizes(target)
    limit = _FREE_EXPANSION_BYTES + _MAX_EXPANSION * copy.file.num_bytes
    parts: dict[str, Checksum] = {}
    try:
        with copy.open() as compressed, gzip.open(compressed) as unpacked:
            done = 0
            while data := unpacked.read(copy.part_bytes):
                progress.advance(compressed.tell() - done)
                done = compressed.tell()
                part = len(parts)
                if part * copy.part_bytes > limit:
                    raise EvenmixError(
                        f"{copy.file.url} unpacks to more than {limit:,} bytes, which no archive "
                        "of pictures does; look at it before you use it"
                    )
                url = part_name(target, part)
                if sizes.get(part, len(data)) != len(data):
                    raise EvenmixError(
                        f"{url} has {sizes[part]:,} bytes, but {copy.file.url} unpacks to "
                        f"{len(data):,} there; remove it and start the same command again"
                    )
                if part not in sizes:
                    storage.publish(url, data)
                parts[url] = checksum([data])
    except (gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise EvenmixError(
            f"{copy.file.url} cannot be decompressed ({error}); it is damaged or cut at its source"
        ) from error
    return parts


def sqlite_to_parquet(
    copy: Copy, table: str, target: str, scratch: str | None, progress: ByteProgress
) -> dict[str, Checksum]:
    """Make Parquet files ``<target>-00000.parquet`` of a table; return their checksums by URL.

    SQLite reads local files only, so the copy is put together in a folder below ``scratch`` (None:
    the system's temporary folder), which is removed in the end. The files have all columns of the
    table, and ``row``, the row id, unless the table has a column of that name.

    Raises:
        EvenmixError: there is no such table or it cannot be split, the file is damaged, or
            ``scratch`` cannot hold it.
    """
    try:
        with tempfile.TemporaryDirectory(prefix="evenmix-mirror-", dir=scratch) as folder:
            path = Path(folder, "copy.sqlite")
            with copy.open() as file, path.open("wb") as whole:
                while data := file.read(_CHUNK_BYTES):
                    whole.write(data)
                    progress.advance(len(data))
            return _publish_parquet(copy, str(path), table, target, progress)
    except OSError as error:
        raise EvenmixError(
            f"cannot put {copy.file.url} together in {scratch or tempfile.gettempdir()}: {error}; "
            f"name a folder with room for {copy.file.num_bytes:,} bytes with --scratch"
        ) from error


def _publish_parquet(
    copy: Copy, path: str, table: str, target: str, progress: ByteProgress
) -> dict[str, Checksum]:
    found = sqlite.find_table(path, table, copy.file.num_bytes)
    ranges = found.ranges(ROWS_PER_FILE)
    files: dict[str, Checksum] = {}
    for number, (start, stop) in enumerate(ranges):
        url = f"{target}-{number:05d}.parquet"
        if not storage.exists(url):
            rows = _rows(path, found, start, stop)
            storage.publish(url, storage.parquet_bytes(rows, {}))
        files[url] = checksum(storage.read_chunks(url))
        progress.advance(copy.file.num_bytes // len(ranges))
    return files


def _rows(path: str, table: sqlite.Table, start: int, stop: int) -> pa.Table:
    rows = list(sqlite.read_rows(path, table, table.columns, start, stop))
    names = ["row", *table.columns]
    columns = [_column(values) for values in zip(*rows, strict=True)] if rows else []
    columns = columns or [pa.array([], pa.large_string()) for _ in names]
    # The table's own column of a name comes later and stays.
    return pa.table(dict(zip(names, columns, strict=True)))


def _column(values: Sequence[sqlite.Value]) -> pa.Array:
    """Return a column of integers or floats if all values are, else of texts."""
    types = {type(value) for value in values if value is not None}
    if types == {int}:
        return pa.array(values, pa.int64())
    if types == {float}:
        return pa.array(values, pa.float64())
    if not types <= {bytes}:
        values = [str(v).encode() if isinstance(v, int | float) else v for v in values]
    # Unchecked, as in SQLite: a record whose text is no UTF-8 is rejected when it is read.
    return pa.array(values, pa.large_binary()).view(pa.large_string())
