"""How fast a captioning run went, beside what the engine alone reaches.

The bare engine is `LLM.chat` of vLLM with everything in one batch: it never waits for a picture, a
network or a disk. It is measured when a run is told to, and noted for the later runs of the set.
"""

import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta

import pyarrow.compute as pc

from captioning.bare_engine import BareRate, measure
from captioning.from_model import VllmCaptioning
from pipeline import storage
from pipeline.progress import console
from pipeline.records import NOTES
from pipeline.stage import WorkItem, shard_url

_CONCURRENT_READS = 16


@dataclass(frozen=True)
class Rate:
    """What a run has brought, from its first question to its last answer."""

    captions: int
    output_tokens: int
    began: datetime
    ended: datetime

    @property
    def tokens_per_s(self) -> float:
        """Output tokens per second."""
        return self.output_tokens / max((self.ended - self.began).total_seconds(), 1e-3)


def print_efficiency(stage: VllmCaptioning, items: Sequence[WorkItem], since: datetime) -> None:
    """Print the rate of a run's shards, and its share of the bare engine's if that is known."""
    rate = run_rate(stage, items, since)
    if rate is None:
        return
    console.print(
        f"{stage.name}: {rate.captions:,} captions with {rate.output_tokens:,} output tokens in "
        f"{(rate.ended - rate.began).total_seconds():,.1f} s: {rate.tokens_per_s:,.0f} tokens/s",
        soft_wrap=True,
    )
    url = _bare_rate_url(stage)
    if storage.exists(url):
        bare = BareRate(**json.loads(storage.read_bytes(url)))
        share = rate.tokens_per_s * bare.seconds / bare.output_tokens
        console.print(f"efficiency: {share:.2f} of the bare engine's", soft_wrap=True)
    elif stage.settings.endpoint is None:
        console.print(
            "efficiency: not known; with --bare-engine 512 the engine alone is measured once, and "
            "each run of this set compared with it",
            soft_wrap=True,
        )


def measure_bare_engine(stage: VllmCaptioning, items: Sequence[WorkItem], captions: int) -> None:
    """Measure the bare engine with the first captions of a set, print and note its rate.

    Raises:
        EvenmixError: the engine cannot be started here.
    """
    bare = measure(stage.engine_config, stage.sample_requests(items, captions))
    storage.replace(_bare_rate_url(stage), json.dumps(asdict(bare)).encode())
    console.print(
        f"the bare engine: {bare.output_tokens / bare.seconds:,.0f} tokens/s (vLLM's LLM.chat, "
        f"{bare.captions:,} captions in one batch)",
        soft_wrap=True,
    )


def _bare_rate_url(stage: VllmCaptioning) -> str:
    return storage.join(stage.root, NOTES, stage.folder, "bare-engine.json")


def run_rate(stage: VllmCaptioning, items: Sequence[WorkItem], since: datetime) -> Rate | None:
    """Sum up the captions that were asked for ``since`` a time; None if there are none."""
    with ThreadPoolExecutor(_CONCURRENT_READS) as pool:
        rates = [rate for rate in pool.map(lambda item: _rate(stage, item, since), items) if rate]
    if not rates:
        return None
    return Rate(
        sum(rate.captions for rate in rates),
        sum(rate.output_tokens for rate in rates),
        min(rate.began for rate in rates),
        max(rate.ended for rate in rates),
    )


def _rate(stage: VllmCaptioning, item: WorkItem, since: datetime) -> Rate | None:
    fields = ("asked", "answer_s", "completion_tokens")
    with storage.open_parquet(shard_url(stage, item.dataset, item.shard)) as file:
        table = file.read(columns=[f"captions.list.element.{field}" for field in fields])
    captions = pc.list_flatten(table["captions"].combine_chunks())
    is_new = pc.fill_null(pc.greater_equal(pc.struct_field(captions, "asked"), since), False)
    rows = captions.filter(is_new).to_pylist()
    if not rows:
        return None
    return Rate(
        len(rows),
        sum(row["completion_tokens"] for row in rows),
        min(row["asked"] for row in rows),
        max(row["asked"] + timedelta(seconds=row["answer_s"]) for row in rows),
    )
