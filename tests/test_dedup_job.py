"""The jobs on real photographs: from sources through embed and dedup, with Beam and without."""

import io
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from dedup import deduplicate, embed, steps
from demo import photographs
from pipeline import ingest, storage
from pipeline.beam_job import RunnerOptions
from pipeline.errors import EvenmixError
from pipeline.receipts import Counts
from pipeline.recipe import Recipe
from pipeline.stage import Stage, WorkItem
from pipeline.summary import Summary
from tests.stages import run_here
from tests.tiny_onnx import mean_colour_onnx

NAMES = ["brick", "camera", "coffee", "coins"]
TWO_WORKERS = RunnerOptions(workers=2)


def here(stage: Stage, items: list[WorkItem], _: RunnerOptions) -> Mapping[str, Summary]:
    return run_here(stage, items)


@pytest.fixture
def without_beam(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (ingest, embed, deduplicate, steps):
        monkeypatch.setattr(module, "run_stage", here)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write photographs with their edits, more of them in another dataset, and a graphic."""
    folder = tmp_path_factory.mktemp("sources")
    photographs.write_photographs(folder / "all")
    for dataset in ("album", "crawl", "graphics"):
        (folder / dataset).mkdir()
    for path in sorted((folder / "all").glob("*.[jp][pn]g")):
        name = path.stem.split("_")[0]
        if name in NAMES:
            shutil.copy(path, folder / ("crawl" if "mirrored" in path.stem else "album"))
    # The same bytes, the same pixels, and a picture that is merely alike.
    shutil.copy(folder / "all" / "brick.png", folder / "graphics" / "wall.png")
    Image.open(folder / "all" / "camera.png").save(folder / "graphics" / "man.bmp")
    shutil.copy(folder / "all" / "coins_quality_30.jpg", folder / "graphics" / "coins.jpg")
    return folder


def recipe_of(root: Path, sources: Path, **changes: Any) -> Recipe:
    def dataset(name: str, **options: Any) -> dict[str, Any]:
        return {"layout": "folder", "source": str(sources / name), "licence": "CC0 1.0"} | options

    document = {
        "root": str(root),
        "datasets": {
            "album": dataset("album", second_look="none"),
            "crawl": dataset("crawl", threshold=0.9, second_look="none"),
            "graphics": dataset("graphics", duplicates="exact"),
        },
        "images": {"min_short_edge_px": 64, "records_per_shard": 20},
        "captions": {"source": {"engine": "source"}},
        "mixture": {"name": "m", "resolution": 64, "captions": "source"},
    }
    return Recipe.model_validate(document | changes)


def build(recipe: Recipe) -> None:
    for job in (ingest, embed, deduplicate):
        job.run_recipe(recipe, TWO_WORKERS)


def tables(root: Path, family: str) -> dict[str, pa.Table]:
    """Read the files of all datasets of a family, by dataset and shard."""
    return {
        file.name.removesuffix(".parquet"): storage.read_parquet(file.url)
        for file in storage.list_files(str(root / family))
        if file.name.endswith(".parquet") and "rejected" not in file.name
    }


def files(root: Path) -> dict[str, bytes]:
    return {
        file.name: storage.read_bytes(file.url)
        for folder in ("duplicates", "embeddings")
        for file in storage.list_files(str(root / folder))
    }


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory, sources: Path) -> Path:
    """Build with Beam and two workers; the other tests compare with this one."""
    root = tmp_path_factory.mktemp("corpus")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ingest, "run_stage", here)
        build(recipe_of(root, sources))
    return root


def outcomes(root: Path) -> dict[str, dict[str, Any]]:
    """Join duplicates with the image index row by row; return rows by dataset/source id."""
    indexes, duplicates = tables(root, "images"), tables(root, "duplicates/sscd")
    rows: dict[str, dict[str, Any]] = {}
    for name, index in indexes.items():
        assert duplicates[name]["key"].to_pylist() == index["key"].to_pylist()
        for picture, row in zip(index.to_pylist(), duplicates[name].to_pylist(), strict=True):
            rows[f"{name.split('/')[0]}/{picture['source_id']}"] = picture | row
    return rows


def test_who_stays(corpus: Path) -> None:
    rows = outcomes(corpus)
    kept = {name for name, row in rows.items() if row["duplicate_of"] is None}
    names = {row["key"]: name for name, row in rows.items()}
    assert kept >= {"album/coffee.png", "album/coins.png"}
    # Of equal bytes the lower key stays, of equal pixels the larger file.
    wall = sorted((rows[name]["key"], name) for name in ("album/brick.png", "graphics/wall.png"))
    assert [name in kept for _, name in wall] == [True, False]
    assert rows[wall[1][1]]["rule"] == "exact_copy"
    assert names[rows["album/camera.png"]["duplicate_of"]] == "graphics/man.bmp"
    assert rows["album/camera.png"]["rule"] == "exact_copy"
    # The same bytes in both: the album loses it to an original, graphics has exact copies only.
    assert rows["album/coins_quality_30.jpg"]["rule"] == "near_duplicate"
    assert "graphics/coins.jpg" in kept
    # A mirrored picture is about .94 alike; its dataset asks for .9.
    assert names[rows["crawl/coffee_mirrored.jpg"]["duplicate_of"]] == "album/coffee.png"
    # Nothing is taken for a copy of another photograph.
    groups: dict[str, set[str]] = {}
    subject = {"wall": "brick", "man": "camera"}
    for name, row in rows.items():
        stem = Path(name).stem.split("_")[0]
        groups.setdefault(row["group"], set()).add(subject.get(stem, stem))
    assert all(len(subjects) == 1 for subjects in groups.values())


def test_every_removed_picture_has_a_kept_one_within_the_threshold(corpus: Path) -> None:
    rows = {
        row["key"]: row | {"dataset": name.split("/")[0]} for name, row in outcomes(corpus).items()
    }
    vectors = {
        key: np.asarray(vector, np.float64)
        for table in tables(corpus, "embeddings").values()
        for key, vector in zip(
            table["key"].to_pylist(), table["embedding"].to_pylist(), strict=True
        )
    }
    thresholds = {"album": 0.75, "crawl": 0.9}

    def cosine(a: str, b: str) -> float:
        lengths = np.linalg.norm(vectors[a]) * np.linalg.norm(vectors[b])
        return float(vectors[a] @ vectors[b] / lengths)

    def are_copies(a: str, b: str) -> bool:
        return bool(rows[a]["pixels_sha256"] == rows[b]["pixels_sha256"])

    def are_alike(a: str, b: str) -> bool:
        if not {rows[a]["dataset"], rows[b]["dataset"]} <= thresholds.keys():
            return False
        return cosine(a, b) >= max(thresholds[rows[key]["dataset"]] for key in (a, b))

    kept = [key for key, row in rows.items() if row["duplicate_of"] is None]
    removed = [key for key, row in rows.items() if row["duplicate_of"] is not None]
    assert len(removed) > 20
    for key in removed:
        keeper = rows[key]["duplicate_of"]
        assert keeper in kept
        assert rows[key]["group"] == keeper
        if rows[key]["rule"] == "exact_copy":
            assert are_copies(key, keeper)
            assert rows[key]["similarity"] == 1
        else:
            assert are_alike(key, keeper)
            assert rows[key]["similarity"] == pytest.approx(cosine(key, keeper), abs=1e-6)
    for i, a in enumerate(kept):
        assert rows[a]["group"] == a
        assert not any(are_alike(a, b) or are_copies(a, b) for b in kept[:i])


def test_counts_are_conserved_and_by_reason(corpus: Path) -> None:
    for dataset in ("album", "crawl", "graphics"):
        folder = corpus / "duplicates" / "sscd" / dataset
        counts = json.loads((folder / "stage.json").read_bytes())["counts"]
        rows = [row for name, row in outcomes(corpus).items() if name.startswith(f"{dataset}/")]
        rules = [row["rule"] for row in rows if row["rule"]]
        assert Counts(**counts) == Counts(
            len(rows),
            len(rows) - len(rules),
            {rule: rules.count(rule) for rule in sorted(set(rules))},
        )
    # Graphics needs no descriptors.
    assert {name.split("/")[1] for name in tables(corpus, "embeddings")} == {"album", "crawl"}


def test_the_same_bytes_without_beam(
    corpus: Path, sources: Path, tmp_path: Path, without_beam: None
) -> None:
    build(recipe_of(tmp_path, sources))
    assert files(tmp_path) == files(corpus)


def test_the_same_outcome_in_another_order(
    corpus: Path, sources: Path, tmp_path: Path, without_beam: None
) -> None:
    """Other shards, in which other pictures are neighbours, and other batches."""
    build(recipe_of(tmp_path, sources, images={"min_short_edge_px": 64, "records_per_shard": 7}))
    tables_of_all = [
        f"exchange/duplicates-sscd/1x1/clusters/clustering-{0:02}/all.parquet",
        f"duplicates/sscd/_graph/range-{0:05}.parquet",
        *(f"duplicates/sscd/{name}/all.parquet" for name in ("_groups", "_summary", "_recall")),
    ]
    for name in tables_of_all:
        one, other = (storage.read_parquet(str(root / name)) for root in (corpus, tmp_path))
        assert one.equals(other), name
        assert one.num_rows, name
    columns = ["key", "duplicate_of", "similarity", "group", "rule"]
    one_by_one = [
        {name: {column: row[column] for column in columns} for name, row in outcomes(root).items()}
        for root in (corpus, tmp_path)
    ]
    assert one_by_one[0] == one_by_one[1]


def test_without_near_duplicates_nothing_is_embedded(
    sources: Path, tmp_path: Path, without_beam: None
) -> None:
    recipe = recipe_of(tmp_path, sources)
    exact = {
        name: dataset.model_copy(update={"duplicates": "exact"})
        for name, dataset in recipe.datasets.items()
    }
    weights = recipe.dedup.model_copy(update={"weights": "no/such/file.onnx"})
    recipe = recipe.model_copy(update={"datasets": exact, "dedup": weights})
    build(recipe)
    assert not (tmp_path / "embeddings").exists()
    assert not (tmp_path / "duplicates" / "sscd" / "_graph").exists()
    rules = {row["rule"] for row in outcomes(tmp_path).values()}
    assert rules == {None, "exact_copy"}


def test_a_corpus_of_which_nothing_was_kept(
    sources: Path, tmp_path: Path, without_beam: None
) -> None:
    build(recipe_of(tmp_path, sources, images={"min_short_edge_px": 10_000}))
    assert outcomes(tmp_path) == {}
    removed = tables(tmp_path, "duplicates/sscd")["_removed/all"]
    assert removed.num_rows == 0


def test_other_settings_want_another_name(
    corpus: Path, sources: Path, tmp_path: Path, without_beam: None
) -> None:
    for family in ("images", "embeddings", "duplicates", "exchange"):
        shutil.copytree(corpus / family, tmp_path / family)
    recipe = recipe_of(tmp_path, sources, dedup={"max_neighbours": 4})
    with pytest.raises(EvenmixError, match=r"sscd/_.*search.max_neighbours: 64 -> 4.*another name"):
        deduplicate.run_recipe(recipe, TWO_WORKERS)
    threshold = recipe_of(tmp_path, sources)
    album = threshold.datasets["album"].model_copy(update={"threshold": 0.8})
    datasets = threshold.datasets | {"album": album}
    with pytest.raises(EvenmixError, match=r"inputs\.search\.rules"):
        deduplicate.run_recipe(threshold.model_copy(update={"datasets": datasets}), TWO_WORKERS)


def test_without_the_exchange_nothing_is_done_again(
    corpus: Path,
    sources: Path,
    tmp_path: Path,
    without_beam: None,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for family in ("images", "embeddings", "duplicates"):
        shutil.copytree(corpus / family, tmp_path / family)
    deduplicate.run_recipe(recipe_of(tmp_path, sources), TWO_WORKERS)
    assert files(tmp_path) == files(corpus)
    assert not (tmp_path / "exchange").exists()
    shown = capsys.readouterr().err
    assert "removed pictures" in shown
    assert "pair recall" in shown


def test_an_outcome_that_was_cut_off_is_completed(
    corpus: Path, sources: Path, tmp_path: Path, without_beam: None
) -> None:
    for family in ("images", "embeddings", "duplicates", "exchange"):
        shutil.copytree(corpus / family, tmp_path / family)
    for dataset in ("_summary", "crawl"):
        shutil.rmtree(tmp_path / "duplicates" / "sscd" / dataset)
    deduplicate.run_recipe(recipe_of(tmp_path, sources), TWO_WORKERS)
    assert files(tmp_path) == files(corpus)


def test_missing_weights_stop_before_any_work(
    corpus: Path, sources: Path, tmp_path: Path, without_beam: None
) -> None:
    shutil.copytree(corpus / "images", tmp_path / "images")
    recipe = recipe_of(tmp_path, sources, dedup={"weights": str(tmp_path / "gone.onnx")})
    with pytest.raises(EvenmixError, match=r"gone\.onnx, which does not exist"):
        embed.run_recipe(recipe, TWO_WORKERS)
    assert not (tmp_path / "embeddings").exists()


def test_dedup_before_embed_says_what_to_do(
    corpus: Path, sources: Path, tmp_path: Path, without_beam: None
) -> None:
    shutil.copytree(corpus / "images", tmp_path / "images")
    with pytest.raises(
        EvenmixError, match=r"album is missing or not finished; run `evenmix embed`"
    ):
        deduplicate.run_recipe(recipe_of(tmp_path, sources), TWO_WORKERS)


def test_descriptors_never_mix(
    corpus: Path, sources: Path, tmp_path: Path, without_beam: None
) -> None:
    for family in ("images", "embeddings"):
        shutil.copytree(corpus / family, tmp_path / family)
    weights = tmp_path / "mean.onnx"
    weights.write_bytes(mean_colour_onnx())
    recipe = recipe_of(tmp_path, sources, dedup={"weights": str(weights)})
    with pytest.raises(EvenmixError, match=r"made in another way \(config\.descriptor\.dimension"):
        embed.run_recipe(recipe, TWO_WORKERS)
    shutil.rmtree(tmp_path / "embeddings" / "sscd" / "crawl")
    without_album = {name: recipe.datasets[name] for name in ("crawl", "graphics")}
    embed.run_recipe(recipe.model_copy(update={"datasets": without_album}), TWO_WORKERS)
    with pytest.raises(
        EvenmixError, match=r"album and crawl were embedded by different .*512 -> 3"
    ):
        deduplicate.run_recipe(recipe, TWO_WORKERS)


def test_a_damaged_tar_is_named(
    corpus: Path, sources: Path, tmp_path: Path, without_beam: None
) -> None:
    shutil.copytree(corpus / "images", tmp_path / "images")
    (index,) = (t for name, t in tables(tmp_path, "images").items() if name.startswith("crawl/"))
    (tar,) = (tmp_path / "images" / "crawl").glob("*.tar")
    data = bytearray(tar.read_bytes())
    data[index["offset"][1].as_py() + 1_000] ^= 1
    tar.write_bytes(data)
    with pytest.raises(EvenmixError) as caught:
        embed.run_recipe(recipe_of(tmp_path, sources), TWO_WORKERS)
    assert str(tar) in str(caught.value)
    assert index["key"][1].as_py() in str(caught.value)


def test_the_sources_are_what_the_tests_take_them_for(sources: Path) -> None:
    with Image.open(io.BytesIO((sources / "graphics" / "man.bmp").read_bytes())) as copy:
        pixels = np.asarray(copy)
    np.testing.assert_array_equal(pixels, np.asarray(Image.open(sources / "all" / "camera.png")))
