"""Plain tars of pictures, tars of tars, and tars that lie in parts."""

import random
from pathlib import Path

import pytest

from pipeline import readers, storage
from pipeline.errors import EvenmixError
from pipeline.readers.parts import open_whole, part_name, whole_files
from pipeline.reasons import RejectReason
from pipeline.recipe import Images
from tests.sources import Members, dataset, read_all, record, summary, tar_bytes

PLACES: Members = [
    ("./a/abbey/00000000.jpg", b"1"),
    ("./a/abbey/00000001.jpg", b"2"),
    ("./s/swimming_pool/indoor/00000000.jpg", b"3"),
    ("./s/swimming_pool/outdoor/00000000.jpg", b"4"),
]


def write_parts(folder: str, name: str, data: bytes, part_bytes: int) -> None:
    for number, start in enumerate(range(0, len(data), part_bytes)):
        part = data[start : start + part_bytes]
        storage.publish(storage.join(folder, part_name(name, number)), part)


def test_members_are_named_by_their_path(tmp_path: Path) -> None:
    (tmp_path / "places.tar").write_bytes(tar_bytes(PLACES))
    plain = dataset("tar", tmp_path / "places.tar")
    assert read_all(plain)[0] == record(
        "places.tar/a/abbey/00000000.jpg", "a/abbey/00000000.jpg", b"1"
    )
    spec = dataset(
        "tar",
        tmp_path / "places.tar",
        id_rule="{category}/{stem}",
        join_rule="{parent}_{stem}",
        ambiguous_joins=["indoor_*", "outdoor_*"],
        path_pattern=r"(^|/)[a-z]/(?P<category>.+)/[^/]+$",
        text_field="category",
    )
    found = [(r.source_id, r.join_id, r.join_ambiguous, r.text) for r in read_all(spec)]
    assert found == [
        ("abbey/00000000", "abbey_00000000", False, "abbey"),
        ("abbey/00000001", "abbey_00000001", False, "abbey"),
        ("swimming_pool/indoor/00000000", "indoor_00000000", True, "swimming_pool/indoor"),
        ("swimming_pool/outdoor/00000000", "outdoor_00000000", True, "swimming_pool/outdoor"),
    ]


def test_what_is_no_picture_is_no_record_but_an_archive_is(tmp_path: Path) -> None:
    members: Members = [
        ("folder/", b""),
        ("README", b"text"),
        ("a.JPG", b"1"),
        ("list.json", b"{}"),
        ("more.tar", tar_bytes([])),
        ("large.png", bytes((1 << 20) + 1)),
    ]
    (tmp_path / "a.tar").write_bytes(tar_bytes(members))
    assert summary(read_all(dataset("tar", tmp_path / "a.tar"))) == [
        ("a.JPG", b"1", None),
        ("more.tar", b"", RejectReason.MISSING_PICTURE),
        ("large.png", b"", RejectReason.TOO_MANY_BYTES),
    ]


def test_a_tar_that_is_cut_ends_with_a_reason(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(tar_bytes(PLACES)[:2500])
    *whole, cut = read_all(dataset("tar", tmp_path / "a.tar"))
    assert [r.picture for r in whole] == [b"1", b"2"]
    assert cut.reason == RejectReason.TRUNCATED_ARCHIVE
    assert cut.detail.endswith("what follows a/abbey/00000001.jpg is lost: fetch it again")


def nested() -> tuple[bytes, list[tuple[str, bytes]]]:
    """Return a tar of three tars, one of them empty, and what it holds."""
    source = random.Random(0)
    outer: Members = [("tars/", b"")]
    expected = []
    for letter, count in [("a", 40), ("b", 0), ("c", 25)]:
        inner = [(f"{letter}{n}/{n:03d}.jpg", source.randbytes(900)) for n in range(count)]
        outer.append((f"tars/{letter}.tar", tar_bytes(inner)))
        expected += [(f"tars/{letter}/{name}", data) for name, data in inner]
    return tar_bytes(outer), expected


@pytest.mark.parametrize("bytes_per_shard", [3000, 20_000, 1 << 28])
def test_tars_in_a_tar_are_split_each_by_itself(tmp_path: Path, bytes_per_shard: int) -> None:
    data, expected = nested()
    (tmp_path / "all.tar").write_bytes(data)
    spec = dataset("tar", tmp_path / "all.tar")
    records = read_all(spec, bytes_per_shard=bytes_per_shard)
    assert [(r.source_id, r.picture) for r in records] == expected
    shards = [i.shard for i in readers.plan("d", spec, Images(bytes_per_shard=bytes_per_shard))]
    assert len(set(shards)) == len(shards) >= 3


def test_a_tar_of_tars_that_cannot_be_read_whole_stops_the_build(tmp_path: Path) -> None:
    data, _ = nested()
    spec = dataset("tar", tmp_path / "all.tar")
    (tmp_path / "all.tar").write_bytes(data[:-20_000])
    with pytest.raises(EvenmixError, match=r"all.tar is damaged \(tars/c.tar is cut\); fetch it"):
        readers.plan("d", spec, Images())
    (tmp_path / "all.tar").write_bytes(tar_bytes([("a.tar", b""), ("b.jpg", b"x")]))
    with pytest.raises(EvenmixError, match=r"has both tars and pictures \(b.jpg\)"):
        readers.plan("d", spec, Images())
    (tmp_path / "all.tar").write_bytes(tar_bytes([("a.tar", b""), ("b.tar.gz", b"x")]))
    with pytest.raises(EvenmixError, match=r"all.tar/b.tar.gz is compressed"):
        readers.plan("d", spec, Images())


@pytest.fixture(params=["local", "gs"])
def folder(request: pytest.FixtureRequest) -> str:
    """An empty folder of each kind of store."""
    name = "gcs_bucket" if request.param == "gs" else "tmp_path"
    return str(request.getfixturevalue(name))


def test_a_tar_in_parts_is_read_as_one(folder: str) -> None:
    data, expected = nested()
    write_parts(folder, "all.tar", data, 7_000)
    spec = dataset("tar", storage.join(folder, "*.part-*"))
    records = read_all(spec, bytes_per_shard=20_000)
    assert [(r.source_id, r.picture) for r in records] == expected
    assert records[0].locator == f"all.tar/{expected[0][0]}"
    payloads = {len(str(i.payload)) for i in readers.plan("d", spec, Images())}
    assert max(payloads) < 200


def test_the_identity_of_parts_is_that_of_all_of_them(folder: str) -> None:
    data = tar_bytes(PLACES)
    write_parts(folder, "a.tar", data, 3000)
    spec = dataset("tar", storage.join(folder, "*.part-*"))
    (before,) = readers.plan("d", spec, Images())
    url = storage.join(folder, part_name("a.tar", 1))
    storage.replace(url, bytes(3000))
    (after,) = readers.plan("d", spec, Images())
    assert before.inputs["version"] != after.inputs["version"]


def test_parts_that_do_not_fit_together_are_an_error(tmp_path: Path) -> None:
    for sizes in [(10, None, 10), (10, 9, 10), (10, 11), (None, 10), (10, 0)]:
        folder = tmp_path / str(sizes)
        for number, size in enumerate(sizes):
            if size is not None:
                storage.publish(str(folder / part_name("a.tar", number)), bytes(size))
        with pytest.raises(EvenmixError, match=r"a.tar lies in parts that do not fit together"):
            whole_files(storage.list_files(str(folder)))


def test_a_file_in_parts_can_be_read_from_any_place(tmp_path: Path) -> None:
    data = random.Random(0).randbytes(1000)
    write_parts(str(tmp_path), "a", data, 64)
    with open_whole(f"{tmp_path}/a", len(data), 64, buffer_bytes=10) as file:
        for start, stop in [(0, 1000), (63, 65), (64, 64), (999, 1000), (100, 700), (990, 2000)]:
            file.seek(start)
            assert file.read(stop - start) == data[start:stop]
        file.seek(-5, 2)
        assert file.read() == data[-5:]
