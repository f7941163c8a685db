"""A mirror has every byte of its source once, whatever happens in between, and the same records."""

import gzip
import hashlib
import io
import json
import random
import re
import signal
import sqlite3
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow.parquet as pq
import pytest

from pipeline import byte_progress, copying, readers, storage, stores, unpacking
from pipeline.dataset import Dataset
from pipeline.errors import EvenmixError
from pipeline.mirror import mirror, mirrored, verify_mirror
from pipeline.readers.rules import Record
from pipeline.reasons import RejectReason
from pipeline.receipts import Checksum, checksum
from pipeline.recipe import Images
from tests.corpora import evenmix, finish
from tests.http_files import FileServer, serve_files
from tests.hub import Repository, point_at, serve_hub

PART_BYTES = 16 << 10


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FileServer]:
    monkeypatch.setattr(stores, "RETRY_WAITS_S", (0.01, 0.01, 0.01))
    (tmp_path / "web").mkdir()
    with serve_files(tmp_path / "web") as running:
        yield running


def tar_dataset(source: str, **options: Any) -> Dataset:
    spec = {"layout": "tar", "source": source, "licence": "CC0 1.0", "mirror": True}
    return Dataset.model_validate(spec | {"id_rule": "{stem}"} | options)


def write_tar(path: Path, num_pictures: int = 40, seed: int = 0) -> None:
    """Write a tar, plain or compressed as its name says, of bytes that stand for pictures."""
    random_bytes = random.Random(seed).randbytes
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for number in range(num_pictures):
            info = tarfile.TarInfo(f"train/{number // 10:02d}_birds/{number:04d}.jpg")
            info.size = 3000 + 100 * number
            tar.addfile(info, io.BytesIO(random_bytes(info.size)))
    data = buffer.getvalue()
    path.write_bytes(data if path.suffix == ".tar" else gzip.compress(data, mtime=0))


def read_all(spec: Dataset) -> list[Record]:
    """Read a dataset; a mirror's locators name other files."""
    items = readers.plan("d", spec, Images(records_per_shard=7, bytes_per_shard=30_000))
    assert len(items) > 3
    return [
        replace(record, locator="")
        for item in items
        for record in readers.read(spec, item, 1 << 20)
    ]


def make(root: object, spec: Dataset, **options: Any) -> dict[str, Checksum]:
    checksums = options.pop("checksums", {})
    return mirror(str(root), "d", spec, checksums, **{"part_bytes": PART_BYTES, **options})


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def ranges(num_bytes: int) -> list[tuple[int, int]]:
    """Return the ranges of a file's parts, as (first, last)."""
    starts = range(0, num_bytes, PART_BYTES)
    return [(start, min(start + PART_BYTES, num_bytes) - 1) for start in starts]


# A tar


def test_a_tar_is_copied_in_parts_each_fetched_once(tmp_path: Path, server: FileServer) -> None:
    write_tar(tmp_path / "web/places.tar")
    data = (tmp_path / "web/places.tar").read_bytes()
    spec = tar_dataset(server.url("places.tar"))
    md5 = f"md5:{hashlib.md5(data).hexdigest()}"
    files = make(tmp_path / "R", spec, checksums={"places.tar": md5})

    parts = [data[first : last + 1] for first, last in ranges(len(data))]
    assert len(parts) == 15
    assert files == {
        f"places.tar.part-{number:05d}": checksum([part]) for number, part in enumerate(parts)
    }
    folder = tmp_path / "R/sources/d"
    assert [(folder / name).read_bytes() for name in files] == parts
    assert names(folder) == [
        "mirror.json",
        "places.tar.checked.json",
        *files,
        "places.tar.source.json",
    ]
    assert sorted(server.ranges) == ranges(len(data))
    manifest = json.loads((folder / "mirror.json").read_bytes())
    assert manifest["source"] == spec.source
    assert {name: Checksum(**file) for name, file in manifest["files"].items()} == files


def test_a_part_may_take_several_requests(
    tmp_path: Path, server: FileServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(copying, "_READ_BYTES", 5000)
    write_tar(tmp_path / "web/places.tar")
    files = make(tmp_path / "R", tar_dataset(server.url("places.tar")))
    parts = [(tmp_path / "R/sources/d" / name).read_bytes() for name in files]
    assert [len(part) for part in parts[:2]] == [PART_BYTES, PART_BYTES]
    assert b"".join(parts) == (tmp_path / "web/places.tar").read_bytes()
    assert max(last - first for first, last in server.ranges) == 4999


def test_progress_without_a_terminal_is_a_line_now_and_then(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(byte_progress, "_LINE_EVERY_S", 0)
    monkeypatch.setattr(copying, "_READ_BYTES", 100_000)
    write_tar(tmp_path / "a.tar")
    make(tmp_path / "R", tar_dataset(str(tmp_path / "a.tar")), part_bytes=1 << 20)
    lines = capsys.readouterr().err.splitlines()
    expected = ["copying a.tar: 100.0 kB", "copying a.tar: 200.0 kB", "copying a.tar: 235.5 kB"]
    expected += ["checking a.tar: 235.5 kB"]
    rate = r"[\d.]+ [kMG]?B/s(, \d:\d\d:\d\d left)?"
    for line, begin in zip(lines, expected, strict=True):
        assert re.fullmatch(rf"{re.escape(begin)} of 235\.5 kB, {rate}", line), line


def test_a_mirrored_tar_has_the_records_of_its_source(tmp_path: Path, server: FileServer) -> None:
    write_tar(tmp_path / "web/places.tar")
    spec = tar_dataset(
        server.url("places.tar"), path_pattern="_(?P<kind>[^/]+)/", text_field="kind"
    )
    make(tmp_path / "R", spec)
    direct = spec.model_copy(update={"source": str(tmp_path / "web/places.tar")})
    found = read_all(mirrored(str(tmp_path / "R"), "d", spec))
    assert [record.source_id for record in found] == [f"{number:04d}" for number in range(40)]
    assert found == read_all(direct)


@pytest.mark.parametrize("kind", ["tar", "sqlite"])
def test_the_plan_of_a_mirror_computes_no_checksums(
    tmp_path: Path, gcs_bucket: str, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """They are in its manifest; the items are the same on a disk and in an object store."""
    if kind == "tar":
        write_tar(tmp_path / "a.tar")
        spec = tar_dataset(str(tmp_path / "a.tar"))
    else:
        write_sqlite(tmp_path / "a.sql")
        spec = sqlite_dataset(str(tmp_path / "a.sql"))
    roots = [str(tmp_path / "R"), f"{gcs_bucket}/R"]
    for root in roots:
        make(root, spec)

    def fail(file: BinaryIO, num_bytes: int) -> str:
        raise AssertionError("a checksum is computed")

    monkeypatch.setattr("pipeline.readers.items.content_version", fail)
    monkeypatch.setattr("pipeline.readers.parts.content_version", fail)
    local, remote = (readers.plan("d", mirrored(root, "d", spec), Images()) for root in roots)
    assert [(item.shard, item.inputs) for item in local] == [
        (item.shard, item.inputs) for item in remote
    ]


def test_a_mirror_s_file_of_another_size_is_an_error(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar")
    spec = tar_dataset(str(tmp_path / "a.tar"))
    *_, last = make(tmp_path / "R", spec)
    path = tmp_path / "R/sources/d" / last
    size = path.stat().st_size
    path.write_bytes(b"x")
    with pytest.raises(EvenmixError, match=f"{last} has 1 bytes, but was mirrored with {size:,}"):
        readers.plan("d", mirrored(str(tmp_path / "R"), "d", spec), Images())


def test_a_mirror_of_the_hub_knows_the_commit_that_it_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not the branch, which moves on."""
    write_tar(tmp_path / "a.tar")
    files = {"a.tar": (tmp_path / "a.tar").read_bytes()}
    root, source = str(tmp_path / "R"), "hf://datasets/someone/data/a.tar"
    with serve_hub() as hub:
        point_at(hub, monkeypatch)
        hub.repositories["someone/data"] = Repository({"cd" * 20: files})
        make(root, tar_dataset(source, revision="main"))
    for revision in ("main", None, "cd" * 20, "cdcdcdc"):
        found = mirrored(root, "d", tar_dataset(source, revision=revision))
        assert found.revision == "cd" * 20
    with pytest.raises(EvenmixError, match=f"is the mirror of revision {'cd' * 20}, not of revi"):
        mirrored(root, "d", tar_dataset(source, revision="abcdef0"))


@pytest.mark.parametrize("store", ["local", "gs"])
def test_a_mirror_is_compared_with_its_manifest(
    tmp_path: Path, gcs_bucket: str, store: str
) -> None:
    write_tar(tmp_path / "a.tar.gz")
    root = gcs_bucket if store == "gs" else str(tmp_path / "R")
    first, second, *_ = make(root, tar_dataset(str(tmp_path / "a.tar.gz")))
    folder = storage.join(root, "sources/d")
    assert verify_mirror(folder) == []
    storage.remove(storage.join(folder, first))
    url = storage.join(folder, second)
    data = storage.read_bytes(url)
    storage.replace(url, data[:-1] + bytes([data[-1] ^ 1]))
    storage.publish(storage.join(folder, "a.tar.part-00099"), b"x")
    assert verify_mirror(folder) == [
        f"{folder}/{first}: is missing; remove mirror.json beside it and mirror again",
        f"{url}: its bytes are not those that were published; remove it and mirror.json, and "
        "mirror again",
        f"{folder}/a.tar.part-00099: belongs to no finished work; remove it",
    ]
    storage.replace(storage.join(folder, "mirror.json"), b"{}")
    (finding,) = verify_mirror(folder)
    assert finding.startswith(f"{folder}/mirror.json is damaged")


def test_a_finished_mirror_is_not_touched_again(tmp_path: Path, server: FileServer) -> None:
    write_tar(tmp_path / "web/places.tar")
    spec = tar_dataset(server.url("places.tar"))
    files = make(tmp_path / "R", spec)
    requests = server.num_requests
    # What a command that was killed after the commit has left.
    (tmp_path / "R/sources/d/.temporary-1-places.tar.part-00000").write_bytes(b"x")
    assert make(tmp_path / "R", spec) == files
    assert server.num_requests == requests
    assert len(names(tmp_path / "R/sources/d")) == len(files) + 3


def test_a_tar_is_mirrored_into_an_object_store(
    tmp_path: Path, server: FileServer, gcs_bucket: str
) -> None:
    write_tar(tmp_path / "web/places.tar.gz")
    spec = tar_dataset(server.url("places.tar.gz"))
    files = make(f"{gcs_bucket}/R", spec)
    found = [file.name for file in storage.list_files(f"{gcs_bucket}/R/sources/d")]
    assert sorted(found) == sorted(
        ["mirror.json", "places.tar.gz.checked.json", "places.tar.gz.source.json", *files]
    )
    direct = tmp_path / "places.tar"
    direct.write_bytes(gzip.decompress((tmp_path / "web/places.tar.gz").read_bytes()))
    assert read_all(mirrored(f"{gcs_bucket}/R", "d", spec)) == read_all(tar_dataset(str(direct)))


def test_several_files_of_a_local_folder(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    write_tar(tmp_path / "in/a.tar", seed=1)
    write_tar(tmp_path / "in/b.tgz", seed=2)
    files = make(tmp_path / "R", tar_dataset(f"{tmp_path}/in/*"))
    for name, expected in {
        "a.tar": (tmp_path / "in/a.tar").read_bytes(),
        "b.tar": gzip.decompress((tmp_path / "in/b.tgz").read_bytes()),
    }.items():
        parts = [part for part in files if part.startswith(f"{name}.part-")]
        folder = tmp_path / "R/sources/d"
        assert b"".join((folder / part).read_bytes() for part in parts) == expected


# A server that fails


def test_what_may_pass_is_tried_again(tmp_path: Path, server: FileServer) -> None:
    write_tar(tmp_path / "web/places.tar")
    size = (tmp_path / "web/places.tar").stat().st_size
    server.unavailable, server.dropped = 2, 1
    make(tmp_path / "R", tar_dataset(server.url("places.tar")))
    assert (server.unavailable, server.dropped) == (0, 0)
    assert sorted(server.ranges) == ranges(size)


def test_a_source_that_disappears_is_one_error_and_the_copy_goes_on_from_there(
    tmp_path: Path, server: FileServer
) -> None:
    write_tar(tmp_path / "web/places.tar")
    size = (tmp_path / "web/places.tar").stat().st_size
    spec = tar_dataset(server.url("places.tar"))
    make_until(server, tmp_path / "R", spec, num_parts=5)
    make(tmp_path / "R", spec)
    assert sorted(server.ranges) == ranges(size)


def make_until(server: FileServer, root: Path, spec: Dataset, num_parts: int) -> None:
    """Mirror from a server that is gone after that many parts."""
    server.gone_after = num_parts
    with pytest.raises(EvenmixError, match=r"places\.tar cannot be read \(HTTP 503\); start the"):
        make(root, spec)
    server.gone_after = sys.maxsize
    assert len(list((root / "sources/d").glob("places.tar.part-*"))) == num_parts


def test_a_server_without_ranges_is_refused(tmp_path: Path, server: FileServer) -> None:
    write_tar(tmp_path / "web/places.tar")
    server.has_ranges = False
    with pytest.raises(EvenmixError, match=r"places\.tar .*range"):
        make(tmp_path / "R", tar_dataset(server.url("places.tar")))
    assert not (tmp_path / "R/sources/d/mirror.json").exists()


def test_a_server_that_tells_no_size_is_refused(tmp_path: Path, server: FileServer) -> None:
    write_tar(tmp_path / "web/places.tar")
    server.tells_size = False
    with pytest.raises(
        EvenmixError, match=r"places\.tar cannot be read in parts: its server tells"
    ):
        make(tmp_path / "R", tar_dataset(server.url("places.tar")))


def test_a_source_that_changed_between_two_runs_is_refused(
    tmp_path: Path, server: FileServer
) -> None:
    write_tar(tmp_path / "web/places.tar", seed=1)
    spec = tar_dataset(server.url("places.tar"))
    make_until(server, tmp_path / "R", spec, num_parts=3)
    write_tar(tmp_path / "web/places.tar", seed=2)
    with pytest.raises(
        EvenmixError, match=r"places\.tar has changed since its copy was begun \(ve"
    ):
        make(tmp_path / "R", spec)
    for path in (tmp_path / "R/sources/d").iterdir():
        path.unlink()
    make(tmp_path / "R", spec)


def test_a_source_that_changes_while_it_is_copied_is_refused(
    tmp_path: Path, server: FileServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_tar(tmp_path / "web/places.tar", seed=1)
    publish = storage.publish

    def publish_and_change(url: str, data: bytes) -> bool:
        if url.endswith("part-00003"):
            # In one step: a server would not show half of it.
            write_tar(tmp_path / "new.tar", seed=2)
            (tmp_path / "new.tar").replace(tmp_path / "web/places.tar")
        return publish(url, data)

    monkeypatch.setattr(storage, "publish", publish_and_change)
    with pytest.raises(EvenmixError, match=r"places\.tar has changed since .* start again"):
        make(tmp_path / "R", tar_dataset(server.url("places.tar")))


def test_a_wrong_checksum_names_the_file_and_the_parts(tmp_path: Path, server: FileServer) -> None:
    write_tar(tmp_path / "web/places.tar")
    spec = tar_dataset(server.url("places.tar"))
    data = (tmp_path / "web/places.tar").read_bytes()
    checksums = {"places.tar": f"md5:{hashlib.md5(data).hexdigest()}"}
    make_until(server, tmp_path / "R", spec, num_parts=5)
    part = next((tmp_path / "R/sources/d").glob("places.tar.part-*"))
    part.write_bytes(bytes(PART_BYTES))
    for _ in range(2):
        with pytest.raises(
            EvenmixError,
            match=r"copy of http.*places\.tar has md5 .* remove .*/places\.tar\.part-\*",
        ):
            make(tmp_path / "R", spec, checksums=checksums)
    for path in (tmp_path / "R/sources/d").glob("places.tar.part-*"):
        path.unlink()
    assert len(make(tmp_path / "R", spec, checksums=checksums)) == 15


def test_a_part_of_another_size_is_named(tmp_path: Path, server: FileServer) -> None:
    write_tar(tmp_path / "web/places.tar")
    (tmp_path / "R/sources/d").mkdir(parents=True)
    (tmp_path / "R/sources/d/places.tar.part-00003").write_bytes(b"short")
    with pytest.raises(EvenmixError, match="part-00003 has 5 bytes and is no part of http"):
        make(tmp_path / "R", tar_dataset(server.url("places.tar")))


# A process that is stopped

MIRROR = """
import sys
from pipeline.dataset import Dataset
from pipeline.mirror import mirror
root, dataset, part_bytes = sys.argv[1:]
mirror(root, "d", Dataset.model_validate_json(dataset), {}, part_bytes=int(part_bytes))
"""


def start_mirror(root: Path, spec: Dataset, *before: str) -> "subprocess.Popen[str]":
    program = "\n".join([*before, MIRROR])
    arguments = [str(root), spec.model_dump_json(), str(PART_BYTES)]
    return subprocess.Popen(
        [sys.executable, "-c", program, *arguments],
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


@pytest.mark.parametrize("name", ["places.tar", "places.tar.gz"])
def test_a_killed_copy_goes_on_and_fetches_no_part_twice(
    tmp_path: Path, server: FileServer, name: str
) -> None:
    write_tar(tmp_path / "web" / name)
    size = (tmp_path / "web" / name).stat().st_size
    undisturbed = make(tmp_path / "R1", tar_dataset(server.url(name)))
    server.ranges.clear()

    spec = tar_dataset(server.url(name))
    folder = tmp_path / "R/sources/d"
    target = name if name == "places.tar" else f".temporary-{name}"
    server.held_after = 6
    process = start_mirror(tmp_path / "R", spec)
    while process.poll() is None and len(list(folder.glob(f"{target}.part-*"))) < 6:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    before = list(server.ranges)
    assert len(before) == 6
    server.held_after = sys.maxsize
    assert make(tmp_path / "R", spec) == undisturbed
    # A request of the killed command may still have been on its way, and come twice.
    assert {server.ranges.count(part) for part in before} == {1}
    assert sorted(set(server.ranges)) == ranges(size)
    assert names(folder) == names(tmp_path / "R1/sources/d")


def test_a_command_killed_while_it_decompresses_fetches_nothing_again(
    tmp_path: Path, server: FileServer
) -> None:
    write_tar(tmp_path / "web/places.tar.gz")
    spec = tar_dataset(server.url("places.tar.gz"))
    undisturbed = make(tmp_path / "R1", spec)
    server.ranges.clear()
    # The third part of the tar is never written.
    stop_there = """
import os, signal
from pipeline import storage
publish = storage.publish
def publish_or_die(url, data):
    if url.endswith("/places.tar.part-00002"):
        os.kill(os.getpid(), signal.SIGKILL)
    return publish(url, data)
storage.publish = publish_or_die
"""
    process = start_mirror(tmp_path / "R", spec, stop_there)
    printed, _ = process.communicate()
    assert process.returncode == -signal.SIGKILL, printed
    folder = tmp_path / "R/sources/d"
    first = folder / "places.tar.part-00000"
    written = first.stat().st_mtime_ns
    requests = len(server.ranges)
    assert make(tmp_path / "R", spec) == undisturbed
    assert len(server.ranges) == requests
    assert first.stat().st_mtime_ns == written
    assert names(folder) == names(tmp_path / "R1/sources/d")


def test_a_full_disk_is_one_clear_error_and_the_copy_goes_on(
    tmp_path: Path, server: FileServer
) -> None:
    """The kernel refuses files above 10,000 bytes, as a full disk does."""
    write_tar(tmp_path / "web/places.tar")
    size = (tmp_path / "web/places.tar").stat().st_size
    spec = tar_dataset(server.url("places.tar"))
    limit = """
import resource, signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
"""
    process = start_mirror(tmp_path / "R", spec, limit)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "pipeline.errors.EvenmixError: cannot write" in printed.splitlines()[-1]
    make(tmp_path / "R", spec)
    assert set(ranges(size)) <= set(server.ranges)


def test_a_disk_without_room_is_noticed_before_the_start(
    tmp_path: Path, server: FileServer
) -> None:
    write_tar(tmp_path / "web/places.tar")
    server.claimed_bytes = 1 << 60
    with pytest.raises(EvenmixError, match="at least 1,152,921,504,606,846,976 bytes are still to"):
        make(tmp_path / "R", tar_dataset(server.url("places.tar")), part_bytes=1 << 50)
    assert not (tmp_path / "R").exists()
    assert server.ranges == []


# A compressed tar


def test_a_compressed_tar_has_the_records_that_were_packed(
    tmp_path: Path, server: FileServer
) -> None:
    write_tar(tmp_path / "web/inat.tar.gz")
    compressed = (tmp_path / "web/inat.tar.gz").read_bytes()
    spec = tar_dataset(server.url("inat.tar.gz"))
    sha256 = f"sha256:{hashlib.sha256(compressed).hexdigest()}"
    files = make(tmp_path / "R", spec, checksums={"inat.tar.gz": sha256})
    unpacked = gzip.decompress(compressed)
    folder = tmp_path / "R/sources/d"
    assert b"".join((folder / name).read_bytes() for name in files) == unpacked
    assert names(folder) == [
        "inat.tar.gz.checked.json",
        "inat.tar.gz.source.json",
        *files,
        "mirror.json",
    ]
    direct = tmp_path / "inat.tar"
    direct.write_bytes(unpacked)
    found = read_all(mirrored(str(tmp_path / "R"), "d", spec))
    assert len(found) == 40
    assert found == read_all(tar_dataset(str(direct)))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (gzip.compress(random.Random(0).randbytes(50_000))[:-9], "end-of-stream marker"),
        (b"no gzip at all", "Not a gzipped file"),
        (gzip.compress(bytes(9_000))[:-8] + bytes(8), "CRC check failed"),
    ],
    ids=["cut", "no-gzip", "wrong-crc"],
)
def test_what_cannot_be_decompressed_is_damaged_at_its_source(
    tmp_path: Path, data: bytes, message: str
) -> None:
    (tmp_path / "a.tar.gz").write_bytes(data)
    with pytest.raises(EvenmixError, match=rf"a\.tar\.gz cannot be decompressed \(.*{message}"):
        make(tmp_path / "R", tar_dataset(str(tmp_path / "a.tar.gz")))


def test_a_gzip_bomb_does_not_fill_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(unpacking, "_FREE_EXPANSION_BYTES", 100_000)
    (tmp_path / "a.tar.gz").write_bytes(gzip.compress(bytes(10_000_000)))
    size = (tmp_path / "a.tar.gz").stat().st_size
    with pytest.raises(EvenmixError, match=rf"to more than {100_000 + 50 * size:,} bytes"):
        make(tmp_path / "R", tar_dataset(str(tmp_path / "a.tar.gz")))
    parts = (tmp_path / "R/sources/d").glob("a.tar.part-*")
    assert sum(path.stat().st_size for path in parts) < 100_000 + 50 * size + 2 * PART_BYTES


# A SQLite file


def sqlite_dataset(source: str) -> Dataset:
    return Dataset.model_validate(
        {
            "layout": "sqlite",
            "source": source,
            "licence": "CC",
            "mirror": True,
            "table": "photos",
            "id_rule": "{photoid}-{row}",
            "image_url": "{url:multimedia_commons_path}",
            "text_field": "title",
            "extra_fields": ["marker", "latitude", "mixed", "absent"],
        }
    )


def write_sqlite(path: Path) -> None:
    rows: Sequence[tuple[Any, ...]] = [
        (10**10 + n, f"http://x/{n}", f"title {n}", n % 2, n / 7, n if n % 3 else f"text {n}", None)
        for n in range(1, 51)
    ]
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute(
            "CREATE TABLE photos (photoid INTEGER, url TEXT, title TEXT, marker INTEGER, "
            "latitude REAL, mixed, absent TEXT)"
        )
        connection.executemany("INSERT INTO photos VALUES (?,?,?,?,?,?,?)", rows)
        connection.execute("UPDATE photos SET title = CAST(x'e9' AS TEXT) WHERE rowid = 7")
        connection.execute("UPDATE photos SET url = NULL WHERE rowid = 8")
        connection.execute("DELETE FROM photos WHERE rowid BETWEEN 20 AND 31")


def test_a_sqlite_file_becomes_parquet_with_the_same_records(
    tmp_path: Path, server: FileServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(unpacking, "ROWS_PER_FILE", 10)
    write_sqlite(tmp_path / "web/yfcc.sql")
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    spec = sqlite_dataset(server.url("yfcc.sql"))
    files = make(tmp_path / "R", spec, part_bytes=3000, scratch=str(scratch))
    assert list(files) == [f"yfcc.sql-{number:05d}.parquet" for number in range(5)]
    folder = tmp_path / "R/sources/d"
    assert [pq.read_metadata(folder / name).num_rows for name in files] == [10, 9, 0, 9, 10]
    assert names(folder) == [
        "mirror.json",
        *files,
        "yfcc.sql.checked.json",
        "yfcc.sql.source.json",
    ]
    assert names(scratch) == []

    found = read_all(mirrored(str(tmp_path / "R"), "d", spec))
    direct = read_all(spec.model_copy(update={"source": str(tmp_path / "web/yfcc.sql")}))
    assert [r.source_id for r in found[:2]] == ["10000000001-1", "10000000002-2"]
    assert [r.reason for r in found[6:8]] == [RejectReason.BAD_RECORD] * 2
    # A Parquet column has one type: integers among texts become texts.
    for record in direct:
        if record.reason is None:
            record.fields["mixed"] = str(record.fields["mixed"])  # type: ignore[index]
    assert [replace(r, detail="") for r in found] == [replace(r, detail="") for r in direct]


def test_parquet_files_that_are_there_are_not_made_again(
    tmp_path: Path, server: FileServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(unpacking, "ROWS_PER_FILE", 10)
    write_sqlite(tmp_path / "web/yfcc.sql")
    spec = sqlite_dataset(server.url("yfcc.sql"))
    undisturbed = make(tmp_path / "R1", spec)
    publish = storage.publish

    def publish_or_stop(url: str, data: bytes) -> bool:
        if url.endswith("00003.parquet"):
            raise KeyboardInterrupt
        return publish(url, data)

    monkeypatch.setattr(storage, "publish", publish_or_stop)
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path / "R", spec)
    monkeypatch.setattr(storage, "publish", publish)
    server.ranges.clear()
    first = tmp_path / "R/sources/d/yfcc.sql-00000.parquet"
    written = first.stat().st_mtime_ns
    assert make(tmp_path / "R", spec) == undisturbed
    assert first.stat().st_mtime_ns == written
    assert server.ranges == []


def test_a_scratch_folder_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    write_sqlite(tmp_path / "yfcc.sql")
    spec = sqlite_dataset(str(tmp_path / "yfcc.sql"))
    with pytest.raises(
        EvenmixError, match=r"cannot put .*yfcc\.sql together in .*/none: .*--scratch"
    ):
        make(tmp_path / "R", spec, scratch=str(tmp_path / "none"))


# What needs no mirror, or has none


def test_layouts_that_are_read_in_parallel_need_no_mirror(tmp_path: Path) -> None:
    spec = Dataset(layout="webdataset", source=str(tmp_path / "*.tar"), licence="CC0")
    with pytest.raises(EvenmixError, match="layout webdataset is read in parallel where it is"):
        make(tmp_path / "R", spec)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([], "nothing at .*; correct its source"),
        (["a.zip"], r"a\.zip is neither \.tar nor \.tar\.gz"),
        (["a.tar", "a.tgz"], r"2 files at .* would become .*sources/d/a\.tar"),
        (["a.tar"], r"a\.tar is empty"),
    ],
)
def test_sources_that_cannot_be_mirrored(tmp_path: Path, files: list[str], message: str) -> None:
    (tmp_path / "in").mkdir()
    for name in files:
        (tmp_path / "in" / name).write_bytes(b"" if len(files) == 1 else b"x")
    with pytest.raises(EvenmixError, match=message):
        make(tmp_path / "R", tar_dataset(f"{tmp_path}/in/*"))


def test_a_mirror_that_is_not_there_or_not_of_this_source_is_not_read(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar")
    spec, root = tar_dataset(str(tmp_path / "a.tar")), str(tmp_path / "R")
    with pytest.raises(EvenmixError, match=r"d has no mirror in .*: run `evenmix mirror d` first"):
        mirrored(root, "d", spec)
    make(root, spec)
    other = tar_dataset(str(tmp_path / "b.tar"))
    for read in (make, lambda root, spec: mirrored(root, "d", spec)):
        with pytest.raises(EvenmixError, match=r"is the mirror of .*a\.tar, not of .*b\.tar"):
            read(root, other)
    (tmp_path / "R/sources/d/mirror.json").write_text("{}")
    with pytest.raises(EvenmixError, match=r"mirror\.json is damaged \('source'\); remove it"):
        mirrored(root, "d", spec)


# The command

RECIPE = """
root = "{root}"
[datasets.birds]
layout = "tar"
source = "{source}"
mirror = true
licence = "CC0 1.0"
[captions.own]
engine = "source"
[mixture]
name = "m"
resolution = 32
captions = "own"
"""


def test_the_command_mirrors_a_dataset_of_a_recipe(tmp_path: Path, server: FileServer) -> None:
    write_tar(tmp_path / "web/birds.tar.gz")
    source, root = server.url("birds.tar.gz"), tmp_path / "R"
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(RECIPE.format(root=tmp_path / "elsewhere", source=source))
    arguments = ["mirror", "birds", "--recipe", str(recipe), "--root", str(root)]
    printed = finish(evenmix(*arguments))
    assert printed == f"mirror: {root}/sources/birds is complete: 235.5 kB, files to read: 1\n"
    assert names(root / "sources/birds")[2:] == ["birds.tar.part-00000", "mirror.json"]


def test_ctrl_c_ends_the_command_at_once_even_if_the_server_hangs(
    tmp_path: Path, server: FileServer
) -> None:
    write_tar(tmp_path / "web/birds.tar")
    server.held_after = 0
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(RECIPE.format(root=tmp_path / "R", source=server.url("birds.tar")))
    process = evenmix("mirror", "birds", "--recipe", str(recipe))
    while process.poll() is None and server.num_held < 1:
        time.sleep(0.02)
    stopped = time.monotonic()
    process.send_signal(signal.SIGINT)
    printed, _ = process.communicate(timeout=60)
    assert time.monotonic() - stopped < 30
    assert (process.returncode, printed) == (
        130,
        "stopped; start the same command again to go on\n",
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["inaturalis", "--root", "R"],
            "the catalogue has no dataset inaturalis; did you mean 'ina",
        ),
        (["inaturalist"], "name the corpus root with --root, or a recipe with --recipe"),
        (["fluxreason", "--root", "R"], "layout parquet is read in parallel where it is"),
    ],
)
def test_a_wrong_command_line_is_one_line(arguments: list[str], message: str) -> None:
    process = evenmix("mirror", *arguments)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    assert printed.startswith("error: ")
    assert message in printed
    assert printed.count("\n") == 1
