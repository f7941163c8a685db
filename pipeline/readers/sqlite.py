"""A table of a SQLite file, as YFCC100M is given out, split into ranges of row ids.

The file is opened read-only and immutable, and nothing that it defines (views, functions, virtual
tables) is run. Values come as SQLite keeps them; its text need not be UTF-8, so each is decoded
here, and one that cannot be costs only its own record.
"""

import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

from fsspec.implementations.local import LocalFileSystem

from pipeline import storage
from pipeline.dataset import Dataset
from pipeline.errors import EvenmixError
from pipeline.readers.items import identities, shard_name, states
from pipeline.readers.rules import Record, bad_record, describe, value_names
from pipeline.recipe import Images
from pipeline.stage import WorkItem

MAX_VALUE_BYTES = 16 << 20
"""The largest text or blob that is read; SQLite takes a longer one for an error."""

Value = int | float | bytes | None
"""A value as SQLite keeps it; text is bytes, as nobody has checked it."""


@dataclass(frozen=True)
class Table:
    """A table that can be split: its columns, and its first and last row id (None: no rows)."""

    name: str
    columns: tuple[str, ...]
    rowids: tuple[int, int] | None

    def ranges(self, num_rows: int) -> list[tuple[int, int]]:
        """Cut the row ids into ranges [start, stop) of ``num_rows`` each."""
        if self.rowids is None:
            return []
        first, last = self.rowids
        return [
            (start, min(start + num_rows, last + 1)) for start in range(first, last + 1, num_rows)
        ]


def plan(name: str, dataset: Dataset, images: Images) -> list[WorkItem]:
    """Cut the table into ranges of ``records_per_shard`` row ids.

    Raises:
        EvenmixError: a file is not local, is damaged, or has no such table or columns.
    """
    files = storage.glob_files(dataset.source)
    paths = [local_path(name, file.url, file.num_bytes) for file in files]
    items = []
    for file, path, identity in zip(files, paths, identities(files), strict=True):
        table = find_table(path, dataset.table or "", file.num_bytes)
        missing = [n for n in value_names(dataset) if n not in (*table.columns, "row")]
        if missing:
            raise EvenmixError(
                f"{file.url}: table {table.name} has no column {', '.join(missing)} (it has "
                f"{', '.join(table.columns)}); correct the rules and field names of the dataset"
            )
        items += [
            WorkItem(
                name,
                shard_name(file.name, start),
                inputs={**identity, "rowids": [start, stop]},
                payload={"url": file.url, "states": states([file])},
            )
            for start, stop in table.ranges(images.records_per_shard)
        ]
    return items


def read(dataset: Dataset, item: WorkItem, max_bytes: int) -> Iterator[Record]:
    """Yield the records of a range of row ids; their pictures are still to be fetched.

    Raises:
        EvenmixError: the file is damaged.
    """
    path = local_path(item.dataset, item.payload["url"], item.inputs["num_bytes"])
    table = find_table(path, dataset.table or "", item.inputs["num_bytes"])
    columns = [name for name in value_names(dataset) if name in table.columns]
    start, stop = item.inputs["rowids"]
    for rowid, *values in read_rows(path, table, columns, start, stop):
        locator = f"{item.inputs['file']}:{rowid}"
        try:
            own = {name: _decoded(value) for name, value in zip(columns, values, strict=True)}
        except UnicodeDecodeError as error:
            yield bad_record(locator, f"its text: {error}")
            continue
        yield describe(dataset, locator, {"row": rowid} | own)


def _decoded(value: Value) -> int | float | str | None:
    return value.decode() if isinstance(value, bytes) else value


def local_path(name: str, url: str, num_bytes: int) -> str:
    """Return the path of a SQLite file.

    Raises:
        EvenmixError: it is not local.
    """
    fs, path = storage.filesystem(url)
    if not isinstance(fs, LocalFileSystem):
        raise EvenmixError(
            f"{url} ({num_bytes:,} bytes) is not a local file, and SQLite reads no other; "
            f"`evenmix mirror {name}` makes Parquet of it, once, that every worker can read"
        )
    return path


def find_table(path: str, name: str, num_bytes: int) -> Table:
    """Look up a table of a SQLite file of ``num_bytes`` bytes, without reading its rows.

    Raises:
        EvenmixError: the file is damaged, has no such table, or the table cannot be split.
    """
    with _open(path) as connection:
        listing = connection.execute("PRAGMA main.table_list").fetchall()
        without_rowid = {
            _text(found): bool(flag)
            for _, found, kind, _, flag, _ in listing
            if kind == b"table" and not found.startswith(b"sqlite_")
        }
        if name not in without_rowid:
            has = ", ".join(sorted(without_rowid)) or "none"
            raise EvenmixError(f"{path} has no table {name!r}; its tables: {has}. Correct `table`")
        columns = tuple(
            _text(column[1])
            for column in connection.execute(f"PRAGMA main.table_info({_quoted(name)})")
        )
        if without_rowid[name] or _rowid(columns) is None:
            raise EvenmixError(
                f"{path}: table {name} has no row ids to split it by (its columns: "
                f"{', '.join(columns)}); copy it with CREATE TABLE … AS SELECT …, or make Parquet"
            )
        rowid = _rowid(columns)
        # Asked for both at once, SQLite would read every row.
        first, last = (
            connection.execute(f"SELECT {end}({rowid}) FROM main.{_quoted(name)}").fetchone()[0]
            for end in ("min", "max")
        )
    if first is None:
        return Table(name, columns, None)
    # A row takes more than a byte of its file: beyond that most ranges would be empty.
    if last - first >= num_bytes:
        raise EvenmixError(
            f"{path}: the row ids of table {name} go from {first} to {last}, too sparse to be "
            "split; copy it with CREATE TABLE … AS SELECT …, which numbers the rows anew"
        )
    return Table(name, columns, (first, last))


def read_rows(
    path: str, table: Table, columns: Sequence[str], start: int, stop: int
) -> Iterator[tuple[Any, ...]]:
    """Yield row id and columns of the rows with start <= row id < stop, in order.

    Raises:
        EvenmixError: the file is damaged.
    """
    names = ", ".join([str(_rowid(table.columns)), *map(_quoted, columns)])
    query = (
        f"SELECT {names} FROM main.{_quoted(table.name)} "
        f"WHERE {_rowid(table.columns)} BETWEEN ? AND ? ORDER BY 1"
    )
    with _open(path) as connection:
        yield from connection.execute(query, (start, stop - 1))


@contextmanager
def _open(path: str) -> Iterator[sqlite3.Connection]:
    try:
        uri = f"file:{quote(path)}?mode=ro&immutable=1"
        with closing(sqlite3.connect(uri, uri=True)) as connection:
            connection.text_factory = bytes
            connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, MAX_VALUE_BYTES)
            connection.execute("PRAGMA trusted_schema = OFF")
            connection.execute("PRAGMA cell_size_check = ON")
            yield connection
    except sqlite3.Error as error:
        raise EvenmixError(
            f"{path} cannot be read as a SQLite file ({error}); it is damaged: fetch it again"
        ) from error


def _text(name: bytes) -> str:
    """Return the name of a table or column; one that is no UTF-8 cannot be asked for."""
    return name.decode(errors="replace")


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def _rowid(columns: Sequence[str]) -> str | None:
    """Return SQLite's name of the row id that no column hides."""
    hidden = {column.lower() for column in columns}
    return next((name for name in ("rowid", "_rowid_", "oid") if name not in hidden), None)
