"""A large file that lies in parts, as `evenmix mirror` writes it, read as the one file that it is.

``photos.tar`` lies as ``photos.tar.part-00000``, ``photos.tar.part-00001`` and so on, all of the
same size but the last one, which is not larger.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from typing import BinaryIO

from pipeline import storage
from pipeline.errors import EvenmixError
from pipeline.mirror_manifest import with_known_versions
from pipeline.readers.items import content_version
from pipeline.receipts import fingerprint
from pipeline.storage import FileInfo

_PART = re.compile(r"(?P<whole>.+)\.part-(?P<number>\d{5,})")


@dataclass(frozen=True)
class WholeFile(FileInfo):
    """A file, or the parts of one: these hold ``part_bytes`` bytes each (None: it has no parts)."""

    part_bytes: int | None = None

    def open(self, buffer_bytes: int = 4 << 20) -> BinaryIO:
        """Open it for reading from any place."""
        return open_whole(self.url, self.num_bytes, self.part_bytes, buffer_bytes)


def part_name(whole: str, number: int) -> str:
    """Return the name or URL of a part."""
    return f"{whole}.part-{number:05d}"


def open_whole(
    url: str, num_bytes: int, part_bytes: int | None, buffer_bytes: int = 4 << 20
) -> BinaryIO:
    """Open a file of ``num_bytes`` bytes; with ``part_bytes``, ``url`` is that of the whole."""
    if part_bytes is None:
        return storage.open_file(url, num_bytes, buffer_bytes)
    return storage.open_ranges(partial(_read_parts, url, part_bytes), num_bytes, buffer_bytes)


def _read_parts(url: str, part_bytes: int, offset: int, length: int) -> bytes:
    pieces = []
    while length:
        number, start = divmod(offset, part_bytes)
        step = min(length, part_bytes - start)
        pieces.append(storage.read_bytes(part_name(url, number), start, step))
        offset, length = offset + step, length - step
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)


def whole_files(files: Sequence[FileInfo]) -> list[WholeFile]:
    """Put the parts in a listing together; files without parts stay as they are.

    Raises:
        EvenmixError: a part is missing or has the wrong size.
    """
    found = []
    for name, group in groupby(sorted(files, key=lambda file: file.name), key=_whole_name):
        members = list(group)
        if name == members[0].name:
            found += [WholeFile(**vars(file)) for file in members]
        else:
            parts = sorted(with_known_versions(members), key=_part_number)
            found.append(_whole(name, parts))
    return found


def _whole_name(file: FileInfo) -> str:
    match = _PART.fullmatch(file.name)
    return match["whole"] if match else file.name


def _part_number(file: FileInfo) -> int:
    return int(file.name.rpartition("-")[2])


def _whole(name: str, parts: Sequence[FileInfo]) -> WholeFile:
    url, _, _ = parts[0].url.rpartition(".part-")
    part_bytes = parts[0].num_bytes
    *full, last = parts
    if (
        [part.url for part in parts] != [part_name(url, number) for number in range(len(parts))]
        or any(part.num_bytes != part_bytes for part in full)
        or not 0 < last.num_bytes <= part_bytes
    ):
        raise EvenmixError(
            f"{url} lies in parts that do not fit together: there must be {part_name('', 0)}, "
            f"{part_name('', 1)}… of one size, the last one not larger; copy it again"
        )
    num_bytes = sum(part.num_bytes for part in parts)
    whole = WholeFile(url, name, num_bytes, None, part_bytes=part_bytes)
    versions = [part.version for part in parts]
    if None in versions:
        with whole.open() as file:
            version = content_version(file, whole.num_bytes)
    else:
        version = f"parts:{fingerprint({'versions': versions})[:32]}"
    return replace(whole, version=version)
