"""Records come once, in order, from lists of any size; what is broken says so and costs no more."""

import json
import struct
import tracemalloc
import zipfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import storage
from pipeline.dataset import Dataset
from pipeline.errors import EvenmixError
from pipeline.readers import url_list
from pipeline.readers.rules import Record
from pipeline.reasons import RejectReason
from pipeline.recipe import Images
from tests.http_files import serve_files

MAX_BYTES = 1 << 20


def dataset(source: object, **options: object) -> Dataset:
    return Dataset.model_validate(
        {
            "layout": "url_list",
            "source": str(source),
            "licence": "CC BY 4.0",
            "id_rule": "{image_id}",
            "image_url": "{url}",
            **options,
        }
    )


def redcaps(source: object, **options: object) -> Dataset:
    return dataset(source, records_field="annotations", text_field="caption", **options)


def read_all(spec: Dataset, records_per_shard: int = 100) -> list[Record]:
    items = url_list.plan("d", spec, Images(records_per_shard=records_per_shard))
    assert len({item.shard for item in items}) == len(items)
    return [record for item in items for record in url_list.read(spec, item, MAX_BYTES)]


def annotation(number: int) -> dict[str, Any]:
    return {
        "image_id": f"id{number}",
        "author": "a" * 400,
        "url": f"https://i.redd.it/{number}.jpg",
        "caption": f"caption {number}",
    }


def record(number: int, locator: str) -> Record:
    url = f"https://i.redd.it/{number}.jpg"
    return Record(
        locator,
        f"id{number}",
        image_url=url,
        text=f"caption {number}",
        source_url=url,
        licence="CC BY 4.0",
    )


def write_zip(path: Path, members: dict[str, Any], method: int = zipfile.ZIP_DEFLATED) -> None:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, document in members.items():
            text = document if isinstance(document, str | bytes) else json.dumps(document)
            archive.writestr(name, text)


def annotations(*numbers: int) -> dict[str, Any]:
    return {"info": {"year": 2020}, "annotations": [annotation(number) for number in numbers]}


# JSON


@pytest.mark.parametrize("records_per_shard", [1, 2, 7, 20, 100])
def test_zipped_json_comes_once_and_in_order(tmp_path: Path, records_per_shard: int) -> None:
    """Whatever the number of parts that a member is read in."""
    write_zip(
        tmp_path / "redcaps.zip",
        {
            "annotations/": "",
            "annotations/cats_2019.json": annotations(*range(20)),
            "annotations/dogs_2020.json": annotations(20),
            "annotations/none_2020.json": annotations(),
            "README.md": "no records",
        },
    )
    cats = [record(n, f"redcaps.zip/annotations/cats_2019.json:{n}") for n in range(20)]
    dog = record(20, "redcaps.zip/annotations/dogs_2020.json:0")
    assert read_all(redcaps(tmp_path / "*.zip"), records_per_shard) == [*cats, dog]


def test_large_documents_are_cut_by_the_size_that_the_directory_tells(tmp_path: Path) -> None:
    write_zip(
        tmp_path / "a.zip", {"large.json": annotations(*range(20)), "small.json": annotations(20)}
    )
    items = url_list.plan("d", redcaps(tmp_path / "a.zip"), Images(records_per_shard=10))
    size = zipfile.ZipFile(tmp_path / "a.zip").getinfo("large.json").file_size
    assert 6_000 < size < 12_000
    assert [(item.inputs["member"], item.inputs["part"]) for item in items] == [
        ("large.json", [0, 2]),
        ("large.json", [1, 2]),
        ("small.json", [0, 1]),
    ]


def test_rules_may_ask_for_the_place_of_a_record(tmp_path: Path) -> None:
    write_zip(tmp_path / "a.zip", {"annotations/cats_2019.json": annotations(5, 6)})
    spec = redcaps(tmp_path / "a.zip", id_rule="{folder}|{file}|{row}")
    assert [found.source_id for found in read_all(spec)] == [
        "annotations|annotations/cats_2019|0",
        "annotations|annotations/cats_2019|1",
    ]


def test_bare_json_with_a_list_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "b.json").write_text(json.dumps([annotation(0), annotation(1)]))
    assert read_all(dataset(tmp_path / "*.json", text_field="caption"), 1) == [
        record(0, "b.json:0"),
        record(1, "b.json:1"),
    ]


def test_zipped_json_in_an_object_store(tmp_path: Path, gcs_bucket: str) -> None:
    write_zip(tmp_path / "a.zip", {"cats.json": annotations(0, 1)})
    storage.publish(f"{gcs_bucket}/in/a.zip", (tmp_path / "a.zip").read_bytes())
    assert read_all(redcaps(f"{gcs_bucket}/in/*.zip")) == [
        record(n, f"a.zip/cats.json:{n}") for n in range(2)
    ]


def test_a_document_is_fetched_once_for_parts_that_follow_each_other(tmp_path: Path) -> None:
    write_zip(tmp_path / "a.zip", {"a.json": annotations(*range(50))})
    with serve_files(tmp_path) as server:
        spec = redcaps(server.url("a.zip"))
        items = url_list.plan("d", spec, Images(records_per_shard=5))
        assert len(items) > 5
        server.ranges.clear()
        first, *others = [list(url_list.read(spec, item, MAX_BYTES)) for item in items]
        assert len(server.ranges) <= 4  # the directory, and the member
        assert [r.source_id for part in (first, *others) for r in part] == [
            f"id{n}" for n in range(50)
        ]
        # One that has changed is another document.
        write_zip(tmp_path / "a.zip", {"a.json": annotations(*range(1, 51))})
        changed, *_ = url_list.plan("d", spec, Images(records_per_shard=5))
        assert next(url_list.read(spec, changed, MAX_BYTES)).source_id == "id1"


def test_bad_records_are_reasons(tmp_path: Path) -> None:
    lacks_url = {"image_id": "x", "caption": "y"}
    write_zip(
        tmp_path / "a.zip", {"a.json": {"annotations": [[1], annotation(1), lacks_url, None]}}
    )
    found = read_all(redcaps(tmp_path / "a.zip"))
    assert [(r.locator, r.source_id, r.reason) for r in found] == [
        ("a.zip/a.json:0", None, RejectReason.BAD_RECORD),
        ("a.zip/a.json:1", "id1", None),
        ("a.zip/a.json:2", None, RejectReason.BAD_RECORD),
        ("a.zip/a.json:3", None, RejectReason.BAD_RECORD),
    ]
    assert found[0].detail == "it is no object but '[1]'"
    assert found[2].detail == (
        "it has no 'url'; it has caption, file, folder, image_id, parent, path, row, stem"
    )


@pytest.mark.parametrize(
    ("document", "detail"),
    [
        ("{", "none of its records can be read: Expecting property name enclosed in double"),
        (b"\xff\x00\xff", "none of its records can be read: 'utf-"),
        ("[" * 100_000, "none of its records can be read: maximum recursion depth"),
        ('{"info": 1}', "none of its records can be read: no list at 'annotations'"),
        ('{"annotations": {"0": 1}}', "none of its records can be read: no list at 'annotations'"),
        ('"text"', "none of its records can be read: no list at 'annotations'"),
    ],
)
def test_a_document_without_records_is_one_reason(
    tmp_path: Path, document: str | bytes, detail: str
) -> None:
    """One, however many parts it is cut into; the other documents are read."""
    write_zip(tmp_path / "a.zip", {"bad.json": document, "good.json": annotations(1)})
    bad, good = read_all(redcaps(tmp_path / "a.zip"), records_per_shard=1)
    assert (bad.locator, bad.source_id, bad.reason) == (
        "a.zip/bad.json",
        None,
        RejectReason.BAD_RECORD,
    )
    assert bad.detail.startswith(detail)
    assert good == record(1, "a.zip/good.json:0")


def patch(path: Path, signature: bytes, offset: int, data: bytes) -> None:
    """Overwrite bytes of the last structure of a zip archive that begins with a signature."""
    content = bytearray(path.read_bytes())
    begin = content.rindex(signature) + offset
    content[begin : begin + len(data)] = data
    path.write_bytes(content)


DIRECTORY_ENTRY = b"PK\x01\x02"
FLAGS, CRC, SIZE = 8, 16, 24


def test_a_zip_bomb_is_refused_by_what_it_claims(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_zip(tmp_path / "a.zip", {"a.json": b" " * 50_000_000})
    monkeypatch.setattr(url_list, "MAX_DOCUMENT_BYTES", 49_999_999)
    tracemalloc.start()
    with pytest.raises(EvenmixError, match=r"a\.zip: a\.json claims 50,000,000 bytes; .* limit is"):
        url_list.plan("d", redcaps(tmp_path / "a.zip"), Images())
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 10_000_000


def test_a_zip_bomb_that_claims_little_gives_no_more(tmp_path: Path) -> None:
    """Its data are cut at the size in the directory, which then is not that of its checksum."""
    write_zip(tmp_path / "a.zip", {"a.json": b" " * 50_000_000})
    patch(tmp_path / "a.zip", DIRECTORY_ENTRY, SIZE, struct.pack("<L", 1000))
    spec = redcaps(tmp_path / "a.zip")
    (item,) = url_list.plan("d", spec, Images())
    tracemalloc.start()
    with pytest.raises(EvenmixError, match=r"a\.zip cannot be read as a zip archive \(Bad CRC-32"):
        list(url_list.read(spec, item, MAX_BYTES))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 10_000_000


def test_an_encrypted_archive_is_refused(tmp_path: Path) -> None:
    write_zip(tmp_path / "a.zip", {"a.json": annotations(1)})
    patch(tmp_path / "a.zip", DIRECTORY_ENTRY, FLAGS, b"\x01\x00")
    with pytest.raises(EvenmixError, match=r"a\.zip: a\.json is encrypted; decrypt"):
        url_list.plan("d", redcaps(tmp_path / "a.zip"), Images())


def test_compression_that_takes_any_memory_is_refused(tmp_path: Path) -> None:
    write_zip(tmp_path / "a.zip", {"a.json": annotations(1)}, zipfile.ZIP_LZMA)
    with pytest.raises(EvenmixError, match=r"a\.json is neither stored nor deflated"):
        url_list.plan("d", redcaps(tmp_path / "a.zip"), Images())


def test_all_files_that_cannot_be_read_are_named_at_once(tmp_path: Path) -> None:
    write_zip(tmp_path / "cut.zip", {"a.json": annotations(1)})
    (tmp_path / "cut.zip").write_bytes((tmp_path / "cut.zip").read_bytes()[:-30])
    (tmp_path / "notes.csv").write_text("a,b")
    with pytest.raises(EvenmixError) as caught:
        url_list.plan("d", redcaps(tmp_path / "*"), Images())
    assert str(caught.value).splitlines() == [
        "dataset d cannot be read:",
        f"  {tmp_path}/cut.zip cannot be read as a zip archive (File is not a zip file); "
        "fetch it again",
        f"  {tmp_path}/notes.csv is no .parquet, .zip or .json; correct the source",
    ]


def test_an_archive_damaged_after_it_was_planned_is_an_error(tmp_path: Path) -> None:
    write_zip(tmp_path / "a.zip", {"a.json": annotations(*range(50))})
    spec = redcaps(tmp_path / "a.zip")
    (item,) = url_list.plan("d", spec, Images())
    content = bytearray((tmp_path / "a.zip").read_bytes())
    content[60:100] = b"\xff" * 40
    (tmp_path / "a.zip").write_bytes(content)
    with pytest.raises(EvenmixError, match="cannot be read as a zip archive"):
        list(url_list.read(spec, item, MAX_BYTES))


# Parquet


def write_parquet(path: Path, numbers: range, rows_per_group: int) -> None:
    table = pa.Table.from_pylist([annotation(number) for number in numbers])
    pq.write_table(table, path, row_group_size=rows_per_group)


@pytest.mark.parametrize("records_per_shard", [1, 3, 7, 100])
@pytest.mark.parametrize("rows_per_group", [1, 4, 50])
def test_parquet_rows_come_once_and_in_order(
    tmp_path: Path, records_per_shard: int, rows_per_group: int
) -> None:
    (tmp_path / "x").mkdir()
    write_parquet(tmp_path / "x/a.parquet", range(20), rows_per_group)
    write_parquet(tmp_path / "x/b.parquet", range(20, 25), rows_per_group)
    spec = dataset(tmp_path / "x/*.parquet", text_field="caption")
    assert read_all(spec, records_per_shard) == [
        *(record(n, f"a.parquet:{n}") for n in range(20)),
        *(record(n, f"b.parquet:{n - 20}") for n in range(20, 25)),
    ]


def test_parquet_rows_of_a_large_row_group_come_once_and_in_order(tmp_path: Path) -> None:
    """Items begin and end within batches, and more than a batch into the group."""
    write_parquet(tmp_path / "a.parquet", range(2500), 2500)
    spec = dataset(tmp_path / "a.parquet", text_field="caption")
    assert read_all(spec, 700) == [record(n, f"a.parquet:{n}") for n in range(2500)]


def test_only_the_columns_that_are_needed_are_read(tmp_path: Path) -> None:
    """The first column is damaged: who reads it fails."""
    table = pa.Table.from_pylist([annotation(n) for n in range(5)])
    table = table.select(["author", "image_id", "url", "caption"])
    path = tmp_path / "a.parquet"
    pq.write_table(table, path, compression="none", use_dictionary=False)
    data = bytearray(path.read_bytes())
    data[4:60] = b"\xff" * 56
    path.write_bytes(data)
    spec = dataset(path, text_field="caption")
    assert [found.source_id for found in read_all(spec)] == [f"id{n}" for n in range(5)]
    with pytest.raises(EvenmixError, match=r"a\.parquet is damaged after row 0"):
        read_all(dataset(path, text_field="author"))


def test_parquet_text_that_is_no_text_costs_its_own_record(tmp_path: Path) -> None:
    captions = pa.array([b"one", b"caf\xe9", None]).view(pa.string())
    table = pa.table({"image_id": [1, 2, 3], "url": ["a", "b", None], "caption": captions})
    pq.write_table(table, tmp_path / "a.parquet")
    found = read_all(dataset(tmp_path / "a.parquet", text_field="caption"))
    assert [(r.locator, r.source_id, r.text, r.reason) for r in found] == [
        ("a.parquet:0", "1", "one", None),
        ("a.parquet:1", None, None, RejectReason.BAD_RECORD),
        ("a.parquet:2", None, None, RejectReason.BAD_RECORD),
    ]
    assert found[2].detail == "its url is null"


def test_a_column_that_is_not_there_is_an_error_at_once(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", range(1), 1)
    spec = dataset(tmp_path / "a.parquet", id_rule="{id}-{row}-{file}", extra_fields=["score"])
    with pytest.raises(EvenmixError, match=r"a\.parquet has no column id, score \(it has image_id"):
        url_list.plan("d", spec, Images())
