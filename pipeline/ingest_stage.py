"""The stage that makes R/images: one work item's records become one shard.

What a source has is judged as it is read. What must be downloaded is judged in the order of
arrival, beside the downloads, and published in the order of the source.
"""

import io
import json
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

import pyarrow as pa

from pipeline import images, readers, storage
from pipeline.dataset import Dataset
from pipeline.errors import EvenmixError
from pipeline.exclusions import load_exclusions
from pipeline.images import Limits
from pipeline.judge import Judge, Verdict, download
from pipeline.readers.rules import Record
from pipeline.reasons import RejectReason
from pipeline.receipts import Counts
from pipeline.recipe import Fetch
from pipeline.records import FETCHED, IMAGES, INDEX, REJECTED, uniform_hash
from pipeline.stage import REJECTED_SUFFIX, Observed, Output, WorkItem
from pipeline.summary import dataset_url
from pipeline.tars import TarWriter

_MANY_DOWNLOADS = 20
"""From so many on, it is no accident if all of them fail."""

LedgerRow = Mapping[str, Any]
"""A row of the table of rejected records."""


@dataclass(frozen=True)
class Ingest:
    """The stage that makes R/images.

    ``datasets`` are as they are read: mirrored, at a full revision. ``origins`` are the URLs where
    they come from, None for a local one. A trial takes the first ``limit`` records of each dataset,
    or ``sample_fraction`` of them by hash of the key.
    """

    root: str
    datasets: Mapping[str, Dataset]
    origins: Mapping[str, str | None]
    limits: Limits
    fetch: Fetch
    exclusions: str | None = None
    limit: int | None = None
    sample_fraction: float = 1.0
    name: str = "ingest"
    version: int = 2
    folder: str = IMAGES
    resource_hints: Mapping[str, str] = field(default_factory=dict)

    @property
    def items_at_once(self) -> int:
        """Two where all is downloaded: the slowest servers of the one leave time for the other."""
        return 2 if all(dataset.is_fetched for dataset in self.datasets.values()) else 1

    def config(self, dataset: str) -> Mapping[str, Any]:
        """Return what decides the content of a shard: how records are read, what is kept.

        The list of exclusions is not among it: a takedown must not make shards that are published
        look wrong. A mixture, which can be cut again, has it in its own identity.
        """
        spec = self.datasets[dataset]
        where = {"source", "mirror"}
        how_used = {"duplicates", "threshold", "prompt", "lines_field", "caption_subset"}
        config: dict[str, Any] = {
            "dataset": spec.model_dump(exclude=where | how_used, exclude_defaults=True),
            "origin": self.origins[dataset],
            "min_short_edge_px": self.limits.min_short_edge_px,
            "max_pixels": self.limits.max_pixels,
            "max_bytes": self.limits.max_bytes,
        }
        if spec.is_fetched:
            config["opt_out"] = self.fetch.opt_out
        if self.limit is not None:
            config["limit"] = self.limit
        if self.sample_fraction < 1:
            config["sample_fraction"] = self.sample_fraction
        return config

    def process(self, item: WorkItem) -> Output:
        """Read one item's records and judge each of them."""
        dataset = self.datasets[item.dataset]
        judge = Judge(
            item.dataset,
            dataset,
            self.limits,
            load_exclusions(self.exclusions),
            {"source": self.origins[item.dataset], "revision": dataset.revision},
        )
        before = self.earlier_attempts(item)
        records = self._asked_for(item, judge, before)
        if not dataset.is_fetched:
            verdicts = (judge.of_picture(record, record.picture) for record in records)
            tar, kept, others = _write(_first_of_each_id(verdicts))
            return _output(tar, kept, [_ledger_row(verdict) for verdict in others])
        downloads = list(_first_of_each_id(download(records, judge, self.fetch)))
        # A retry is about failures alone, and may well be one about dead servers.
        if self.fetch.stop_when_unreachable and "retries" not in item.inputs:
            _refuse_unreachable(downloads)
        attempt = _Attempt(downloads, before)
        tar, kept, others = _write(_emptying(downloads))
        return attempt.output(tar, kept, [attempt.ledger[v.record.locator] for v in others])

    def _asked_for(
        self, item: WorkItem, judge: Judge, before: Mapping[str, LedgerRow]
    ) -> Iterator[Record]:
        """Yield the item's records, or those of them that a trial or a retry is about."""
        records = readers.read(self.datasets[item.dataset], item, self.limits.max_bytes)
        for record in islice(records, item.inputs.get("first_records")):
            key = judge.key_of(record)
            if key is not None and uniform_hash(0, key, "sample") >= self.sample_fraction * 2**64:
                continue
            if "retries" not in item.inputs or record.locator in before:
                yield record

    def earlier_attempts(self, item: WorkItem) -> dict[str, LedgerRow]:
        """Return what a retry tries again, by locator: the ledger of the earlier generation."""
        if "retries" not in item.inputs:
            return {}
        folder = dataset_url(self.root, self.folder, item.dataset)
        url = storage.join(folder, f"{item.payload['retry_of']}{REJECTED_SUFFIX}")
        return {
            row["locator"]: row for row in storage.read_parquet(url).to_pylist() if row["retryable"]
        }


def _first_of_each_id(verdicts: Iterable[Verdict]) -> Iterator[Verdict]:
    """Reject a record whose id an earlier one of the shard has, if that one is kept.

    Records in different shards that share an id are found by dedup, as exact copies.
    """
    kept: dict[str, str] = {}
    for verdict in verdicts:
        if verdict.row is None or verdict.key is None:
            yield verdict
        elif verdict.key in kept:
            detail = f"{kept[verdict.key]} has the same id"
            reason = RejectReason.DUPLICATE_ID
            yield replace(verdict, picture=b"", row=None, reason=reason, detail=detail)
        else:
            kept[verdict.key] = verdict.record.locator
            yield verdict


def _refuse_unreachable(downloads: Sequence[Verdict]) -> None:
    """Raise an EvenmixError if no server has answered at all: the fault is most likely ours."""
    tried = [verdict for verdict in downloads if verdict.fetched and verdict.fetched.attempts]
    unreached = [verdict for verdict in tried if verdict.fetched and verdict.fetched.status is None]
    if len(tried) < _MANY_DOWNLOADS or len(unreached) < len(tried):
        return
    reasons = Counter(str(verdict.reason) for verdict in tried)
    counted = ", ".join(f"{reason} {n:,}" for reason, n in sorted(reasons.items()))
    raise EvenmixError(
        f"of {len(tried):,} downloads not one reached a server ({counted}; such as "
        f"{tried[0].record.image_url}: {tried[0].detail}). If the network is down, start the same "
        "command again when it is up: nothing is lost. If these servers are gone for good, set "
        "fetch.stop_when_unreachable = false in a recipe"
    )


def _emptying(verdicts: list[Verdict]) -> Iterator[Verdict]:
    """Take verdicts out of their list, so that a picture need not stay when it is in the tar."""
    verdicts.reverse()
    while verdicts:
        yield verdicts.pop()


def _write(verdicts: Iterable[Verdict]) -> tuple[bytes, list[dict[str, Any]], list[Verdict]]:
    """Write the pictures that are kept into a tar, in order.

    Returns the tar, the index of its pictures, and the verdicts on the other records.
    """
    tar, kept, others = TarWriter(), list[dict[str, Any]](), list[Verdict]()
    for verdict in verdicts:
        if verdict.row is None:
            others.append(verdict)
            continue
        extension = images.EXTENSIONS[verdict.row["format"]]
        offset = tar.add(f"{verdict.key}.{extension}", verdict.picture)
        row = json.dumps(dict(verdict.row), sort_keys=True, ensure_ascii=False)
        tar.add(f"{verdict.key}.json", row.encode())
        kept.append({**verdict.row, "offset": offset})
    return tar.close(), kept, others


def _output(tar: bytes, kept: Sequence[Mapping[str, Any]], rejected: Sequence[LedgerRow]) -> Output:
    reasons = Counter(str(row["reason"]) for row in rejected)
    return Output(
        table=pa.Table.from_pylist(kept, schema=INDEX),
        counts=Counts(len(kept) + len(rejected), len(kept), dict(sorted(reasons.items()))),
        tar=tar,
        rejected=pa.Table.from_pylist(rejected, schema=REJECTED),
    )


def _ledger_row(verdict: Verdict) -> dict[str, Any]:
    record = verdict.record
    return {
        "key": verdict.key,
        "source_id": record.source_id,
        "locator": record.locator,
        "source_url": record.source_url,
        "reason": verdict.reason,
        "detail": verdict.detail,
        "attempts": verdict.fetched.attempts if verdict.fetched else 0,
        "retryable": verdict.retryable,
    }


class _Attempt:
    """One attempt at the downloads of an item, of which another would have other results.

    ``ledger`` has a row for each record, by locator: what is said of it if it is not kept.
    """

    def __init__(self, downloads: Sequence[Verdict], before: Mapping[str, LedgerRow]) -> None:
        self._before = before
        self._observed = pa.Table.from_pylist(
            [_observation(verdict) for verdict in downloads if verdict.fetched], FETCHED
        )
        self.ledger: dict[str, LedgerRow] = {}
        for verdict in downloads:
            row = _ledger_row(verdict)
            if verdict.row is not None:
                row["reason"] = RejectReason.UNAVAILABLE
                row["detail"] = "the attempt whose shard was published did not get it"
                row["retryable"] = True
            if verdict.record.locator in before:
                row["attempts"] += before[verdict.record.locator]["attempts"]
            self.ledger[verdict.record.locator] = row

    def output(
        self, tar: bytes, kept: Sequence[Mapping[str, Any]], rejected: Sequence[LedgerRow]
    ) -> Output:
        """Return the output of the item."""
        output = _output(tar, kept, rejected)
        retried = Counter(str(row["reason"]) for row in self._before.values())
        counts = replace(output.counts, retried=dict(sorted(retried.items())))
        return replace(output, counts=counts, observed=Observed(self._observed, self._adopt))

    def _adopt(self, tar: bytes, rejected: pa.Table | None) -> Output:
        """Return the output with the pictures, and the ledger, that another attempt published."""
        kept = _index_of(tar)
        located = {row["locator"] for row in kept}
        own = [row for locator, row in self.ledger.items() if locator not in located]
        return self.output(tar, kept, own if rejected is None else rejected.to_pylist())


def _observation(verdict: Verdict) -> dict[str, Any]:
    fetched = verdict.fetched
    assert fetched is not None
    return {
        "key": verdict.key,
        "url": fetched.url,
        "final_url": fetched.final_url,
        "status": fetched.status,
        "outcome": verdict.reason or "kept",
        "attempts": fetched.attempts,
        "started": fetched.started,
        "duration_s": fetched.duration_s,
    }


def _index_of(tar: bytes) -> list[dict[str, Any]]:
    """Return the index of a shard's tar, from the rows that stand behind its pictures."""
    rows = []
    with tarfile.open(fileobj=io.BytesIO(tar), mode="r:") as archive:
        members = iter(archive)
        for picture, described in zip(members, members, strict=True):
            data = tar[described.offset_data : described.offset_data + described.size]
            rows.append(json.loads(data) | {"offset": picture.offset_data})
    return rows
