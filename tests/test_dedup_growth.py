"""A corpus that grows, evaluation pictures, rules for pairs of datasets: on real photographs."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from dedup import deduplicate, embed, steps
from demo import photographs
from pipeline import ingest, storage
from pipeline.beam_job import RunnerOptions
from pipeline.errors import EvenmixError
from pipeline.recipe import Recipe
from pipeline.stage import Stage, WorkItem
from pipeline.summary import Summary
from tests.stages import run_here

NAMES = ("camera.png", "chelsea.png", "coffee.png", "rocket.jpg")


def here(stage: Stage, items: list[WorkItem], _: RunnerOptions) -> Mapping[str, Summary]:
    return run_here(stage, items)


@pytest.fixture(autouse=True)
def _without_beam(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (ingest, embed, deduplicate, steps):
        monkeypatch.setattr(module, "run_stage", here)


def save(folder: Path, name: str, picture: Image.Image, **options: Any) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    picture.save(folder / name, **options)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write photographs at 320 pixels, larger and smaller copies of them, and one to test with."""
    folder = tmp_path_factory.mktemp("sources")
    photographs.write_photographs(folder / "all")
    for file in NAMES:
        name = Path(file).stem
        picture = Image.open(folder / "all" / file).convert("RGB").resize((320, 320))
        save(folder / "old", f"{name}.png", picture)
        save(folder / "old", f"{name}_small.png", picture.resize((200, 200)))
        save(folder / "new", f"{name}_large.png", picture.resize((480, 480)))
        if name == "chelsea":
            save(folder / "tests", "cat.jpg", picture.resize((100, 100)), quality=60)
    (folder / "tests" / "README.txt").write_text("not a picture")
    return folder


def recipe_of(root: Path, sources: Path, *datasets: str, **dedup: Any) -> Recipe:
    return Recipe.model_validate(
        {
            "root": str(root),
            "datasets": {
                name: {"layout": "folder", "source": str(sources / name), "licence": "CC0 1.0"}
                for name in datasets
            },
            "images": {"min_short_edge_px": 64},
            "dedup": dedup,
            "captions": {"source": {"engine": "source"}},
            "mixture": {"name": "m", "resolution": 64, "captions": "source"},
        }
    )


def build(recipe: Recipe) -> dict[str, dict[str, Any]]:
    for job in (ingest, embed, deduplicate):
        job.run_recipe(recipe, RunnerOptions(workers=1))
    return outcomes(recipe)


def outcomes(recipe: Recipe) -> dict[str, dict[str, Any]]:
    """Return what became of each picture, by the name of its file."""
    rows: dict[str, dict[str, Any]] = {}
    for dataset in recipe.datasets:
        for file in storage.list_files(f"{recipe.root}/images/{dataset}"):
            if file.name.endswith(".parquet") and "rejected" not in file.name:
                index = storage.read_parquet(file.url)
                url = f"{recipe.root}/duplicates/{recipe.dedup.name}/{dataset}/{file.name}"
                outcome = storage.read_parquet(url)
                for picture, row in zip(index.to_pylist(), outcome.to_pylist(), strict=True):
                    rows[picture["source_id"]] = row
    names = {row["key"]: name for name, row in rows.items()}
    for row in rows.values():
        row["of"] = names.get(row["duplicate_of"])
    return rows


def kept(rows: Mapping[str, Mapping[str, Any]]) -> set[str]:
    return {name for name, row in rows.items() if row["rule"] is None}


def test_what_was_accepted_stays(tmp_path: Path, sources: Path) -> None:
    first = build(recipe_of(tmp_path, sources, "old", name="first"))
    assert kept(first) == {"camera.png", "chelsea.png", "coffee.png", "rocket.png"}
    second = build(recipe_of(tmp_path, sources, "old", "new", name="second", accepted="first"))
    # The new pictures are larger, and would win without that.
    assert kept(second) == kept(first)
    assert {name: row for name, row in second.items() if name in first} == first
    assert second["coffee_large.png"]["of"] == "coffee.png"
    anew = build(recipe_of(tmp_path, sources, "old", "new", name="anew"))
    assert kept(anew) == {f"{name}_large.png" for name in ("camera", "chelsea", "coffee", "rocket")}


def test_an_earlier_search_of_other_datasets(tmp_path: Path, sources: Path) -> None:
    build(recipe_of(tmp_path, sources, "old", name="first"))
    with pytest.raises(EvenmixError, match=r"first has accepted pictures of old, which the recipe"):
        build(recipe_of(tmp_path, sources, "new", name="second", accepted="first"))
    with pytest.raises(EvenmixError, match=r"there is no search .*duplicates/none"):
        build(recipe_of(tmp_path, sources, "new", name="second", accepted="none"))


def test_contamination_is_removed_with_its_whole_group(tmp_path: Path, sources: Path) -> None:
    against = str(sources / "tests")
    rows = build(recipe_of(tmp_path, sources, "old", "new", name="clean", against=against))
    cats = {name for name in rows if name.startswith("chelsea")}
    assert {name for name, row in rows.items() if row["rule"] == "contamination"} == cats
    assert len(cats) == 3
    assert kept(rows) == {"camera_large.png", "coffee_large.png", "rocket_large.png"}
    listed = storage.read_parquet(f"{tmp_path}/duplicates/clean/_contamination/all.parquet")
    assert set(listed["key"].to_pylist()) == {rows[name]["key"] for name in cats}
    assert set(listed["keeper_dataset"].to_pylist()) == {"_against"}


def test_contamination_may_only_be_reported(tmp_path: Path, sources: Path) -> None:
    recipe = recipe_of(
        tmp_path, sources, "old", name="told", against=str(sources / "tests"),
        contamination="report",
    )  # fmt: skip
    rows = build(recipe)
    assert {row["rule"] for row in rows.values()} == {None, "near_duplicate"}
    listed = storage.read_parquet(f"{tmp_path}/duplicates/told/_contamination/all.parquet")
    cats = {row["key"] for name, row in rows.items() if name.startswith("chelsea")}
    assert set(listed["key"].to_pylist()) == cats


def test_later_what_an_accepted_one_was_kept_for_may_go(tmp_path: Path, sources: Path) -> None:
    build(recipe_of(tmp_path, sources, "old", name="first"))
    against = str(sources / "tests")
    second = recipe_of(tmp_path, sources, "old", name="second", accepted="first", against=against)
    rows = build(second)
    contaminated = {name for name, row in rows.items() if row["rule"] == "contamination"}
    assert contaminated == {"chelsea.png", "chelsea_small.png"}
    assert rows["coffee_small.png"]["of"] == "coffee.png"


def test_a_later_search_names_the_evaluation_pictures_again(tmp_path: Path, sources: Path) -> None:
    against = str(sources / "tests")
    build(recipe_of(tmp_path, sources, "old", name="first", against=against))
    later = recipe_of(tmp_path, sources, "old", "new", name="second", accepted="first")
    for work in (deduplicate.check, build):
        with pytest.raises(EvenmixError, match=r"first has removed .* name dedup\.against again"):
            work(later)
    build(recipe_of(tmp_path, sources, "old", name="told", against=against, contamination="report"))
    told = later.model_copy(update={"dedup": later.dedup.model_copy(update={"accepted": "told"})})
    deduplicate.check(told)  # nothing was removed for that


def test_evaluation_files_of_which_none_is_a_picture(tmp_path: Path, sources: Path) -> None:
    folder = tmp_path / "tables"
    folder.mkdir()
    for name in ("a.parquet", "b.parquet"):
        (folder / name).write_bytes(b"PAR1, with pictures in it")
    recipe = recipe_of(tmp_path, sources, "old", name="none", against=str(folder))
    with pytest.raises(EvenmixError, match=r"none of the 2 files of .*tables is a .*not_an_image"):
        build(recipe)


def test_other_evaluation_pictures_are_another_search(
    tmp_path: Path, sources: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also where they are only reported, and copies are exact: then the removals are the same."""

    def recipe(folder: Path, name: str) -> Recipe:
        told = recipe_of(
            tmp_path, sources, "old", name=name, against=str(folder), contamination="report"
        )
        old = told.datasets["old"].model_copy(update={"duplicates": "exact"})
        return told.model_copy(update={"datasets": {"old": old}})

    copies = tmp_path / "copies"
    copies.mkdir()
    shutil.copy(sources / "old" / "coffee.png", copies)
    build(recipe(sources / "tests", "told"))
    assert "is compared with 1 evaluation pictures" in capsys.readouterr().err
    shutil.rmtree(tmp_path / "exchange")
    build(recipe(sources / "tests", "told"))
    with pytest.raises(EvenmixError, match=r"made in another way \(inputs\.search\.against: "):
        build(recipe(copies, "told"))
    rows = build(recipe(copies, "copies"))
    listed = storage.read_parquet(f"{tmp_path}/duplicates/copies/_contamination/all.parquet")
    assert listed["key"].to_pylist() == [
        row["group"] for name, row in rows.items() if name == "coffee.png"
    ]


@pytest.mark.parametrize(
    ("rule", "num_kept"),
    [
        ({"duplicates": "off"}, 8),
        ({"duplicates": "exact"}, 7),
        ({"threshold": 0.9999}, 7),
        ({"threshold": 0.75}, 4),
    ],
)
def test_a_rule_for_two_datasets(
    tmp_path: Path, sources: Path, rule: Mapping[str, Any], num_kept: int
) -> None:
    twins = tmp_path / "twins"
    for dataset in ("old", "new"):
        shutil.copytree(sources / dataset, twins / dataset)
    shutil.copy(sources / "old" / "rocket.png", twins / "new" / "rocket_large.png")
    pairs = [{"between": ["new", "old"], **rule}]
    rows = build(recipe_of(tmp_path, twins, "old", "new", pairs=pairs, priority=["old"]))
    # Within a dataset its own rule holds: the small copies go in any case.
    assert {row["of"] for name, row in rows.items() if name.endswith("_small.png")} <= {
        f"{name}{size}.png"
        for name in ("camera", "chelsea", "coffee", "rocket")
        for size in ("", "_large")
    }
    assert len(kept(rows)) == num_kept
