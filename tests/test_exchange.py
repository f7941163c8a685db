"""Rows regrouped in files are those of the plain definition, in few reads and equal bytes."""

from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import storage
from pipeline.errors import EvenmixError
from pipeline.exchange import Ints, exchange_table, read_slices
from pipeline.receipts import table_digest

NUM_DESTINATIONS = 20
SCHEMA = pa.schema(
    [("number", pa.int64()), ("texts", pa.list_(pa.string())), ("data", pa.binary())]
)


def draw_rows(num_rows: int, seed: int, num_bytes: int = 100) -> tuple[pa.Table, Ints]:
    """Return rows with nulls, in chunks, and the destination of each."""
    draw = np.random.default_rng(seed)
    rows = [
        {
            "number": None if n % 7 == 0 else n,
            "texts": [f"é{n}", None] if n % 3 else None,
            "data": draw.bytes(num_bytes),
        }
        for n in range(num_rows)
    ]
    table = pa.Table.from_pylist(rows, SCHEMA)
    cut = num_rows // 3
    table = pa.concat_tables([table.slice(0, cut), table.slice(cut)])
    return table, draw.integers(0, NUM_DESTINATIONS, num_rows)


def publish(path: Path, table: pa.Table) -> str:
    assert storage.publish(str(path), storage.parquet_bytes(table, {}))
    return str(path)


def test_a_destination_gets_its_rows_in_the_order_of_files_and_rows(tmp_path: Path) -> None:
    files = [draw_rows(num_rows, seed=num_rows) for num_rows in (400, 0, 1, *range(2, 18))]
    urls = [
        publish(tmp_path / f"{number}.parquet", exchange_table(*file))
        for number, file in enumerate(files)
    ]
    for destination in range(NUM_DESTINATIONS):
        expected = [
            row
            for table, destinations in files
            for row, place in zip(table.to_pylist(), destinations, strict=True)
            if place == destination
        ]
        assert expected
        slices = list(read_slices(urls, destination))
        assert all(rows.schema == SCHEMA and rows.num_rows for rows in slices)
        assert [row for rows in slices for row in rows.to_pylist()] == expected
    assert list(read_slices(urls, NUM_DESTINATIONS)) == []


def test_several_destinations_of_a_file_are_read_at_one_opening(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = [draw_rows(num_rows, seed=num_rows) for num_rows in (3, 100, 60)]
    urls = [
        publish(tmp_path / f"{number}.parquet", exchange_table(*file))
        for number, file in enumerate(files)
    ]
    opened = list[str]()
    open_parquet = storage.open_parquet

    def counting(url: str) -> AbstractContextManager[pq.ParquetFile]:
        opened.append(url)
        return open_parquet(url)

    monkeypatch.setattr(storage, "open_parquet", counting)
    wanted = [7, 2, NUM_DESTINATIONS, 11]
    slices = list(read_slices(urls, *wanted))
    assert sorted(opened) == urls
    one_by_one = [rows for url in urls for place in wanted for rows in read_slices([url], place)]
    assert len(slices) == 6
    assert all(a.equals(b) for a, b in zip(slices, one_by_one, strict=True))


def test_equal_rows_give_equal_tables() -> None:
    rows, destinations = draw_rows(200, seed=1)
    shifted = pa.concat_tables([rows.slice(0, 11), rows.slice(11, 100), rows.slice(111)])
    first = exchange_table(rows, destinations)
    assert table_digest(exchange_table(shifted, destinations)) == table_digest(first)
    others = np.roll(destinations, 1)
    assert table_digest(exchange_table(rows, others)) != table_digest(first)


def test_a_slice_is_read_without_its_neighbours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The footer, then one range: also of a file too large to be read at once."""
    rows, destinations = draw_rows(400, seed=2, num_bytes=110_000)
    url = publish(tmp_path / "large.parquet", exchange_table(rows, destinations))
    reads = list[int]()
    read_bytes = storage.read_bytes

    def counting(url: str, offset: int, length: int) -> bytes:
        reads.append(length)
        return read_bytes(url, offset, length)

    monkeypatch.setattr(storage, "read_bytes", counting)
    (found,) = read_slices([url], 17)
    wanted = rows.take(np.flatnonzero(destinations == 17))
    assert found.equals(wanted)
    assert storage.file_info(url).num_bytes > 40 << 20
    assert len(reads) == 2
    assert sum(reads) < wanted.nbytes + (100 << 10)


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    rows, destinations = draw_rows(50, seed=3)
    whole = storage.parquet_bytes(exchange_table(rows, destinations), {})
    path = tmp_path / "d.parquet"
    path.write_bytes(bytes(len(whole) // 2) + whole[len(whole) // 2 :])
    with pytest.raises(EvenmixError, match=r"d\.parquet is damaged (?s:.*) start the same command"):
        list(read_slices([str(path)], int(destinations[0])))
