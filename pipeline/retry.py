"""Trying again what a download could not get: the items of a further generation of shards.

A retry reads the ledger of the last generation, and asks again for the records that it calls
retryable, and for no others. What it gets becomes the shard ``<shard>.r1`` beside ``<shard>``, what
it does not get is in the ledger of that shard, and so on. The first ledger stays as it was written.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

from pipeline import storage
from pipeline.errors import EvenmixError
from pipeline.receipts import read_receipt
from pipeline.stage import REJECTED_SUFFIX, Stage, WorkItem, make_plan
from pipeline.summary import dataset_url, first_shard, next_generation, read_generations

_CONCURRENT_READS = 16


def retry_items(stage: Stage, items: Sequence[WorkItem]) -> list[WorkItem]:
    """Return the items of the next generation; ``items`` are those of the first run.

    Raises:
        EvenmixError: the first run has not finished, or was made from other sources or settings.
    """
    plan = make_plan(stage, items)
    unfinished = {item.dataset for item in items} - {dataset for dataset, _ in plan.summarised}
    if unfinished:
        raise EvenmixError(
            f"{', '.join(sorted(unfinished))}: not finished; run the command without --retry first"
        )
    first = {(item.dataset, item.shard): item for item in items}
    last = [
        (dataset, shard)
        for dataset in sorted({item.dataset for item in items})
        for shard, entry in read_generations(stage.root, stage.folder, dataset)[-1].items.items()
        if entry["counts"]["rejected"]
    ]
    with ThreadPoolExecutor(_CONCURRENT_READS) as pool:
        found = pool.map(lambda place: _retry_item(stage, first, *place), last)
        return [item for item in found if item is not None]


def _retry_item(
    stage: Stage, first: dict[tuple[str, str], WorkItem], dataset: str, shard: str
) -> WorkItem | None:
    """Return the item that tries a shard's ledger again, or None if there is nothing to try."""
    stem = storage.join(dataset_url(stage.root, stage.folder, dataset), shard)
    rejected = storage.read_parquet(f"{stem}{REJECTED_SUFFIX}", ["retryable"])
    if True not in rejected["retryable"].to_pylist():
        return None
    ledger = read_receipt(f"{stem}.parquet").rejected
    assert ledger is not None
    item = first[dataset, first_shard(shard)]
    return replace(
        item,
        shard=next_generation(shard),
        inputs={**item.inputs, "retries": ledger.sha256},
        payload={**item.payload, "retry_of": shard},
    )
