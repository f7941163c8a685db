"""Receipts survive their footer, recognise equal work, and say what differs."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from pipeline import storage
from pipeline.errors import EvenmixError
from pipeline.receipts import (
    METADATA_KEY,
    Checksum,
    Counts,
    Receipt,
    checksum,
    difference,
    fingerprint,
    read_receipt,
    table_digest,
    total,
)


def test_counts_are_conserved_if_nothing_is_lost_or_invented() -> None:
    assert Counts(10, 7, {"too_small": 2, "truncated": 1}).is_conserved()
    assert not Counts(10, 7, {"too_small": 2}).is_conserved()
    assert not Counts(10, 11).is_conserved()


def test_total_adds_reason_by_reason() -> None:
    assert total([Counts(3, 1, {"b": 2}), Counts(), Counts(4, 1, {"a": 1, "b": 2})]) == Counts(
        7, 2, {"a": 1, "b": 4}
    )


def test_checksum_of_chunks_is_that_of_the_whole() -> None:
    data = b"123456789"
    # CRC-32C of "123456789" is the check value of its definition (RFC 3720, B.4).
    expected = Checksum(9, "e3069283", hashlib.sha256(data).hexdigest())
    assert checksum([data]) == checksum([b"1234", b"", b"56789"]) == expected


@pytest.mark.parametrize("tar", [None, Checksum(1, "aa", "bb")])
def test_receipt_survives_a_parquet_footer(tmp_path: Path, tar: Checksum | None) -> None:
    receipt = Receipt({"stage": "s", "config": {"é": [1, None]}}, Counts(2, 1, {"x": 1}), "d", tar)
    url = str(tmp_path / "a.parquet")
    table = pa.table({"key": ["a"]})
    storage.publish(url, storage.parquet_bytes(table, {METADATA_KEY: receipt.to_json()}))
    assert read_receipt(url) == receipt


def test_a_receipt_from_before_there_were_further_files_is_read() -> None:
    receipt = Receipt({"stage": "s"}, Counts(1, 1), "d")
    fields = json.loads(receipt.to_json())
    assert fields.pop("files") == {}
    assert Receipt.from_json(json.dumps(fields)) == receipt
    named = replace(receipt, files={"a.b": Checksum(1, "aa", "bb")})
    assert Receipt.from_json(named.to_json()) == named


def test_a_file_without_a_receipt_is_refused(tmp_path: Path) -> None:
    url = str(tmp_path / "a.parquet")
    storage.publish(url, storage.parquet_bytes(pa.table({"key": ["a"]}), {}))
    with pytest.raises(EvenmixError, match="was not written by evenmix") as caught:
        read_receipt(url)
    assert str(caught.value).startswith(url)


@pytest.mark.parametrize("text", ["{", "[]", '{"counts": {}}', '{"counts": {"odd": 1}, "tar": 0}'])
def test_a_receipt_of_another_form_is_refused(tmp_path: Path, text: str) -> None:
    url = str(tmp_path / "a.parquet")
    storage.publish(url, storage.parquet_bytes(pa.table({"key": ["a"]}), {METADATA_KEY: text}))
    with pytest.raises(EvenmixError, match="has a receipt that this version cannot read"):
        read_receipt(url)


def test_fingerprint_depends_on_values_and_not_on_order() -> None:
    assert fingerprint({"a": 1, "b": {"c": 2, "d": 3}}) == fingerprint(
        {"b": {"d": 3, "c": 2}, "a": 1}
    )
    assert fingerprint({"a": 1}) != fingerprint({"a": "1"})
    assert fingerprint({"a": 1}) != fingerprint({"a": 1, "b": None})


COLUMNS: dict[str, pa.Array] = {
    "strings": pa.array(["a", None, "", "é", "bc", None]),
    "integers": pa.array([1, None, 3, 4, 5, 6]),
    "floats": pa.array([1.5, float("nan"), None, -0.0, 2.0, 3.0], pa.float32()),
    "booleans": pa.array([True, None, False, True, True, False]),
    "lists": pa.array([[1, 2], None, [], [3], [None], [4, 5]]),
    "vectors": pa.array([[1.0, 2.0]] * 6, pa.list_(pa.float32(), 2)),
    "structs": pa.array([{"x": 1, "y": "a"}, None, {"x": None, "y": "b"}] * 2),
    "lists of structs": pa.array([[{"t": "a"}, {"t": None}], [], None] * 2),
    "fixed bytes": pa.array([b"ab", None, b"\0\0", b"cd", b"a\0", b"zz"], pa.binary(2)),
    "bytes": pa.array([b"\xff", None, b"", b"ab", b"c", b"d"]),
}


@pytest.mark.parametrize("name", COLUMNS)
def test_digest_is_the_same_before_writing_and_after_reading(tmp_path: Path, name: str) -> None:
    table = pa.table({"column": COLUMNS[name]})
    url = str(tmp_path / "a.parquet")
    storage.publish(url, storage.parquet_bytes(table, {"some": "metadata"}))
    assert table_digest(storage.read_parquet(url)) == table_digest(table)


@pytest.mark.parametrize("name", COLUMNS)
def test_digest_is_of_the_rows_however_they_are_held(name: str) -> None:
    table = pa.table({"column": COLUMNS[name]})
    chunked = pa.concat_tables([table.slice(0, 1), table.slice(1, 0), table.slice(1)])
    fresh = pa.Table.from_pylist(table.slice(2, 3).to_pylist(), schema=table.schema)
    assert table_digest(chunked) == table_digest(table)
    assert table_digest(table.slice(2, 3)) == table_digest(fresh)


CHANGES: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"a": ["x", "y"]}, {"a": ["y", "x"]}),
    ({"a": ["x", "y"]}, {"b": ["x", "y"]}),
    ({"a": ["xy", ""]}, {"a": ["x", "y"]}),
    ({"a": ["x", None]}, {"a": ["x", ""]}),
    ({"a": [0, None]}, {"a": [None, 0]}),
    ({"a": [1, 2]}, {"a": [1, 3]}),
    ({"a": [[1], [2]]}, {"a": [[1, 2], []]}),
    ({"a": [[], None]}, {"a": [None, []]}),
    ({"a": [{"x": "1"}]}, {"a": [{"x": "2"}]}),
    ({"a": [1], "b": [2]}, {"a": [2], "b": [1]}),
    ({"a": ["x"]}, {"a": ["x", "x"]}),
]


@pytest.mark.parametrize(("before", "after"), CHANGES)
def test_digest_changes_with_any_value(before: dict[str, Any], after: dict[str, Any]) -> None:
    assert table_digest(pa.table(before)) != table_digest(pa.table(after))


def test_no_digest_of_what_it_does_not_know() -> None:
    with pytest.raises(TypeError, match="large_string"):
        table_digest(pa.table({"column": pa.array(["a"], pa.large_string())}))


def test_difference_names_each_place_that_differs() -> None:
    old = {"version": 1, "config": {"seed": 0, "same": [1], "gone": "x"}}
    new = {"version": 2, "config": {"seed": 1, "same": [1], "new": "y"}}
    assert difference(old, new) == [
        'config.gone: "x" -> null',
        'config.new: null -> "y"',
        "config.seed: 0 -> 1",
        "version: 1 -> 2",
    ]
    assert difference(old, old) == []


def test_difference_of_long_values_stays_readable() -> None:
    (line,) = difference({"a": "x" * 500}, {"a": "y"})
    assert line == f'a: "{"x" * 76}... -> "y"'
