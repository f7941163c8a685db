"""A file is published whole or not at all and once, on a local disk as in an object store."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import pyarrow as pa
import pytest

from pipeline import storage
from pipeline.errors import EvenmixError
from pipeline.receipts import checksum

WRITERS = 8


@pytest.fixture(params=["local", "gs"])
def folder(request: pytest.FixtureRequest) -> str:
    """An empty folder of each kind of store."""
    if request.param == "gs":
        return str(request.getfixturevalue("gcs_bucket"))
    return str(request.getfixturevalue("tmp_path"))


def names(folder: str) -> list[str]:
    return [file.name for file in storage.list_files(folder)]


@pytest.mark.parametrize("size", [0, 1, 70_000])
def test_publish_writes_all_bytes(folder: str, size: int) -> None:
    data = bytes(range(256)) * size
    url = storage.join(folder, "a", "b.bin")
    assert not storage.exists(url)
    assert storage.publish(url, data)
    assert storage.exists(url)
    assert storage.read_bytes(url) == data
    (file,) = storage.list_files(folder)
    assert (file.url, file.name, file.num_bytes) == (url, "a/b.bin", len(data))
    # Where the store keeps a checksum, it is the one that would be computed.
    assert file.version in (None, f"crc32c:{checksum([data]).crc32c}")
    assert (file.version is None) == ("://" not in url)


def test_publish_leaves_a_taken_name_alone(folder: str) -> None:
    url = storage.join(folder, "file")
    assert storage.publish(url, b"first")
    assert not storage.publish(url, b"second")
    assert storage.read_bytes(url) == b"first"
    assert names(folder) == ["file"]


def test_of_concurrent_publishers_exactly_one_wins(folder: str) -> None:
    url = storage.join(folder, "file")
    start = Barrier(WRITERS)

    def contend(writer: int) -> bool:
        start.wait()
        return storage.publish(url, b"%d" % writer * 10_000)

    with ThreadPoolExecutor(WRITERS) as pool:
        won = list(pool.map(contend, range(WRITERS)))
    assert won.count(True) == 1
    assert storage.read_bytes(url) == b"%d" % won.index(True) * 10_000
    assert names(folder) == ["file"]


def test_replace_takes_a_free_or_taken_name(folder: str) -> None:
    url = storage.join(folder, "file")
    storage.replace(url, b"first")
    storage.replace(url, b"second")
    assert storage.read_bytes(url) == b"second"
    assert names(folder) == ["file"]


@pytest.mark.parametrize("size", [0, 300_000, 9 << 20])
def test_bytes_that_look_like_the_end_of_a_multipart_upload_survive(folder: str, size: int) -> None:
    data = b"before\r\n--==0==--\r\n--==0==\r\n\r\nafter" + bytes(size)
    url = storage.join(folder, "file")
    assert storage.publish(url, data)
    assert storage.read_bytes(url) == data


def test_read_bytes_of_a_range(folder: str) -> None:
    url = storage.join(folder, "file")
    storage.publish(url, b"0123456789")
    assert storage.read_bytes(url, 3, 4) == b"3456"
    assert storage.read_bytes(url, 7) == b"789"
    assert storage.read_bytes(url, 10, 0) == b""
    assert storage.read_bytes(url, 0, 10) == b"0123456789"


@pytest.mark.parametrize(("offset", "length"), [(8, 3), (10, 1), (100, 5)])
def test_read_bytes_past_the_end_names_the_file(folder: str, offset: int, length: int) -> None:
    url = storage.join(folder, "file")
    storage.publish(url, b"0123456789")
    with pytest.raises(EvenmixError, match="is shorter than expected") as caught:
        storage.read_bytes(url, offset, length)
    assert str(caught.value).startswith(url)


def test_reading_what_is_not_there_names_it(folder: str) -> None:
    url = storage.join(folder, "absent.parquet")
    for read in (storage.read_bytes, storage.read_parquet, storage.parquet_metadata):
        with pytest.raises(EvenmixError) as caught:
            read(url)
        assert str(caught.value) == f"{url} does not exist"
    storage.remove(url)


def test_a_folder_read_as_a_file_is_an_error_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(EvenmixError, match=f"{tmp_path} cannot be read"):
        storage.read_bytes(str(tmp_path))


def test_a_store_of_unknown_kind_is_an_error_that_names_it() -> None:
    with pytest.raises(EvenmixError, match=r"^nosuch://bucket/file cannot be opened"):
        storage.read_bytes("nosuch://bucket/file")


def test_list_files_sees_what_has_just_been_published(folder: str) -> None:
    for number, name in enumerate(["b", "a/c", "a/b"]):
        storage.publish(storage.join(folder, name), bytes(number))
        assert name in names(folder)
    assert [(file.name, file.num_bytes) for file in storage.list_files(folder)] == [
        ("a/b", 2),
        ("a/c", 1),
        ("b", 0),
    ]
    assert names(storage.join(folder, "a")) == ["b", "c"]
    assert names(storage.join(folder, "absent")) == []


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("*.tar", ["a.tar", "b.tar"]),
        ("[ab].tar", ["a.tar", "b.tar"]),
        ("?.tar", ["a.tar", "b.tar"]),
        ("*/x.tar", ["sub/x.tar"]),
        ("**/*.tar", ["a.tar", "b.tar", "sub/x.tar"]),
        ("a.tar", ["a.tar"]),
        ("sub", []),
        ("absent/*.tar", []),
    ],
)
def test_glob_files(folder: str, pattern: str, expected: list[str]) -> None:
    for name in ["b.tar", "a.tar", "sub/x.tar", "a.txt"]:
        storage.publish(storage.join(folder, name), b"x")
    found = storage.glob_files(storage.join(folder, pattern))
    assert [file.name for file in found] == expected
    assert [storage.read_bytes(file.url) for file in found] == [b"x"] * len(expected)


@pytest.mark.parametrize("pattern", ["*.tar", "a.tar", "./*.tar"])
def test_glob_files_in_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pattern: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.tar").write_bytes(b"x")
    (file,) = storage.glob_files(pattern)
    assert file.name == "a.tar"
    assert storage.read_bytes(file.url) == b"x"


def test_sweep_removes_temporary_files_only(folder: str) -> None:
    leftover = f"{storage.TEMPORARY_PREFIX}0123-shard.tar"
    for name in [leftover, f"sub/{leftover}", "sub/shard.tar"]:
        storage.publish(storage.join(folder, name), b"x")
    storage.sweep(folder)
    assert names(folder) == ["sub/shard.tar"]


def test_parquet_keeps_rows_and_metadata(folder: str) -> None:
    url = storage.join(folder, "table.parquet")
    table = pa.table({"key": ["a", "b"], "number": [1, None]})
    storage.publish(url, storage.parquet_bytes(table, {"receipt": "café"}))
    assert storage.read_parquet(url).to_pylist() == table.to_pylist()
    assert storage.read_parquet(url, ["number"]).to_pydict() == {"number": [1, None]}
    assert storage.parquet_metadata(url) == {"receipt": "café"}


def test_parquet_of_equal_rows_has_equal_bytes_however_they_are_chunked() -> None:
    whole = pa.table({"key": [f"{n:05}" for n in range(5000)], "number": range(5000)})
    chunked = pa.concat_tables([whole.slice(start, 700) for start in range(0, 5000, 700)])
    assert storage.parquet_bytes(whole, {}) == storage.parquet_bytes(chunked, {})


def test_read_parquet_reads_single_fields_of_nested_columns(tmp_path: Path) -> None:
    url = str(tmp_path / "t.parquet")
    rows = [{"key": "a", "captions": [{"text": "t", "outcome": "ok"}]}, {"key": "b"}]
    table = pa.Table.from_pylist(rows)
    storage.publish(url, storage.parquet_bytes(table, {}))
    found = storage.read_parquet(url, ["key", "captions.list.element.outcome"])
    assert found.to_pylist() == [
        {"key": "a", "captions": [{"outcome": "ok"}]},
        {"key": "b", "captions": None},
    ]
    with pytest.raises(EvenmixError, match=r"no column captions\.list\.element\.model; it has key"):
        storage.read_parquet(url, ["captions.list.element.model"])


def test_read_parquet_names_the_missing_column(folder: str) -> None:
    url = storage.join(folder, "table.parquet")
    storage.publish(url, storage.parquet_bytes(pa.table({"key": ["a"]}), {}))
    with pytest.raises(EvenmixError) as caught:
        storage.read_parquet(url, ["key", "text", "image"])
    assert str(caught.value) == f"{url} has no column image, text; it has key"


@pytest.mark.parametrize("keep", [0, 3, -20])
def test_read_parquet_of_a_damaged_file_names_it(folder: str, keep: int) -> None:
    url = storage.join(folder, "table.parquet")
    storage.publish(url, storage.parquet_bytes(pa.table({"key": ["a"] * 99}), {})[:keep])
    with pytest.raises(EvenmixError, match="cannot be read as Parquet") as caught:
        storage.read_parquet(url)
    assert str(caught.value).startswith(url)


def test_read_chunks_gives_the_file_in_order(folder: str) -> None:
    url = storage.join(folder, "file")
    data = bytes(range(256)) * 50
    storage.publish(url, data)
    chunks = list(storage.read_chunks(url, chunk_bytes=1000))
    assert b"".join(chunks) == data
    assert max(map(len, chunks)) == 1000


def test_a_file_in_the_place_of_a_folder_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x")
    with pytest.raises(EvenmixError, match="cannot write"):
        storage.publish(str(tmp_path / "file" / "below"), b"y")


def test_a_writer_whose_temporary_file_was_swept_has_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = str(tmp_path / "file")

    def overtaken(fd: int) -> None:
        monkeypatch.undo()
        storage.publish(url, b"the other's")
        storage.sweep(str(tmp_path))

    monkeypatch.setattr("os.fsync", overtaken)
    assert not storage.publish(url, b"mine")
    assert storage.read_bytes(url) == b"the other's"
    assert names(str(tmp_path)) == ["file"]


def test_a_writer_that_was_swept_before_the_other_published_writes_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = str(tmp_path / "file")

    def sweep(fd: int) -> None:
        monkeypatch.undo()
        storage.sweep(str(tmp_path))

    monkeypatch.setattr("os.fsync", sweep)
    assert storage.publish(url, b"mine")
    assert storage.read_bytes(url) == b"mine"
    assert names(str(tmp_path)) == ["file"]


FULL_DISK = """
import resource, signal, sys
from pipeline import storage
from pipeline.errors import EvenmixError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
folder = sys.argv[1]
assert storage.publish(f"{folder}/small", bytes(1000))
try:
    storage.publish(f"{folder}/large", bytes(2 << 20))
except EvenmixError as error:
    print(error)
"""


def test_a_write_that_the_system_refuses_half_way_leaves_nothing(tmp_path: Path) -> None:
    """The kernel cuts the write at 1 MiB, as a full disk or a quota does, on any file system."""
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(tmp_path)], check=True, capture_output=True, text=True
    )
    assert done.stdout == (
        f"cannot write {tmp_path}/large (2,097,152 bytes): [Errno 27] File too large. Nothing that "
        "was published is lost; free some space or check the permissions and start the same "
        "command again.\n"
    )
    assert names(str(tmp_path)) == ["small"]
