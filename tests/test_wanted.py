"""Which pictures captions are asked for, when a mixture is all that they are for."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from captioning.wanted import Wanted, wanted_by
from pipeline import storage
from pipeline.beam_job import RunnerOptions
from pipeline.candidates import Candidates
from pipeline.eligible import HASH_RANGE, is_held_out, selection_hash
from pipeline.recipe import Recipe
from tests.table_corpus import (
    DUPLICATES,
    NUMBERS,
    SHARDS,
    SMALL,
    find_candidates,
    key,
    recipe_of,
    write_corpus,
)

HERE = RunnerOptions(workers=1)
ELIGIBLE = {*NUMBERS} - DUPLICATES - SMALL


@pytest.fixture
def root(tmp_path: Path) -> str:
    write_corpus(str(tmp_path))
    return str(tmp_path)


def asked(wanted: Wanted) -> set[str]:
    return set.union(*(wanted.keys("set", f"shard-{shard}") for shard in range(SHARDS)))


def smallest(recipe: Recipe, eligible: set[int], number: int) -> set[str]:
    """Return the keys with the smallest hashes, and all that are held out."""
    keys = {key(n) for n in eligible}
    held_out = {each for each in keys if is_held_out(recipe, each)}
    train = sorted(keys - held_out, key=lambda each: selection_hash(recipe, each))
    return held_out | set(train[:number])


@pytest.mark.parametrize(("number", "margin"), [(50, 0.1), (50, 0.0), (120, 0.5), (1000, 0.1)])
def test_captions_are_asked_for_what_a_mixture_selects_and_a_margin(
    root: str, number: int, margin: float
) -> None:
    recipe = recipe_of(root, images_per_dataset=number)
    find_candidates(recipe, with_captions=False)
    wanted = wanted_by(recipe, margin, "new", HERE)
    assert asked(wanted) == smallest(recipe, ELIGIBLE, math.ceil(number * (1 + margin)))


def test_the_pictures_are_judged_by_a_stage_and_the_bound_is_noted(root: str) -> None:
    recipe = recipe_of(root, images_per_dataset=50, captions="source")
    before = wanted_by(recipe, 0.1, "new", HERE)
    assert asked(before) == smallest(recipe, ELIGIBLE, math.ceil(50 * 1.1))
    folder = storage.join(root, Candidates(recipe, with_captions=False).folder)
    for file in storage.list_files(folder):
        storage.remove(file.url)
    # As if fewer pictures had been there: the bound stays.
    summary = Path(root, "images", "set", "stage.json")
    document = json.loads(summary.read_text())
    del document["items"]["shard-2"]
    summary.write_text(json.dumps(document))
    assert wanted_by(recipe, 0.1, "new", HERE).bounds == before.bounds
    assert storage.list_files(folder) == []
    find_candidates(recipe, with_captions=False)
    assert wanted_by(recipe, 0.1, "another", HERE).bounds != before.bounds


def test_another_choice_has_another_bound(root: str) -> None:
    def wanted(**mixture: Any) -> Wanted:
        recipe = recipe_of(root, **mixture)
        find_candidates(recipe, with_captions=False)
        return wanted_by(recipe, 0.1, "new", HERE)

    more, fewer = wanted(images_per_dataset=50), wanted(images_per_dataset=20)
    assert fewer.bounds["set"] < more.bounds["set"]
    assert fewer.config("set") != more.config("set")
    everything = wanted()
    assert everything.bounds == {"set": HASH_RANGE}
    assert asked(everything) == {key(n) for n in ELIGIBLE}
    # What a filter turns away is not asked for.
    tall = wanted(images_per_dataset=50, filters=[{"column": "height", "at_least": 65}])
    assert asked(tall) == set()
    assert tall.config("set") != more.config("set")


def test_a_set_is_asked_for_the_datasets_that_take_it(root: str) -> None:
    write_corpus(root, "more")
    table = {"layout": "folder", "source": "s", "licence": "CC0 1.0"}
    changes = {
        "datasets": {name: table for name in ("set", "more", "other")},
        "captions": {name: {"engine": "source"} for name in ("source", "new")},
    }
    recipe = recipe_of(root, changes, captions_of={"set": "new"}, without=["other"])
    assert wanted_by(recipe, 0.1, "new", HERE).bounds.keys() == {"set"}
    assert wanted_by(recipe, 0.1, "source", HERE).bounds.keys() == {"more"}
    assert wanted_by(recipe, 0.1, "a-third", HERE).bounds.keys() == {"more", "set"}
