"""The steps of a search: what their stages share, and what later steps need to know of each."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dedup.corpus import Search
from pipeline import storage
from pipeline.beam_job import RunnerOptions
from pipeline.receipts import Counts, fingerprint, total
from pipeline.run import run_stage
from pipeline.stage import Stage, WorkItem
from pipeline.summary import dataset_url


@dataclass(frozen=True)
class SearchStage:
    """What the stages of a search have in common."""

    search: Search
    root: str
    folder: str
    version: int = 1
    resource_hints: Mapping[str, str] = field(default_factory=dict)
    items_at_once: int = 1

    def config(self, dataset: str) -> Mapping[str, Any]:
        """Return nothing: the inputs decide."""
        return {}


@dataclass(frozen=True)
class Published:
    """The tables that a step has published, and their sums.

    ``by_dataset`` has their URLs, by shard; ``digest`` identifies all of them.
    """

    by_dataset: Mapping[str, list[str]]
    digest: str
    counts: Counts

    @property
    def urls(self) -> list[str]:
        """The URLs of all tables."""
        return [url for urls in self.by_dataset.values() for url in urls]


def run_step(stage: Stage, items: Sequence[WorkItem], runner: RunnerOptions) -> Published:
    """Run a stage to its end.

    Raises:
        EvenmixError: as :func:`pipeline.run.run_stage`.
    """
    summaries = run_stage(stage, items, runner)
    urls = {
        dataset: [
            storage.join(dataset_url(stage.root, stage.folder, dataset), f"{shard}.parquet")
            for shard in sorted(summary.items)
        ]
        for dataset, summary in sorted(summaries.items())
    }
    digests = {dataset: summary.digests() for dataset, summary in summaries.items()}
    counts = total(summary.counts for summary in summaries.values())
    return Published(urls, fingerprint(digests), counts)
