"""Which pictures a mixture takes, and into which of its shards they go."""

from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from mixing.mix import refuse_empty, tell_exhausted
from mixing.select import Select, Selection, choose, corpus_digests, read_selection
from pipeline import storage
from pipeline.eligible import is_held_out, judge_shard, selection_hash
from pipeline.errors import EvenmixError
from pipeline.receipts import Counts, fingerprint
from pipeline.recipe import Recipe
from pipeline.stage import make_plan
from pipeline.summary import Summary
from tests.stages import run_here
from tests.table_corpus import (
    CAPTIONLESS,
    DUPLICATES,
    NUMBERS,
    SHARDS,
    SMALL,
    find_candidates,
    key,
    recipe_of,
    write_captions,
    write_corpus,
)

ELIGIBLE = {*NUMBERS} - DUPLICATES - SMALL - CAPTIONLESS


@pytest.fixture
def root(tmp_path: Path) -> str:
    write_corpus(str(tmp_path))
    return str(tmp_path)


@dataclass(frozen=True)
class Chosen:
    """A selection, its counts, and the keys that it takes."""

    selection: Selection
    counts: Counts
    train: set[str]
    validation: set[str]


def select(root: str, changes: dict[str, Any] | None = None, **mixture: Any) -> Chosen:
    """Select from the dataset `set` with some of the recipe's settings changed."""
    recipe = recipe_of(root, changes, **{"name": fingerprint(mixture)[:8]} | mixture)
    find_candidates(recipe)
    stage = Select(recipe)
    counts = run_here(stage, stage.plan())["set"].counts
    selection = read_selection(recipe, "set")
    assert choose(recipe, "set") == selection
    return Chosen(selection, counts, *taken(recipe, selection))


def taken(recipe: Recipe, selection: Selection) -> tuple[set[str], set[str]]:
    """Return the keys that a selection takes for training and for validation."""
    found: dict[bool, set[str]] = {False: set(), True: set()}
    for shard in range(SHARDS):
        for each, reason in judge_shard(recipe, "set", f"shard-{shard}", with_captions=True):
            held_out = is_held_out(recipe, each)
            if reason is None and selection.takes(selection_hash(recipe, each), held_out):
                found[held_out].add(each)
    return found[False], found[True]


def test_every_picture_is_counted_under_its_first_reason(root: str) -> None:
    chosen = select(root)
    assert chosen.counts == Counts(
        len(NUMBERS),
        len(ELIGIBLE),
        {
            "near_duplicate": len(DUPLICATES),
            "no_caption": len(CAPTIONLESS),
            "too_small": len(SMALL),
        },
    )
    assert chosen.train | chosen.validation == {key(n) for n in ELIGIBLE}
    assert chosen.selection.num_train == len(chosen.train)
    assert chosen.selection.num_validation == len(chosen.validation)


def test_the_smallest_hashes_are_taken(root: str) -> None:
    chosen = select(root, images_per_dataset=50)
    recipe = recipe_of(root)
    candidates = sorted(
        (selection_hash(recipe, key(n)), key(n))
        for n in ELIGIBLE
        if not is_held_out(recipe, key(n))
    )
    assert chosen.train == {each for _, each in candidates[:50]}
    assert chosen.selection.last_hash == candidates[49][0]


def test_all_filters_are_one_reason(root: str) -> None:
    filters = [{"column": "height", "at_least": 64}, {"column": "width", "at_least": 100}]
    chosen = select(root, filters=filters, min_short_edge_px=1)
    assert chosen.counts.records_out == 0
    assert chosen.counts.rejected == {
        "filtered": len(NUMBERS) - len(DUPLICATES),
        "near_duplicate": len(DUPLICATES),
    }


def test_a_smaller_mixture_is_a_subset_of_a_larger_one(root: str) -> None:
    sizes = (20, 80, 200, None)
    chosen = [select(root, images_per_dataset=number) for number in sizes]
    for number, smaller, larger in zip(sizes, chosen, chosen[1:], strict=False):
        assert len(smaller.train) == number
        assert smaller.train < larger.train
        assert smaller.validation == larger.validation
        assert smaller.counts.is_conserved()
    assert chosen[0].counts.rejected["not_sampled"] - chosen[1].counts.rejected["not_sampled"] == 60
    assert "not_sampled" not in chosen[-1].counts.rejected


def test_what_is_held_out_is_never_trained_on(root: str) -> None:
    chosen = select(root, images_per_dataset=1)
    assert chosen.validation
    assert not chosen.validation & chosen.train
    assert len(chosen.train) == 1
    assert not select(root, validation_fraction=0).validation


def test_another_dataset_changes_nothing(root: str) -> None:
    alone = select(root, images_per_dataset=50, name="m")
    write_corpus(root, "more")
    table = {"layout": "folder", "source": "s", "licence": "CC0 1.0"}
    changes = {"datasets": {"set": table, "more": table}}
    recipe = recipe_of(root, changes, images_per_dataset=50)
    find_candidates(recipe)
    stage = Select(recipe)
    assert make_plan(stage, stage.plan()).summarised.keys() == {("set", 0)}
    run_here(stage, stage.plan())
    assert read_selection(recipe, "set") == alone.selection
    assert read_selection(recipe, "more").num_train == 50


def test_another_seed_takes_other_pictures(root: str) -> None:
    one = select(root, images_per_dataset=50)
    other = select(root, {"seed": 4}, images_per_dataset=50, name="n")
    assert one.train != other.train


def test_shards_are_about_even_and_shuffled(root: str) -> None:
    chosen = select(root)
    selection = chosen.selection
    recipe = recipe_of(root)
    sizes = Counter(selection.destination(each, held_out=False) for each in chosen.train)
    assert selection.num_shards("train") == -(-len(chosen.train) // 40)
    assert set(sizes) == {f"train-{number:05}" for number in range(selection.num_shards("train"))}
    assert max(sizes.values()) < 2 * min(sizes.values())
    assert {selection.destination(each, held_out=True) for each in chosen.validation} == {
        "validation-00000"
    }
    first = [key(n) for n in NUMBERS if key(n) in chosen.train]
    shuffled = sorted(first, key=selection.order)
    assert shuffled != first
    assert shuffled != sorted(first, key=lambda each: selection_hash(recipe, each))


def test_excluded_pictures_are_in_no_mixture(root: str, tmp_path: Path) -> None:
    names = ["1", "10", "11"]  # the second is a duplicate too
    listed = tmp_path / "exclusions.txt"
    listed.write_text("".join(f"source_id set {name}\n" for name in names), encoding="utf-8")
    before = select(root, name="m")
    after = select(root, {"exclusions": str(listed)}, name="n")
    assert after.counts.records_out == before.counts.records_out - 2
    assert after.counts.rejected == before.counts.rejected | {"excluded": 3, "near_duplicate": 29}
    assert (before.train | before.validation) - (after.train | after.validation) == {
        key(1),
        key(11),
    }
    # With another list it is another mixture, which needs a name of its own.
    stage = Select(recipe_of(root, {"exclusions": str(listed)}))
    with pytest.raises(EvenmixError, match=r"made in another way \(config.exclusions: null -> "):
        make_plan(stage, stage.plan())


def test_a_selection_does_not_need_the_candidates_once_it_is_made(root: str) -> None:
    recipe = recipe_of(root, images_per_dataset=50)
    stage = Select(recipe)
    with pytest.raises(EvenmixError, match=r"exchange/candidates-.* run `evenmix mix` first"):
        choose(recipe, "set")
    find_candidates(recipe)
    run_here(stage, stage.plan())
    for file in storage.list_files(f"{root}/exchange"):
        storage.remove(file.url)
    assert make_plan(stage, stage.plan()).is_finished
    assert read_selection(recipe, "set").num_train == 50


def test_a_selection_knows_the_corpus_that_it_was_made_from(root: str) -> None:
    recipe = recipe_of(root)
    before = corpus_digests(recipe, "set")
    assert list(before) == ["images", "duplicates/sscd", "captions/source"]
    write_captions(root, "source", [["truncated"]] * len(NUMBERS))
    after = corpus_digests(recipe, "set")
    assert {folder for folder in after if after[folder] != before[folder]} == {"captions/source"}


def test_a_picture_that_was_not_asked_for_is_counted_as_that(root: str) -> None:
    outcomes = [["not_asked" if 1 <= n < 4 else "ok"] for n in NUMBERS]
    write_captions(root, "source", outcomes)
    assert select(root).counts.rejected["not_asked"] == 3


def test_an_empty_dataset_is_refused_with_its_reasons(root: str) -> None:
    counts = select(root, min_short_edge_px=1000).counts
    summary = Summary("select", "set", {}, counts)
    with pytest.raises(EvenmixError, match=r"set \(near_duplicate 30, too_small 270\)"):
        refuse_empty({"set": summary})
    refuse_empty({"set": replace(summary, counts=Counts(1, 1))})
    with pytest.raises(EvenmixError, match=r"set \(ingest kept none\)"):
        refuse_empty({"set": replace(summary, counts=Counts(0, 0))})


def test_a_mixture_says_where_captions_that_were_not_asked_for_are_wanting(
    root: str, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = recipe_of(root)
    short = Summary("select", "short", {}, Counts(9, 5, {"not_asked": 4}))
    full = Summary("select", "full", {}, Counts(9, 3, {"not_asked": 4, "not_sampled": 2}))
    tell_exhausted(recipe, {"short": short, "full": full})
    told = capsys.readouterr().err
    assert "short: all pictures" in told
    assert "4 more were not asked for" in told
    assert "full" not in told
