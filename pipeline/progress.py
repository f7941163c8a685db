"""What a running stage shows: counts of what has been published, never of what was attempted."""

import time
from collections.abc import Mapping, Sequence

from rich import box
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from pipeline import storage
from pipeline.receipts import Counts, total
from pipeline.stage import (
    Plan,
    Stage,
    WorkItem,
    committed_shards,
    item_identity,
    read_receipts,
    refuse_other_identity,
)
from pipeline.summary import dataset_url

_LINE_EVERY_S = 15.0
_POLL_TIME_SHARE = 0.05
"""Polling takes at most this share of the time, however long the listings are: of 200,000 shards
on gs:// they are 800 requests, side by side, for half a cent."""
_RECEIPTS_A_POLL = 1000
"""Of so many new items the records are counted, and of the others estimated: a cluster publishes
faster than one process reads."""

console = Console(stderr=True, highlight=False)


class Progress:
    """Follows a stage from its published items: live on a terminal, else a line now and then."""

    def __init__(self, stage: Stage, plan: Plan) -> None:
        self._stage = stage
        self._missing = _by_dataset(plan.missing)
        self._planned = _by_dataset(plan.items)
        self._published: dict[str, set[str]] = {dataset: set() for dataset in self._missing}
        self._counted, self._counts = 0, Counts()
        self._started = time.monotonic()
        self._next_poll = self._started
        self._next_line = self._started + _LINE_EVERY_S
        self._live = Live(console=console, transient=True, auto_refresh=False)

    def __enter__(self) -> "Progress":
        if console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._live.stop()

    def update(self) -> None:
        """Look for newly published items and show the counts."""
        now = time.monotonic()
        if now < self._next_poll:
            return
        for dataset in sorted(self._missing):
            self._look(dataset)
        poll_s = time.monotonic() - now
        self._next_poll = now + max(1.0, poll_s / _POLL_TIME_SHARE)
        if console.is_terminal:
            self._live.update(Text(self._line()), refresh=True)
        elif now >= self._next_line:
            console.print(self._line(), soft_wrap=True)
            self._next_line = now + _LINE_EVERY_S

    def _look(self, dataset: str) -> None:
        """Count the newly published items of a dataset, and the records of a part of them.

        Raises:
            EvenmixError: somebody publishes them in another way, such as a job in the cloud that an
                earlier command began. Better now than when all is done.
        """
        missing, published = self._missing[dataset], self._published[dataset]
        awaited = missing.keys() - published
        if not awaited:
            return
        folder = dataset_url(self._stage.root, self._stage.folder, dataset)
        there = committed_shards(folder, self._planned[dataset])
        new = [shard for shard in there if shard in awaited]
        published.update(new)
        counted = new[:: -(-len(new) // _RECEIPTS_A_POLL) or 1]
        self._counted += len(counted)
        for shard, receipt in read_receipts(folder, counted):
            planned = item_identity(self._stage, missing[shard])
            refuse_other_identity(self._stage, dataset, shard, receipt, planned)
            self._counts = total([self._counts, receipt.counts])

    def _line(self) -> str:
        elapsed_s = time.monotonic() - self._started
        done, items = (sum(map(len, s.values())) for s in (self._published, self._missing))
        scale = done / self._counted if done else 1.0
        about = "about " if scale > 1 else ""
        records_in, records_out = self._counts.records_in * scale, self._counts.records_out * scale
        left = f", {_clock(elapsed_s * (items - done) / done)} left" if done else ""
        return (
            f"{self._stage.name}: {done}/{items} items, {about}{records_in:,.0f} records "
            f"({records_in / elapsed_s:,.0f}/s), {records_out:,.0f} kept, "
            f"{records_in - records_out:,.0f} rejected{left}"
        )


def _by_dataset(items: Sequence[WorkItem]) -> dict[str, dict[str, WorkItem]]:
    """Return the items of each dataset, by shard."""
    found: dict[str, dict[str, WorkItem]] = {}
    for item in items:
        found.setdefault(item.dataset, {})[item.shard] = item
    return found


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"


def counts_table(title: str, counts: Mapping[str, Counts]) -> Table:
    """Return a table of what went in and came out, and the reasons of the difference."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("dataset", overflow="fold")
    table.add_column("in", justify="right")
    table.add_column("out", justify="right")
    table.add_column("rejected", overflow="fold")
    for dataset, count in counts.items():
        table.add_row(
            dataset, f"{count.records_in:,}", f"{count.records_out:,}", reasons_text(count, ", ")
        )
    return table


def print_counts(title: str, counts: Mapping[str, Counts]) -> None:
    """Print a stage's counts by dataset: a table, or a line if there is only one."""
    if len(counts) == 1:
        ((dataset, count),) = counts.items()
        text = f"{count.records_in:,} in, {count.records_out:,} out"
        line = f"{title}, {dataset}: {text} {reasons_text(count, ', ')}".rstrip()
        console.print(line, soft_wrap=True)
        return
    console.print(counts_table(title, {**counts, "all": total(counts.values())}))


def reasons_text(counts: Counts, separator: str) -> str:
    """Return the rejections as text, such as ``too_small 4, truncated 1``."""
    return separator.join(f"{reason} {n:,}" for reason, n in sorted(counts.rejected.items()))


def exists_line(stage: Stage) -> str:
    """Return what is said of a stage that has nothing to do."""
    return f"{stage.name}: {storage.join(stage.root, stage.folder)} is complete; nothing to do"
