"""`evenmix datasets NAME --check`: does the live source still say what the catalogue says?

The listing, the columns and the first record are compared, and of what is read little is read: a
footer, the beginning of a file, ten pictures at most.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from pipeline import hub, peek, storage
from pipeline.catalog import Entry
from pipeline.dataset import Dataset
from pipeline.errors import EvenmixError
from pipeline.exclusions import Exclusions
from pipeline.images import Limits
from pipeline.judge import Judge, Verdict, download
from pipeline.readers.rules import Record
from pipeline.recipe import Fetch, Images
from pipeline.storage import FileInfo

ROUNDED = 0.05
"""Sizes that sources state are rounded; a difference up to this share is none."""

NUM_RECORDS = 10
"""How many records are looked at: the first may be broken, or its picture gone."""

_LIMITS = Limits(1, Images().max_pixels, Images().max_bytes)


@dataclass(frozen=True)
class Finding:
    """One thing that was compared; ``differs`` from what the catalogue says."""

    text: str
    differs: bool = False


def check(name: str, entry: Entry, dataset: Dataset, fetch: Fetch) -> Iterator[Finding]:
    """Compare a catalogue entry with the source of ``dataset``: the entry's own, or a copy of it.

    Raises:
        EvenmixError: the source is out of reach, or not open to us.
    """
    if dataset.source.startswith("hf://"):
        commit, findings = _check_commit(entry, dataset)
        yield from findings
        source, _ = hub.resolve(dataset.source, commit.sha)
        dataset = dataset.model_copy(update={"source": source})
    files = storage.glob_files(dataset.source)
    if not files:
        yield Finding(f"nothing at {dataset.source}", differs=True)
        return
    yield from _check_listing(entry, files)
    if dataset.layout == "sqlite" and "://" in dataset.source:
        yield Finding("records: a SQLite file is read from a disk; give a local copy with --source")
        return
    try:
        yield from _check_columns(entry, peek.columns(dataset, files[0]))
        records = peek.first_records(name, dataset, files[0], NUM_RECORDS, _LIMITS.max_bytes)
    except EvenmixError as error:
        yield Finding(" ".join(str(error).split()), differs=True)
        return
    yield from _check_records(entry, _judge(name, dataset, records, fetch))


def _check_commit(entry: Entry, dataset: Dataset) -> tuple[hub.Commit, list[Finding]]:
    """Return the commit to compare with, which is the present one if the pinned one is gone."""
    commit = hub.find_commit(dataset.source, None)
    findings = [_compare("gated", entry.gated, commit.gated)]
    if dataset.revision is None:
        findings.append(Finding(f"revision: {commit.sha} now; the catalogue pins none"))
        return commit, findings
    try:
        commit = hub.find_commit(dataset.source, dataset.revision)
        findings.append(Finding(f"revision: {commit.sha}, as the catalogue says"))
    except EvenmixError as error:
        findings.append(Finding(f"revision: {error}", differs=True))
    return commit, findings


def _check_listing(entry: Entry, files: Sequence[FileInfo]) -> Iterator[Finding]:
    num_bytes = sum(file.num_bytes for file in files)
    is_exact = any(file.name in entry.checksums for file in files)
    yield _compare("files", entry.num_files, len(files))
    if entry.num_bytes and not is_exact and abs(num_bytes / entry.num_bytes - 1) <= ROUNDED:
        yield Finding(f"bytes: {num_bytes:,}, about {entry.num_bytes:,} as the catalogue says")
    else:
        yield _compare("bytes", entry.num_bytes, num_bytes)
    if is_exact:
        yield Finding(
            f"version: {files[0].version or 'not told'}; `evenmix mirror` compares the checksum"
        )


def _check_columns(entry: Entry, found: Sequence[str]) -> Iterator[Finding]:
    """Compare names of columns with the shell patterns of the catalogue."""
    if not entry.columns:
        yield Finding(f"columns: {', '.join(found) or 'none'}; the catalogue knows none")
        return
    missing = [
        pattern
        for pattern in entry.columns
        if pattern != "*" and not any(fnmatchcase(column, pattern) for column in found)
    ]
    extra = [
        column
        for column in found
        if not any(fnmatchcase(column, pattern) for pattern in entry.columns)
    ]
    if missing:
        yield Finding(f"columns: {', '.join(missing)} missing", differs=True)
    if extra:
        yield Finding(f"columns: {', '.join(extra)} not in the catalogue", differs=True)
    if not missing and not extra:
        yield Finding(f"columns: {', '.join(found)}, as the catalogue says")


def _judge(name: str, dataset: Dataset, records: Sequence[Record], fetch: Fetch) -> list[Verdict]:
    """Judge records as ingest does, but for the size of their pictures."""
    judge = Judge(name, dataset, _LIMITS, Exclusions(), {})
    if dataset.is_fetched:
        return download(records, judge, fetch)
    return [judge.of_picture(record, record.picture) for record in records]


def _check_records(entry: Entry, verdicts: Sequence[Verdict]) -> Iterator[Finding]:
    for verdict in verdicts:
        if verdict.record.source_id is None:
            yield Finding(f"record {verdict.record.locator}: {verdict.detail}", differs=True)
    kept = [(verdict.record, verdict.row) for verdict in verdicts if verdict.row is not None]
    reasons = Counter(str(verdict.reason) for verdict in verdicts if verdict.row is None)
    others = "".join(f", {reason} {count}" for reason, count in sorted(reasons.items()))
    counts = f"records: {len(kept)} of the first {len(verdicts)} have a picture{others}"
    yield Finding(counts, differs=not kept)
    for record, row in kept[:1]:
        yield Finding(f"id: {record.source_id}, join: {record.join_id}")
        yield _check_picture(entry, row)


def _check_picture(entry: Entry, row: Mapping[str, Any]) -> Finding:
    found = (row["width"], row["height"])
    text = f"picture: {row['format']}, {found[0]} x {found[1]} px"
    if all(edge in (None, px) for edge, px in zip(entry.size_px, found, strict=True)):
        return Finding(text)
    declared = " x ".join(str(edge or "any") for edge in entry.size_px)
    return Finding(f"{text}; the catalogue says {declared}", differs=True)


def _compare(what: str, expected: object, found: object) -> Finding:
    """Compare a value; where the catalogue has none the value is told."""
    if expected is None:
        return Finding(f"{what}: {_text(found)}; unverified in the catalogue")
    if expected == found:
        return Finding(f"{what}: {_text(found)}, as the catalogue says")
    return Finding(f"{what}: {_text(found)}; the catalogue says {_text(expected)}", differs=True)


def _text(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:,}" if isinstance(value, int) else str(value)
