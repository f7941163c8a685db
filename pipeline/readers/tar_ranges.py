"""A large tar read in parts, by ranges of bytes: with no index, and no look at the whole of it.

A part is a share [begin, end) of the tar's bytes, cut anywhere. So each cut is moved on to a
*boundary*: the first place behind it where a member begins whose sample is not that of the member
before. Headers are found by their form, the word ``ustar`` and a good checksum in a block of 512
bytes, and believed when good headers follow where their sizes lead. A part goes from the boundary
behind its begin to the one behind its end. The next part computes that one by the same function of
the same bytes, so every sample is read once.

Two things can deceive the search, and neither goes unseen. A tar inside a member has headers of its
own: then the chain of a part jumps over the boundary behind its end, which is an error. A damaged
header ends the chain: the records behind it are lost to the part, and the next part begins at its
own boundary as ever.

tarfile decodes the headers. The chain is followed here, because tarfile takes damage for the end,
believes negative sizes, and allocates what an extended header claims to hold. Tars without the word
``ustar``, an older format, are read whole as their first part; the defaults that a pax tar's global
header gives to all members are not read.
"""

import re
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import PurePosixPath
from typing import BinaryIO

from pipeline.errors import EvenmixError
from pipeline.readers.rules import Record
from pipeline.reasons import RejectReason

_COMPRESSED = {".gz", ".tgz", ".bz2", ".tbz2", ".xz", ".txz", ".zst"}

_BLOCK = tarfile.BLOCKSIZE
_MAGIC = b"ustar"
_MAGIC_OFFSET = 257
_SCAN_BYTES = 1 << 20
_MAX_MEMBERS = 256  # of one sample; a larger one may be cut
_MAX_EXTENSIONS = 16
_MAX_EXTENSION_BYTES = 1 << 20
_EXTENSIONS = {
    tarfile.XHDTYPE,
    tarfile.SOLARIS_XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
}
_PAX_RECORD = re.compile(rb"(\d{1,9}) ([^=\n]+)=")
# GNU sparse members: the byte that says whether one more block of their map follows.
_MORE_IN_HEADER, _MORE_IN_BLOCK = 482, 504

SampleOf = Callable[[str], str]
"""Maps a member's name to its sample; consecutive members of one sample stay together."""


class DamagedTar(Exception):
    """The chain of headers breaks: the tar is cut or damaged there."""


@dataclass(frozen=True)
class Part:
    """The share [begin, end) of a tar that fills the bytes [tar_begin, tar_end) of its file."""

    tar_begin: int
    tar_end: int
    begin: int
    end: int


@dataclass(frozen=True)
class Member:
    """A member: where its headers begin, its ``num_bytes`` bytes of data, and what follows it.

    A sparse member counts as one of no bytes: it may claim any size without having them.
    """

    name: str
    is_file: bool
    begin: int
    data: int
    num_bytes: int
    next: int


def split(tar_begin: int, tar_end: int, bytes_per_part: int) -> list[Part]:
    """Cut a tar into parts of ``bytes_per_part`` bytes; there is at least one."""
    cuts = [*(range(tar_begin, tar_end, bytes_per_part) or [tar_begin]), tar_end]
    return [Part(tar_begin, tar_end, begin, end) for begin, end in pairwise(cuts)]


def refuse_compressed(url: str) -> None:
    """Refuse a compressed tar: it can only be read from its beginning.

    Raises:
        EvenmixError: it is one, by its name.
    """
    if PurePosixPath(url).suffix.lower() in _COMPRESSED:
        raise EvenmixError(
            f"{url} is compressed and cannot be read in parts: unpack it to a plain .tar, as "
            "`evenmix mirror` does"
        )


def truncated(locator: str, last: str, error: DamagedTar) -> Record:
    """Return the record that stands for all that is lost behind ``last``."""
    detail = f"{error}; what follows {last or 'the beginning'} is lost: fetch it again"
    return Record(locator, None, reason=RejectReason.TRUNCATED_ARCHIVE, detail=detail)


def read_part(file: BinaryIO, part: Part, sample_of: SampleOf, url: str) -> Iterator[Member]:
    """Yield the members of a part, in order; between two of them ``file`` may be moved.

    Raises:
        DamagedTar: the chain breaks; what was yielded before is good.
        EvenmixError: the chain misses the next part's beginning: a member holds a tar.
    """
    # The end first: what is read in search of the beginning is at hand when the members are.
    stop = _boundary(file, part, part.end, part.tar_end, sample_of)
    position: int | None = part.begin
    if part.begin > part.tar_begin:
        position = _boundary(file, part, part.begin, part.end, sample_of)
    if position is None:
        return  # no member begins here
    while position != stop:
        if stop is not None and position > stop:
            raise EvenmixError(
                f"{url}: the member before byte {position} holds a tar of its own, so that parts "
                "cannot be told apart; raise images.bytes_per_shard above the size of that member, "
                "or unpack it"
            )
        member = member_at(file, position, part.tar_end)
        if member is None:
            if stop is not None or not _is_zero(file, position, part.tar_end):
                raise DamagedTar(f"it goes on behind its end, which is at byte {position}")
            return
        yield member
        position = member.next


def walk(file: BinaryIO, position: int, tar_end: int) -> Iterator[Member]:
    """Yield the members from ``position``, the beginning of one, to the end of the tar.

    Raises:
        DamagedTar: the chain breaks.
    """
    while (member := member_at(file, position, tar_end)) is not None:
        yield member
        position = member.next


def member_at(file: BinaryIO, begin: int, tar_end: int) -> Member | None:
    """Return the member whose first header begins at ``begin``, None at the tar's end.

    Raises:
        DamagedTar: there is no good header, or the tar ends within the member.
    """
    position, name, size, is_sparse = begin, None, None, False
    for _ in range(_MAX_EXTENSIONS):
        block = _read(file, position, _BLOCK, tar_end)
        if position == begin and not any(block):
            return None
        try:
            header = tarfile.TarInfo.frombuf(block, "utf-8", "backslashreplace")
        except tarfile.HeaderError as error:
            raise DamagedTar(f"no header at byte {position}: {error}") from error
        if header.type not in _EXTENSIONS:
            break
        if not 0 <= header.size <= _MAX_EXTENSION_BYTES:
            raise DamagedTar(f"an extended header of {header.size} bytes at byte {position}")
        content = _read(file, position + _BLOCK, header.size, tar_end)
        if header.type == tarfile.GNUTYPE_LONGNAME:
            name = _text(content.partition(b"\0")[0])
        elif header.type in (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE):
            records = _pax_records(content, position)
            name = _text(records[b"path"]) if b"path" in records else name
            size = _number(records[b"size"], position) if b"size" in records else size
            is_sparse |= any(key.startswith(b"GNU.sparse.") for key in records)
        position += _BLOCK + _padded(header.size)
    else:
        raise DamagedTar(f"more than {_MAX_EXTENSIONS} extended headers at byte {begin}")
    name, data = name or header.name, position + _BLOCK
    size = header.size if size is None else size
    if header.type == tarfile.GNUTYPE_SPARSE:
        is_sparse, more = True, block[_MORE_IN_HEADER]
        while more:
            more = _read(file, data, _BLOCK, tar_end)[_MORE_IN_BLOCK]
            data += _BLOCK
    if not header.isreg() and header.type in tarfile.SUPPORTED_TYPES:
        size = 0  # of a link or folder it is no size of data
    if size < 0:
        raise DamagedTar(f"{name} has a size of {size} bytes")
    if data + size > tar_end:
        raise DamagedTar(f"{name} is cut")
    num_bytes = 0 if is_sparse else size
    return Member(name, header.isreg(), begin, data, num_bytes, data + _padded(size))


def _boundary(file: BinaryIO, part: Part, begin: int, end: int, sample_of: SampleOf) -> int | None:
    """Return the boundary behind ``begin``, None if no header in [begin, end) leads to one."""
    for position in _headers(file, part, begin, end):
        try:
            boundary = _next_sample(file, position, part.tar_end, sample_of)
        except DamagedTar:
            continue
        if boundary is not None:
            return boundary
    return None


def _headers(file: BinaryIO, part: Part, begin: int, end: int) -> Iterator[int]:
    """Yield the places of blocks in [begin, end) that have the form of a header."""
    position = begin + (part.tar_begin - begin) % _BLOCK
    while position < end:
        file.seek(position)
        blocks = file.read(min(_SCAN_BYTES, end + -(end - part.tar_begin) % _BLOCK - position))
        found = blocks.find(_MAGIC)
        while found >= 0:
            if found % _BLOCK == _MAGIC_OFFSET:
                yield position + found - _MAGIC_OFFSET
            found = blocks.find(_MAGIC, found + 1)
        position += _SCAN_BYTES


def _next_sample(file: BinaryIO, position: int, tar_end: int, sample_of: SampleOf) -> int | None:
    """Return where a sample begins behind a header, None if the tar ends before.

    The header's own sample does not count, nor does that of the member behind it. If the header's
    name is in an extended header before it, nobody can tell here whether the two are one sample.
    """
    members = walk(file, position, tar_end)
    next(members, None)
    sample = None
    for number, member in enumerate(members):
        if number == _MAX_MEMBERS:
            return member.begin
        if member.is_file and sample is None:
            sample = sample_of(member.name)
        elif member.is_file and sample_of(member.name) != sample:
            return member.begin
    return None


def _is_zero(file: BinaryIO, position: int, end: int) -> bool:
    """Tell whether zeros are all that follows, as they do behind the end of a tar."""
    while position < end:
        blocks = _read(file, position, min(_SCAN_BYTES, end - position), end)
        if blocks.strip(b"\0"):
            return False
        position += len(blocks)
    return True


def _read(file: BinaryIO, position: int, length: int, tar_end: int) -> bytes:
    file.seek(position)
    data = file.read(length)
    if position + length > tar_end or len(data) < length:
        raise DamagedTar(f"it is cut at byte {min(position + len(data), tar_end)}")
    return data


def _padded(num_bytes: int) -> int:
    return num_bytes + -num_bytes % _BLOCK


def _pax_records(content: bytes, position: int) -> dict[bytes, bytes]:
    """Return the records of a pax header, each written as ``<length> <key>=<value>\\n``."""
    records, begin = dict[bytes, bytes](), 0
    while begin < len(content) and content[begin]:
        match = _PAX_RECORD.match(content, begin)
        end = begin + int(match[1]) if match else 0
        if match is None or end <= match.end() or content[end - 1 : end] != b"\n":
            raise DamagedTar(f"a broken extended header at byte {position}")
        records[match[2]] = content[match.end() : end - 1]
        begin = end
    return records


def _number(text: bytes, position: int) -> int:
    if not re.fullmatch(rb"\d{1,18}", text):
        raise DamagedTar(f"a broken size in the extended header at byte {position}")
    return int(text)


def _text(name: bytes) -> str:
    # A name need not be UTF-8, but a record's id and locator are.
    return name.decode(errors="backslashreplace")
