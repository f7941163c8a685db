"""What finished stages say of a dataset: ``stage.json``, and one file more for each generation.

A retry adds a generation of shards, ``<shard>.r1`` and so on, to those of the first run. Published
files stay as they are: the shards of generation 1 are summed up in ``stage.r1.json``, beside the
``stage.json`` of the first run. Together they are the summary of the dataset.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa

from pipeline import storage
from pipeline.errors import EvenmixError
from pipeline.receipts import Counts, Receipt, total

SUMMARY = re.compile(r"stage(?:\.r(\d+))?\.json")
"""The names of the files with summaries."""

_GENERATION = re.compile(r"\.r(\d+)(?=$|\.(?:tar|(?:rejected\.|fetch\.)?parquet|jsonl?)$)")


@dataclass(frozen=True)
class Summary:
    """What a finished stage made of one dataset: its items by shard, and their sums."""

    stage: str
    dataset: str
    items: dict[str, dict[str, Any]]
    counts: Counts

    def to_json(self) -> bytes:
        """Serialise; equal summaries give equal bytes."""
        return (json.dumps(asdict(self), sort_keys=True, indent=1) + "\n").encode()

    def digests(self) -> dict[str, str]:
        """Return the digest of each item's table, by shard."""
        return {shard: item["digest"] for shard, item in self.items.items()}

    @classmethod
    def from_json(cls, data: bytes) -> "Summary":
        """Parse what :meth:`to_json` wrote."""
        fields = json.loads(data)
        return cls(**(fields | {"counts": Counts(**fields["counts"])}))


def summarise(stage: str, dataset: str, receipts: Mapping[str, Receipt]) -> Summary:
    """Sum up the receipts of a dataset's shards of one generation in one stage."""
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


def merge(summaries: Sequence[Summary]) -> Summary:
    """Return one summary of a dataset's generations, in which each record counts once."""
    first = summaries[0]
    return Summary(
        stage=first.stage,
        dataset=first.dataset,
        items={shard: item for summary in summaries for shard, item in summary.items.items()},
        counts=total(summary.counts for summary in summaries).without_retried(),
    )


def generation_of(shard: str) -> int:
    """Return the generation of a shard or of its file: 0, or the number of its retry."""
    match = _GENERATION.search(shard)
    return int(match[1]) if match else 0


def previous_generation(shard: str) -> str | None:
    """Return the shard whose rejected records a shard has tried again; None in generation 0."""
    generation = generation_of(shard)
    if generation == 0:
        return None
    return first_shard(shard) + (f".r{generation - 1}" if generation > 1 else "")


def next_generation(shard: str) -> str:
    """Return the name of the shard that tries a shard's rejected records again."""
    return f"{first_shard(shard)}.r{generation_of(shard) + 1}"


def first_shard(shard: str) -> str:
    """Return the shard of the first run that a shard belongs to."""
    return _GENERATION.sub("", shard)


def summary_name(generation: int) -> str:
    """Return the name of the file that sums up a generation."""
    return f"stage.r{generation}.json" if generation else "stage.json"


def dataset_url(root: str, folder: str, dataset: str) -> str:
    """Return the folder of one dataset in one stage."""
    return storage.join(root, folder, dataset)


def read_generation(root: str, folder: str, dataset: str, generation: int) -> Summary | None:
    """Return the summary of one generation, or None if it has not finished."""
    url = storage.join(dataset_url(root, folder, dataset), summary_name(generation))
    if not storage.exists(url):
        return None
    try:
        return Summary.from_json(storage.read_bytes(url))
    except (ValueError, KeyError, TypeError) as error:
        raise EvenmixError(
            f"{url} is damaged ({error!r}); remove it and start the stage's command again, which "
            "sums up the shards anew"
        ) from error


def read_generations(root: str, folder: str, dataset: str) -> list[Summary]:
    """Return the summaries of all finished generations, the first run's first."""
    summaries: list[Summary] = []
    while summary := read_generation(root, folder, dataset, len(summaries)):
        summaries.append(summary)
    return summaries


def read_summary(root: str, folder: str, dataset: str) -> Summary | None:
    """Return the summary of all finished generations, or None if there is none."""
    summaries = read_generations(root, folder, dataset)
    return merge(summaries) if summaries else None


def finished_summary(root: str, folder: str, dataset: str, command: str) -> Summary:
    """Return the summary of a dataset that a stage has finished.

    Raises:
        EvenmixError: the stage has not finished; ``command`` is what finishes it.
    """
    summary = read_summary(root, folder, dataset)
    if summary is None:
        raise EvenmixError(
            f"{dataset_url(root, folder, dataset)} is missing or not finished; "
            f"run `evenmix {command}` first"
        )
    return summary


def finished_shards(root: str, folder: str, dataset: str, command: str) -> dict[str, str]:
    """Return the digest of each shard that a finished stage published, by shard name.

    Raises:
        EvenmixError: the stage has not finished; ``command`` is what finishes it.
    """
    return finished_summary(root, folder, dataset, command).digests()


def read_shard(
    root: str, folder: str, dataset: str, shard: str, columns: Sequence[str] | None = None
) -> pa.Table:
    """Read the table that a stage published for one shard."""
    url = storage.join(dataset_url(root, folder, dataset), f"{shard}.parquet")
    return storage.read_parquet(url, columns)
