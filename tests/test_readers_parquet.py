"""Parquet rows come once and in order; a footer that does not fit stops a build at its start."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import readers
from pipeline.errors import EvenmixError
from pipeline.readers.rows import RowGroup, item_rows
from pipeline.reasons import RejectReason
from pipeline.recipe import Images
from tests.sources import dataset, read_all, record, summary

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def write_parquet(path: Path, rows: list[dict[str, Any]], rows_per_group: int = 100) -> None:
    schema = pa.schema([("id", pa.int64()), ("image", IMAGE), ("text", pa.string())])
    table = pa.Table.from_pylist(rows, schema=schema)
    pq.write_table(table, path, row_group_size=rows_per_group)


def row(number: int) -> dict[str, Any]:
    return {"id": number, "image": {"bytes": b"%d" % number, "path": None}, "text": f"t{number}"}


@pytest.mark.parametrize("records_per_shard", [1, 2, 3, 7, 20, 100])
@pytest.mark.parametrize("rows_per_group", [1, 3, 20, 50])
def test_parquet_rows_come_once_and_in_order(
    tmp_path: Path, records_per_shard: int, rows_per_group: int
) -> None:
    """Ranges within, across and at the ends of row groups and of batches."""
    write_parquet(tmp_path / "a.parquet", [row(n) for n in range(50)], rows_per_group)
    spec = dataset("parquet", tmp_path / "*.parquet", id_rule="{id}", text_field="text")
    assert read_all(spec, records_per_shard) == [
        record(f"a.parquet:{n}", str(n), b"%d" % n, f"t{n}") for n in range(50)
    ]


def test_parquet_fields_go_where_the_recipe_says(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", [row(1)])
    spec = dataset(
        "parquet", tmp_path / "a.parquet", id_rule="{text}", url_field="text", extra_fields=["id"]
    )
    assert read_all(spec) == [
        record("a.parquet:0", "t1", b"1", text=None, source_url="t1", fields={"id": 1})
    ]


def test_parquet_nulls_are_reasons(tmp_path: Path) -> None:
    rows = [
        row(0) | {"id": None},
        row(1) | {"image": None},
        row(2) | {"image": {"bytes": None, "path": "x.jpg"}},
        row(3) | {"text": None},
    ]
    write_parquet(tmp_path / "a.parquet", rows)
    records = read_all(dataset("parquet", tmp_path / "*", id_rule="{id}", text_field="text"))
    assert summary(records) == [
        (None, b"", RejectReason.BAD_RECORD),
        ("1", b"", RejectReason.MISSING_PICTURE),
        ("2", b"", RejectReason.MISSING_PICTURE),
        ("3", b"3", None),
    ]
    assert records[3].text is None


def test_parquet_text_that_is_not_utf8_costs_its_record_only(tmp_path: Path) -> None:
    text = pa.array([b"good", b"caf\xe9"]).view(pa.string())
    images = pa.array([row(n)["image"] for n in range(2)], IMAGE)
    pq.write_table(pa.table({"id": [0, 1], "image": images, "text": text}), tmp_path / "a.parquet")
    records = read_all(dataset("parquet", tmp_path / "*", id_rule="{id}", text_field="text"))
    assert summary(records) == [("0", b"0", None), (None, b"", RejectReason.BAD_RECORD)]


def test_a_time_beyond_all_calendars_costs_its_record_only(tmp_path: Path) -> None:
    times = pa.array([0, 2**62], pa.timestamp("ms"))
    columns = {"id": [0, 1], "image": [b"0", b"1"], "at": times}
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    spec = dataset("parquet", tmp_path / "*", id_rule="{id}", extra_fields=["at"])
    good, bad = read_all(spec)
    assert good.picture == b"0"
    assert (bad.reason, bad.picture) == (RejectReason.BAD_RECORD, b"")


def test_bytes_that_are_numbers_are_no_pictures(tmp_path: Path) -> None:
    image = pa.array([{"bytes": 7}], pa.struct([("bytes", pa.int64())]))
    pq.write_table(pa.table({"id": ["a"], "image": image}), tmp_path / "a.parquet")
    spec = dataset("parquet", tmp_path / "*", id_rule="{id}")
    with pytest.raises(EvenmixError, match="neither bytes nor a struct with bytes"):
        readers.plan("d", spec, Images())


def test_every_parquet_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    write_parquet(tmp_path / "good.parquet", [row(0)])
    pq.write_table(pa.table({"id": [1], "image": ["x"]}), tmp_path / "column.parquet")
    pq.write_table(pa.table({"id": [1], "text": ["x"]}), tmp_path / "lacking.parquet")
    (tmp_path / "text.parquet").write_text("no Parquet")
    whole = (tmp_path / "good.parquet").read_bytes()
    (tmp_path / "cut.parquet").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(EvenmixError) as caught:
        readers.plan("d", dataset("parquet", tmp_path / "*", id_rule="{id}"), Images())
    first, *lines = str(caught.value).splitlines()
    assert first == "dataset d cannot be read:"
    assert lines[0] == (
        f"  {tmp_path}/column.parquet: column image is string, neither bytes nor a struct "
        "with bytes; correct image_field in the recipe"
    )
    assert lines[1].startswith(f"  {tmp_path}/cut.parquet cannot be read as Parquet")
    assert lines[2] == (
        f"  {tmp_path}/lacking.parquet has no column image (it has id, text); correct the rules "
        "and field names of the dataset in the recipe, or replace the file"
    )
    assert lines[3].startswith(f"  {tmp_path}/text.parquet cannot be read as Parquet")
    assert len(lines) == 4


def test_parquet_damaged_inside_is_one_error_that_names_it(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    write_parquet(path, [row(n) for n in range(50)])
    data = bytearray(path.read_bytes())
    data[4:60] = bytes(56)
    path.write_bytes(data)
    with pytest.raises(EvenmixError, match="fetch the file again") as caught:
        read_all(dataset("parquet", path, id_rule="{id}"))
    assert str(caught.value).startswith(f"{path} is damaged after row 0")


def test_a_picture_may_be_plain_bytes(tmp_path: Path) -> None:
    for number, kind in enumerate([pa.binary(), pa.large_binary(), pa.binary_view()]):
        table = pa.table({"id": [number, number + 10], "output": pa.array([b"x", None], kind)})
        pq.write_table(table, tmp_path / f"{number}.parquet")
    spec = dataset("parquet", tmp_path / "*", id_rule="{id}", image_field="output")
    assert summary(read_all(spec)) == [
        found
        for n in range(3)
        for found in [(str(n), b"x", None), (str(n + 10), b"", RejectReason.MISSING_PICTURE)]
    ]


def test_values_of_the_place_stand_beside_the_columns(tmp_path: Path) -> None:
    for subset in ("CoverBook", "PPT2Details"):
        (tmp_path / subset).mkdir()
        table = pa.table({"image_path": ["1.png", "2.png"], "image": [b"x", b"y"]})
        pq.write_table(table, tmp_path / subset / "train-00000-of-00001.parquet")
    source = tmp_path / "*" / "train-*.parquet"
    joined = dataset("parquet", source, id_rule="{folder}:{image_path}")
    assert [r.source_id for r in read_all(joined)] == [
        "CoverBook:1.png",
        "CoverBook:2.png",
        "PPT2Details:1.png",
        "PPT2Details:2.png",
    ]
    rule = "{file} {row} {parent} {stem} {part}"
    placed = dataset("parquet", source, id_rule=rule, path_pattern=r"train-(?P<part>\d+)")
    name = "train-00000-of-00001"
    assert read_all(placed)[1].source_id == f"CoverBook/{name} 1 CoverBook {name} 00000"


def test_a_folder_that_a_rule_asks_for_must_be_there(tmp_path: Path) -> None:
    """A source that names one subset's folder has no folders below it."""
    table = pa.table({"image_path": ["1.png"], "image": [b"x"]})
    pq.write_table(table, tmp_path / "train.parquet")
    spec = dataset("parquet", tmp_path / "*.parquet", id_rule="{folder}:{image_path}")
    (found,) = read_all(spec)
    assert (found.source_id, found.reason) == (None, RejectReason.BAD_RECORD)
    assert found.detail == "its folder is empty: the source must be a pattern with that folder"


def test_a_column_goes_before_a_value_of_the_place(tmp_path: Path) -> None:
    pq.write_table(pa.table({"file": ["mine"], "image": [b"x"]}), tmp_path / "a.parquet")
    (found,) = read_all(dataset("parquet", tmp_path / "*", id_rule="{file}"))
    assert found.source_id == "mine"


def test_all_columns_that_rules_need_are_checked_at_once(tmp_path: Path) -> None:
    pq.write_table(pa.table({"image": [b"x"]}), tmp_path / "a.parquet")
    spec = dataset(
        "parquet",
        tmp_path / "*",
        id_rule="{folder}{a}",
        join_rule="{b}{row}",
        text_field="c",
        extra_fields=["d"],
        image_field="e",
    )
    with pytest.raises(EvenmixError, match=r"a.parquet has no column a, b, c, d, e \(it has image"):
        readers.plan("d", spec, Images())


@pytest.mark.parametrize(
    ("group_rows", "expected"),
    [
        ([], []),
        ([3], [(0, 3)]),
        ([100, 100], [(0, 100), (100, 200)]),
        ([40, 40, 40], [(0, 80), (80, 120)]),
        ([200], [(0, 200)]),
        ([201], [(0, 100), (100, 200), (200, 201)]),
        ([40, 250, 40], [(0, 40), (40, 140), (140, 240), (240, 290), (290, 330)]),
        ([40, 150, 60, 60], [(0, 40), (40, 190), (190, 250), (250, 310)]),
        ([0, 60, 0, 60, 0], [(0, 60), (60, 120)]),
    ],
)
def test_items_end_where_row_groups_end(
    group_rows: list[int], expected: list[tuple[int, int]]
) -> None:
    groups = [RowGroup(num_rows, 10 * num_rows) for num_rows in group_rows]
    assert item_rows(groups, Images(records_per_shard=100)) == expected


@pytest.mark.parametrize(
    ("groups", "expected"),
    [
        ([(10, 60), (10, 60), (10, 40)], [(0, 10), (10, 30)]),
        ([(10, 200)], [(0, 10)]),
        ([(10, 201)], [(0, 4), (4, 8), (8, 10)]),
        ([(3, 1000)], [(0, 1), (1, 2), (2, 3)]),
        ([(1, 1000), (1, 10), (1, 10)], [(0, 1), (1, 3)]),
        ([(150, 300)], [(0, 50), (50, 100), (100, 150)]),
        ([(300, 0)], [(0, 100), (100, 200), (200, 300)]),
        ([(4, -100), (0, 500), (4, 10)], [(0, 4), (4, 8)]),
    ],
)
def test_items_are_bounded_in_bytes_too(
    groups: list[tuple[int, int]], expected: list[tuple[int, int]]
) -> None:
    images = Images(records_per_shard=100, bytes_per_shard=100)
    assert item_rows([RowGroup(*group) for group in groups], images) == expected


def test_only_the_columns_that_are_read_count(tmp_path: Path) -> None:
    """The edited picture is kept, the far larger one before is never read."""
    rows = [
        {
            "id": n,
            "input": {"bytes": os.urandom(10_000), "path": None},
            "output": {"bytes": os.urandom(1_000), "path": None},
        }
        for n in range(20)
    ]
    table = pa.Table.from_pylist(rows)
    pq.write_table(table, tmp_path / "a.parquet", use_dictionary=False)
    spec = dataset("parquet", tmp_path / "*", id_rule="{id}", image_field="output")
    sizes = {
        bytes_per_shard: [
            item.inputs["rows"]
            for item in readers.plan("d", spec, Images(bytes_per_shard=bytes_per_shard))
        ]
        for bytes_per_shard in (22_000, 6_000)
    }
    assert sizes == {22_000: [[0, 20]], 6_000: [[0, 5], [5, 10], [10, 15], [15, 20]]}
    assert [r.source_id for r in read_all(spec, bytes_per_shard=6_000)] == [
        str(n) for n in range(20)
    ]


def test_a_large_row_group_is_streamed(tmp_path: Path) -> None:
    """Arrow's peak is a few pages and buffers, of a row group of 80 MB."""
    rows = [row(n) | {"image": {"bytes": os.urandom(1_000_000), "path": None}} for n in range(80)]
    path = tmp_path / "a.parquet"
    # A page a picture: how much a page holds is up to the writer, and it is decoded as a whole.
    pq.write_table(pa.Table.from_pylist(rows), path, write_batch_size=1, use_dictionary=False)
    pictures = [r["image"]["bytes"] for r in rows]
    code = (
        "import sys, pyarrow\n"
        "from tests.peak_memory import peak_bytes\n"
        "from tests.sources import dataset, read_all\n"
        "from pipeline import readers\n"
        "from pipeline.recipe import Images\n"
        "spec = dataset('parquet', sys.argv[1], id_rule='{id}')\n"
        "(item,) = readers.plan('d', spec, Images())\n"
        "before = peak_bytes()\n"
        "import hashlib\n"
        "digest = hashlib.sha256()\n"
        "for record in readers.read(spec, item, 1 << 30):\n"
        "    digest.update(record.picture)\n"
        "grown = peak_bytes() - before\n"
        "print(digest.hexdigest(), pyarrow.default_memory_pool().max_memory(), grown)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)], check=True, capture_output=True, text=True
    )
    digest, arrow_bytes, grown_bytes = done.stdout.split()
    assert digest == hashlib.sha256(b"".join(pictures)).hexdigest()
    assert int(arrow_bytes) < 50_000_000
    assert int(grown_bytes) < 80_000_000
