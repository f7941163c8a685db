"""What a running stage shows: counts of what has been published, never of what was attempted."""

import time
from collections.abc import Mapping

from rich import box
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from pipeline import storage
from pipeline.receipts import Counts, Receipt, read_receipt, total
from pipeline.stage import Plan, Stage, committed_shards, shard_url
from pipeline.summary import dataset_url

_LINE_EVERY_S = 15.0
_POLL_TIME_SHARE = 0.05
"""Polling takes at most this share of the time, however long the listings are."""

console = Console(stderr=True, highlight=False)


class Progress:
    """Follows a stage from its published items: live on a terminal, else a line now and then."""

    def __init__(self, stage: Stage, plan: Plan) -> None:
        self._stage = stage
        self._missing = {(item.dataset, item.shard) for item in plan.missing}
        self._receipts: dict[tuple[str, str], Receipt] = {}
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
        for dataset in sorted({dataset for dataset, _ in self._missing}):
            folder = dataset_url(self._stage.root, self._stage.folder, dataset)
            for shard in committed_shards(folder):
                place = (dataset, shard)
                if place in self._missing and place not in self._receipts:
                    self._receipts[place] = read_receipt(shard_url(self._stage, dataset, shard))
        poll_s = time.monotonic() - now
        self._next_poll = now + max(1.0, poll_s / _POLL_TIME_SHARE)
        if console.is_terminal:
            self._live.update(Text(self._line()), refresh=True)
        elif now >= self._next_line:
            console.print(self._line(), soft_wrap=True)
            self._next_line = now + _LINE_EVERY_S

    def _line(self) -> str:
        elapsed_s = time.monotonic() - self._started
        counts = total(receipt.counts for receipt in self._receipts.values())
        done, items = len(self._receipts), len(self._missing)
        left = f", {_clock(elapsed_s * (items - done) / done)} left" if done else ""
        return (
            f"{self._stage.name}: {done}/{items} items, {counts.records_in:,} records "
            f"({counts.records_in / elapsed_s:,.0f}/s), {counts.records_out:,} kept, "
            f"{sum(counts.rejected.values()):,} rejected{left}"
        )


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
