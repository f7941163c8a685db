"""All that stands between a recipe and its mixture is told at once, before any work."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mixing.corpus_check import check_corpus
from pipeline import storage
from pipeline.errors import EvenmixError
from tests.table_corpus import NUMBERS, RECIPE, recipe_of, write_attributes, write_corpus

FOLDER = RECIPE["datasets"]["set"]
DATASETS = {"datasets": {"set": FOLDER, "other": FOLDER}}


@pytest.fixture
def root(tmp_path: Path) -> str:
    write_corpus(str(tmp_path))
    write_corpus(str(tmp_path), "other")
    return str(tmp_path)


def obstacles(root: str, changes: dict[str, Any] | None = None, **mixture: Any) -> list[str]:
    """Return the lines of what is told, without the first."""
    with pytest.raises(EvenmixError) as caught:
        check_corpus(recipe_of(root, DATASETS | (changes or {}), **mixture))
    first, *lines = str(caught.value).splitlines()
    assert first == "the mixture cannot be cut:"
    return [line.strip() for line in lines]


def test_a_corpus_that_has_everything_passes(root: str) -> None:
    write_attributes(root, "quality", {"score": pa.array([n / 300 for n in NUMBERS])})
    filters = [
        {"column": "width", "at_least": 80},
        {"column": "quality.score", "at_least": 0.5, "datasets": ["set"]},
    ]
    check_corpus(recipe_of(root, DATASETS, filters=filters))


def test_everything_is_told_at_once_and_what_datasets_share_once(root: str) -> None:
    datasets = {"set": FOLDER, "other": FOLDER, "absent": FOLDER, "begun": FOLDER}
    Path(root, "images", "begun").mkdir()
    filters = [
        {"column": "widht", "at_least": 80},
        {"column": "qality.score", "at_least": 0.5, "datasets": ["set"]},
        {"column": "quality.scores", "at_least": 0.5, "datasets": ["other"]},
    ]
    write_attributes(root, "quality", {"score": pa.array(NUMBERS)}, "other")
    changes = {
        "datasets": datasets,
        "captions": {"sorce": {"engine": "source"}},
        "dedup": {"name": "second"},
    }
    weights = {"set": 0.1234567, "other": 0.3, "absent": 0.2, "begun": 0.1}
    told = obstacles(root, changes, captions="sorce", filters=filters, weights=weights)
    assert told == [
        "mixture.weights have the common denominator 7,234,567, above 65,536; round them, for "
        "instance to three digits",
        "not ingested, or not to the end: absent, begun; run `evenmix ingest`",
        "images has no column widht, which the filter widht >= 80 asks for: other, set; did you "
        "mean 'width'?",
        "dedup second has not finished: other, set; run `evenmix dedup`",
        "attributes/quality has no column scores, which the filter quality.scores >= 0.5 asks for: "
        "other; did you mean 'score'?",
        "captions/sorce is missing, or not finished: other, set; run `evenmix caption`; did you "
        "mean 'source'?",
        "attributes/qality, which mixture.filters name, is missing: set; did you mean 'quality'?",
    ]


def test_filters_that_cannot_be_applied_are_told(root: str) -> None:
    write_attributes(root, "quality", {"word": pa.array(["fine" for _ in NUMBERS])})
    filters = [
        {"column": "quality.word", "at_least": 1, "datasets": ["set"]},
        {"column": "quality.word", "one_of": ["fine"], "datasets": ["set"]},
        {"column": "width", "one_of": ["wide"]},
    ]
    columns, of_index = obstacles(root, filters=filters)[::-1]
    assert of_index.startswith("the filter width in wide cannot be applied to images, whose column")
    assert of_index.endswith("correct mixture.filters: other, set")
    assert columns.startswith(
        "the filter quality.word >= 1 cannot be applied to attributes/quality"
    )
    assert columns.endswith("correct mixture.filters: set")


def test_a_family_is_listed_once_for_hints(root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    listed = list[str]()
    list_files = storage.list_files

    def noting(url: str) -> list[storage.FileInfo]:
        listed.append(url)
        return list_files(url)

    monkeypatch.setattr(storage, "list_files", noting)
    changes = {"captions": {"sorce": {"engine": "source"}}}
    assert len(obstacles(root, changes, captions="sorce")) == 1
    assert listed == [f"{root}/captions"]


def test_caption_sets_are_named_where_none_is_alike(root: str) -> None:
    changes = {"captions": {"qwen3-vl": {"engine": "vllm"}}}
    assert obstacles(root, changes, captions="qwen3-vl") == [
        "captions/qwen3-vl is missing, or not finished: other, set; run `evenmix caption`; there "
        "is source"
    ]


def test_shards_that_are_missing_of_one_family_are_counted(root: str) -> None:
    write_attributes(root, "quality", {"score": pa.array(NUMBERS)})
    write_attributes(root, "quality", {"score": pa.array(NUMBERS)}, "other")
    Path(root, "attributes/quality/set/shard-1.parquet").unlink()
    summary = Path(root, "duplicates/sscd/other/stage.json")
    summary.write_text(summary.read_text().replace('"shard-2"', '"shard-7"'))
    filters = [{"column": "quality.score", "at_least": 0.5}]
    assert obstacles(root, filters=filters) == [
        "duplicates/sscd lacks 1 shards of the image index, such as shard-2: other; give "
        "dedup.name another value and run `evenmix dedup`",
        "attributes/quality lacks 1 shards of the image index, such as shard-1: set; each needs a "
        "table of its name, with its keys in its order",
    ]


def test_a_table_without_keys_is_told(root: str) -> None:
    write_attributes(root, "quality", {"score": pa.array(NUMBERS)})
    for file in Path(root, "attributes/quality/set").iterdir():
        pq.write_table(pq.read_table(file).select(["score"]), file)
    filters = [{"column": "quality.score", "at_least": 0.5, "datasets": ["set"]}]
    assert obstacles(root, filters=filters) == [
        "attributes/quality has no column key: set; it has score"
    ]
