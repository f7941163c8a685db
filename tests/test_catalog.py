"""The catalogue has i1's twelve datasets with i1's counts, and its rules give i1's identifiers."""

import re
from fnmatch import fnmatchcase
from typing import Any

import pytest

from pipeline.catalog import CATALOG
from pipeline.readers.rules import describe, path_values, value_names

PLACES = "places365-challenge2016"
NO_DIGEST = "d41d8cd98f0b24e980998ecf8427e"
"""The MD5 of nothing, d41d8cd98f00b204e9800998ecf8427e, with 00, 04 and 09 as one digit each."""


def test_the_names_are_those_of_the_caption_subsets() -> None:
    assert list(CATALOG) == [
        "fluxreason",
        "gptedit",
        "imagenet22k",
        "inaturalist",
        "megalith10m",
        "midjourneyv6",
        "pexels",
        "places365-challenge2016",
        "redcaps",
        "rendered_text",
        "textatlas",
        "yfcc",
    ]
    assert [entry.dataset.caption_subset for entry in CATALOG.values()] == list(CATALOG)


@pytest.mark.parametrize(
    ("stage", "datasets", "pictures"),
    [(256, 11, 162_903_264), (512, 10, 64_781_840), (1024, 5, 18_899_232)],
)
def test_stages_have_the_datasets_that_i1_counts(stage: int, datasets: int, pictures: int) -> None:
    counts = [entry.in_i1.pictures for entry in CATALOG.values() if stage in entry.stages]
    assert (len(counts), sum(counts)) == (datasets, pictures)


def test_subsets_sum_up_to_their_dataset() -> None:
    textatlas, fluxreason = CATALOG["textatlas"], CATALOG["fluxreason"]
    assert len(textatlas.subsets) == 10
    assert sum(subset.num_records or 0 for subset in textatlas.subsets) == textatlas.num_records
    assert sum(subset.num_files or 0 for subset in fluxreason.subsets) == fluxreason.num_files
    assert sum(subset.num_bytes or 0 for subset in fluxreason.subsets) == fluxreason.num_bytes


@pytest.mark.parametrize("name", CATALOG)
def test_what_is_not_known_is_said_to_be_unverified(name: str) -> None:
    entry = CATALOG[name]
    unverified = " ".join(entry.unverified).lower()
    if entry.gated is None:
        assert "gated" in unverified
    if entry.num_bytes is None and entry.num_files is None:
        assert "bytes" in unverified
    if entry.in_i1.captions_each is None:
        assert "captions of a picture" in unverified
    if entry.dataset.source.startswith("hf://") and entry.dataset.revision is None:
        assert "revision" in unverified


@pytest.mark.parametrize("name", CATALOG)
def test_a_revision_is_a_whole_commit(name: str) -> None:
    revision = CATALOG[name].dataset.revision
    assert revision is None or re.fullmatch("[0-9a-f]{40}", revision)


@pytest.mark.parametrize("name", CATALOG)
def test_rules_use_known_columns_only(name: str) -> None:
    entry = CATALOG[name]
    pattern = re.compile(entry.dataset.path_pattern or "")
    places = {"path", "folder", "parent", "stem", "key", "file", "row"}
    columns = set(value_names(entry.dataset)) - places - pattern.groupindex.keys()
    if entry.dataset.layout == "parquet":
        columns.add(entry.dataset.image_field)
    assert not [
        column
        for column in columns
        if not any(known != "*" and fnmatchcase(column, known) for known in entry.columns)
    ]


@pytest.mark.parametrize("name", CATALOG)
def test_a_join_is_known_if_and_only_if_there_is_a_rule_for_it(name: str) -> None:
    entry = CATALOG[name]
    assert (entry.dataset.join_rule is None) == (entry.join == "unknown")
    assert bool(entry.dataset.ambiguous_joins) == (entry.join == "ambiguous")


FLICKR = "https://live.staticflickr.com/1_b.jpg"
FROM_TABLES: list[tuple[str, dict[str, Any], str, str | None]] = [
    (
        "fluxreason",
        {"id": "aesthetics-part01-00000000"},
        "aesthetics-part01-00000000",
        "aesthetics-part01-00000000",
    ),
    ("gptedit", {"id": "hqedit_7"}, "hqedit_7", "hqedit_7"),
    ("imagenet22k", {"key": "n00004475_32"}, "n00004475_32", "n00004475_32"),
    ("megalith10m", {"url": FLICKR}, FLICKR, None),
    ("midjourneyv6", {"id": 12, "file": "train_003", "row": 4}, "12:train_003:4", None),
    ("pexels", {"key": "4567"}, "4567", "4567"),
    ("redcaps", {"image_id": "ab12c", "url": "u"}, "ab12c", "ab12c"),
    ("rendered_text", {"key": "000000012"}, "000000012", "000000012"),
    (
        "textatlas",
        {"folder": "CoverBook", "image_path": "images/0.jpg"},
        "CoverBook:images/0.jpg",
        "CoverBook:images/0.jpg",
    ),
    ("yfcc", {"photoid": 6985418911, "downloadurl": ""}, "6985418911", "6985418911"),
]


@pytest.mark.parametrize(("name", "values", "source_id", "join_id"), FROM_TABLES)
def test_identifiers_of_rows(
    name: str, values: dict[str, Any], source_id: str, join_id: str | None
) -> None:
    dataset = CATALOG[name].dataset
    others = dict.fromkeys(value_names(dataset), "")
    record = describe(dataset, "somewhere", others | values)
    assert (record.source_id, record.join_id, record.detail) == (source_id, join_id, "")
    assert not record.join_ambiguous


@pytest.mark.parametrize(
    ("path", "source_id", "join_id", "ambiguous"),
    [
        ("a/abbey/00000012.jpg", "abbey/00000012", "abbey_00000012", False),
        # From nested tars, with and without the letter inside.
        ("a/a/abbey/00000012.jpg", "abbey/00000012", "abbey_00000012", False),
        ("data_large/a/abbey/00000012.jpg", "abbey/00000012", "abbey_00000012", False),
        (
            "s/swimming_pool/indoor/00000012.jpg",
            "swimming_pool/indoor/00000012",
            "indoor_00000012",
            True,
        ),
        ("b/bow_window/indoor/00000012.jpg", "bow_window/indoor/00000012", "indoor_00000012", True),
        (
            "n/natural_history_museum/00000012.jpg",
            "natural_history_museum/00000012",
            "natural_history_museum_00000012",
            False,
        ),
    ],
)
def test_identifiers_of_places(path: str, source_id: str, join_id: str, ambiguous: bool) -> None:
    dataset = CATALOG[PLACES].dataset
    record = describe(dataset, path, path_values(path, dataset.path_pattern))
    assert record.source_id == source_id
    assert (record.join_id, record.join_ambiguous) == (join_id, ambiguous)
    assert record.text == source_id.rpartition("/")[0]


def test_identifiers_of_inaturalist() -> None:
    dataset = CATALOG["inaturalist"].dataset
    path = "train/04686_Animalia_Chordata_Aves/0a1b-2c.jpg"
    record = describe(dataset, path, path_values(path, dataset.path_pattern))
    assert (record.source_id, record.join_id) == ("0a1b-2c", "0a1b-2c")
    assert record.text == "Animalia_Chordata_Aves"


def test_a_picture_of_yfcc_is_under_the_hash_of_its_url_without_zeros() -> None:
    dataset = CATALOG["yfcc"].dataset
    values = dict.fromkeys(value_names(dataset), "") | {"photoid": 1, "licensename": "by-sa"}
    record = describe(dataset, "somewhere", values)
    assert record.image_url == (
        f"https://multimedia-commons.s3-us-west-2.amazonaws.com/data/images/d41/d8c/{NO_DIGEST}.jpg"
    )
    assert record.licence == "by-sa"
