"""Each layout gives its records, and what cannot be read is a record with its reason."""

import io
import json
import os
import tarfile
import tracemalloc
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import readers, storage
from pipeline.errors import EvenmixError
from pipeline.readers import Record
from pipeline.reasons import RejectReason
from pipeline.recipe import Dataset
from pipeline.stage import WorkItem

Members = list[tuple[str, bytes]]

MAX_BYTES = 1 << 20


def dataset(layout: str, source: object, **options: object) -> Dataset:
    return Dataset.model_validate(
        {"layout": layout, "source": str(source), "licence": "CC0 1.0", **options}
    )


def read_all(spec: Dataset, records_per_shard: int = 100) -> list[Record]:
    return [
        record
        for item in readers.plan("d", spec, records_per_shard)
        for record in readers.read(spec, item, MAX_BYTES)
    ]


def tar_bytes(members: Members, tar_format: int = tarfile.USTAR_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tar_format) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def summary(records: list[Record]) -> list[tuple[str | None, bytes, str | None]]:
    return [(record.source_id, record.picture, record.reason) for record in records]


# Folder


def test_folder_gives_pictures_with_their_sidecar_text(tmp_path: Path) -> None:
    for name, data in {
        "b.PNG": b"two",
        "a.jpg": b"one",
        "a.txt": b" a text \n",
        "sub/a.b.webp": b"three",
        "sub/a.b.txt": "caf\xe9".encode("latin-1"),
        "notes.md": b"no picture",
    }.items():
        storage.publish(f"{tmp_path}/{name}", data)
    assert read_all(dataset("folder", tmp_path)) == [
        Record("a.jpg", "a.jpg", b"one", "a text"),
        Record("b.PNG", "b.PNG", b"two"),
        Record("sub/a.b.webp", "sub/a.b.webp", b"three", "caf\ufffd"),
    ]


def test_folder_in_an_object_store(gcs_bucket: str) -> None:
    storage.publish(f"{gcs_bucket}/in/a.jpg", b"one")
    storage.publish(f"{gcs_bucket}/in/a.txt", b"text")
    spec = dataset("folder", f"{gcs_bucket}/in")
    assert read_all(spec) == [Record("a.jpg", "a.jpg", b"one", "text")]


def test_folder_is_cut_into_shards(tmp_path: Path) -> None:
    for number in range(5):
        storage.publish(f"{tmp_path}/{number}.jpg", b"x")
    items = readers.plan("d", dataset("folder", tmp_path), records_per_shard=2)
    assert [item.shard for item in items] == [
        "folder-000000000",
        "folder-000000002",
        "folder-000000004",
    ]
    assert len({json.dumps(dict(item.inputs)) for item in items}) == 3


@pytest.mark.parametrize("name", ["a.jpg", "a.txt"])
def test_folder_items_change_with_the_bytes_of_their_files(tmp_path: Path, name: str) -> None:
    spec = dataset("folder", tmp_path)
    storage.publish(f"{tmp_path}/a.jpg", b"one")
    storage.publish(f"{tmp_path}/a.txt", b"two")
    (before,) = readers.plan("d", spec, 10)
    storage.replace(f"{tmp_path}/{name}", b"2nd")
    (after,) = readers.plan("d", spec, 10)
    assert before.inputs != after.inputs


def test_a_file_name_that_is_no_text_gives_an_id_that_is(tmp_path: Path) -> None:
    (tmp_path / os.fsdecode(b"caf\xe9.jpg")).write_bytes(b"x")
    (record,) = read_all(dataset("folder", tmp_path))
    assert (record.source_id, record.picture) == ("caf\\udce9.jpg", b"x")


# Parquet


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
    spec = dataset("parquet", tmp_path / "*.parquet", id_field="id", text_field="text")
    assert read_all(spec, records_per_shard) == [
        Record(f"a.parquet:{n}", str(n), b"%d" % n, f"t{n}") for n in range(50)
    ]


def test_parquet_fields_go_where_the_recipe_says(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", [row(1)])
    spec = dataset(
        "parquet", tmp_path / "a.parquet", id_field="text", url_field="text", extra_fields=["id"]
    )
    assert read_all(spec) == [
        Record("a.parquet:0", "t1", b"1", text=None, source_url="t1", fields={"id": 1})
    ]


def test_parquet_nulls_are_reasons(tmp_path: Path) -> None:
    rows = [
        row(0) | {"id": None},
        row(1) | {"image": None},
        row(2) | {"image": {"bytes": None, "path": "x.jpg"}},
        row(3) | {"text": None},
    ]
    write_parquet(tmp_path / "a.parquet", rows)
    records = read_all(dataset("parquet", tmp_path / "*", id_field="id", text_field="text"))
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
    records = read_all(dataset("parquet", tmp_path / "*", id_field="id", text_field="text"))
    assert summary(records) == [("0", b"0", None), (None, b"", RejectReason.BAD_RECORD)]


def test_every_parquet_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    write_parquet(tmp_path / "good.parquet", [row(0)])
    pq.write_table(pa.table({"id": [1], "image": ["x"]}), tmp_path / "column.parquet")
    pq.write_table(pa.table({"id": [1], "text": ["x"]}), tmp_path / "lacking.parquet")
    (tmp_path / "text.parquet").write_text("no Parquet")
    whole = (tmp_path / "good.parquet").read_bytes()
    (tmp_path / "cut.parquet").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(EvenmixError) as caught:
        readers.plan("d", dataset("parquet", tmp_path / "*", id_field="id"), 10)
    first, *lines = str(caught.value).splitlines()
    assert first == "dataset d cannot be read:"
    assert lines[0] == (
        f"  {tmp_path}/column.parquet: column image is string, not a struct with bytes; "
        "correct image_field in the recipe"
    )
    assert lines[1].startswith(f"  {tmp_path}/cut.parquet cannot be read as Parquet")
    assert lines[2] == (
        f"  {tmp_path}/lacking.parquet has no column image (it has id, text); correct the field "
        "names of the dataset in the recipe, or replace the file"
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
        read_all(dataset("parquet", path, id_field="id"))
    assert str(caught.value).startswith(f"{path} is damaged after row 0")


# WebDataset

SAMPLES: Members = [
    ("a/one.jpg", b"1"),
    ("a/one.json", b'{"id": 11, "text": "first", "url": "http://x/1"}'),
    ("a/two.json", b'{"id": "22", "text": null, "url": null}'),
    ("a/two.txt", b" ignored "),
    ("a/two.png", b"2"),
]


def write_tar(folder: Path, data: bytes, name: str = "a.tar") -> Dataset:
    (folder / name).write_bytes(data)
    return dataset("webdataset", folder / "*.tar")


def test_tar_samples_are_members_of_one_stem_in_any_order(tmp_path: Path) -> None:
    write_tar(tmp_path, tar_bytes(SAMPLES))
    spec = dataset(
        "webdataset", tmp_path / "*.tar", id_field="id", text_field="text", url_field="url"
    )
    assert read_all(spec) == [
        Record("a.tar/a/one", "11", b"1", "first", "http://x/1"),
        Record("a.tar/a/two", "22", b"2"),
    ]


def test_tar_without_fields_takes_stem_and_text_member(tmp_path: Path) -> None:
    spec = write_tar(tmp_path, tar_bytes(SAMPLES))
    assert read_all(spec) == [
        Record("a.tar/a/one", "a/one", b"1"),
        Record("a.tar/a/two", "a/two", b"2", "ignored"),
    ]


def test_tar_samples_that_cannot_be_read_are_reasons(tmp_path: Path) -> None:
    members: Members = [
        ("json.jpg", b"x"),
        ("json.json", b"{"),
        ("lacks.jpg", b"x"),
        ("lacks.json", b"{}"),
        ("list.jpg", b"x"),
        ("list.json", b"[1]"),
        ("null.jpg", b"x"),
        ("null.json", b'{"id": null}'),
        ("half.jpg", b"x"),
        ("half.json", b'{"id": "\\ud800"}'),
        ("deep.jpg", b"x"),
        ("deep.json", b"[" * 100_000),
        ("picture.json", b'{"id": 1}'),
        ("good.jpg", b"x"),
        ("good.json", b'{"id": 2}'),
    ]
    write_tar(tmp_path, tar_bytes(members))
    records = read_all(dataset("webdataset", tmp_path / "*.tar", id_field="id"))
    assert summary(records) == [
        *[(None, b"", RejectReason.BAD_RECORD)] * 6,
        ("1", b"", RejectReason.MISSING_PICTURE),
        ("2", b"x", None),
    ]


PAIRS: Members = [
    (f"{key}.{suffix}", key.encode() * 300) for key in "abc" for suffix in ("jpg", "txt")
]
MEMBER_BYTES = 1024  # a header and one block of data


@pytest.mark.parametrize(
    ("kept_bytes", "expected"),
    [
        (0, []),
        (100, []),
        (2 * MEMBER_BYTES, []),
        (2 * MEMBER_BYTES + 100, []),
        (2 * MEMBER_BYTES + 512, []),
        (2 * MEMBER_BYTES + 700, []),
        (3 * MEMBER_BYTES, ["a"]),
        (3 * MEMBER_BYTES + 100, ["a"]),
        (4 * MEMBER_BYTES, ["a"]),
        (6 * MEMBER_BYTES, ["a", "b"]),
        (6 * MEMBER_BYTES + 511, ["a", "b"]),
    ],
)
def test_a_tar_that_is_cut_gives_what_is_whole_and_a_reason(
    tmp_path: Path, kept_bytes: int, expected: list[str]
) -> None:
    """Cut in a header, in data and between members: a sample counts once the next has begun."""
    spec = write_tar(tmp_path, tar_bytes(PAIRS)[:kept_bytes])
    *whole, cut = read_all(spec)
    assert cut.reason == RejectReason.TRUNCATED_ARCHIVE
    assert cut.source_id is None
    assert cut.locator.startswith("a.tar/")
    assert [record.source_id for record in whole] == expected


def test_a_tar_with_its_end_block_is_whole(tmp_path: Path) -> None:
    spec = write_tar(tmp_path, tar_bytes(PAIRS)[: 6 * MEMBER_BYTES + 512])
    assert [record.source_id for record in read_all(spec)] == ["a", "b", "c"]


def test_a_tar_without_members_has_no_records(tmp_path: Path) -> None:
    assert read_all(write_tar(tmp_path, tar_bytes([]))) == []


def test_a_damaged_header_in_the_midst_is_not_taken_for_the_end(tmp_path: Path) -> None:
    data = bytearray(tar_bytes(PAIRS))
    data[2 * MEMBER_BYTES + 150] ^= 1  # a digit of the checksum of the second sample's header
    *whole, cut = read_all(write_tar(tmp_path, bytes(data)))
    assert [record.source_id for record in whole] == []
    assert cut.reason == RejectReason.TRUNCATED_ARCHIVE


def forged_size(data: bytes, size_field: bytes, kind: bytes = b"0") -> bytes:
    """Return a tar whose second header claims another size and kind, with a matching checksum."""
    header = bytearray(data[MEMBER_BYTES : MEMBER_BYTES + 512])
    header[124:136] = size_field
    header[156:157] = kind
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return data[:MEMBER_BYTES] + bytes(header) + data[MEMBER_BYTES + 512 :]


@pytest.mark.parametrize(
    "size_field",
    [
        (-512).to_bytes(12, "big", signed=True),
        b"\x80" + (1 << 40).to_bytes(11, "big"),  # a terabyte: no memory is taken for it
        b"\x80" + (1 << 87).to_bytes(11, "big", signed=False),
        b"77777777777\0",
    ],
    ids=["negative", "terabyte", "beyond any offset", "8 GiB"],
)
def test_a_tar_that_lies_about_a_size_is_cut_there(tmp_path: Path, size_field: bytes) -> None:
    spec = write_tar(tmp_path, forged_size(tar_bytes(PAIRS), size_field))
    records = read_all(spec)
    assert [record.reason for record in records] == [RejectReason.TRUNCATED_ARCHIVE]


def test_a_tar_that_leads_back_comes_to_an_end(tmp_path: Path) -> None:
    """A member of unknown kind and negative size: tarfile finds its header again and again."""
    back = (-512).to_bytes(12, "big", signed=True)
    spec = write_tar(tmp_path, forged_size(tar_bytes(PAIRS), back, kind=b"Z"))
    assert [record.reason for record in read_all(spec)] == [RejectReason.TRUNCATED_ARCHIVE]


def test_a_sparse_member_is_not_blown_up(tmp_path: Path) -> None:
    """A GNU sparse header (0x53) may claim any real size; here a terabyte, at bytes 483 to 495."""
    data = bytearray(tar_bytes([("a.jpg", b""), ("b.jpg", b"x")], tarfile.GNU_FORMAT))
    header = bytearray(data[:512])
    header[156:157] = b"S"
    header[483:495] = b"\x80" + (1 << 40).to_bytes(11, "big")
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    spec = write_tar(tmp_path, bytes(header) + bytes(data[512:]))
    assert summary(read_all(spec)) == [("a", b"", None), ("b", b"x", None)]


def test_a_member_name_that_is_no_text_gives_an_id_that_is(tmp_path: Path) -> None:
    data = tar_bytes([("caf_.jpg", b"x")]).replace(b"caf_", b"caf\xe9")
    header = bytearray(data[:512])
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    (record,) = read_all(write_tar(tmp_path, bytes(header) + data[512:]))
    assert (record.source_id, record.picture) == ("caf\\xe9", b"x")


@pytest.mark.parametrize("tar_format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_names_are_read(tmp_path: Path, tar_format: int) -> None:
    stem = "folder/" * 30 + "picture"
    spec = write_tar(tmp_path, tar_bytes([(f"{stem}.jpg", b"x")], tar_format))
    assert summary(read_all(spec)) == [(stem, b"x", None)]


def test_tars_in_an_object_store(gcs_bucket: str) -> None:
    storage.publish(f"{gcs_bucket}/in/a.tar", tar_bytes(PAIRS))
    spec = dataset("webdataset", f"{gcs_bucket}/in/*.tar")
    assert [record.source_id for record in read_all(spec)] == ["a", "b", "c"]


# All layouts


def shards(folder: Path, names: list[str]) -> list[str]:
    for name in names:
        storage.publish(f"{folder}/{name}", tar_bytes(PAIRS))
    return [item.shard for item in readers.plan("d", dataset("webdataset", f"{folder}/**"), 1)]


def test_shard_names_are_plain_and_short_and_differ(tmp_path: Path) -> None:
    names = ["a b.tar", "a-b.tar", "a_b.tar", "sub/a-b.tar", "é.tar", "ü.tar", f"{'x' * 200}.tar"]
    found = shards(tmp_path, names)
    assert len(set(found)) == len(names)
    assert "a-b-000000000" in found
    for shard in found:
        assert len(shard) <= 100
        assert shard.replace("-", "").replace("_", "").isalnum()
        assert shard.isascii()
        assert not shard.startswith("-")


def test_plan_does_not_depend_on_the_order_of_the_listing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in "abcd":
        storage.publish(f"{tmp_path}/{name}.tar", tar_bytes([(f"{name}.jpg", name.encode())]))
        storage.publish(f"{tmp_path}/{name}.jpg", name.encode())
    specs = [dataset("webdataset", tmp_path / "*.tar"), dataset("folder", tmp_path)]
    expected = [readers.plan("d", spec, 3) for spec in specs]
    scandir = os.scandir

    class Reversed:
        def __init__(self, path: str) -> None:
            with scandir(path) as entries:
                self.entries = sorted(entries, key=lambda entry: entry.name, reverse=True)

        def __enter__(self) -> list[os.DirEntry[str]]:
            return self.entries

        def __exit__(self, *exception: object) -> None:
            pass

    monkeypatch.setattr(os, "scandir", Reversed)
    assert [readers.plan("d", spec, 3) for spec in specs] == expected


@pytest.mark.parametrize("layout", ["folder", "parquet", "webdataset"])
def test_a_source_without_records_is_an_error_that_names_it(tmp_path: Path, layout: str) -> None:
    spec = dataset(layout, tmp_path / "absent", id_field="id")
    with pytest.raises(EvenmixError) as caught:
        readers.plan("cats", spec, 10)
    assert str(caught.value) == (
        f"dataset cats: no records at {tmp_path}/absent; correct datasets.cats.source"
    )


def test_items_survive_a_work_list(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", [row(n) for n in range(3)])
    spec = dataset("parquet", tmp_path / "a.parquet", id_field="id")
    for item in readers.plan("d", spec, 2):
        copy = WorkItem(**json.loads(json.dumps(item.__dict__)))
        assert list(readers.read(spec, copy, MAX_BYTES)) == list(
            readers.read(spec, item, MAX_BYTES)
        )


@pytest.mark.parametrize("layout", ["folder", "webdataset"])
def test_a_file_above_the_cap_is_not_read(layout: str, tmp_path: Path) -> None:
    large = bytes(MAX_BYTES + 1)
    if layout == "folder":
        (tmp_path / "a.png").write_bytes(large)
        spec = dataset("folder", tmp_path)
    else:
        (tmp_path / "a.tar").write_bytes(tar_bytes([("a.png", large), ("b.png", b"small")]))
        spec = dataset("webdataset", tmp_path / "a.tar")
    (item,) = readers.plan("d", spec, 100)
    tracemalloc.start()
    first = next(readers.read(spec, item, MAX_BYTES))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (first.reason, first.detail) == (RejectReason.TOO_MANY_BYTES, f"{len(large)} bytes")
    assert peak < MAX_BYTES
