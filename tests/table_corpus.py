"""A corpus for tests of what looks at tables only: index, duplicates, captions, no pictures.

Of 300 pictures each 10th is a duplicate, each 15th small, and each 25th has no caption.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa

from captioning.outcomes import CaptionOutcome
from captioning.tables import CAPTIONS
from pipeline import storage
from pipeline.candidates import Candidates
from pipeline.receipts import Counts, table_digest
from pipeline.recipe import Recipe
from pipeline.records import INDEX, key_of
from pipeline.summary import Summary, summary_name
from tests.stages import run_here

SHARDS, ROWS = 3, 100
NUMBERS = range(SHARDS * ROWS)
DUPLICATES = {n for n in NUMBERS if n % 10 == 0}
SMALL = {n for n in NUMBERS if n % 15 == 0} - DUPLICATES
CAPTIONLESS = {n for n in NUMBERS if n % 25 == 0} - DUPLICATES - SMALL

RECIPE: dict[str, Any] = {
    "seed": 3,
    "datasets": {"set": {"layout": "folder", "source": "s", "licence": "CC0 1.0"}},
    "captions": {"source": {"engine": "source"}},
    "mixture": {
        "name": "m",
        "resolution": 64,
        "captions": "source",
        "validation_fraction": 0.1,
        "samples_per_shard": 40,
    },
}


def recipe_of(root: str, changes: Mapping[str, Any] | None = None, **mixture: Any) -> Recipe:
    """Return the recipe with some of its tables, and some of the mixture's settings, changed."""
    document = RECIPE | {"root": root, "mixture": RECIPE["mixture"] | mixture}
    return Recipe.model_validate(document | dict(changes or {}))


def key(number: int, dataset: str = "set") -> str:
    """Return the key of a picture."""
    return key_of(dataset, str(number))


def write_corpus(root: str, dataset: str = "set") -> None:
    """Write the tables of 300 pictures in three shards."""
    index = [
        {"key": key(n, dataset), "width": 80, "height": 40 if n % 15 == 0 else 64} for n in NUMBERS
    ]
    duplicates = [
        {"key": key(n, dataset), "rule": None if n % 10 else "near_duplicate"} for n in NUMBERS
    ]
    outcomes = [CaptionOutcome.OK if n % 25 else CaptionOutcome.EMPTY for n in NUMBERS]
    publish(root, "images", dataset, index, INDEX)
    publish(root, "duplicates/sscd", dataset, duplicates)
    write_captions(root, "source", [[outcome] for outcome in outcomes], dataset)


def write_captions(
    root: str, captions: str, outcomes: Sequence[Sequence[str]], dataset: str = "set"
) -> None:
    """Write a caption set whose captions have some outcomes, by picture."""
    rows = [
        {"key": key(n, dataset), "captions": [{"text": "t", "outcome": o} for o in found]}
        for n, found in enumerate(outcomes)
    ]
    publish(root, f"captions/{captions}", dataset, rows, CAPTIONS)


def publish(
    root: str,
    folder: str,
    dataset: str,
    rows: Sequence[Mapping[str, Any]],
    schema: pa.Schema | None = None,
) -> None:
    """Write the tables of three shards, as a stage that has finished does."""
    url = storage.join(root, folder, dataset)
    items = {}
    for shard in range(SHARDS):
        some = rows[shard * ROWS : (shard + 1) * ROWS]
        table = pa.Table.from_pylist(some, schema=schema)
        storage.replace(f"{url}/shard-{shard}.parquet", storage.parquet_bytes(table, {}))
        items[f"shard-{shard}"] = {"digest": table_digest(table)}
    summary = Summary("s", dataset, items, Counts())
    storage.replace(f"{url}/{summary_name(0)}", summary.to_json())


def write_attributes(
    root: str, table: str, columns: Mapping[str, pa.Array], dataset: str = "set"
) -> None:
    """Write an attribute table from the columns of all pictures, as a user does."""
    rows = pa.table({"key": [key(n, dataset) for n in NUMBERS], **columns})
    for shard in range(SHARDS):
        data = storage.parquet_bytes(rows.slice(shard * ROWS, ROWS), {})
        storage.replace(f"{root}/attributes/{table}/{dataset}/shard-{shard}.parquet", data)


def find_candidates(recipe: Recipe, with_captions: bool = True) -> None:
    """Run the first pass over the corpus."""
    stage = Candidates(recipe, with_captions)
    run_here(stage, stage.plan())
