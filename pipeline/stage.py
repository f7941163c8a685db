"""The one way a stage runs: work items in, files out, receipts kept, finished work skipped.

A stage adds one folder below the root R. It plans its work items, and each item, on some worker,
publishes one shard: the tar if there is one, the rejected records, and last the Parquet file,
whose appearance is the commit. When every item of a dataset has committed, ``stage.json`` sums up
the receipts. Started again, a stage does what is missing and nothing else.
"""

import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from itertools import groupby
from typing import Any, Protocol

import pyarrow as pa

from pipeline import storage
from pipeline.errors import EvenmixError
from pipeline.receipts import (
    METADATA_KEY,
    Counts,
    Receipt,
    checksum,
    difference,
    fingerprint,
    read_receipt,
    table_digest,
    total,
)

SUMMARY = "stage.json"
_CONCURRENT_READS = 16


@dataclass(frozen=True)
class WorkItem:
    """One shard's worth of work.

    ``inputs`` identify what is read (they enter the fingerprint); ``payload`` says how to find it
    (it does not). Both hold JSON values only.
    """

    dataset: str
    shard: str
    inputs: Mapping[str, Any]
    payload: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Output:
    """What an item publishes: its table, and where it has them its tar and rejected records."""

    table: pa.Table
    counts: Counts
    tar: bytes | None = None
    rejected: pa.Table | None = None


class Stage(Protocol):
    """What a stage has to say of itself; its instances are pickled to the workers."""

    @property
    def name(self) -> str:
        """The sub-command's name, such as ``ingest``."""

    @property
    def version(self) -> int:
        """Raised whenever the stage's logic changes what it would publish."""

    @property
    def root(self) -> str:
        """The root R of the corpus."""

    @property
    def folder(self) -> str:
        """The folder below R, such as ``embeddings/sscd``."""

    @property
    def resource_hints(self) -> Mapping[str, str]:
        """Beam resource hints of the workers that process items (an accelerator, memory)."""

    def config(self, dataset: str) -> Mapping[str, Any]:
        """The part of the configuration that decides what an item of ``dataset`` holds."""

    def process(self, item: WorkItem) -> Output:
        """Do the work of one item, on a worker. Bad records are outcomes, not exceptions."""


@dataclass(frozen=True)
class Summary:
    """``stage.json``: what a finished stage made of one dataset."""

    stage: str
    dataset: str
    items: dict[str, dict[str, Any]]
    counts: Counts

    def to_json(self) -> bytes:
        """Serialise; equal summaries give equal bytes."""
        return (json.dumps(asdict(self), sort_keys=True, indent=1) + "\n").encode()

    @classmethod
    def from_json(cls, data: bytes) -> "Summary":
        """Parse what :meth:`to_json` wrote."""
        fields = json.loads(data)
        return cls(**(fields | {"counts": Counts(**fields["counts"])}))


def item_identity(stage: Stage, item: WorkItem) -> dict[str, Any]:
    """Return everything that decides an item's content: never runner, threads or versions."""
    return {
        "stage": stage.name,
        "version": stage.version,
        "item": f"{item.dataset}/{item.shard}",
        "config": dict(stage.config(item.dataset)),
        "inputs": dict(item.inputs),
    }


def dataset_url(root: str, folder: str, dataset: str) -> str:
    """Return the folder of one dataset in one stage."""
    return storage.join(root, folder, dataset)


def read_summary(root: str, folder: str, dataset: str) -> Summary | None:
    """Return the summary of a finished stage, or None if it has not finished."""
    url = storage.join(dataset_url(root, folder, dataset), SUMMARY)
    return Summary.from_json(storage.read_bytes(url)) if storage.exists(url) else None


def finished_shards(root: str, folder: str, dataset: str, command: str) -> dict[str, str]:
    """Return the digest of each shard that a finished stage published, by shard name.

    Raises:
        EvenmixError: the stage has not finished; ``command`` is what finishes it.
    """
    summary = read_summary(root, folder, dataset)
    if summary is None:
        raise EvenmixError(
            f"{dataset_url(root, folder, dataset)} is missing or not finished; "
            f"run `evenmix {command}` first"
        )
    return {shard: item["digest"] for shard, item in summary.items.items()}


def read_shard(
    root: str, folder: str, dataset: str, shard: str, columns: Sequence[str] | None = None
) -> pa.Table:
    """Read the table that a stage published for one shard."""
    url = storage.join(dataset_url(root, folder, dataset), f"{shard}.parquet")
    return storage.read_parquet(url, columns)


@dataclass(frozen=True)
class Plan:
    """The items of a stage, split into those with a commit and those that remain."""

    items: Sequence[WorkItem]
    finished: Mapping[str, Receipt]
    summarised: Mapping[str, Summary]

    @property
    def missing(self) -> list[WorkItem]:
        """The items without a commit."""
        return [
            item
            for item in self.items
            if item.dataset not in self.summarised
            and f"{item.dataset}/{item.shard}" not in self.finished
        ]


def make_plan(stage: Stage, items: Sequence[WorkItem]) -> Plan:
    """Find out which items are done already.

    Raises:
        EvenmixError: something published comes from other inputs or another configuration.
    """
    finished: dict[str, Receipt] = {}
    summarised: dict[str, Summary] = {}
    for dataset, group in groupby(
        sorted(items, key=lambda i: (i.dataset, i.shard)), key=lambda item: item.dataset
    ):
        planned = {item.shard: item_identity(stage, item) for item in group}
        summary = read_summary(stage.root, stage.folder, dataset)
        done = (
            {shard: item["fingerprint"] for shard, item in summary.items.items()} if summary else {}
        )
        if summary and done == {
            shard: fingerprint(identity) for shard, identity in planned.items()
        }:
            summarised[dataset] = summary
            continue
        receipts = committed_receipts(stage, dataset)
        for shard in sorted(receipts.keys() | done.keys()):
            _refuse_other_identity(stage, dataset, shard, receipts.get(shard), planned.get(shard))
        if summary:
            added = sorted(planned.keys() - done.keys())
            raise EvenmixError(
                f"{dataset_url(stage.root, stage.folder, dataset)} is finished, but its inputs "
                f"have grown by {len(added)} shards ({', '.join(added[:3])}...). A finished "
                "dataset is not changed: give the new files a dataset name of their own."
            )
        finished |= {f"{dataset}/{shard}": receipt for shard, receipt in receipts.items()}
    return Plan(items, finished, summarised)


def _refuse_other_identity(
    stage: Stage,
    dataset: str,
    shard: str,
    receipt: Receipt | None,
    planned: Mapping[str, Any] | None,
) -> None:
    url = shard_url(stage, dataset, shard)
    remedy = (
        "Give the new one another name in the recipe (dedup.name, a caption set's, mixture.name) "
        "or another root, or remove that folder."
    )
    if planned is None:
        raise EvenmixError(f"{url} was made from inputs that this run does not have. {remedy}")
    if receipt is None:
        raise EvenmixError(
            f"{url} is listed in {SUMMARY} but is gone; remove the folder's {SUMMARY}"
        )
    if receipt.fingerprint != fingerprint(planned):
        lines = "; ".join(difference(receipt.identity, dict(planned)))
        raise EvenmixError(f"{url} was made in another way ({lines}). {remedy}")


def committed_receipts(stage: Stage, dataset: str) -> dict[str, Receipt]:
    """Read the receipts of all committed items of a dataset, by shard."""
    folder = dataset_url(stage.root, stage.folder, dataset)
    shards = committed_shards(folder)
    with ThreadPoolExecutor(_CONCURRENT_READS) as pool:
        receipts = pool.map(
            lambda shard: read_receipt(storage.join(folder, f"{shard}.parquet")), shards
        )
        return dict(zip(shards, receipts, strict=True))


def committed_shards(folder: str) -> list[str]:
    """List the shards of a folder that have a commit."""
    return [
        file.name.removesuffix(".parquet")
        for file in storage.list_files(folder)
        if is_commit(file.name)
    ]


def is_commit(name: str) -> bool:
    """Tell whether a file's appearance commits an item."""
    return (
        name.endswith(".parquet")
        and not name.endswith((".rejected.parquet", ".fetch.parquet"))
        and not name.startswith(storage.TEMPORARY_PREFIX)
    )


def shard_url(stage: Stage, dataset: str, shard: str) -> str:
    """Return the URL of the file that commits an item."""
    return storage.join(dataset_url(stage.root, stage.folder, dataset), f"{shard}.parquet")


def publish_item(stage: Stage, item: WorkItem) -> None:
    """Do an item's work and publish it; an item that has a commit already is left alone.

    Raises:
        EvenmixError: its place is taken by work done in another way, or it cannot be written.
    """
    url = shard_url(stage, item.dataset, item.shard)
    identity = item_identity(stage, item)
    if storage.exists(url):
        _refuse_other_identity(stage, item.dataset, item.shard, read_receipt(url), identity)
        return
    output = stage.process(item)
    if not output.counts.is_conserved():
        raise AssertionError(
            f"{stage.name} {item.dataset}/{item.shard} lost records: {output.counts}"
        )
    rejected = None
    if output.rejected is not None and output.rejected.num_rows:
        rejected = storage.parquet_bytes(output.rejected, {})
    receipt = Receipt(
        identity=identity,
        counts=output.counts,
        digest=table_digest(output.table),
        tar=None if output.tar is None else checksum([output.tar]),
        rejected=None if rejected is None else checksum([rejected]),
    )
    stem = url.removesuffix(".parquet")
    if output.tar is not None:
        _publish_beside_commit(f"{stem}.tar", output.tar, url)
    if rejected is not None:
        _publish_beside_commit(f"{stem}.rejected.parquet", rejected, url)
    metadata = {METADATA_KEY: receipt.to_json()}
    if not storage.publish(url, storage.parquet_bytes(output.table, metadata)):
        _refuse_other_identity(stage, item.dataset, item.shard, read_receipt(url), identity)


def _publish_beside_commit(url: str, data: bytes, commit_url: str) -> None:
    """Publish a file that belongs to a commit which is still to come.

    If the name is taken, an equal attempt may be under way: then the bytes are equal and stay.
    Other bytes without a commit were left by a killed run with other settings and are replaced,
    in one step: the equal attempt may commit meanwhile, and no commit may be without its tar.
    """
    if storage.publish(url, data):
        return
    if checksum(storage.read_chunks(url)) != checksum([data]) and not storage.exists(commit_url):
        storage.replace(url, data)


def write_work_lists(stage: Stage, items: Sequence[WorkItem]) -> list[str]:
    """Store work items as JSON lines, so that no job description has to carry them.

    There is one list a dataset, beside its shards: it goes when that dataset is finished, and
    never the list of a build that is busy with another.
    """
    urls = []
    for dataset in sorted({item.dataset for item in items}):
        lines = "".join(
            json.dumps(asdict(item), sort_keys=True) + "\n"
            for item in items
            if item.dataset == dataset
        )
        name = f"{storage.TEMPORARY_PREFIX}work-{fingerprint({'lines': lines})[:16]}.jsonl"
        urls.append(storage.join(dataset_url(stage.root, stage.folder, dataset), name))
        storage.publish(urls[-1], lines.encode())
    return urls


def read_work_list(url: str) -> list[WorkItem]:
    """Read a work list; one that is gone was finished by another build, so nothing remains."""
    try:
        lines = storage.read_bytes(url).splitlines()
    except EvenmixError:
        if storage.exists(url):
            raise
        return []
    return [WorkItem(**json.loads(line)) for line in lines]


def finish(stage: Stage, items: Sequence[WorkItem]) -> dict[str, Summary]:
    """Check the sums of a stage whose items have all run, sweep up, publish ``stage.json``.

    Raises:
        EvenmixError: an item has no commit although the job has ended, or another build with
            other inputs or another configuration has published here meanwhile.
    """
    summaries = {}
    for dataset in sorted({item.dataset for item in items}):
        planned = {
            item.shard: item_identity(stage, item) for item in items if item.dataset == dataset
        }
        receipts = committed_receipts(stage, dataset)
        absent = planned.keys() - receipts.keys()
        if absent:
            raise EvenmixError(
                f"{stage.name}: {len(absent)} shards of {dataset} were not published, such as "
                f"{min(absent)}; start the same command again"
            )
        for shard, receipt in sorted(receipts.items()):
            _refuse_other_identity(stage, dataset, shard, receipt, planned.get(shard))
        summary = summarise(stage.name, dataset, receipts)
        folder = dataset_url(stage.root, stage.folder, dataset)
        _sweep(folder, receipts)
        storage.publish(storage.join(folder, SUMMARY), summary.to_json())
        summaries[dataset] = summary
    return summaries


def summarise(stage: str, dataset: str, receipts: Mapping[str, Receipt]) -> Summary:
    """Sum up the receipts of a dataset's shards in one stage."""
    return Summary(
        stage=stage,
        dataset=dataset,
        items={
            shard: {
                "fingerprint": receipt.fingerprint,
                "digest": receipt.digest,
                "counts": asdict(receipt.counts),
            }
            for shard, receipt in sorted(receipts.items())
        },
        counts=total(receipt.counts for receipt in receipts.values()),
    )


def _sweep(folder: str, receipts: Mapping[str, Receipt]) -> None:
    """Remove what killed runs left in the folder of a dataset whose items are all published."""
    storage.sweep(folder)
    kept = {f"{shard}.tar" for shard, receipt in receipts.items() if receipt.tar} | {
        f"{shard}.rejected.parquet" for shard, receipt in receipts.items() if receipt.rejected
    }
    for file in storage.list_files(folder):
        if file.name.endswith((".tar", ".rejected.parquet")) and file.name not in kept:
            storage.remove(file.url)
