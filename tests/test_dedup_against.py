"""Evaluation pictures: a folder of real files, good and bad, described as the corpus is."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import skimage.data
from PIL import Image

from dedup import against
from dedup.describe import describe
from dedup.descriptors import descriptor_of
from pipeline import images, ingest, storage
from pipeline.beam_job import RunnerOptions
from pipeline.errors import EvenmixError
from pipeline.images import Limits
from pipeline.receipts import Counts
from pipeline.recipe import Recipe
from pipeline.records import key_of
from pipeline.stage import Stage, WorkItem
from pipeline.summary import Summary
from tests.pictures import bomb_png, save, smooth
from tests.stages import run_here
from tests.tiny_onnx import mean_colour_onnx

PICTURES = ["coco/astronaut.png", "coco/val/coffee.jpg", "one_pixel.bmp", "rocket_without_suffix"]
LIMITS = Limits(1, 10_000_000, 1_000_000)


@pytest.fixture
def evaluation(tmp_path: Path) -> Path:
    """Write four pictures, and files that are none."""
    folder = tmp_path / "evaluation"
    (folder / "coco" / "val").mkdir(parents=True)
    for name, subject, image_format in zip(
        PICTURES, ["astronaut", "coffee", None, "rocket"], ["PNG", "JPEG", "BMP", "JPEG"],
        strict=True,
    ):  # fmt: skip
        image = Image.fromarray(getattr(skimage.data, subject)() if subject else smooth(1, 1))
        image.thumbnail((90, 90))
        (folder / name).write_bytes(save(image, image_format))
    (folder / "captions.json").write_text('{"images": []}')
    (folder / "empty.png").write_bytes(b"")
    (folder / "huge.png").write_bytes(bomb_png(4_000))
    (folder / "long.jpg").write_bytes(bytes(LIMITS.max_bytes + 1))
    (folder / "torn.jpg").write_bytes(save(smooth(64, 64), "JPEG")[:-100])
    return folder


def recipe_of(root: Path, folder: Path | None, **dataset: Any) -> Recipe:
    weights = root / "mean.onnx"
    weights.write_bytes(mean_colour_onnx())
    document = {
        "root": str(root / "corpus"),
        "datasets": {
            "album": {"layout": "folder", "source": str(folder), "licence": "CC0 1.0"} | dataset
        },
        "images": {
            "min_short_edge_px": 64,
            "max_pixels": LIMITS.max_pixels,
            "max_bytes": LIMITS.max_bytes,
        },
        "dedup": {"weights": str(weights)} | ({"against": str(folder)} if folder else {}),
        "captions": {"source": {"engine": "source"}},
        "mixture": {"name": "m", "resolution": 64, "captions": "source"},
    }
    return Recipe.model_validate(document)


def run(recipe: Recipe, descriptor: Mapping[str, Any]) -> Summary:
    stage = against.describe_against(recipe, descriptor)
    return run_here(stage, against.against_items(recipe))["_against"]


def tables(recipe: Recipe, suffix: str = "0.parquet") -> pa.Table:
    folder = storage.join(recipe.root, against.folder_of(recipe), "_against")
    files = [file.url for file in storage.list_files(folder) if file.name.endswith(suffix)]
    return pa.concat_tables(map(storage.read_parquet, files))


def test_pictures_of_any_size_are_described_as_those_of_the_corpus(
    tmp_path: Path, evaluation: Path
) -> None:
    recipe = recipe_of(tmp_path, evaluation)
    descriptor = descriptor_of(recipe.dedup)
    summary = run(recipe, descriptor.identity())
    assert summary.counts == Counts(
        9, 4, {"empty_file": 1, "not_an_image": 1, "too_many_bytes": 1, "too_many_pixels": 1,
               "truncated": 1},
    )  # fmt: skip
    table = tables(recipe)
    assert table.schema.remove_metadata() == against.against_schema(3)
    files = [(evaluation / name).read_bytes() for name in PICTURES]
    pixels = [images.decode(file, LIMITS) for file in files]
    assert table.select(table.column_names[:7]).to_pylist() == [
        {
            "key": key_of("_against", name),
            "source_id": name,
            "width": picture.shape[1],
            "height": picture.shape[0],
            "num_bytes": len(file),
            "sha256": hashlib.sha256(file).hexdigest(),
            "pixels_sha256": images.sha256_of_pixels(picture),
        }
        for name, file, picture in zip(PICTURES, files, pixels, strict=True)
    ]
    described = describe(descriptor, pixels)
    assert table.select(described.column_names).to_pylist() == described.to_pylist()


def test_a_large_jpeg_is_described_as_embedding_does(tmp_path: Path) -> None:
    folder = tmp_path / "evaluation"
    folder.mkdir()
    data = save(smooth(900, 700), "JPEG")
    (folder / "large.jpg").write_bytes(data)
    recipe = recipe_of(tmp_path, folder)
    descriptor = descriptor_of(recipe.dedup)
    run(recipe, descriptor.identity())
    whole, reduced = (images.decode(data, LIMITS, px) for px in (None, descriptor.short_edge_px))
    assert reduced.shape < whole.shape
    described = describe(descriptor, [reduced])
    assert described.to_pylist() != describe(descriptor, [whole]).to_pylist()
    (row,) = tables(recipe).to_pylist()
    assert {name: row[name] for name in described.column_names} == described.to_pylist()[0]
    assert (row["width"], row["height"]) == (whole.shape[1], whole.shape[0])
    assert row["pixels_sha256"] == images.sha256_of_pixels(whole)


def test_files_of_which_none_is_a_picture_are_an_error(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, tmp_path / "evaluation")
    against.require_pictures(recipe, Counts(9, 1, {"truncated": 8}))
    with pytest.raises(
        EvenmixError,
        match=r"none of the 9 files of .*evaluation is a picture \(8 truncated, 1 empty_file\)",
    ):
        against.require_pictures(recipe, Counts(9, 0, {"truncated": 8, "empty_file": 1}))


def test_what_is_no_picture_is_in_the_ledger(tmp_path: Path, evaluation: Path) -> None:
    recipe = recipe_of(tmp_path, evaluation)
    run(recipe, {})
    assert [
        (row["source_id"], row["reason"]) for row in tables(recipe, "rejected.parquet").to_pylist()
    ] == [
        ("captions.json", "not_an_image"),
        ("empty.png", "empty_file"),
        ("huge.png", "too_many_pixels"),
        ("long.jpg", "too_many_bytes"),
        ("torn.jpg", "truncated"),
    ]


def test_hashes_are_those_of_ingest(
    tmp_path: Path, evaluation: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def here(stage: Stage, items: list[WorkItem], _: RunnerOptions) -> Mapping[str, Summary]:
        return run_here(stage, items)

    monkeypatch.setattr(ingest, "run_stage", here)
    recipe = recipe_of(tmp_path, evaluation)
    corpus = recipe.model_copy(
        update={"images": recipe.images.model_copy(update={"min_short_edge_px": 1})}
    )
    ingest.run_recipe(corpus, RunnerOptions(workers=1))
    run(recipe, {})
    (index,) = storage.glob_files(f"{recipe.root}/images/album/*[0-9].parquet")
    columns = ["source_id", "width", "height", "num_bytes", "sha256", "pixels_sha256"]
    ingested = storage.read_parquet(index.url, columns).to_pylist()
    assert len(ingested) == 3  # ingest wants a suffix
    assert [row for row in tables(recipe).select(columns).to_pylist() if "." in row["source_id"]] \
        == ingested  # fmt: skip


def test_without_near_duplicates_no_model_is_needed(tmp_path: Path, evaluation: Path) -> None:
    recipe = recipe_of(tmp_path, evaluation, duplicates="exact")
    Path(recipe.dedup.weights or "").unlink()
    run(recipe, {})
    assert tables(recipe).schema.remove_metadata() == against.against_schema(None)
    assert tables(recipe)["source_id"].to_pylist() == PICTURES


def test_items_have_a_bounded_number_of_files(
    tmp_path: Path, evaluation: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_of(tmp_path, evaluation)
    descriptor = descriptor_of(recipe.dedup).identity()
    run(recipe, descriptor)
    elsewhere = recipe.model_copy(update={"root": str(tmp_path / "elsewhere")})
    monkeypatch.setattr(against, "FILES_PER_ITEM", 4)
    monkeypatch.setattr(against, "_BATCH_SIZE", 3)
    summary = run(elsewhere, descriptor)
    assert [item["counts"]["records_in"] for item in summary.items.values()] == [4, 4, 1]
    folder = storage.join(elsewhere.root, against.folder_of(recipe), "_against")
    parts = [storage.read_parquet(f"{folder}/{shard}.parquet") for shard in summary.items]
    assert pa.concat_tables(parts).equals(tables(recipe))


@pytest.mark.parametrize("is_there", [True, False])
def test_a_folder_without_files_stops_before_any_work(tmp_path: Path, is_there: bool) -> None:
    folder = tmp_path / "evaluation"
    if is_there:
        folder.mkdir()
    recipe = recipe_of(tmp_path, folder)
    for work in (against.check, against.against_items):
        with pytest.raises(EvenmixError, match=r"evaluation has no files.*dedup\.against"):
            work(recipe)


def test_without_a_folder_there_is_nothing_to_do(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, None)
    against.check(recipe)
    assert against.against_items(recipe) == []


def test_another_descriptor_than_that_of_the_corpus_is_refused(
    tmp_path: Path, evaluation: Path
) -> None:
    recipe = recipe_of(tmp_path, evaluation)
    of_corpus = descriptor_of(recipe.dedup).identity() | {"dimension": 512}
    with pytest.raises(EvenmixError, match=r"evaluation would be described.*dimension: 512 -> 3"):
        against.describe_against(recipe, of_corpus)


def test_a_file_that_changes_stops_the_run(tmp_path: Path, evaluation: Path) -> None:
    recipe = recipe_of(tmp_path, evaluation)
    items = against.against_items(recipe)
    (evaluation / "one_pixel.bmp").write_bytes(save(smooth(1, 2), "BMP"))
    with pytest.raises(EvenmixError, match=r"one_pixel\.bmp has changed since it was planned"):
        run_here(against.describe_against(recipe, {}), items)
