"""Sources on the web and on the Hub: listed, read by ranges, and out of reach in clear words."""

from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from gcsfs.credentials import GoogleCredentials
from google.auth.credentials import Credentials
from google.auth.exceptions import RefreshError, TransportError

from pipeline import readers, storage, stores
from pipeline.errors import EvenmixError
from pipeline.recipe import Images
from tests.http_files import FileServer, serve_files
from tests.hub import TOKEN, Hub, Page, Repository, point_at, serve_hub
from tests.sources import MAX_BYTES, Members, dataset, read_all, tar_bytes

SAMPLES: Members = [(f"{n:03d}.{s}", b"%d" % n * 900) for n in range(60) for s in ("jpg", "txt")]


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FileServer]:
    """A web server of the files in ``tmp_path``; waits between attempts are short."""
    monkeypatch.setattr(stores, "RETRY_WAITS_S", (0.01, 0.01, 0.01))
    with serve_files(tmp_path) as running:
        yield running


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with serve_hub() as running:
        point_at(running, monkeypatch)
        yield running


def test_a_file_on_the_web_is_found_with_its_etag(server: FileServer, tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(b"0123456789")
    (file,) = storage.glob_files(server.url("a.tar"))
    assert (file.url, file.name, file.num_bytes) == (server.url("a.tar"), "a.tar", 10)
    assert file.version == 'etag:"781e5e245d69b566979b86e28d23f2c7"'
    assert storage.glob_files(server.url("absent.tar")) == []
    assert storage.read_bytes(file.url, 3, 4) == b"3456"
    assert storage.read_bytes(file.url) == b"0123456789"
    with pytest.raises(EvenmixError, match="is shorter than expected"):
        storage.read_bytes(file.url, 8, 4)


def test_a_tar_on_the_web_is_read_by_ranges(server: FileServer, tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(tar_bytes(SAMPLES))
    spec = dataset("webdataset", server.url("a.tar"))
    (item,) = readers.plan("d", spec, Images())
    assert server.ranges == []
    assert [r.source_id for r in readers.read(spec, item, MAX_BYTES)] == [
        f"{n:03d}" for n in range(60)
    ]
    assert read_all(spec, bytes_per_shard=30_000) == read_all(spec)


def test_a_parquet_file_on_the_web_is_read_by_ranges(server: FileServer, tmp_path: Path) -> None:
    table = pa.table({"id": list(range(500)), "image": [b"x" * 1000] * 500})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=100, compression="none")
    spec = dataset("parquet", server.url("a.parquet"), id_rule="{id}")
    items = readers.plan("d", spec, Images(records_per_shard=100))
    server.ranges.clear()
    assert len(list(readers.read(spec, items[3], MAX_BYTES))) == 100
    assert sum(last - first for first, last in server.ranges) < 300_000


def test_what_may_pass_is_tried_again(server: FileServer, tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(bytes(range(256)) * 400)
    url = server.url("a")
    server.unavailable = 3
    assert storage.read_bytes(url, 256, 256) == bytes(range(256))
    server.dropped = 3
    assert storage.read_bytes(url, 512, 256) == bytes(range(256))
    server.dropped = 2
    with storage.open_file(url, 102_400, buffer_bytes=1000) as file:
        assert file.read() == bytes(range(256)) * 400


def test_what_does_not_pass_is_one_error_that_names_the_file(
    server: FileServer, tmp_path: Path
) -> None:
    (tmp_path / "a").write_bytes(bytes(1000))
    url = server.url("a")
    server.unavailable = 4
    with pytest.raises(EvenmixError) as caught:
        storage.read_bytes(url, 0, 10)
    assert str(caught.value) == (
        f"{url} cannot be read (HTTP 503); start the same command again later"
    )
    requests = server.num_requests
    with pytest.raises(EvenmixError) as caught:
        storage.read_bytes(server.url("absent"), 0, 10)
    assert str(caught.value) == f"{server.url('absent')} does not exist"
    assert server.num_requests == requests + 1


def test_a_source_that_disappears_half_way_is_one_error(tmp_path: Path, server: FileServer) -> None:
    (tmp_path / "a.tar").write_bytes(tar_bytes([(f"{n}.jpg", bytes(800_000)) for n in range(12)]))
    spec = dataset("webdataset", server.url("a.tar"))
    (item,) = readers.plan("d", spec, Images())
    records = readers.read(spec, item, MAX_BYTES)
    assert next(records).source_id == "0"
    (tmp_path / "a.tar").unlink()
    with pytest.raises(EvenmixError) as caught:
        list(records)
    assert str(caught.value) == f"{server.url('a.tar')} does not exist"


@pytest.mark.parametrize("whole_groups", [True, False])
def test_a_table_that_disappears_half_way_is_one_error(
    tmp_path: Path, server: FileServer, monkeypatch: pytest.MonkeyPatch, whole_groups: bool
) -> None:
    """Arrow hands on what is raised where it reads, in its own threads too."""
    monkeypatch.setattr(storage, "_WHOLE_ROW_GROUP_BYTES", (1 << 30) * whole_groups)
    table = pa.table({"id": list(range(30)), "image": [bytes([n]) * 900 for n in range(30)]})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=10, compression="none")
    spec = dataset("parquet", server.url("a.parquet"), id_rule="{id}")
    (item,) = readers.plan("d", spec, Images())
    records = readers.read(spec, item, MAX_BYTES)
    assert next(records).source_id == "0"
    (tmp_path / "a.parquet").unlink()
    with pytest.raises(EvenmixError) as caught:
        list(records)
    assert str(caught.value) == f"{server.url('a.parquet')} does not exist"


def test_a_server_out_of_reach_is_not_taken_for_an_absent_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stores, "RETRY_WAITS_S", (0.01,))
    with serve_files(tmp_path) as gone:
        url = gone.url("a.tar")
    for call in (storage.glob_files, storage.file_info, lambda u: storage.read_bytes(u, 0, 1)):
        with pytest.raises(EvenmixError, match=r"is out of reach .* start the same command again"):
            call(url)


def test_a_password_in_a_url_is_not_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stores, "RETRY_WAITS_S", ())
    with serve_files(tmp_path) as gone:
        url = gone.url("a.tar").replace("//", "//me:secret@")
    with pytest.raises(EvenmixError) as caught:
        storage.glob_files(url)
    assert "secret" not in str(caught.value)


def test_a_server_that_refuses_ranges_is_one_error(hub: Hub) -> None:
    hub.pages["/a.tar"] = Page(b"x", headers={"Accept-Ranges": "none"})
    with pytest.raises(EvenmixError, match=r"a.tar cannot be read in parts: .* download it"):
        storage.glob_files(f"{hub.url}/a.tar")


def test_a_server_that_ignores_ranges_is_one_error(server: FileServer, tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(tar_bytes([(f"{n}.jpg", bytes(800_000)) for n in range(30)]))
    server.has_ranges = False
    spec = dataset("webdataset", server.url("a.tar"))
    with pytest.raises(EvenmixError, match=r"a.tar cannot be read in parts: .* download it"):
        read_all(spec)


def test_refusal_is_told_as_such(hub: Hub) -> None:
    hub.pages["/a.tar"] = Page(status=403)
    with pytest.raises(EvenmixError, match=r"a.tar is not open to you \(HTTP 403\); check the"):
        storage.glob_files(f"{hub.url}/a.tar")


def test_files_on_the_hub_are_listed_with_their_hashes(hub: Hub) -> None:
    sha = "0" * 40
    files = {
        "CoverBook/train-00000.parquet": b"one",
        "CoverBook/notes.txt": b"text",
        "PPT2Details/train-00000.parquet": b"two",
    }
    hub.repositories["someone/pictures"] = Repository({sha: files})
    root = f"hf://datasets/someone/pictures@{sha}"
    found = storage.glob_files(f"{root}/*/train-*.parquet")
    assert [file.name for file in found] == [
        "CoverBook/train-00000.parquet",
        "PPT2Details/train-00000.parquet",
    ]
    assert [file.url for file in found] == [f"{root}/{file.name}" for file in found]
    assert all(str(file.version).startswith("sha256:") for file in found)
    assert [storage.read_bytes(file.url) for file in found] == [b"one", b"two"]
    assert storage.read_bytes(found[1].url, 1, 2) == b"wo"
    (text,) = storage.glob_files(f"{root}/CoverBook/notes.txt")
    assert str(text.version).startswith("git:")


def test_a_tar_on_the_hub_is_read(hub: Hub) -> None:
    sha = "1" * 40
    hub.repositories["someone/tars"] = Repository({sha: {"train/a.tar": tar_bytes(SAMPLES)}})
    spec = dataset("webdataset", f"hf://datasets/someone/tars@{sha}/train/*.tar")
    assert len(read_all(spec, bytes_per_shard=50_000)) == 60


def test_a_gated_repository_is_told_as_such(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    sha = "2" * 40
    hub.repositories["someone/gated"] = Repository({sha: {"a.tar": tar_bytes(SAMPLES)}}, gated=True)
    spec = dataset("webdataset", f"hf://datasets/someone/gated@{sha}/*.tar")
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(EvenmixError, match=r"accept the dataset's terms .* HF_TOKEN") as caught:
        read_all(spec)
    assert "hf_wrong" not in str(caught.value)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert len(read_all(spec)) == 60


def test_a_repository_that_is_not_there_is_told_as_such(hub: Hub) -> None:
    for call in (storage.glob_files, storage.list_files):
        with pytest.raises(EvenmixError, match="hf://datasets/someone/absent"):
            call("hf://datasets/someone/absent/*.tar")


class NoToken(Credentials):
    """An account for which Google gives no token."""

    def __init__(self, error: RefreshError):
        super().__init__()  # type: ignore[no-untyped-call]
        self.error = error
        self.num_asked = 0

    def refresh(self, request: object) -> None:
        self.num_asked += 1
        raise self.error


def metadata_server_is_down() -> RefreshError:
    error = RefreshError("no answer of the metadata server")
    error.__cause__ = TransportError("HTTP 503")
    return error


@pytest.mark.parametrize(
    ("error", "num_asked", "told"),
    [
        (RefreshError("unavailable", retryable=True), 3, r"again later"),
        (metadata_server_is_down(), 3, r"again later"),
        (RefreshError("invalid_grant"), 1, r"is not open to you \(HTTP 401\)"),
    ],
)
def test_a_token_that_cannot_be_had_for_a_moment_is_asked_for_again(
    error: RefreshError, num_asked: int, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stores, "OUTAGE_WAITS_S", (0.0, 0.0))
    account = NoToken(error)
    signing_in = GoogleCredentials("project", "read_only", account)
    with pytest.raises(EvenmixError, match=told):
        stores.ask("gs://bucket/a", signing_in.maybe_refresh)
    assert account.num_asked == num_asked
