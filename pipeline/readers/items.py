"""What the plans of all layouts share: how files are identified and cut, and shards named."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, BinaryIO

from pipeline import storage
from pipeline.errors import EvenmixError
from pipeline.receipts import checksum, fingerprint
from pipeline.stage import WorkItem
from pipeline.storage import FileInfo

PICTURE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"}

_CONCURRENT_CHECKSUMS = 8
_CONCURRENT_REQUESTS = 16  # a dataset can have thousands of files on a server far away
_SHARD_NAME_CHARACTERS = 80
_READ_WHOLE_BYTES = 1 << 30
_NUM_SAMPLES = 64
_SAMPLE_BYTES = 1 << 20


def plan_files(
    name: str,
    files: Sequence[FileInfo],
    plan_file: Callable[[FileInfo, Mapping[str, Any]], Sequence[WorkItem]],
) -> list[WorkItem]:
    """Cut each file of a dataset into items, given the file and its identity; several at once.

    Raises:
        EvenmixError: some files cannot be read at all; every one is named.
    """

    def plan_or_mistake(
        file: FileInfo, identity: Mapping[str, Any]
    ) -> Sequence[WorkItem] | EvenmixError:
        try:
            return plan_file(file, identity)
        except EvenmixError as error:
            return error

    items, mistakes = list[WorkItem](), list[str]()
    with ThreadPoolExecutor(_CONCURRENT_REQUESTS) as pool:
        for found in pool.map(plan_or_mistake, files, identities(files)):
            if isinstance(found, EvenmixError):
                mistakes.append(str(found))
            else:
                items += found
    if mistakes:
        raise EvenmixError("\n  ".join([f"dataset {name} cannot be read:", *mistakes]))
    return items


def identities(files: Sequence[FileInfo]) -> list[dict[str, Any]]:
    """Identify files by name, size and version, for the inputs of work items.

    The version is the store's own where it has one, otherwise :func:`content_version`.
    """

    def version(file: FileInfo) -> str:
        if file.version is not None:
            return file.version
        with storage.open_file(file.url, file.num_bytes) as opened:
            return content_version(opened, file.num_bytes)

    with ThreadPoolExecutor(_CONCURRENT_CHECKSUMS) as pool:
        return [
            # A local file's name need not be UTF-8, but JSON is.
            {"file": plain(file.name), "num_bytes": file.num_bytes, "version": found}
            for file, found in zip(files, pool.map(version, files), strict=True)
        ]


def states(files: Sequence[FileInfo]) -> list[list[Any]]:
    """Return what :func:`require_unchanged` looks at again, for the payload of an item.

    Files on the Hub are not among it: their URLs name a commit.
    """
    return [
        [file.url, file.num_bytes, file.modified or file.version]
        for file in files
        if not file.url.startswith("hf://")
    ]


def require_unchanged(planned: Sequence[Sequence[Any]]) -> None:
    """Compare files with their states when they were listed.

    A local file, which has no version, is known by its size and the time of its last change.

    Raises:
        EvenmixError: one has changed, is gone or is out of reach.
    """

    def require(state: Sequence[Any]) -> None:
        url, *before = state
        file = storage.file_info(url)
        now = [file.num_bytes, file.modified or file.version]
        if now != before:
            raise EvenmixError(
                f"{url} has changed since it was planned; start the same command again, and change "
                "no source while it is read"
            )

    with ThreadPoolExecutor(_CONCURRENT_REQUESTS) as pool:
        for _ in pool.map(require, planned):
            pass


def content_version(file: BinaryIO, num_bytes: int) -> str:
    """Return the CRC-32C of a file's content; above 1 GiB that of samples, ``sampled:…``.

    The samples are 64 MiB in all, evenly spaced from the first bytes to the last: planning must not
    read 500 GB. A change between them that keeps the size goes unseen.
    """
    if num_bytes <= _READ_WHOLE_BYTES:
        return f"crc32c:{checksum(iter(lambda: file.read(_SAMPLE_BYTES), b'')).crc32c}"
    return f"sampled:{checksum(_samples(file, num_bytes)).crc32c}"


def _samples(file: BinaryIO, num_bytes: int) -> Iterator[bytes]:
    last = num_bytes - _SAMPLE_BYTES
    for number in range(_NUM_SAMPLES):
        file.seek(last * number // (_NUM_SAMPLES - 1))
        yield file.read(_SAMPLE_BYTES)


def plain(name: str) -> str:
    r"""Return a file's name as Unicode: bytes that are no UTF-8 become ``\udc…`` in letters."""
    return name.encode(errors="backslashreplace").decode()


def shard_name(file_name: str, start: int) -> str:
    """Name a shard after its source file and first record or part, within a bounded length."""
    stem = file_name.rsplit(".", 1)[0]
    found = re.sub(r"[^A-Za-z0-9_-]+", "-", stem).strip("-")
    if found != stem or len(found) > _SHARD_NAME_CHARACTERS:
        # Two names may have become one.
        found = f"{found[-_SHARD_NAME_CHARACTERS:]}-{fingerprint({'file': file_name})[:8]}"
    return f"{found}-{start:09d}".lstrip("-")
