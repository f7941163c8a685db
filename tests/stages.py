"""A small but real stage for the tests: words go in, those that are long enough come out."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from pipeline.errors import EvenmixError
from pipeline.publishing import publish_item, remove_leftovers
from pipeline.receipts import Counts
from pipeline.records import REJECTED
from pipeline.stage import Output, Stage, WorkItem, finish, make_plan
from pipeline.summary import Summary, read_summary
from pipeline.tars import TarWriter


@dataclass(frozen=True)
class Words:
    """Publishes the words of an item as a tar and a table.

    ``pause_s`` is how long an item takes; ``obstacle`` and ``defect`` are the messages of an
    EvenmixError and a ValueError that end it; ``loses`` words vanish without a reason.
    """

    root: str
    min_length: int = 1
    pause_s: float = 0.0
    obstacle: str = ""
    defect: str = ""
    loses: int = 0
    name: str = "words"
    version: int = 1
    folder: str = "words"
    resource_hints: Mapping[str, str] = field(default_factory=dict)
    items_at_once: int = 1

    def config(self, dataset: str) -> Mapping[str, Any]:
        return {"min_length": self.min_length}

    def process(self, item: WorkItem) -> Output:
        time.sleep(self.pause_s)
        if self.obstacle:
            raise EvenmixError(self.obstacle)
        if self.defect:
            raise ValueError(self.defect)
        words = item.inputs["words"]
        kept = [word for word in words if len(word) >= self.min_length]
        rejected = [
            {"key": word, "source_id": word, "locator": word, "reason": "too_small", "detail": ""}
            for word in words
            if len(word) < self.min_length
        ]
        tar = TarWriter()
        for word in kept:
            tar.add(f"{word}.txt", word.encode())
        reasons = {"too_small": len(rejected)} if rejected else {}
        return Output(
            table=pa.table({"key": pa.array(kept, pa.string())}),
            counts=Counts(len(words), len(kept) - self.loses, reasons),
            tar=tar.close(),
            rejected=pa.Table.from_pylist(rejected, schema=REJECTED),
        )


def items(*shards: str, dataset: str = "d") -> list[WorkItem]:
    """Return one item a shard, each with three words: of one, three and five letters."""
    return [
        WorkItem(dataset, shard, inputs={"words": [f"{shard}"[:1], f"{shard}bb"[:3], "ccccc"]})
        for shard in shards
    ]


def run_here(stage: Stage, items: Sequence[WorkItem]) -> Mapping[str, Summary]:
    """Do what `run_stage` does, in this process and without Beam."""
    plan = make_plan(stage, items)
    remove_leftovers(stage, plan)
    for item in plan.missing:
        publish_item(stage, item)
    finish(stage, items)
    found = {item.dataset: read_summary(stage.root, stage.folder, item.dataset) for item in items}
    return {name: summary for name, summary in found.items() if summary}
