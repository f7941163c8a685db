"""What becomes of a record: a picture of the corpus, or a line in the ledger that says why not.

What a source has is judged as it is read; what must be downloaded is judged as it arrives.
"""

import hashlib
import json
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

from pipeline import images
from pipeline.dataset import Dataset
from pipeline.exclusions import Exclusions
from pipeline.fetch import Fetched, fetch_all
from pipeline.images import Limits
from pipeline.readers.rules import Record
from pipeline.reasons import PictureError, RejectReason
from pipeline.recipe import Fetch
from pipeline.records import key_of

SHARD_ROOM_BYTES = 1 << 30
"""What the downloaded pictures of a shard may have together. A shard is built in memory; 512
ordinary pictures are far below it, and what is beyond is left for a retry."""


@dataclass(frozen=True)
class Verdict:
    """What became of one record.

    ``row`` is its row in the index, but for the offset, and None if it is not kept; then
    ``reason``, ``detail`` and ``retryable`` say why, and whether a later download may succeed.
    """

    record: Record
    key: str | None
    picture: bytes = b""
    row: Mapping[str, Any] | None = None
    reason: RejectReason | None = None
    detail: str = ""
    retryable: bool = False
    fetched: Fetched | None = None


@dataclass(frozen=True)
class Judge:
    """The rules for the records of one dataset.

    ``origin`` are the columns of the index that are the same for the whole dataset: where it comes
    from, and which revision of it.
    """

    name: str
    dataset: Dataset
    limits: Limits
    exclusions: Exclusions
    origin: Mapping[str, str | None]

    def key_of(self, record: Record) -> str | None:
        """Return the key of a record, None if it has no id."""
        return key_of(self.name, record.source_id) if record.source_id else None

    def without_picture(self, record: Record) -> Verdict | None:
        """Return the verdict on a record that needs no look at its picture, else None."""
        key = self.key_of(record)
        if record.reason is not None:
            return Verdict(record, key, reason=record.reason, detail=record.detail)
        if key is None:
            return Verdict(record, key, reason=RejectReason.BAD_RECORD, detail="it has no id")
        by = self.exclusions.reason(key, (record.image_url, record.source_url))
        if by is not None:
            return Verdict(record, key, reason=RejectReason.EXCLUDED, detail=f"by its {by}")
        return None

    def of_picture(self, record: Record, picture: bytes) -> Verdict:
        """Return the verdict on a record with the picture that its source has."""
        known = self.without_picture(record)
        return known or self._look(record, picture, None)

    def of_download(self, record: Record, fetched: Fetched) -> Verdict:
        """Return the verdict on a record whose picture was downloaded, or could not be."""
        key = self.key_of(record)
        if fetched.reason is not None:
            return Verdict(
                record,
                key,
                reason=fetched.reason,
                detail=fetched.detail,
                retryable=fetched.retryable,
                fetched=fetched,
            )
        size, picture = len(fetched.body), fetched.body
        # What is not kept must not stay in memory until its shard is done.
        fetched = replace(fetched, body=b"")
        by_url = any(fnmatchcase(fetched.final_url, p) for p in self.dataset.placeholder_urls)
        if by_url or size in self.dataset.placeholder_bytes:
            detail = f"{size} bytes from {fetched.final_url}"
            reason = RejectReason.PLACEHOLDER
            return Verdict(record, key, reason=reason, detail=detail, fetched=fetched)
        return self._look(record, picture, fetched)

    def _look(self, record: Record, picture: bytes, fetched: Fetched | None) -> Verdict:
        key = self.key_of(record)
        final_url = fetched.final_url if fetched else None
        try:
            header, pixels = images.read(picture, self.limits)
            if fetched and len(picture) < self.dataset.min_bytes:
                raise PictureError(RejectReason.PLACEHOLDER, f"only {len(picture)} bytes")
            sha256 = hashlib.sha256(picture).hexdigest()
            pixels_sha256 = images.sha256_of_pixels(pixels)
            by = self.exclusions.reason(key, (final_url,), (sha256, pixels_sha256))
            if by is not None:
                raise PictureError(RejectReason.EXCLUDED, f"by its {by}")
        except PictureError as error:
            return Verdict(record, key, reason=error.reason, detail=error.detail, fetched=fetched)
        row = {
            "key": key,
            "source_id": record.source_id,
            "join_id": record.join_id,
            "join_ambiguous": record.join_ambiguous,
            **self.origin,
            "locator": record.locator,
            "source_url": record.source_url,
            "final_url": None if final_url == record.image_url else final_url,
            "licence": record.licence or self.dataset.licence,
            "text": record.text,
            "fields": json.dumps(record.fields, sort_keys=True, ensure_ascii=False, default=str),
            "format": header.format,
            "width": header.width,
            "height": header.height,
            "num_bytes": len(picture),
            "sha256": sha256,
            "pixels_sha256": pixels_sha256,
        }
        return Verdict(record, key, picture, row, fetched=fetched)


def download(records: Iterable[Record], judge: Judge, policy: Fetch) -> list[Verdict]:
    """Download the pictures of records and return the verdicts, in the order of the records.

    What needs no look at its picture is not downloaded. Pictures for which a shard has no room are
    left for a retry.
    """
    known = [(record, judge.without_picture(record)) for record in records]
    wanted = [record for record, verdict in known if verdict is None]
    room = _Room(SHARD_ROOM_BYTES)

    def verdict_on(number: int, fetched: Fetched) -> Verdict:
        verdict = judge.of_download(wanted[number], fetched)
        if verdict.row is None or room.take(len(verdict.picture)):
            return verdict
        return replace(
            verdict,
            picture=b"",
            row=None,
            reason=RejectReason.SHARD_FULL,
            detail=f"{len(verdict.picture):,} bytes more than fit beside the others",
            retryable=True,
        )

    downloaded = iter(
        fetch_all(
            [str(record.image_url) for record in wanted],
            policy,
            judge.limits.max_bytes,
            verdict_on,
        )
    )
    return [verdict or next(downloaded) for _, verdict in known]


class _Room:
    """What is left of a number of bytes; several threads take from it."""

    def __init__(self, num_bytes: int) -> None:
        self._free_bytes = num_bytes
        self._lock = threading.Lock()

    def take(self, num_bytes: int) -> bool:
        """Take so many bytes and return True, or return False if there are fewer."""
        with self._lock:
            if num_bytes > self._free_bytes:
                return False
            self._free_bytes -= num_bytes
            return True
