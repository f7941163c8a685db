"""Which pictures a mixture takes, and with which weights. (Its shards are in test_build.py.)"""

import json
import math
import shutil
from collections import Counter
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from captioning.outcomes import CaptionOutcome
from captioning.tables import CAPTIONS
from captioning.wanted import wanted_by
from mixing.mix import refuse_empty, tell_exhausted
from mixing.select import Select
from mixing.weights import dataset_weights
from pipeline import storage
from pipeline.eligible import is_held_out, selection_hash
from pipeline.errors import EvenmixError
from pipeline.receipts import Counts
from pipeline.recipe import Recipe
from pipeline.records import INDEX, key_of
from pipeline.stage import Output
from pipeline.summary import Summary, summary_name

SHARDS, ROWS = 3, 100

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


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A corpus of 300 pictures: each 10th a duplicate, 15th small, 25th captionless."""
    root = str(tmp_path_factory.mktemp("corpus"))
    tables: dict[str, list[pa.Table]] = {"images": [], "duplicates/sscd": [], "captions/source": []}
    for shard in range(SHARDS):
        index, duplicates, captions = [], [], []
        for number in range(shard * ROWS, (shard + 1) * ROWS):
            key = key_of("set", str(number))
            index.append({"key": key, "width": 80, "height": 40 if number % 15 == 0 else 64})
            duplicates.append({"key": key, "rule": None if number % 10 else "near_duplicate"})
            outcome = CaptionOutcome.OK if number % 25 else CaptionOutcome.EMPTY
            captions.append({"key": key, "captions": [{"text": "t", "outcome": outcome}]})
        tables["images"].append(pa.Table.from_pylist(index, schema=INDEX))
        tables["duplicates/sscd"].append(pa.Table.from_pylist(duplicates))
        tables["captions/source"].append(pa.Table.from_pylist(captions, schema=CAPTIONS))
    for folder, shards in tables.items():
        url = storage.join(root, folder, "set")
        for number, table in enumerate(shards):
            storage.publish(f"{url}/shard-{number}.parquet", storage.parquet_bytes(table, {}))
        items = {f"shard-{number}": {"digest": f"{folder}{number}"} for number in range(SHARDS)}
        storage.publish(f"{url}/{summary_name(0)}", Summary("s", "set", items, Counts()).to_json())
    return root


def select(root: str, **mixture: Any) -> Output:
    """Select from the corpus with some of the mixture's settings changed."""
    document = RECIPE | {"root": root, "mixture": RECIPE["mixture"] | mixture}
    stage = Select(Recipe.model_validate(document))
    (item,) = stage.plan()
    return stage.process(item)


def keys(output: Output, split: str) -> set[str]:
    rows = output.table.to_pylist()
    return {row["key"] for row in rows if row["destination"].startswith(split)}


def test_every_picture_is_counted_under_its_first_reason(root: str) -> None:
    numbers = range(SHARDS * ROWS)
    duplicates = [n for n in numbers if n % 10 == 0]
    small = [n for n in numbers if n % 15 == 0 and n % 10]
    captionless = [n for n in numbers if n % 25 == 0 and n % 10 and n % 15]
    output = select(root)
    assert output.counts.records_in == SHARDS * ROWS
    assert output.counts.rejected == {
        "near_duplicate": len(duplicates),
        "no_caption": len(captionless),
        "too_small": len(small),
    }
    assert output.counts.is_conserved()
    expected = {
        key_of("set", str(n)) for n in numbers if n not in {*duplicates, *small, *captionless}
    }
    assert {row["key"] for row in output.table.to_pylist()} == expected


def test_a_smaller_mixture_is_a_subset_of_a_larger_one(root: str) -> None:
    small, large = (select(root, images_per_dataset=n) for n in (50, 120))
    assert len(keys(small, "train")) == 50
    assert keys(small, "train") < keys(large, "train")
    assert keys(small, "validation") == keys(large, "validation")
    assert small.counts.rejected["not_sampled"] - large.counts.rejected["not_sampled"] == 70
    assert small.counts.is_conserved()


def test_what_is_held_out_is_never_trained_on(root: str) -> None:
    output = select(root)
    assert keys(output, "validation")
    assert not keys(output, "validation") & keys(output, "train")


def test_rows_point_to_their_pictures(root: str) -> None:
    for row in select(root).table.to_pylist():
        index = storage.read_parquet(f"{root}/images/set/{row['shard']}.parquet", ["key"])
        assert index["key"][row["row"]].as_py() == row["key"]


def test_shards_are_about_even_and_shuffled(root: str) -> None:
    rows = select(root).table.to_pylist()
    sizes = Counter(r["destination"] for r in rows if r["destination"].startswith("train"))
    assert len(sizes) == -(-sum(sizes.values()) // 40)
    first = [(r["shard"], r["row"]) for r in rows if r["destination"] == "train-00000"]
    assert first != sorted(first)
    assert {shard for shard, _ in first} == {"shard-0", "shard-1", "shard-2"}


def test_another_seed_takes_other_pictures(root: str) -> None:
    one = select(root, images_per_dataset=50)
    document = RECIPE | {"root": root, "seed": 4}
    document["mixture"] = RECIPE["mixture"] | {"images_per_dataset": 50}
    stage = Select(Recipe.model_validate(document))
    other = stage.process(stage.plan()[0])
    assert keys(one, "train") != keys(other, "train")


def test_excluded_pictures_are_in_no_mixture(root: str, tmp_path: Path) -> None:
    names = ["1", "10", "11"]  # the second is a duplicate too
    listed = tmp_path / "exclusions.txt"
    listed.write_text("".join(f"source_id set {name}\n" for name in names), encoding="utf-8")
    before = Select(Recipe.model_validate(RECIPE | {"root": root}))
    after = Select(Recipe.model_validate(RECIPE | {"root": root, "exclusions": str(listed)}))
    (item,) = after.plan()
    output = after.process(item)
    counts = before.process(item).counts
    assert output.counts.records_out == counts.records_out - 2
    assert output.counts.rejected == counts.rejected | {"excluded": 3, "near_duplicate": 29}
    taken = before.process(item).table["key"].to_pylist()
    assert set(taken) - set(output.table["key"].to_pylist()) == {
        key_of("set", "1"),
        key_of("set", "11"),
    }
    # With another list it is another mixture, which needs a name of its own.
    assert before.config("set") != after.config("set")


def test_tables_that_are_not_aligned_are_never_joined(root: str, tmp_path: Path) -> None:
    shuffled = str(tmp_path)
    for file in storage.list_files(root):
        data = storage.read_bytes(file.url)
        if file.name == "captions/source/set/shard-1.parquet":
            table = storage.read_parquet(file.url)
            data = storage.parquet_bytes(table.take(list(reversed(range(ROWS)))), {})
        storage.publish(storage.join(shuffled, file.name), data)
    with pytest.raises(EvenmixError, match=r"set/shard-1: .* speak of different pictures"):
        select(shuffled)


@pytest.mark.parametrize(("number", "margin"), [(50, 0.1), (50, 0.0), (120, 0.5), (1000, 0.1)])
def test_captions_are_asked_for_what_a_mixture_selects_and_a_margin(
    root: str, tmp_path: Path, number: int, margin: float
) -> None:
    shutil.copytree(root, tmp_path, dirs_exist_ok=True)
    document = RECIPE | {"root": str(tmp_path)}
    document["mixture"] = RECIPE["mixture"] | {"images_per_dataset": number}
    recipe = Recipe.model_validate(document)
    wanted = wanted_by(recipe, margin, "new")
    asked = set.union(*(wanted.keys("set", f"shard-{shard}") for shard in range(SHARDS)))
    eligible = {key_of("set", str(n)) for n in range(SHARDS * ROWS) if n % 10 and n % 15}
    assert asked <= eligible
    held_out = {key for key in eligible if is_held_out(recipe, key)}
    assert held_out <= asked
    least = sorted((selection_hash(recipe, key), key) for key in eligible - held_out)
    assert asked - held_out == {key for _, key in least[: math.ceil(number * (1 + margin))]}


def test_the_pictures_asked_for_stay_the_same_when_more_come_in(root: str, tmp_path: Path) -> None:
    shutil.copytree(root, tmp_path, dirs_exist_ok=True)
    document = RECIPE | {"root": str(tmp_path)}
    document["mixture"] = RECIPE["mixture"] | {"images_per_dataset": 50}
    recipe = Recipe.model_validate(document)
    before = wanted_by(recipe, 0.1, "new")
    summary = tmp_path / "images" / "set" / "stage.json"
    document = json.loads(summary.read_text())
    del document["items"]["shard-2"]
    summary.write_text(json.dumps(document))
    assert wanted_by(recipe, 0.1, "new").bounds == before.bounds
    assert wanted_by(recipe, 0.1, "another").bounds != before.bounds
    # Another mixture is another choice, which the note of the first has no say in.
    document = RECIPE | {"root": str(tmp_path)}
    document["mixture"] = RECIPE["mixture"] | {"images_per_dataset": 20}
    fewer = wanted_by(Recipe.model_validate(document), 0.1, "new")
    assert fewer.bounds["set"] < before.bounds["set"]
    assert fewer.config("set") != before.config("set")


def test_a_picture_that_was_not_asked_for_is_counted_as_that(root: str, tmp_path: Path) -> None:
    shutil.copytree(root, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "captions" / "source" / "set" / "shard-0.parquet"
    rows = storage.read_parquet(str(path)).to_pylist()
    for row in rows[1:4]:
        row["captions"] = [{"outcome": CaptionOutcome.NOT_ASKED}]
    table = pa.Table.from_pylist(rows, schema=CAPTIONS)
    path.write_bytes(storage.parquet_bytes(table, {}))
    assert select(str(tmp_path)).counts.rejected["not_asked"] == 3


def test_an_empty_dataset_is_refused_with_its_reasons(root: str) -> None:
    output = select(root, min_short_edge_px=1000)
    summary = Summary("select", "set", {}, output.counts)
    with pytest.raises(EvenmixError, match=r"set \(near_duplicate 30, too_small 270\)"):
        refuse_empty({"set": summary})
    refuse_empty({"set": replace(summary, counts=Counts(1, 1))})
    with pytest.raises(EvenmixError, match=r"set \(ingest kept none\)"):
        refuse_empty({"set": replace(summary, counts=Counts(0, 0))})


def test_a_mixture_says_where_captions_that_were_not_asked_for_are_wanting(
    root: str, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = Recipe.model_validate(RECIPE | {"root": root})
    short = Summary("select", "short", {}, Counts(9, 5, {"not_asked": 4}))
    full = Summary("select", "full", {}, Counts(9, 3, {"not_asked": 4, "not_sampled": 2}))
    tell_exhausted(recipe, {"short": short, "full": full})
    told = capsys.readouterr().err
    assert "short: all pictures" in told
    assert "4 more were not asked for" in told
    assert "full" not in told


def test_equal_weights_are_exact() -> None:
    weights = dataset_weights([f"d{i}" for i in range(11)], "equal")
    assert set(weights.values()) == {Fraction(1, 11)}


def test_weights_that_no_trainer_could_tabulate_are_refused() -> None:
    with pytest.raises(EvenmixError, match="round them"):
        dataset_weights(["a", "b"], {"a": 0.1234567, "b": 0.3})


def test_given_weights_are_read_as_decimals_and_sum_to_one() -> None:
    weights = dataset_weights(["a", "b", "c"], {"a": 0.1, "b": 0.2, "c": 0.1})
    assert weights == {"a": Fraction(1, 4), "b": Fraction(1, 2), "c": Fraction(1, 4)}
