"""WebDataset: the samples of a tar, whole, cut, damaged or hostile."""

import tarfile
from pathlib import Path

import pytest

from pipeline import readers, storage
from pipeline.dataset import Dataset
from pipeline.errors import EvenmixError
from pipeline.reasons import RejectReason
from pipeline.recipe import Images
from tests.sources import Members, dataset, read_all, record, summary, tar_bytes

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
        "webdataset", tmp_path / "*.tar", id_rule="{id}", text_field="text", url_field="url"
    )
    assert read_all(spec) == [
        record("a.tar/a/one", "11", b"1", "first", source_url="http://x/1"),
        record("a.tar/a/two", "22", b"2"),
    ]


def test_tar_without_fields_takes_stem_and_text_member(tmp_path: Path) -> None:
    spec = write_tar(tmp_path, tar_bytes(SAMPLES))
    assert read_all(spec) == [
        record("a.tar/a/one", "a/one", b"1"),
        record("a.tar/a/two", "a/two", b"2", "ignored"),
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
    records = read_all(dataset("webdataset", tmp_path / "*.tar", id_rule="{id}"))
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


@pytest.mark.parametrize("bytes_per_shard", [1000, 5000, 20_000])
def test_a_large_tar_is_read_in_parts(tmp_path: Path, bytes_per_shard: int) -> None:
    members = [(f"{n:03d}.{s}", b"%d" % n * 300) for n in range(40) for s in ("jpg", "txt")]
    spec = write_tar(tmp_path, tar_bytes(members))
    images = Images(bytes_per_shard=bytes_per_shard)
    items = readers.plan("d", spec, images)
    num_parts = -(-(tmp_path / "a.tar").stat().st_size // bytes_per_shard)
    assert [item.shard for item in items] == [f"a-{n:09d}" for n in range(num_parts)]
    assert read_all(spec, bytes_per_shard=bytes_per_shard) == read_all(spec)
    assert len(read_all(spec)) == 40


def test_damage_in_one_part_leaves_the_others_whole(tmp_path: Path) -> None:
    data = bytearray(tar_bytes([(f"{n:03d}.jpg", bytes([n]) * 600) for n in range(60)]))
    data[20 * 3 * 512 + 150] ^= 1  # the checksum of the header of 020.jpg
    records = read_all(write_tar(tmp_path, bytes(data)), bytes_per_shard=20_000)
    reasons = [record.reason for record in records if record.reason]
    assert reasons == [RejectReason.TRUNCATED_ARCHIVE]
    kept = [record.source_id for record in records if record.source_id]
    assert kept == [f"{n:03d}" for n in range(60) if not 19 <= n <= 28]


def test_rules_see_the_json_before_the_place(tmp_path: Path) -> None:
    members: Members = [
        ("train/one.webp", b"1"),
        ("train/one.json", b'{"stem": "mine", "tags": ["a"]}'),
    ]
    write_tar(tmp_path, tar_bytes(members))
    spec = dataset(
        "webdataset",
        tmp_path / "*.tar",
        id_rule="{split}|{folder}|{parent}|{stem}|{key}|{path}",
        path_pattern="^(?P<split>[a-z]+)/",
        extra_fields=["tags"],
    )
    (found,) = read_all(spec)
    assert found.source_id == "train|train|train|mine|train/one|train/one.webp"
    assert found.fields == {"tags": ["a"]}


def test_a_json_name_that_is_no_text_is_told_in_letters(tmp_path: Path) -> None:
    write_tar(tmp_path, tar_bytes([("a.jpg", b"x"), ("a.json", b'{"\\ud800": 1}')]))
    (found,) = read_all(dataset("webdataset", tmp_path / "*.tar", id_rule="{id}"))
    assert found.reason == RejectReason.BAD_RECORD
    assert found.detail.encode().startswith(b"it has no 'id'; it has")
    assert "\\ud800" in found.detail


@pytest.mark.parametrize("layout", ["webdataset", "tar"])
@pytest.mark.parametrize("name", ["a.tar.gz", "a.tgz", "a.tar.zst"])
def test_a_compressed_tar_is_refused(tmp_path: Path, layout: str, name: str) -> None:
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(EvenmixError, match=f"{name} is compressed .* `evenmix mirror` does"):
        readers.plan("d", dataset(layout, tmp_path / "*"), Images())
