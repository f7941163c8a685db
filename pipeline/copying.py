"""A large file copied in parts: ranges of it, several at once, each published when it is whole.

The copy of ``train.tar`` is ``train.tar.part-00000``, ``train.tar.part-00001`` and so on, of equal
size but the last. A part that is there is never fetched again, so a copy that was interrupted goes
on where it stopped; the source's identity is stored before the first part, so that parts of two
versions never become one file.
"""

import hashlib
import io
import json
from dataclasses import asdict, dataclass
from multiprocessing.pool import ThreadPool
from typing import Any, BinaryIO

from pipeline import storage
from pipeline.byte_progress import ByteProgress
from pipeline.errors import EvenmixError
from pipeline.readers.items import identities
from pipeline.readers.parts import open_whole, part_name
from pipeline.receipts import Checksum, checksum, difference
from pipeline.storage import FileInfo

PART_BYTES = 64 << 20
"""The size of a part, which is held in memory while it is fetched."""

_CONCURRENT_PARTS = 4
_READ_BYTES = 8 << 20  # a request's range; what a broken connection costs


@dataclass(frozen=True)
class Copy:
    """A file of a source, and the name of its copy: the URL of its parts without their number.

    ``record`` is the URL of what is known of the copy, without its suffix.
    """

    file: FileInfo
    target: str
    record: str
    part_bytes: int

    @property
    def num_parts(self) -> int:
        """The number of parts of the whole copy."""
        return -(-self.file.num_bytes // self.part_bytes)

    def part_url(self, part: int) -> str:
        """Return the URL of a part."""
        return part_name(self.target, part)

    def part_size(self, part: int) -> int:
        """Return the size of a part, in bytes."""
        return min(self.part_bytes, self.file.num_bytes - part * self.part_bytes)

    def missing(self) -> list[int]:
        """Return the parts that are not there yet.

        Raises:
            EvenmixError: a part has another size than it must have.
        """
        sizes = part_sizes(self.target)
        for part, num_bytes in sizes.items():
            if part >= self.num_parts or num_bytes != self.part_size(part):
                raise EvenmixError(
                    f"{self.part_url(part)} has {num_bytes:,} bytes and is no part of "
                    f"{self.file.url}; remove it and start the same command again"
                )
        return [part for part in range(self.num_parts) if part not in sizes]

    def open(self) -> BinaryIO:
        """Open the copy, once all its parts are there, as the file that it is."""
        return open_whole(self.target, self.file.num_bytes, self.part_bytes, _READ_BYTES)


def part_sizes(target: str) -> dict[int, int]:
    """Return the sizes in bytes of a file's parts that are there, by their numbers."""
    folder, _, name = target.rpartition("/")
    prefix = f"{name}.part-"
    return {
        int(file.name.removeprefix(prefix)): file.num_bytes
        for file in storage.list_files(folder)
        if file.name.startswith(prefix) and file.name.removeprefix(prefix).isdecimal()
    }


def fetch(copy: Copy, progress: ByteProgress) -> None:
    """Fetch the parts that are missing; their order does not matter.

    Raises:
        EvenmixError: the source cannot be read or has changed, or a part cannot be written.
    """
    identity = _identity(copy, copy.file)
    record = f"{copy.record}.source.json"
    if not storage.publish(record, json.dumps(identity, sort_keys=True).encode()):
        _compare(copy, json.loads(storage.read_bytes(record)), identity)

    def fetch_part(part: int) -> None:
        offset, size = part * copy.part_bytes, copy.part_size(part)
        data = io.BytesIO()
        for start in range(0, size, _READ_BYTES):
            length = min(_READ_BYTES, size - start)
            data.write(storage.read_bytes(copy.file.url, offset + start, length))
            progress.advance(length)
        storage.publish(copy.part_url(part), data.getvalue())

    # Its threads, unlike an executor's, do not keep a stopped command waiting for a slow server.
    with ThreadPool(_CONCURRENT_PARTS) as pool:
        try:
            for _ in pool.imap_unordered(fetch_part, copy.missing()):
                pass
        except EvenmixError:
            # The parts that are under way are still published, and none is when we have gone.
            pool.terminate()
            pool.join()
            raise
    now = [_identity(copy, f) for f in storage.glob_files(copy.file.url) if f.url == copy.file.url]
    _compare(copy, identity, now[0] if now else {})


def _identity(copy: Copy, file: FileInfo) -> dict[str, Any]:
    return {**identities([file])[0], "part_bytes": copy.part_bytes}


def _compare(copy: Copy, before: dict[str, Any], now: dict[str, Any]) -> None:
    if before != now:
        changes = "; ".join(difference(before, now))
        raise EvenmixError(
            f"{copy.file.url} has changed since its copy was begun ({changes}); remove the folder "
            f"{copy.record.rpartition('/')[0]} and start again"
        )


def check(copy: Copy, expected: str | None, progress: ByteProgress) -> list[Checksum]:
    """Read the whole copy once and return the checksums of its parts.

    ``expected`` is the known checksum of the file, such as ``md5:0123…`` or ``sha256:0123…``. What
    was checked is stored, and believed by later runs.

    Raises:
        EvenmixError: the copy is not the file that was expected.
    """
    url = f"{copy.record}.checked.json"
    if storage.exists(url):
        return [Checksum(**part) for part in json.loads(storage.read_bytes(url))]
    algorithm, _, digest = (expected or "sha256:").partition(":")
    whole = hashlib.new(algorithm, usedforsecurity=False)
    parts = []
    for part in range(copy.num_parts):
        data = storage.read_bytes(copy.part_url(part), 0, copy.part_size(part))
        whole.update(data)
        parts.append(checksum([data]))
        progress.advance(len(data))
    if digest and whole.hexdigest() != digest:
        raise EvenmixError(
            f"the copy of {copy.file.url} has {algorithm} {whole.hexdigest()}, not {digest}; "
            f"remove {copy.target}.part-* and start again. If it happens again, the source has "
            "another file than the catalogue knows"
        )
    storage.publish(url, json.dumps([asdict(part) for part in parts]).encode())
    return parts
