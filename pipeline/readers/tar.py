"""A plain tar of pictures, or a tar of such tars: each member with a picture's suffix is a record.

Other members are no records, as in a folder; but an archive among pictures may hold some that are
not read, so it is one, with the reason ``missing_picture``. In a tar of tars a member's path begins
with that of its tar: ``abbey/1.jpg`` in ``a.tar`` is ``a/abbey/1.jpg``.

A compressed tar can only be read from its beginning. That is enough for a trial, of which it is one
item; for more, `evenmix mirror` decompresses it.
"""

import gzip
import io
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import astuple, replace
from pathlib import PurePosixPath
from typing import BinaryIO

from pipeline import storage
from pipeline.dataset import Dataset
from pipeline.errors import EvenmixError
from pipeline.readers.items import PICTURE_SUFFIXES, identities, shard_name, states
from pipeline.readers.parts import WholeFile, open_whole, whole_files
from pipeline.readers.rules import Record, describe, path_values
from pipeline.readers.tar_ranges import (
    DamagedTar,
    Member,
    Part,
    read_part,
    refuse_compressed,
    split,
    truncated,
    walk,
)
from pipeline.reasons import RejectReason
from pipeline.recipe import Images
from pipeline.stage import WorkItem

_ARCHIVES = {".tar", ".gz", ".tgz", ".zip", ".bz2", ".xz", ".zst", ".7z"}
_GZIPPED = (".tar.gz", ".tgz")
_HOP_BYTES = 1 << 16
_UNKNOWN_END = 1 << 62  # of a tar that is decompressed on the way


def plan(name: str, dataset: Dataset, images: Images, *, is_trial: bool = False) -> list[WorkItem]:
    """Make an item of each tar, or of each part of a large one; also of those inside a tar.

    Only the first header of a tar is read, or all headers if there is a tar behind the first. For a
    trial a tar may be compressed with gzip; then it is one item, however large.

    Raises:
        EvenmixError: a tar is compressed, or a tar of tars is damaged or has pictures too.
    """
    files = whole_files(storage.glob_files(dataset.source))
    for file in files:
        if not (is_trial and file.name.endswith(_GZIPPED)):
            refuse_compressed(file.url)
    items = []
    for file, identity in zip(files, identities(files), strict=True):
        # The parts of a mirror are published once and never changed.
        own_states = [] if file.part_bytes else states([file])
        payload = {"url": file.url, "part_bytes": file.part_bytes, "states": own_states}
        if file.name.endswith(_GZIPPED):
            items.append(WorkItem(name, shard_name(file.name, 0), identity, payload))
            continue
        items += [
            WorkItem(
                name,
                shard_name(f"{file.name}/{tar}" if tar else file.name, number),
                inputs={**identity, "member": tar, "part": list(astuple(part))},
                payload=payload,
            )
            for tar, begin, end in _tars(file)
            for number, part in enumerate(split(begin, end, images.bytes_per_shard))
        ]
    return items


def read(dataset: Dataset, item: WorkItem, max_bytes: int) -> Iterator[Record]:
    """Yield the pictures of a part of a tar; a damaged one ends with a ``truncated_archive``.

    Raises:
        EvenmixError: the tar is out of reach, a member holds a tar, or a compressed one is damaged.
    """
    url, part_bytes = item.payload["url"], item.payload["part_bytes"]
    buffer_bytes = storage.stream_bytes(url)
    with open_whole(url, item.inputs["num_bytes"], part_bytes, buffer_bytes) as file:
        if "part" in item.inputs:
            members = read_part(file, Part(*item.inputs["part"]), str, url)
            yield from _records(dataset, item, file, members, max_bytes)
            return
        try:
            with io.BufferedReader(gzip.GzipFile(fileobj=file)) as tar:
                # Neither the walk nor what is read of its members goes back.
                members = walk(tar, 0, _UNKNOWN_END)
                yield from _records(dataset, item, tar, members, max_bytes)
        except (gzip.BadGzipFile, zlib.error, EOFError) as error:
            raise EvenmixError(
                f"{url} cannot be decompressed ({error}); it is damaged or cut at its source"
            ) from error


def _records(
    dataset: Dataset, item: WorkItem, file: BinaryIO, members: Iterable[Member], max_bytes: int
) -> Iterator[Record]:
    """Yield the pictures among the members of a tar, whose bytes are in ``file``."""
    prefix = item.inputs["file"] + "/"
    folder = item.inputs.get("member", "").rpartition(".")[0]
    path = ""
    try:
        for member in members:
            path = str(PurePosixPath(folder, member.name.lstrip("/")))
            suffix = PurePosixPath(path).suffix.lower()
            if member.is_file and suffix in PICTURE_SUFFIXES | _ARCHIVES:
                record = describe(dataset, prefix + path, path_values(path, dataset.path_pattern))
                yield _with_picture(record, file, member, max_bytes)
    except DamagedTar as error:
        yield truncated(prefix + path, path, error)


def _tars(file: WholeFile) -> Sequence[tuple[str, int, int]]:
    """Return name, begin and end of each tar in a tar of tars; a plain one is itself, unnamed."""
    with file.open(_HOP_BYTES) as opened:
        files = (member for member in walk(opened, 0, file.num_bytes) if member.is_file)
        try:
            first = next(files, None)
        except DamagedTar:
            first = None  # reading it will say so
        if first is None or not _is_tar(first):
            return [("", 0, file.num_bytes)]
        try:
            members = [first, *files]
        except DamagedTar as error:
            raise EvenmixError(f"{file.url} is damaged ({error}); fetch it again") from error
    for member in members:
        refuse_compressed(f"{file.url}/{member.name}")
        if PurePosixPath(member.name).suffix.lower() in PICTURE_SUFFIXES:
            raise EvenmixError(
                f"{file.url} has both tars and pictures ({member.name}); unpack its tars"
            )
    return [(m.name, m.data, m.data + m.num_bytes) for m in members if _is_tar(m)]


def _is_tar(member: Member) -> bool:
    return member.name.lower().endswith(".tar")


def _with_picture(record: Record, file: BinaryIO, member: Member, max_bytes: int) -> Record:
    if record.reason is not None:
        return record
    if PurePosixPath(member.name).suffix.lower() in _ARCHIVES:
        return replace(record, reason=RejectReason.MISSING_PICTURE, detail="an archive")
    if member.num_bytes > max_bytes:
        reason, detail = RejectReason.TOO_MANY_BYTES, f"{member.num_bytes} bytes"
        return replace(record, reason=reason, detail=detail)
    file.seek(member.data)
    return replace(record, picture=file.read(member.num_bytes))
