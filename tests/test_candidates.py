"""Which pictures a mixture could take, and the bound of the smallest hashes among them."""

import os
import tracemalloc
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pytest

from pipeline import candidates, storage
from pipeline.beam_job import RunnerOptions
from pipeline.candidates import (
    CANDIDATES,
    Candidates,
    Smallest,
    candidate_counts,
    candidate_urls,
    smallest,
)
from pipeline.eligible import (
    HASH_RANGE,
    input_digests,
    is_held_out,
    judge_shard,
    selection_hash,
)
from pipeline.errors import EvenmixError
from pipeline.recipe import Recipe
from pipeline.run import run_stage
from pipeline.verify import verify
from tests.stages import run_here
from tests.table_corpus import (
    CAPTIONLESS,
    DUPLICATES,
    NUMBERS,
    ROWS,
    SHARDS,
    SMALL,
    find_candidates,
    key,
    recipe_of,
    write_attributes,
    write_captions,
    write_corpus,
)

LAST = HASH_RANGE - 1


@pytest.fixture
def root(tmp_path: Path) -> str:
    write_corpus(str(tmp_path))
    return str(tmp_path)


def judge(recipe: Recipe, with_captions: bool = True) -> dict[int, str | None]:
    """Return why each picture of the corpus cannot be taken, by its number."""
    judged = [
        row
        for shard in range(SHARDS)
        for row in judge_shard(recipe, "set", f"shard-{shard}", with_captions)
    ]
    assert [found for found, _ in judged] == [key(number) for number in NUMBERS]
    return dict(zip(NUMBERS, (reason for _, reason in judged), strict=True))


def those_with(judged: dict[int, str | None], reason: str | None) -> set[int]:
    return {number for number, found in judged.items() if found == reason}


def test_every_picture_has_its_first_reason(root: str) -> None:
    judged = judge(recipe_of(root))
    assert those_with(judged, "near_duplicate") == DUPLICATES
    assert those_with(judged, "too_small") == SMALL
    assert those_with(judged, "no_caption") == CAPTIONLESS
    assert those_with(judged, None) == {*NUMBERS} - DUPLICATES - SMALL - CAPTIONLESS
    judged = judge(recipe_of(root), with_captions=False)
    assert those_with(judged, None) == {*NUMBERS} - DUPLICATES - SMALL


def test_excluded_pictures_come_first(root: str, tmp_path: Path) -> None:
    listed = tmp_path / "exclusions.txt"  # the second is a duplicate too, the third small
    listed.write_text("".join(f"source_id set {name}\n" for name in (1, 10, 15)), encoding="utf-8")
    judged = judge(recipe_of(root, {"exclusions": str(listed)}))
    assert those_with(judged, "excluded") == {1, 10, 15}
    assert those_with(judged, "near_duplicate") == DUPLICATES - {10}


FLOATS = pa.array([0.1 if n % 2 else 0.3 for n in NUMBERS], pa.float32())
WORDS = pa.array([("cat", "dog", None)[n % 3] for n in NUMBERS])


@pytest.mark.parametrize(
    ("wanted", "passes"),
    [
        ({"column": "q.float", "at_least": 0.3}, lambda n: n % 2 == 0),
        ({"column": "q.float", "at_most": 0.1}, lambda n: n % 2 == 1),
        ({"column": "q.float", "at_least": 0.1, "at_most": 0.3}, lambda n: True),
        ({"column": "q.int", "at_least": 298.5}, lambda n: n == 299),
        ({"column": "q.int", "at_least": 7, "at_most": 8}, lambda n: n in (7, 8)),
        ({"column": "q.int", "one_of": [7, 9]}, lambda n: n in (7, 9)),
        ({"column": "q.some", "at_least": -1}, lambda n: n % 4 > 1),  # neither null nor NaN
        ({"column": "q.some", "at_most": 1}, lambda n: n % 4 > 1),
        ({"column": "q.word", "one_of": ["cat", "cow"]}, lambda n: n % 3 == 0),
        ({"column": "q.category", "one_of": ["dog"]}, lambda n: n % 3 == 1),
        ({"column": "q.flag", "one_of": [True]}, lambda n: n % 5 == 0),
        ({"column": "q.nothing", "at_least": 0}, lambda n: False),
        ({"column": "q.untyped", "one_of": ["cat"]}, lambda n: False),
        ({"column": "width", "at_least": 80}, lambda n: True),
        ({"column": "height", "at_most": 63}, lambda n: False),
        ({"column": "q.word", "one_of": ["cat"], "datasets": ["set"]}, lambda n: n % 3 == 0),
        ({"column": "q.word", "one_of": ["cat"], "datasets": ["other"]}, lambda n: True),
    ],
)
def test_filters(root: str, wanted: dict[str, Any], passes: Any) -> None:
    some = [(None, float("nan"), 0.5, 0.7)[n % 4] for n in NUMBERS]
    columns = {
        "float": FLOATS,
        "int": pa.array(NUMBERS, pa.int16()),
        "some": pa.array(some, pa.float64()),
        "word": WORDS,
        "category": WORDS.dictionary_encode(),
        "flag": pa.array([n % 5 == 0 for n in NUMBERS]),
        "nothing": pa.nulls(len(NUMBERS), pa.float32()),
        "untyped": pa.nulls(len(NUMBERS)),
    }
    write_attributes(root, "q", columns)
    table = {"layout": "folder", "source": "s", "licence": "CC0 1.0"}
    changes = {"datasets": {"set": table, "other": table}}
    recipe = recipe_of(root, changes, filters=[wanted], datasets=["set"])
    left = {*NUMBERS} - DUPLICATES - SMALL
    judged = judge(recipe)
    reason = f"filtered: {recipe.mixture.filters[0]}"
    assert those_with(judged, reason) == {n for n in left if not passes(n)}
    assert those_with(judged, "no_caption") == {n for n in CAPTIONLESS if passes(n)}


def test_of_several_filters_the_first_that_a_picture_fails_is_counted(root: str) -> None:
    write_attributes(root, "a.b", {"float": FLOATS})
    write_attributes(root, "q", {"word": WORDS, "float": FLOATS})
    filters = [
        {"column": "q.word", "one_of": ["cat", "dog"]},
        {"column": "a.b.float", "at_least": 0.2},
        {"column": "q.float", "at_least": 0.2},
    ]
    reasons = Counter(judge(recipe_of(root, filters=filters), with_captions=False).values())
    left = {*NUMBERS} - DUPLICATES - SMALL
    assert reasons["filtered: q.word in cat, dog"] == sum(n % 3 == 2 for n in left)
    assert reasons["filtered: a.b.float >= 0.2"] == sum(n % 3 < 2 and n % 2 for n in left)
    assert reasons[None] == sum(n % 3 < 2 and n % 2 == 0 for n in left)
    assert "filtered: q.float >= 0.2" not in reasons


@pytest.mark.parametrize(
    ("wanted", "error"),
    [
        ({"column": "none", "at_least": 1}, r"images/set/shard-0.parquet has no column none"),
        ({"column": "q.none", "at_least": 1}, r"q/set/shard-0.parquet has no column none; it has"),
        ({"column": "q.word", "at_least": 1}, r"q.word >= 1 cannot be applied to attributes/q, .*"),
        ({"column": "q.float", "one_of": ["a"]}, r"in a cannot be applied .* of type float .*"),
        ({"column": "q.word", "one_of": [1]}, r"q.word in 1 cannot be applied .* of type string"),
    ],
)
def test_filters_that_do_not_fit_the_tables(root: str, wanted: dict[str, Any], error: str) -> None:
    write_attributes(root, "q", {"word": WORDS, "float": FLOATS})
    with pytest.raises(EvenmixError, match=error):
        judge(recipe_of(root, filters=[wanted]))


def test_attribute_tables_have_a_row_for_each_picture_in_order(root: str) -> None:
    recipe = recipe_of(root, filters=[{"column": "q.float", "at_least": 0.2}])
    with pytest.raises(EvenmixError, match=r"attributes/q/set has no attribute tables; write one"):
        input_digests(recipe, "set", with_captions=True)
    write_attributes(root, "q", {"float": FLOATS})
    url = f"{root}/attributes/q/set/shard-1.parquet"
    table = storage.read_parquet(url)
    for wrong in (table.take(list(reversed(range(ROWS)))), table.slice(1)):
        storage.replace(url, storage.parquet_bytes(wrong, {}))
        with pytest.raises(
            EvenmixError, match=r"shard-1.parquet and .* different .* write it anew"
        ):
            judge(recipe)
    large = table.set_column(0, "key", table["key"].cast(pa.large_string()))
    storage.replace(url, storage.parquet_bytes(large, {}))
    assert those_with(judge(recipe), None)
    storage.remove(url)
    with pytest.raises(EvenmixError, match=r"q/set lacks 1 shards, such as shard-1, of the image"):
        input_digests(recipe, "set", with_captions=True)


def test_attribute_tables_are_known_by_their_bytes(root: str) -> None:
    recipe = recipe_of(root, filters=[{"column": "q.float", "at_least": 0.2}])
    write_attributes(root, "q", {"float": FLOATS})
    before = input_digests(recipe, "set", with_captions=True)
    assert list(before) == ["images", "duplicates/sscd", "attributes/q", "captions/source"]
    url = f"{root}/attributes/q/set/shard-1.parquet"
    os.utime(url, (1, 1))  # a copy of the corpus
    assert input_digests(recipe, "set", with_captions=True) == before
    data = storage.read_bytes(url)
    storage.replace(url, data.replace(b"float", b"flaot"))  # as long as it was
    after = input_digests(recipe, "set", with_captions=True)
    differing = {
        (folder, shard)
        for folder, found in after.items()
        for shard, digest in found.items()
        if digest != before[folder][shard]
    }
    assert differing == {("attributes/q", "shard-1")}


def test_a_caption_of_any_set_is_enough(root: str) -> None:
    outcomes: list[list[str]]
    outcomes = [["ok"], ["empty", "truncated"], ["repeating"], ["not_asked"], []]
    others = [["not_asked"], ["empty"], ["refused"], ["empty"], ["empty"], ["ok"]]
    write_captions(root, "a", [outcomes[n % 5] for n in NUMBERS])
    write_captions(root, "b", [others[n % 6] for n in NUMBERS])
    captions = {"captions": {name: {"engine": "source"} for name in ("a", "b")}}
    left = {*NUMBERS} - DUPLICATES - SMALL

    def expected(*usable: str) -> dict[int, str | None]:
        reasons: dict[int, str | None] = {}
        for n in left:
            found = {*outcomes[n % 5], *others[n % 6]}
            missing = "not_asked" if "not_asked" in found else "no_caption"
            reasons[n] = None if found & set(usable) else missing
        return reasons

    recipe = recipe_of(root, captions, captions={"a": 0.5, "b": 0.5})
    judged = judge(recipe)
    assert {n: judged[n] for n in left} == expected("ok", "truncated")
    recipe = recipe_of(
        root, captions, captions={"a": 0.5, "b": 0.5}, outcomes=["truncated", "repeating"]
    )
    judged = judge(recipe)
    assert {n: judged[n] for n in left} == expected("truncated", "repeating")
    only_b = judge(recipe_of(root, captions, captions="a", captions_of={"set": "b"}))
    assert those_with(only_b, None) == {n for n in left if n % 6 == 5}


def test_tables_that_are_not_aligned_are_never_joined(root: str) -> None:
    url = f"{root}/captions/source/set/shard-1.parquet"
    table = storage.read_parquet(url).take(list(reversed(range(ROWS))))
    storage.replace(url, storage.parquet_bytes(table, {}))
    with pytest.raises(EvenmixError, match=r"shard-1.parquet and .* different .* `evenmix verify`"):
        judge(recipe_of(root))


@pytest.mark.parametrize("with_captions", [True, False])
def test_candidates_are_published_by_their_hashes(root: str, with_captions: bool) -> None:
    recipe = recipe_of(root)
    find_candidates(recipe, with_captions)
    taken = those_with(judge(recipe, with_captions), None)
    expected = sorted((selection_hash(recipe, key(n)), is_held_out(recipe, key(n))) for n in taken)
    (url,) = candidate_urls(recipe, "set", with_captions)
    table = storage.read_parquet(url)
    assert table.schema.equals(CANDIDATES)
    assert [(row["hash"], row["held_out"]) for row in table.to_pylist()] == expected
    counts = candidate_counts(recipe, "set", with_captions)
    assert counts.is_conserved()
    assert (counts.records_in, counts.records_out) == (len(NUMBERS), len(taken))
    assert ("no_caption" in counts.rejected) == with_captions


def test_all_mixtures_that_judge_alike_share_their_candidates(root: str, tmp_path: Path) -> None:
    listed = tmp_path / "exclusions.txt"
    listed.write_text("source_id set 1\n", encoding="utf-8")

    def folder(changes: dict[str, Any] | None = None, **mixture: Any) -> str:
        return Candidates(recipe_of(root, changes, **mixture), with_captions=True).folder

    alike = [
        folder(),
        folder(images_per_dataset=10),
        folder(name="n", samples_per_shard=7, weights="size", image_format="jpeg"),
        folder(captions={"source": 0.3}),
        folder(min_short_edge_px=64),
    ]
    others = [
        folder({"seed": 4}),
        folder({"dedup": {"name": "again"}}),
        folder({"exclusions": str(listed)}),
        folder(validation_fraction=0.2),
        folder(resolution=32),
        folder(outcomes=["ok"]),
        folder(filters=[{"column": "width", "at_least": 1}]),
        folder(captions_of={"set": {"source": 1}}),
        Candidates(recipe_of(root), with_captions=False).folder,
    ]
    assert set(alike) == {folder()}
    assert len({*alike, *others}) == 1 + len(others)


def test_the_bound_does_not_depend_on_groups(root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = recipe_of(root)
    find_candidates(recipe)
    together = smallest(candidate_urls(recipe, "set", True), 50)
    monkeypatch.setattr(candidates, "SHARDS_PER_GROUP", 1)
    apart = recipe_of(root, {"exclusions": None}, outcomes=["ok"])  # alike here, named otherwise
    find_candidates(apart)
    urls = candidate_urls(apart, "set", True)
    assert [url.rpartition("/")[2] for url in urls] == [
        f"group-{number:05}.parquet" for number in range(SHARDS)
    ]
    assert smallest(urls, 50) == together
    assert together.num_train == 50


def test_any_number_of_workers_finds_the_same(root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(candidates, "SHARDS_PER_GROUP", 1)
    stage = Candidates(recipe_of(root), with_captions=True)

    def files() -> dict[str, bytes]:
        found = storage.list_files(storage.join(root, stage.folder))
        return {file.name: storage.read_bytes(file.url) for file in found}

    run_here(stage, stage.plan())
    here = files()
    for file in storage.list_files(storage.join(root, stage.folder)):
        storage.remove(file.url)
    run_stage(stage, stage.plan(), RunnerOptions(workers=2))
    assert files() == here
    assert len(here) == SHARDS + 1
    _, findings = verify(root, deep=False)
    assert not [finding for finding in findings if "exchange" in finding]


def write_hashes(folder: Path, *files: npt.NDArray[np.uint64]) -> list[str]:
    """Write candidates in files; every seventh of all is held out."""
    urls = []
    for number, hashes in enumerate(files):
        ordered = np.sort(hashes)
        table = pa.table([ordered, ordered % np.uint64(7) == 0], schema=CANDIDATES)
        urls.append(str(folder / f"group-{number:05}.parquet"))
        storage.publish(urls[-1], storage.parquet_bytes(table, {}))
    return urls


def random_hashes(*shape: int) -> npt.NDArray[np.uint64]:
    return np.random.default_rng(0).integers(0, HASH_RANGE, shape, np.uint64)


@pytest.mark.parametrize("number", [1, 2, 99, 100, 101, 399, 1000, None])
def test_the_smallest_hashes_are_exact(tmp_path: Path, number: int | None) -> None:
    hashes = random_hashes(23, 30)
    urls = write_hashes(tmp_path, *hashes, np.empty(0, np.uint64))
    train = np.sort(hashes[hashes % np.uint64(7) != 0])
    found = smallest(urls, number)
    if number is None or number >= len(train):
        last, taken = LAST, len(train)
    else:
        last, taken = int(train[number - 1]), number
    assert found == Smallest(last, taken, hashes.size - len(train))


def test_equal_hashes_at_the_bound_are_all_taken(tmp_path: Path) -> None:
    one, two, three = (np.array(each, np.uint64) for each in ([1, 3, 5], [3, 9], [LAST - 1, 3, 2]))
    urls = write_hashes(tmp_path, one, two, three)  # the largest is held out
    assert smallest(urls, 2) == Smallest(2, 2, 1)
    assert smallest(urls, 3) == smallest(urls, 4) == smallest(urls, 5) == Smallest(3, 5, 1)
    assert smallest(urls, 6) == Smallest(5, 6, 1)
    assert smallest(urls, 7) == smallest(urls, None) == Smallest(LAST, 7, 1)
    assert smallest([], 5) == Smallest(LAST, 0, 0)


def test_memory_is_that_of_the_hashes_that_are_kept(tmp_path: Path) -> None:
    number, files, rows = 1000, 256, 4096
    hashes = random_hashes(files, rows)
    urls = write_hashes(tmp_path, *hashes)
    train = hashes[hashes % np.uint64(7) != 0]
    del hashes
    tracemalloc.start()
    found = smallest(urls, number)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert found.last_hash == np.partition(train, number - 1)[number - 1]
    assert found.num_train == number
    at_once = candidates._CONCURRENT_READS * 2 * rows * 9  # bytes of the files, and their columns
    assert peak < 4 * number * 8 + at_once < train.nbytes
