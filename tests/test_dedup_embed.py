"""Embedding: rows beside the index's, and reduced decoding that changes nothing that matters."""

import io
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image, ImageOps

from dedup import embed, second_look
from dedup.describe import describe
from dedup.embed import BATCH_SIZE, Embed
from dedup.records import embeddings_schema, from_column
from dedup.sscd import Sscd, sscd
from demo import photographs
from pipeline import images, ingest, originals, storage
from pipeline.beam_job import RunnerOptions
from pipeline.images import Limits
from pipeline.originals import DamagedPictureError
from pipeline.recipe import Recipe
from pipeline.stage import Stage, WorkItem, is_commit
from pipeline.summary import Summary
from tests import pictures
from tests.stages import run_here

LIMITS = Limits(min_short_edge_px=1, max_pixels=100_000_000, max_bytes=100_000_000)
THRESHOLD = 0.75
NAMES = ["astronaut", "chelsea", "coffee", "hubble_deep_field", "retina", "rocket"]


@pytest.fixture(scope="module")
def descriptor() -> Sscd:
    return sscd(None)


def photograph(name: str) -> Image.Image:
    (file,) = (p.file for p in photographs.PHOTOGRAPHS if p.name == name)
    data = (resources.files("skimage") / "data" / file).read_bytes()
    return Image.open(io.BytesIO(data)).convert("RGB")


def large_jpegs() -> list[bytes]:
    """Return photographs and their edits, with a shorter edge of 1,000 pixels, as JPEGs."""
    edits = (photographs.cropped, photographs.overlaid, ImageOps.grayscale)
    copies = [edit(photograph(name)).convert("RGB") for name in NAMES for edit in edits]
    enlarged = [
        images.resize_short_edge(np.asarray(picture), 1000, "bicubic")
        for picture in [*map(photograph, NAMES), *copies]
    ]
    return [pictures.save(pixels, "JPEG", quality=90) for pixels in enlarged]


def test_reduced_decoding_changes_nothing_that_matters(descriptor: Sscd) -> None:
    """The cosine with the whole picture's vector, every pair's decision, and the second look.

    Most of the difference is int8's: the student's vectors, in floating point, agree to 0.999.
    """
    jpegs = large_jpegs()
    whole = [images.decode(data, LIMITS) for data in jpegs]
    reduced = [images.decode(data, LIMITS, descriptor.short_edge_px) for data in jpegs]
    assert all(b.shape[0] == -(-a.shape[0] // 2) for a, b in zip(whole, reduced, strict=True))
    a, b = describe(descriptor, whole), describe(descriptor, reduced)
    vectors = [
        from_column(table["embedding"].combine_chunks(), 512).astype(np.float64) for table in (a, b)
    ]
    assert (vectors[0] * vectors[1]).sum(axis=1).min() > 0.99
    decisions = [v @ v.T >= THRESHOLD for v in vectors]
    np.testing.assert_array_equal(decisions[0], decisions[1])
    assert a["graphic"] == b["graphic"]
    thumbnails = [
        np.stack([np.frombuffer(t, np.int8) for t in table["thumbnail"].to_pylist()])
        for table in (a, b)
    ]
    same = np.eye(len(jpegs), dtype=bool)
    agreeing = second_look.agreeing(thumbnails[0], thumbnails[1], same, mirrored=False)
    np.testing.assert_array_equal(agreeing, same)


def here(stage: Stage, items: list[WorkItem], _: RunnerOptions) -> Mapping[str, Summary]:
    return run_here(stage, items)


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Recipe:
    """Ingest a folder with more pictures than a batch has, all on their sides, and others."""
    for module in (ingest, embed):
        monkeypatch.setattr(module, "run_stage", here)
    folder = tmp_path / "album"
    folder.mkdir()
    turned = Image.Exif()
    turned[photographs.EXIF_ORIENTATION] = photographs.TURN_RIGHT_TO_DISPLAY
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "empty.jpg").touch()
    for number in range(BATCH_SIZE + 2):
        picture = photograph(NAMES[number % len(NAMES)]).rotate(15 * number)
        picture.resize((700, 640)).save(folder / f"{number:02d}.jpg", exif=turned)
    dataset = {"layout": "folder", "licence": "CC0 1.0"}
    document: dict[str, Any] = {
        "root": str(tmp_path / "corpus"),
        "datasets": {
            "album": dataset | {"source": str(folder)},
            "broken": dataset | {"source": str(tmp_path / "broken")},
            "exact": dataset | {"source": str(folder), "duplicates": "exact"},
        },
        "captions": {"source": {"engine": "source"}},
        "mixture": {"name": "m", "resolution": 64, "captions": "source"},
    }
    recipe = Recipe.model_validate(document)
    ingest.run_recipe(recipe, RunnerOptions(workers=1))
    return recipe


def commits(root: str, folder: str) -> list[str]:
    """Return the URLs of the shards of a folder."""
    files = storage.list_files(storage.join(root, folder))
    return [file.url for file in files if is_commit(file.name.rpartition("/")[2])]


def test_rows_stand_beside_the_index(recipe: Recipe, descriptor: Sscd) -> None:
    embed.run_recipe(recipe, RunnerOptions(workers=1))
    assert not commits(recipe.root, "embeddings/sscd/exact")
    (url,) = commits(recipe.root, "embeddings/sscd/album")
    (index_url,) = commits(recipe.root, "images/album")
    table, index = storage.read_parquet(url), storage.read_parquet(index_url)
    assert table.schema.remove_metadata() == embeddings_schema(512)
    assert table["key"] == index["key"]
    assert index.num_rows == BATCH_SIZE + 2
    tar_url = index_url.replace(".parquet", ".tar")
    rows = index.to_pylist()
    decoded = [
        originals.decode_original(
            tar_url, row, storage.read_bytes(tar_url, row["offset"], row["num_bytes"]), 320
        )
        for row in rows
    ]
    assert {picture.shape for picture in decoded} == {(350, 320, 3)}  # upright, and half
    expected = pa.concat_tables(
        describe(descriptor, decoded[start : start + BATCH_SIZE])
        for start in range(0, len(rows), BATCH_SIZE)
    )
    assert table.drop_columns("key").equals(expected)


def test_the_accelerator_is_the_recipes(recipe: Recipe) -> None:
    assert embed.stage_of(recipe).resource_hints == {}
    wanted = "type:nvidia-l4;count:1;install-nvidia-driver"
    dedup = recipe.dedup.model_copy(update={"accelerator": wanted})
    stage = embed.stage_of(recipe.model_copy(update={"dedup": dedup}))
    assert stage.resource_hints == {"accelerator": wanted}


def test_a_shard_without_pictures_has_no_rows(recipe: Recipe) -> None:
    embed.run_recipe(recipe, RunnerOptions(workers=1))
    (url,) = commits(recipe.root, "embeddings/sscd/broken")
    table = storage.read_parquet(url)
    assert table.num_rows == 0
    assert table.schema.remove_metadata() == embeddings_schema(512)


def test_damaged_bytes_are_not_described(recipe: Recipe, descriptor: Sscd) -> None:
    (index_url,) = commits(recipe.root, "images/album")
    tar = Path(index_url.replace(".parquet", ".tar"))
    row = storage.read_parquet(index_url).to_pylist()[3]
    data = bytearray(tar.read_bytes())
    data[row["offset"] + row["num_bytes"] // 2] ^= 1
    tar.write_bytes(data)
    shard = Path(index_url).stem
    stage = Embed(recipe.root, "embeddings/sscd", descriptor)
    with pytest.raises(DamagedPictureError, match=f"picture {row['key']}: other bytes"):
        stage.process(WorkItem("album", shard, inputs={}))


def test_only_datasets_with_near_duplicates_are_embedded(recipe: Recipe) -> None:
    assert embed.near_datasets(recipe) == ["album", "broken"]
    pairs = [{"between": ["broken", other], "duplicates": "exact"} for other in ("album", "broken")]
    changed = Recipe.model_validate(recipe.model_dump() | {"dedup": {"pairs": pairs}})
    assert embed.near_datasets(changed) == ["album"]
