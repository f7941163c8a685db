"""The storage that the other tests trust: preconditions hold, and all else passes through."""

import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection
from pathlib import Path
from threading import Barrier
from typing import TYPE_CHECKING, Any

import fsspec
import pytest
from google.api_core.exceptions import BadRequest, PreconditionFailed
from google.cloud.storage import Blob, Client

if TYPE_CHECKING:
    from tests.gcs import Proxy

KIB, MIB = 2**10, 2**20
WRITERS = 4


def pipe_at_once(fs: Any, path: str, data: bytes, scratch: Path) -> None:
    fs.pipe_file(path, data, mode="create")


def pipe_in_chunks(fs: Any, path: str, data: bytes, scratch: Path) -> None:
    fs.pipe_file(path, data, mode="create", chunksize=256 * KIB)


def put(fs: Any, path: str, data: bytes, scratch: Path) -> None:
    """One request below 5 MiB, a resumable upload from there on."""
    scratch.write_bytes(data)
    fs.put_file(str(scratch), path, mode="create", chunksize=MIB)


@pytest.mark.parametrize(
    ("create", "size"),
    [(pipe_at_once, 0), (pipe_at_once, KIB), (pipe_in_chunks, MIB), (put, KIB), (put, 6 * MIB)],
)
def test_of_concurrent_creators_one_wins(
    create: Callable[[Any, str, bytes, Path], None], size: int, gcs_bucket: str, tmp_path: Path
) -> None:
    fs, root = fsspec.url_to_fs(gcs_bucket)
    start = Barrier(WRITERS)

    def contend(writer: int) -> bytes | None:
        data = bytes([writer]) * size
        start.wait()
        try:
            create(fs, f"{root}/object", data, tmp_path / str(writer))
        except FileExistsError:
            return None
        return data

    with ThreadPoolExecutor(WRITERS) as pool:
        outcomes = list(pool.map(contend, range(WRITERS)))

    (winner,) = [outcome for outcome in outcomes if outcome is not None]
    assert fs.cat_file(f"{root}/object") == winner


def test_precondition_of_a_resumable_upload_must_hold_at_its_end(gcs_bucket: str) -> None:
    fs, root = fsspec.url_to_fs(gcs_bucket)
    first, second = (fs.open(f"{root}/object", "xb", block_size=256 * KIB) for _ in range(2))
    first.write(b"1" * MIB)
    second.write(b"2" * MIB)  # both uploads have started: no object was in their way

    second.close()
    with pytest.raises(FileExistsError):
        first.close()

    assert fs.cat_file(f"{root}/object") == b"2" * MIB


def blob_at(url: str, name: str, chunk_size: int | None = None) -> Blob:
    bucket, _, prefix = url.removeprefix("gs://").partition("/")
    return Client().bucket(bucket).blob(f"{prefix}/{name}", chunk_size=chunk_size)


@pytest.mark.parametrize("chunk_size", [None, 256 * KIB])
def test_generation_must_match_in_googles_own_client(
    chunk_size: int | None, gcs_bucket: str
) -> None:
    blob = blob_at(gcs_bucket, "object", chunk_size)
    blob.upload_from_string(b"1" * MIB, if_generation_match=0)
    first = blob.generation
    with pytest.raises(PreconditionFailed):
        blob.upload_from_string(b"no" * MIB, if_generation_match=0)

    blob.upload_from_string(b"2" * MIB, if_generation_match=first)
    assert blob.generation != first
    with pytest.raises(PreconditionFailed):
        blob.upload_from_string(b"no" * MIB, if_generation_match=first)

    assert blob.download_as_bytes() == b"2" * MIB


def test_copies_and_deletes_keep_preconditions(gcs_bucket: str) -> None:
    source, target = blob_at(gcs_bucket, "source"), blob_at(gcs_bucket, "target")
    source.upload_from_string(b"source")
    bucket = source.bucket

    bucket.copy_blob(source, bucket, target.name, if_generation_match=0)
    assert target.download_as_bytes() == b"source"
    with pytest.raises(PreconditionFailed):
        bucket.copy_blob(source, bucket, target.name, if_generation_match=0)
    with pytest.raises(PreconditionFailed):
        target.rewrite(source, if_generation_match=0)

    target.reload()
    with pytest.raises(PreconditionFailed):
        target.delete(if_generation_match=target.generation + 1)
    target.delete(if_generation_match=target.generation)
    assert not target.exists()


def test_condition_that_is_not_enforced_is_refused(gcs_bucket: str) -> None:
    with pytest.raises(BadRequest, match="does not enforce ifMetagenerationMatch"):
        blob_at(gcs_bucket, "object").upload_from_string(b"", if_metageneration_match=1)


def test_objects_are_written_read_listed_and_deleted(gcs_bucket: str) -> None:
    fs, root = fsspec.url_to_fs(gcs_bucket)
    data = bytes(range(256)) * 4 * KIB
    names = ["a b+%/z.bin", "a b+%/ü.bin", "top.bin"]
    for name in names:
        fs.pipe_file(f"{root}/{name}", b"overwritten")
        fs.pipe_file(f"{root}/{name}", data)

    assert fs.cat_file(f"{root}/top.bin") == data
    assert fs.cat_file(f"{root}/top.bin", 1000, 1300) == data[1000:1300]
    with fs.open(f"{root}/top.bin", block_size=64 * KIB) as file:
        file.seek(-300, 2)
        assert file.read() == data[-300:]
    assert fs.find(root) == [f"{root}/{name}" for name in names]
    assert sorted(fs.ls(root, detail=False)) == [f"{root}/a b+%", f"{root}/top.bin"]
    assert fs.size(f"{root}/{names[0]}") == MIB

    fs.rm(f"{root}/a b+%", recursive=True)
    assert fs.find(root) == [f"{root}/top.bin"]
    with pytest.raises(FileNotFoundError):
        fs.cat_file(f"{root}/{names[0]}")


def test_chunked_body_passes(gcs_bucket: str, gcs_server: "Proxy") -> None:
    bucket, _, prefix = gcs_bucket.removeprefix("gs://").partition("/")
    path = f"/upload/storage/v1/b/{bucket}/o?uploadType=media&name={prefix}/object"
    connection = HTTPConnection("127.0.0.1", gcs_server.server_port)
    connection.request("POST", path, body=iter([b"one ", b"two ", b"three"]))
    assert connection.getresponse().status == 200
    connection.close()

    assert blob_at(gcs_bucket, "object").download_as_bytes() == b"one two three"


def test_beam_reads_and_writes(gcs_bucket: str) -> None:
    from apache_beam.io.filesystems import FileSystems

    with FileSystems.create(f"{gcs_bucket}/temporary") as file:
        file.write(b"beam" * MIB)
    FileSystems.rename([f"{gcs_bucket}/temporary"], [f"{gcs_bucket}/final"])

    (match,) = FileSystems.match([f"{gcs_bucket}/*"])
    assert [(found.path, found.size_in_bytes) for found in match.metadata_list] == [
        (f"{gcs_bucket}/final", 4 * MIB)
    ]
    with FileSystems.open(f"{gcs_bucket}/final") as file:
        file.seek(4 * MIB - 6)
        assert file.read() == b"ambeam"
    FileSystems.delete([f"{gcs_bucket}/final"])
    assert not FileSystems.exists(f"{gcs_bucket}/final")


CHILD = """
import sys, fsspec
from apache_beam.internal.gcp.auth import get_service_credentials
from apache_beam.io.filesystems import FileSystems
from apache_beam.options.pipeline_options import PipelineOptions

assert get_service_credentials(PipelineOptions()) is not None
with fsspec.open(sys.argv[1], "wb") as file:
    file.write(b"from a child")
with FileSystems.open(sys.argv[1]) as file:
    sys.stdout.buffer.write(file.read())
"""


def test_child_process_needs_no_setting(gcs_bucket: str) -> None:
    url = f"{gcs_bucket}/object"
    child = subprocess.run([sys.executable, "-c", CHILD, url], capture_output=True, check=True)
    assert child.stdout == b"from a child"
    fs, path = fsspec.url_to_fs(url)
    assert fs.cat_file(path) == b"from a child"
