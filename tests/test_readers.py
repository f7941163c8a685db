"""A folder's records, and what holds for all layouts."""

import json
import os
import sqlite3
import tracemalloc
from contextlib import closing
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import readers, storage
from pipeline.dataset import Dataset
from pipeline.errors import EvenmixError
from pipeline.reasons import RejectReason
from pipeline.recipe import Images
from pipeline.stage import WorkItem
from tests.http_files import serve_files
from tests.sources import MAX_BYTES, Members, dataset, read_all, record, tar_bytes

PAIRS: Members = [
    (f"{key}.{suffix}", key.encode() * 300) for key in "abc" for suffix in ("jpg", "txt")
]

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
        record("a.jpg", "a.jpg", b"one", "a text"),
        record("b.PNG", "b.PNG", b"two"),
        record("sub/a.b.webp", "sub/a.b.webp", b"three", "caf\ufffd"),
    ]


def test_folder_in_an_object_store(gcs_bucket: str) -> None:
    storage.publish(f"{gcs_bucket}/in/a.jpg", b"one")
    storage.publish(f"{gcs_bucket}/in/a.txt", b"text")
    spec = dataset("folder", f"{gcs_bucket}/in")
    assert read_all(spec) == [record("a.jpg", "a.jpg", b"one", "text")]


def test_folder_is_cut_into_shards(tmp_path: Path) -> None:
    for number in range(5):
        storage.publish(f"{tmp_path}/{number}.jpg", b"x")
    items = readers.plan("d", dataset("folder", tmp_path), Images(records_per_shard=2))
    assert [item.shard for item in items] == [
        "folder-000000000",
        "folder-000000002",
        "folder-000000004",
    ]
    assert len({json.dumps(dict(item.inputs)) for item in items}) == 3


def test_a_folder_s_shards_are_bounded_in_bytes(tmp_path: Path) -> None:
    for number, size in enumerate([40, 50, 20, 150, 10, 90]):
        storage.publish(f"{tmp_path}/{number}.jpg", bytes(size))
    spec = dataset("folder", tmp_path)
    items = readers.plan("d", spec, Images(bytes_per_shard=100))
    assert [(item.shard, len(item.payload["pictures"])) for item in items] == [
        ("folder-000000000", 2),
        ("folder-000000002", 1),
        ("folder-000000003", 1),
        ("folder-000000004", 2),
    ]
    assert [r.source_id for r in read_all(spec, bytes_per_shard=100)] == [
        f"{n}.jpg" for n in range(6)
    ]


@pytest.mark.parametrize("name", ["a.jpg", "a.txt"])
def test_folder_items_change_with_the_bytes_of_their_files(tmp_path: Path, name: str) -> None:
    spec = dataset("folder", tmp_path)
    storage.publish(f"{tmp_path}/a.jpg", b"one")
    storage.publish(f"{tmp_path}/a.txt", b"two")
    (before,) = readers.plan("d", spec, Images())
    storage.replace(f"{tmp_path}/{name}", b"2nd")
    (after,) = readers.plan("d", spec, Images())
    assert before.inputs != after.inputs


def test_a_file_name_that_is_no_text_gives_an_id_that_is(tmp_path: Path) -> None:
    (tmp_path / os.fsdecode(b"caf\xe9.jpg")).write_bytes(b"x")
    (record,) = read_all(dataset("folder", tmp_path))
    assert (record.source_id, record.picture) == ("caf\\udce9.jpg", b"x")


# All layouts


def shards(folder: Path, names: list[str]) -> list[str]:
    for name in names:
        storage.publish(f"{folder}/{name}", tar_bytes(PAIRS))
    return [
        item.shard for item in readers.plan("d", dataset("webdataset", f"{folder}/**"), Images())
    ]


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
    expected = [readers.plan("d", spec, Images(records_per_shard=3)) for spec in specs]
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
    assert [readers.plan("d", spec, Images(records_per_shard=3)) for spec in specs] == expected


@pytest.mark.parametrize("layout", ["folder", "parquet", "webdataset"])
def test_a_source_without_records_is_an_error_that_names_it(tmp_path: Path, layout: str) -> None:
    spec = dataset(layout, tmp_path / "absent", id_rule="{id}")
    with pytest.raises(EvenmixError) as caught:
        readers.plan("cats", spec, Images())
    assert str(caught.value) == (
        f"dataset cats: no records at {tmp_path}/absent; correct datasets.cats.source"
    )


@pytest.mark.parametrize("layout", ["folder", "parquet", "webdataset", "tar"])
def test_items_survive_a_work_list(tmp_path: Path, layout: str) -> None:
    (tmp_path / "a.tar").write_bytes(tar_bytes(PAIRS))
    (tmp_path / "a.jpg").write_bytes(b"x")
    pq.write_table(pa.table({"id": [1, 2, 3], "image": [b"x"] * 3}), tmp_path / "a.parquet")
    source = {"folder": tmp_path, "parquet": tmp_path / "a.parquet"}.get(layout, tmp_path / "a.tar")
    spec = dataset(layout, source, id_rule="{id}" if layout == "parquet" else None)
    items = readers.plan("d", spec, Images(records_per_shard=2, bytes_per_shard=3000))
    copies = [WorkItem(**json.loads(json.dumps(item.__dict__))) for item in items]
    assert copies == items
    assert any(list(readers.read(spec, item, MAX_BYTES)) for item in copies)


def layouts(folder: Path) -> dict[str, tuple[Dataset, Path]]:
    """Return a dataset of each layout, and a file of its source."""
    members: Members = [(f"{n}.jpg", b"%d" % n * 500) for n in range(10)]
    for layout in ("folder", "tar", "webdataset"):
        (folder / layout).mkdir()
    (folder / "folder/a.jpg").write_bytes(b"one")
    (folder / "folder/a.txt").write_bytes(b"two")
    (folder / "tar/a.tar").write_bytes(tar_bytes(members))
    (folder / "webdataset/a.tar").write_bytes(tar_bytes(members))
    pq.write_table(pa.table({"id": [1, 2], "image": [b"x", b"y"]}), folder / "a.parquet")
    (folder / "a.json").write_text('[{"id": 1}, {"id": 2}]')
    with closing(sqlite3.connect(folder / "a.sqlite")) as connection, connection:
        connection.execute("CREATE TABLE photos (id INTEGER)")
        connection.execute("INSERT INTO photos VALUES (7)")
    rows = {"id_rule": "{id}"}
    fetched = rows | {"image_url": "http://x/{id}.jpg"}
    return {
        "folder": (dataset("folder", folder / "folder"), folder / "folder/a.txt"),
        "tar": (dataset("tar", folder / "tar/*"), folder / "tar/a.tar"),
        "webdataset": (dataset("webdataset", folder / "webdataset/*"), folder / "webdataset/a.tar"),
        "parquet": (dataset("parquet", folder / "a.parquet", **rows), folder / "a.parquet"),
        "url_list": (dataset("url_list", folder / "a.json", **fetched), folder / "a.json"),
        "sqlite": (
            dataset("sqlite", folder / "a.sqlite", table="photos", **fetched),
            folder / "a.sqlite",
        ),
    }


@pytest.mark.parametrize("layout", ["folder", "tar", "webdataset", "parquet", "url_list", "sqlite"])
@pytest.mark.parametrize("is_cut", [False, True])
def test_a_local_source_that_changed_after_it_was_planned_is_an_error(
    tmp_path: Path, layout: str, is_cut: bool
) -> None:
    """Written again with the same bytes, or cut, which looks like damage."""
    spec, path = layouts(tmp_path)[layout]
    (item,) = readers.plan("d", spec, Images())
    assert list(readers.read(spec, item, MAX_BYTES))
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2] if is_cut else data)
    later = path.stat().st_mtime + 1
    os.utime(path, (later, later))
    with pytest.raises(EvenmixError) as caught:
        list(readers.read(spec, item, MAX_BYTES))
    assert str(caught.value) == (
        f"{path} has changed since it was planned; start the same command again, and change no "
        "source while it is read"
    )


def test_a_source_on_a_server_that_changed_after_it_was_planned_is_an_error(
    tmp_path: Path,
) -> None:
    members: Members = [("a.jpg", b"one"), ("b.jpg", b"two")]
    (tmp_path / "a.tar").write_bytes(tar_bytes(members))
    with serve_files(tmp_path) as server:
        for layout in ("tar", "webdataset"):
            spec = dataset(layout, server.url("a.tar"))
            (item,) = readers.plan("d", spec, Images())
            records = readers.read(spec, item, MAX_BYTES)
            assert next(records).picture == b"one"
            (tmp_path / "a.tar").write_bytes(tar_bytes([*members[:1], ("b.jpg", b"2nd")]))
            with pytest.raises(EvenmixError, match=r"a\.tar has changed since it was planned"):
                list(records)
            (tmp_path / "a.tar").write_bytes(tar_bytes(members))


def test_an_object_that_changed_after_it_was_planned_is_an_error(gcs_bucket: str) -> None:
    url = f"{gcs_bucket}/in/a.jpg"
    storage.publish(url, b"one")
    spec = dataset("folder", f"{gcs_bucket}/in")
    (item,) = readers.plan("d", spec, Images())
    storage.replace(url, b"2nd")
    with pytest.raises(EvenmixError, match=r"in/a\.jpg has changed since it was planned"):
        list(readers.read(spec, item, MAX_BYTES))


@pytest.mark.parametrize("layout", ["folder", "webdataset"])
def test_a_file_above_the_cap_is_not_read(layout: str, tmp_path: Path) -> None:
    large = bytes(40 * MAX_BYTES)
    if layout == "folder":
        (tmp_path / "a.png").write_bytes(large)
        spec = dataset("folder", tmp_path)
    else:
        (tmp_path / "a.tar").write_bytes(tar_bytes([("a.png", large), ("b.png", b"small")]))
        spec = dataset("webdataset", tmp_path / "a.tar")
    (item,) = readers.plan("d", spec, Images())
    tracemalloc.start()
    first = next(readers.read(spec, item, MAX_BYTES))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (first.reason, first.detail) == (RejectReason.TOO_MANY_BYTES, f"{len(large)} bytes")
    assert peak < len(large) / 2
