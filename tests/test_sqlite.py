"""A SQLite table gives each row once, whatever the ranges, and trusts nothing in its file."""

import sqlite3
from collections.abc import Iterable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from pipeline import storage
from pipeline.dataset import Dataset
from pipeline.errors import EvenmixError
from pipeline.readers import sqlite
from pipeline.readers.rules import Record
from pipeline.reasons import RejectReason
from pipeline.recipe import Images
from pipeline.templates import multimedia_commons_path

MAX_BYTES = 1 << 20
BUCKET = "https://multimedia-commons.s3-us-west-2.amazonaws.com/data/images"


def dataset(source: object, **options: object) -> Dataset:
    """YFCC100M, as the catalogue has it."""
    return Dataset.model_validate(
        {
            "layout": "sqlite",
            "source": str(source),
            "licence": "Creative Commons",
            "table": "yfcc100m_dataset",
            "id_rule": "{photoid}",
            "image_url": BUCKET + "/{downloadurl:multimedia_commons_path}.jpg",
            "text_field": "title",
            "licence_field": "licensename",
            "extra_fields": ["marker"],
            **options,
        }
    )


SCHEMA = """
CREATE TABLE yfcc100m_dataset (
    photoid INTEGER, title TEXT, downloadurl TEXT, licensename TEXT, marker INTEGER, latitude REAL
)
"""


def row(number: int) -> tuple[Any, ...]:
    url = f"http://farm1.staticflickr.com/1/{number}_a.jpg"
    return (7_000_000_000 + number, f"title {number}", url, "Attribution License", number % 2, 0.5)


def write(path: Path, rows: Iterable[tuple[Any, ...]], schema: str = SCHEMA) -> None:
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.executescript(schema)
        connection.executemany("INSERT INTO yfcc100m_dataset VALUES (?,?,?,?,?,?)", rows)


def change(path: Path, *statements: str) -> None:
    with closing(sqlite3.connect(path)) as connection, connection:
        for statement in statements:
            connection.execute(statement)


def record(number: int) -> Record:
    url = f"http://farm1.staticflickr.com/1/{number}_a.jpg"
    image_url = f"{BUCKET}/{multimedia_commons_path(url)}.jpg"
    return Record(
        f"yfcc.sql:{number + 1}",
        str(7_000_000_000 + number),
        image_url=image_url,
        text=f"title {number}",
        source_url=image_url,
        licence="Attribution License",
        fields={"marker": number % 2},
    )


def read_all(spec: Dataset, records_per_shard: int = 100) -> list[Record]:
    items = sqlite.plan("yfcc", spec, Images(records_per_shard=records_per_shard))
    assert len({item.shard for item in items}) == len(items)
    return [record for item in items for record in sqlite.read(spec, item, MAX_BYTES)]


@pytest.mark.parametrize("records_per_shard", [1, 2, 7, 20, 100])
def test_rows_come_once_and_in_order(tmp_path: Path, records_per_shard: int) -> None:
    write(tmp_path / "yfcc.sql", map(row, range(20)))
    assert read_all(dataset(tmp_path / "*.sql"), records_per_shard) == [
        record(number) for number in range(20)
    ]


def test_row_ids_may_have_gaps_and_be_negative(tmp_path: Path) -> None:
    write(tmp_path / "yfcc.sql", map(row, range(50)))
    change(
        tmp_path / "yfcc.sql",
        "DELETE FROM yfcc100m_dataset WHERE rowid BETWEEN 11 AND 30",
        "UPDATE yfcc100m_dataset SET rowid = -3 WHERE rowid = 1",
    )
    spec = dataset(tmp_path / "yfcc.sql", id_rule="{row}")
    assert [found.source_id for found in read_all(spec, 4)] == [
        str(n) for n in [-3, *range(2, 11), *range(31, 51)]
    ]


def test_an_empty_table_has_no_items(tmp_path: Path) -> None:
    write(tmp_path / "yfcc.sql", [])
    assert read_all(dataset(tmp_path / "yfcc.sql")) == []


def test_text_that_is_no_text_costs_its_own_record(tmp_path: Path) -> None:
    write(tmp_path / "yfcc.sql", map(row, range(4)))
    change(
        tmp_path / "yfcc.sql",
        "UPDATE yfcc100m_dataset SET title = CAST(x'636166e9' AS TEXT) WHERE rowid = 2",
        "UPDATE yfcc100m_dataset SET downloadurl = NULL WHERE rowid = 3",
    )
    found = read_all(dataset(tmp_path / "yfcc.sql"))
    assert [found[0], found[3]] == [record(0), record(3)]
    assert [(r.locator, r.reason) for r in found[1:3]] == [
        ("yfcc.sql:2", RejectReason.BAD_RECORD),
        ("yfcc.sql:3", RejectReason.BAD_RECORD),
    ]
    assert found[1].detail.startswith("its text: 'utf-8' codec can't decode byte 0xe9")
    assert found[2].detail == "its downloadurl is null"


def test_columns_that_no_rule_names_are_not_read(tmp_path: Path) -> None:
    """A text that SQLite may not return is no obstacle where nobody asks for it."""
    write(tmp_path / "yfcc.sql", map(row, range(2)))
    change(
        tmp_path / "yfcc.sql",
        f"UPDATE yfcc100m_dataset SET latitude = zeroblob({sqlite.MAX_VALUE_BYTES + 1})",
    )
    assert read_all(dataset(tmp_path / "yfcc.sql")) == [record(0), record(1)]
    with pytest.raises(EvenmixError, match=r"yfcc\.sql cannot be read .* \(string or blob too big"):
        read_all(dataset(tmp_path / "yfcc.sql", extra_fields=["latitude"]))


def test_names_are_never_sql(tmp_path: Path) -> None:
    name = 'x"; DROP TABLE t; --'
    quoted = '"' + name.replace('"', '""') + '"'
    path = tmp_path / "a.db"
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute(f"CREATE TABLE {quoted} ({quoted} TEXT, rowid TEXT)")
        connection.execute(f"INSERT INTO {quoted} VALUES ('value', 'hidden')")
    spec = dataset(path, table=name, id_rule="{row}", image_url="{rowid}", licence_field=None)
    spec = spec.model_copy(update={"text_field": name, "extra_fields": []})
    (found,) = read_all(spec)
    assert (found.source_id, found.text, found.image_url) == ("1", "value", "hidden")


def test_the_file_is_not_written_to(tmp_path: Path) -> None:
    write(tmp_path / "yfcc.sql", map(row, range(3)))
    change(tmp_path / "yfcc.sql", "PRAGMA journal_mode = WAL")
    before = (tmp_path / "yfcc.sql").read_bytes()
    (tmp_path / "yfcc.sql").chmod(0o444)
    tmp_path.chmod(0o555)
    try:
        assert len(read_all(dataset(tmp_path / "yfcc.sql"))) == 3
    finally:
        tmp_path.chmod(0o755)
    assert (tmp_path / "yfcc.sql").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["yfcc.sql"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"table": "photos"}, r"has no table 'photos'; its tables: yfcc100m_dataset\. Correct"),
        ({"table": "sqlite_schema"}, "has no table 'sqlite_schema'"),
        ({"table": "of_titles"}, "has no table 'of_titles'"),
        (
            {"id_rule": "{id}", "text_field": "name"},
            r"table yfcc100m_dataset has no column id, name \(it has photoid, title, downloadurl",
        ),
    ],
)
def test_a_wrong_name_is_an_error_that_says_what_is_there(
    tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    write(tmp_path / "yfcc.sql", [row(0)])
    change(tmp_path / "yfcc.sql", "CREATE VIEW of_titles AS SELECT title FROM yfcc100m_dataset")
    with pytest.raises(EvenmixError, match=message):
        read_all(dataset(tmp_path / "yfcc.sql", **options))


def test_a_table_without_row_ids_cannot_be_split(tmp_path: Path) -> None:
    schema = SCHEMA.strip().removesuffix(")").replace("photoid INTEGER", "photoid PRIMARY KEY")
    write(tmp_path / "yfcc.sql", [row(0)], f"{schema}) WITHOUT ROWID")
    with pytest.raises(EvenmixError, match=r"yfcc100m_dataset has no row ids .* photoid, title"):
        read_all(dataset(tmp_path / "yfcc.sql"))


def test_row_ids_far_apart_do_not_become_countless_items(tmp_path: Path) -> None:
    write(tmp_path / "yfcc.sql", [row(0), row(1)])
    change(tmp_path / "yfcc.sql", f"UPDATE yfcc100m_dataset SET rowid = {2**63 - 1} WHERE rowid=2")
    with pytest.raises(EvenmixError, match="go from 1 to 9223372036854775807, too sparse"):
        read_all(dataset(tmp_path / "yfcc.sql"))


def test_planning_reads_no_rows(tmp_path: Path) -> None:
    """Not even those that are damaged: they may fill 65 GB."""
    path = tmp_path / "yfcc.sql"
    write(path, map(row, range(20_000)))
    spec, images = dataset(path), Images(records_per_shard=100)
    ranges = [item.inputs["rowids"] for item in sqlite.plan("yfcc", spec, images)]
    assert (len(ranges), ranges[0], ranges[-1]) == (200, [1, 101], [19_901, 20_001])
    data = bytearray(path.read_bytes())
    begin, end = len(data) // 10, len(data) // 10 * 8
    data[begin:end] = b"\xff" * (end - begin)
    path.write_bytes(data)
    assert [item.inputs["rowids"] for item in sqlite.plan("yfcc", spec, images)] == ranges


def test_a_damaged_file_is_one_error(tmp_path: Path) -> None:
    path = tmp_path / "yfcc.sql"
    write(path, map(row, range(2000)))
    spec = dataset(path)
    items = sqlite.plan("yfcc", spec, Images(records_per_shard=100))
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2] + b"\xff" * (len(whole) // 2))
    with pytest.raises(EvenmixError, match=r"yfcc\.sql cannot be read as a SQLite file \(database"):
        for item in items:
            list(sqlite.read(spec, item, MAX_BYTES))
    path.write_bytes(b"<html>not found</html>" * 100)
    with pytest.raises(EvenmixError, match=r"yfcc\.sql cannot .* \(file is not a database\)"):
        sqlite.plan("yfcc", spec, Images())


def test_a_remote_file_wants_a_mirror(tmp_path: Path, gcs_bucket: str) -> None:
    write(tmp_path / "yfcc.sql", [row(0)])
    storage.publish(f"{gcs_bucket}/yfcc.sql", (tmp_path / "yfcc.sql").read_bytes())
    with pytest.raises(EvenmixError, match=r"is not a local file, .* `evenmix mirror yfcc` makes"):
        read_all(dataset(f"{gcs_bucket}/yfcc.sql"))
