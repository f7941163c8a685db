"""`evenmix ingest --dry-run`: what would be read, from where, and how much of it."""

from collections import Counter
from collections.abc import Sequence
from urllib.parse import urlsplit

from rich.console import Console

from pipeline import readers
from pipeline.ingest_stage import Ingest
from pipeline.stage import WorkItem

_HOSTS_SHOWN = 5


def print_dry_run(stage: Ingest, items: Sequence[WorkItem]) -> None:
    """Print the plan of an ingest to standard output. Nothing is written to the root."""
    console = Console(highlight=False, soft_wrap=True)
    for name in sorted({item.dataset for item in items}):
        dataset, own = stage.datasets[name], [item for item in items if item.dataset == name]
        console.print(f"{name}: {dataset.layout} at {dataset.source}", markup=False)
        if dataset.revision:
            console.print(f"  revision {dataset.revision}", markup=False)
        # Several items read from one file; or an item reads several, which then have no name here.
        files = {item.inputs.get("file", item.shard): item.inputs for item in own}
        num_files = sum(inputs.get("num_files", 1) for inputs in files.values())
        num_bytes = sum(inputs["num_bytes"] for inputs in files.values())
        size = f"{num_files:,} files, {num_bytes:,} bytes"
        console.print(f"  {size}, into {len(own):,} shards of {stage.root}", markup=False)
        if "retries" in own[0].inputs:
            num_records = sum(len(stage.earlier_attempts(item)) for item in own)
            console.print(
                f"  of them the {num_records:,} records that may be had now", markup=False
            )
        elif dataset.is_fetched:
            hosts = Counter(
                urlsplit(record.image_url or "").hostname or "(no URL)"
                for record in readers.read(dataset, own[0], stage.limits.max_bytes)
            )
            shown = ", ".join(f"{host} {n}" for host, n in hosts.most_common(_HOSTS_SHOWN))
            console.print(f"  pictures are downloaded; of the first shard's: {shown}", markup=False)
        if stage.sample_fraction < 1:
            console.print(f"  of the records, {stage.sample_fraction:g} by hash", markup=False)
