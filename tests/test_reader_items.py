"""A source file's identity changes with its bytes, and is cheap to have of a huge one."""

import hashlib
import io
from pathlib import Path

import pytest

from pipeline import storage
from pipeline.readers.items import content_version, identities
from pipeline.receipts import checksum
from pipeline.storage import FileInfo

GIB = 1 << 30
MIB = 1 << 20


class CountedFile(io.FileIO):
    """Counts the bytes that are read."""

    num_read = 0

    def read(self, size: int | None = -1) -> bytes:
        data = super().read(size)
        self.num_read += len(data)
        return data


def test_a_file_without_a_version_is_known_by_its_checksum(tmp_path: Path) -> None:
    data = bytes(range(256)) * 20_000
    (tmp_path / "a").write_bytes(data)
    versioned = FileInfo("nosuch://host/b", "b", 3, "etag:1")
    assert identities([*storage.list_files(str(tmp_path)), versioned]) == [
        {"file": "a", "num_bytes": len(data), "version": f"crc32c:{checksum([data]).crc32c}"},
        {"file": "b", "num_bytes": 3, "version": "etag:1"},
    ]


def test_a_file_above_a_gibibyte_is_known_by_samples(tmp_path: Path) -> None:
    """A sparse file, which takes no place: 3 GiB and a byte of zeros."""
    size = 3 * GIB + 1
    with (tmp_path / "a").open("wb") as file:
        file.truncate(size)
    with CountedFile(tmp_path / "a") as opened:
        before = content_version(opened, size)
        assert opened.num_read == 64 * MIB
    assert before == f"sampled:{checksum([bytes(64 * MIB)]).crc32c}"
    seen = set()
    for place in [0, MIB - 1, size - MIB, size - 1]:
        with (tmp_path / "a").open("r+b") as file:
            file.seek(place)
            file.write(b"x")
        with (tmp_path / "a").open("rb") as file:
            seen.add(content_version(file, size))
    assert len(seen - {before}) == 4


@pytest.mark.parametrize("size", [0, 1, MIB, MIB + 1])
def test_the_checksum_is_of_all_bytes(size: int) -> None:
    data = hashlib.shake_128(b"seed").digest(size)
    assert content_version(io.BytesIO(data), size) == f"crc32c:{checksum([data]).crc32c}"
