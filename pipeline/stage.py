"""The one way a stage runs: work items in, files out, receipts kept, finished work skipped.

A stage adds one folder below the root R. It plans its work items, and each item, on some worker,
publishes one shard (:mod:`pipeline.publishing`): the tar if there is one, the rejected records, and
last the Parquet file, whose appearance is the commit. When every item of a dataset has committed,
``stage.json`` sums up the receipts (:mod:`pipeline.summary`). Started again, a stage does what is
missing and nothing else.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from itertools import groupby
from typing import Any, Protocol

import pyarrow as pa

from pipeline import storage
from pipeline.errors import EvenmixError
from pipeline.receipts import (
    Counts,
    Receipt,
    difference,
    fingerprint,
    read_receipt,
)
from pipeline.summary import (
    Summary,
    dataset_url,
    generation_of,
    read_generation,
    summarise,
    summary_name,
)

REJECTED_SUFFIX = ".rejected.parquet"
OBSERVED_SUFFIX = ".fetch.parquet"
_CONCURRENT_READS = 64  # of footers, which are a few kilobytes
_CONCURRENT_REMOVALS = 64
_RECEIPTS_AHEAD = 1024
SHARDS_PER_LISTING = 250
"""A shard has up to four files, and gs:// lists a thousand at once."""


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
    """What an item publishes: its table, and where it has them its tar and rejected records.

    ``files`` are further ones, under names of the stage's own; no two items may use the same.

    ``observed`` is there if another attempt at the item would give other bytes, as a download
    does; such an item has a tar and a table of rejected records, and nothing else.
    """

    table: pa.Table
    counts: Counts
    tar: bytes | None = None
    rejected: pa.Table | None = None
    files: Mapping[str, bytes] = field(default_factory=dict)
    observed: "Observed | None" = None


@dataclass(frozen=True)
class Observed:
    """What an item saw: a table of observations, published as ``<shard>.fetch.parquet``.

    ``adopt`` makes the item's output agree with what an attempt published that was cut off, or is
    faster: its tar, and its rejected records or None if it has not come to these.
    """

    table: pa.Table
    adopt: Callable[[bytes, pa.Table | None], Output]


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

    @property
    def items_at_once(self) -> int:
        """How many items one bundle of Beam's processes at a time, each in its own thread."""

    def config(self, dataset: str) -> Mapping[str, Any]:
        """The part of the configuration that decides what an item of ``dataset`` holds."""

    def process(self, item: WorkItem) -> Output:
        """Do the work of one item, on a worker. Bad records are outcomes, not exceptions."""


def item_identity(stage: Stage, item: WorkItem) -> dict[str, Any]:
    """Return everything that decides an item's content: never runner, threads or versions."""
    return {
        "stage": stage.name,
        "version": stage.version,
        "item": f"{item.dataset}/{item.shard}",
        "config": dict(stage.config(item.dataset)),
        "inputs": dict(item.inputs),
    }


@dataclass(frozen=True)
class Plan:
    """The items of a stage, split into those with a commit and those that remain.

    ``finished`` has the ``<dataset>/<shard>`` of those with a commit, ``summarised`` the
    generations of datasets that are finished as a whole.
    """

    items: Sequence[WorkItem]
    finished: Set[str]
    summarised: Mapping[tuple[str, int], Summary]

    @property
    def missing(self) -> list[WorkItem]:
        """The items without a commit."""
        return [
            item
            for item in self.items
            if _generation(item) not in self.summarised
            and f"{item.dataset}/{item.shard}" not in self.finished
        ]

    @property
    def is_finished(self) -> bool:
        """Tell whether nothing remains, not even a summary."""
        return {_generation(item) for item in self.items} == self.summarised.keys()


def _generation(item: WorkItem) -> tuple[str, int]:
    return item.dataset, generation_of(item.shard)


def _by_generation(items: Sequence[WorkItem]) -> dict[tuple[str, int], list[WorkItem]]:
    ordered = sorted(items, key=lambda item: (_generation(item), item.shard))
    return {place: list(group) for place, group in groupby(ordered, key=_generation)}


def make_plan(stage: Stage, items: Sequence[WorkItem]) -> Plan:
    """Find out which items are done already.

    Raises:
        EvenmixError: something published comes from other inputs or another configuration.
    """
    finished: set[str] = set()
    summarised: dict[tuple[str, int], Summary] = {}
    for (dataset, generation), group in _by_generation(items).items():
        planned = {item.shard: item_identity(stage, item) for item in group}
        summary = read_generation(stage.root, stage.folder, dataset, generation)
        done = (
            {shard: item["fingerprint"] for shard, item in summary.items.items()} if summary else {}
        )
        if summary and done == {
            shard: fingerprint(identity) for shard, identity in planned.items()
        }:
            summarised[dataset, generation] = summary
            continue
        folder = dataset_url(stage.root, stage.folder, dataset)
        shards = _of_generation(committed_shards(folder, planned), generation)
        for shard in sorted(done.keys() - set(shards)):
            refuse_other_identity(stage, dataset, shard, None, planned.get(shard))
        for shard, receipt in read_receipts(folder, shards):
            refuse_other_identity(stage, dataset, shard, receipt, planned.get(shard))
        if summary:
            added = sorted(planned.keys() - done.keys())
            raise EvenmixError(
                f"{folder} is finished, but its inputs have grown by {len(added)} shards "
                f"({', '.join(added[:3])}...). A finished dataset is not changed: give the new "
                "files a dataset name of their own, or take another root."
            )
        finished |= {f"{dataset}/{shard}" for shard in shards}
    return Plan(items, finished, summarised)


def refuse_other_identity(
    stage: Stage,
    dataset: str,
    shard: str,
    receipt: Receipt | None,
    planned: Mapping[str, Any] | None,
) -> None:
    """Check that a shard's receipt is that of the item as it is planned.

    Raises:
        EvenmixError: it is not; the text says what differs.
    """
    url = shard_url(stage, dataset, shard)
    remedy = (
        "Repeat the options and sources that it was made with; or, for other work, take another "
        "root or another name (of the dataset, dedup.name, a caption set's, mixture.name), or "
        "remove that folder. After `evenmix ingest --retry` dedup and mixture need new names."
    )
    if planned is None:
        raise EvenmixError(f"{url} was made from inputs that this run does not have. {remedy}")
    if receipt is None:
        raise EvenmixError(
            f"{url} is listed in its folder's {summary_name(generation_of(shard))} but is gone; "
            "remove that file"
        )
    if receipt.fingerprint != fingerprint(planned):
        lines = "; ".join(difference(receipt.identity, dict(planned)))
        raise EvenmixError(f"{url} was made in another way ({lines}). {remedy}")


def committed_receipts(stage: Stage, dataset: str) -> dict[str, Receipt]:
    """Read the receipts of all committed items of a dataset's first generation, by shard."""
    folder = dataset_url(stage.root, stage.folder, dataset)
    return dict(read_receipts(folder, _of_generation(committed_shards(folder), 0)))


def read_receipts(folder: str, shards: Sequence[str]) -> Iterator[tuple[str, Receipt]]:
    """Yield shards of a folder with their receipts, in order; many are read at once."""
    with ThreadPoolExecutor(_CONCURRENT_READS) as pool:
        for start in range(0, len(shards), _RECEIPTS_AHEAD):
            some = shards[start : start + _RECEIPTS_AHEAD]
            urls = [storage.join(folder, f"{shard}.parquet") for shard in some]
            yield from zip(some, pool.map(read_receipt, urls), strict=True)


def committed_shards(folder: str, planned: Iterable[str] = ()) -> list[str]:
    """List the shards of a folder that have a commit.

    The ``planned`` shards tell where a long listing can be split, so that it takes less time.
    """
    return _committed(file_names(folder, planned))


def committed_items(stage: Stage, items: Sequence[WorkItem]) -> set[tuple[str, str]]:
    """Return dataset and shard of what has a commit, of the datasets of ``items``."""
    return {
        (dataset, shard)
        for (dataset, _), group in _by_generation(items).items()
        for shard in committed_shards(
            dataset_url(stage.root, stage.folder, dataset), [item.shard for item in group]
        )
    }


def a_committed_shard(folder: str) -> str | None:
    """Return one of the shards of a folder that have a commit, None if there is none."""
    names = (file.name for file in storage.walk_files(folder))
    return next((name.removesuffix(".parquet") for name in names if is_commit(name)), None)


def file_names(folder: str, planned: Iterable[str]) -> list[str]:
    """List the files of a folder; the ``planned`` shards are as in :func:`committed_shards`."""
    return [file.name for file in walk_shards(folder, planned)]


def walk_shards(folder: str, planned: Iterable[str]) -> Iterator[storage.FileInfo]:
    """Yield the files of a folder; a long listing is split between the ``planned`` shards."""
    boundaries = sorted(planned)[SHARDS_PER_LISTING::SHARDS_PER_LISTING]
    return storage.walk_files(folder, boundaries)


def _committed(names: Sequence[str]) -> list[str]:
    return [name.removesuffix(".parquet") for name in names if is_commit(name)]


def _of_generation(shards: Sequence[str], generation: int) -> list[str]:
    return [shard for shard in shards if generation_of(shard) == generation]


def is_commit(name: str) -> bool:
    """Tell whether a file's appearance commits an item."""
    return (
        name.endswith(".parquet")
        and not name.endswith((REJECTED_SUFFIX, OBSERVED_SUFFIX))
        and not name.startswith(storage.TEMPORARY_PREFIX)
    )


def shard_url(stage: Stage, dataset: str, shard: str) -> str:
    """Return the URL of the file that commits an item."""
    return storage.join(dataset_url(stage.root, stage.folder, dataset), f"{shard}.parquet")


def write_work_lists(stage: Stage, items: Sequence[WorkItem]) -> list[str]:
    """Store work items as JSON lines, so that no job description has to carry them.

    There is one list for each generation of a dataset, beside its shards: it goes when that is
    finished, and never the list of a build that is busy with another.
    """
    urls = []
    for (dataset, generation), group in _by_generation(items).items():
        lines = "".join(json.dumps(asdict(item), sort_keys=True) + "\n" for item in group)
        digest = fingerprint({"lines": lines})[:16]
        name = f"{storage.TEMPORARY_PREFIX}work-{digest}.r{generation}.jsonl"
        urls.append(storage.join(dataset_url(stage.root, stage.folder, dataset), name))
        storage.publish(urls[-1], lines.encode())
    return urls


def read_work_list(url: str) -> list[WorkItem]:
    """Read a work list; one that is gone was finished by another build, so nothing remains."""
    return [_work_item(line) for line in _lines(url)]


def _lines(url: str) -> list[bytes]:
    try:
        return storage.read_bytes(url).splitlines(keepends=True)
    except EvenmixError:
        if storage.exists(url):
            raise
        return []


def _work_item(line: bytes) -> WorkItem:
    return WorkItem(**json.loads(line))


Line = tuple[str, int, int]
"""Where a work list has an item: its URL, the offset, the number of bytes. No more goes through a
shuffle, however much an item has to be told."""


def lines_of_work_list(url: str) -> list[Line]:
    """Return where the items of a work list are; none if it is gone."""
    lines, offset = [], 0
    for line in _lines(url):
        lines.append((url, offset, len(line)))
        offset += len(line)
    return lines


def read_line(line: Line) -> WorkItem | None:
    """Read an item from its work list; None if that was finished by another build, and is gone."""
    url, offset, num_bytes = line
    try:
        return _work_item(storage.read_bytes(url, offset, num_bytes))
    except EvenmixError:
        if storage.exists(url):
            raise
        return None


def finish(stage: Stage, items: Sequence[WorkItem]) -> None:
    """Check the sums of a stage whose items have all run, sweep up, publish the summaries.

    Raises:
        EvenmixError: an item has no commit although the job has ended, or another build with
            other inputs or another configuration has published here meanwhile.
    """
    for (dataset, generation), group in _by_generation(items).items():
        planned = {item.shard: item_identity(stage, item) for item in group}
        folder = dataset_url(stage.root, stage.folder, dataset)
        names = file_names(folder, planned)
        shards = _of_generation(_committed(names), generation)
        absent = planned.keys() - set(shards)
        if absent:
            raise EvenmixError(
                f"{stage.name}: {len(absent)} shards of {dataset} were not published, such as "
                f"{min(absent)}; start the same command again"
            )
        receipts: dict[str, Receipt] = {}
        for shard, receipt in read_receipts(folder, shards):
            refuse_other_identity(stage, dataset, shard, receipt, planned.get(shard))
            # The equal one, which is there already: of many shards identities take most memory.
            receipts[shard] = replace(receipt, identity=planned[shard])
        summary = summarise(stage.name, dataset, receipts)
        sweep_temporaries(folder, generation)
        _sweep(folder, names, receipts, generation)
        storage.publish(storage.join(folder, summary_name(generation)), summary.to_json())


def sweep_temporaries(folder: str, generation: int) -> None:
    """Remove temporary files of a generation that is finished; a retry may be busy with the next.

    A writer that is still busy with one of them has lost anyway.
    """
    files = storage.walk_files(folder, prefix=storage.TEMPORARY_PREFIX)
    with ThreadPoolExecutor(_CONCURRENT_REMOVALS) as pool:
        of_generation = [file.url for file in files if generation_of(file.name) == generation]
        list(pool.map(storage.remove, of_generation))


def _sweep(
    folder: str, names: Sequence[str], receipts: Mapping[str, Receipt], generation: int
) -> None:
    """Remove what killed runs left in the folder of a generation whose items are all published.

    ``names`` are the files that were there when the last item was.
    """
    kept = {
        f"{shard}{suffix}"
        for shard, receipt in receipts.items()
        for suffix, is_there in (
            (".tar", receipt.tar),
            (REJECTED_SUFFIX, receipt.rejected),
            (OBSERVED_SUFFIX, True),
        )
        if is_there
    }
    for name in names:
        for suffix in (".tar", REJECTED_SUFFIX, OBSERVED_SUFFIX):
            shard = name.removesuffix(suffix)
            if shard != name and name not in kept and generation_of(shard) == generation:
                storage.remove(storage.join(folder, name))
