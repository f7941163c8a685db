"""Exact copies, near-duplicates and repeated ids in one graph, against the plain definition."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pytest

from dedup.deduplicate import removals
from dedup.pictures import EXACT_ONLY, Pictures, read_pictures
from dedup.records import PAIRS
from pipeline import storage
from pipeline.records import INDEX

THRESHOLDS = {"loose": 0.75, "strict": 0.9, "graphics": EXACT_ONLY}
NUM_CONTENTS = 12


@dataclass(frozen=True)
class Picture:
    """A picture whose pixels are one of a few contents; ``file`` tells its encodings apart."""

    dataset: str
    key: str
    content: int
    file: int
    num_pixels: int

    @property
    def rank(self) -> tuple[int, int, str]:
        return (-self.num_pixels, -self.file, self.key)


def write(root: Path, pictures: list[Picture], shards_per_dataset: int) -> Pictures:
    """Write the pictures' image indexes, and read them as dedup does."""
    shards = []
    for dataset in sorted(THRESHOLDS):
        own = [picture for picture in pictures if picture.dataset == dataset]
        for number in range(shards_per_dataset):
            rows = [
                dict.fromkeys(INDEX.names)
                | {
                    "key": picture.key,
                    "width": picture.num_pixels,
                    "height": 1,
                    "num_bytes": picture.file,
                    "sha256": hashlib.sha256(
                        b"%d %d" % (picture.content, picture.file)
                    ).hexdigest(),
                    "pixels_sha256": hashlib.sha256(b"%d" % picture.content).hexdigest(),
                }
                for picture in own[number::shards_per_dataset]
            ]
            table = pa.Table.from_pylist(rows, schema=INDEX)
            url = storage.join(str(root), "images", dataset, f"{number}.parquet")
            assert storage.publish(url, storage.parquet_bytes(table, {}))
            shards.append((dataset, str(number)))
    return read_pictures(str(root), shards, THRESHOLDS)


def some_pictures(rng: np.random.Generator) -> list[Picture]:
    # Equal pixels have equal sizes.
    sizes = rng.choice([100, 200], NUM_CONTENTS)
    return [
        Picture(
            dataset=str(rng.choice(list(THRESHOLDS))),
            key=hashlib.sha256(b"%d" % i).hexdigest()[:32],
            content=(content := int(rng.integers(0, NUM_CONTENTS))),
            file=int(rng.integers(1, 3)),
            num_pixels=int(sizes[content]),
        )
        for i in range(30)
    ]


def some_cosines(rng: np.random.Generator) -> npt.NDArray[np.float32]:
    cosines = rng.choice(
        np.array([0.1, 0.8, 0.95], np.float32), (NUM_CONTENTS, NUM_CONTENTS), p=[0.8, 0.1, 0.1]
    )
    cosines = np.asarray(np.maximum(cosines, cosines.T))
    np.fill_diagonal(cosines, 1)
    return cosines


def similarity(a: Picture, b: Picture, cosines: npt.NDArray[np.float32]) -> np.float32 | None:
    """Return how alike two pictures are, or None if that does not count: the definition."""
    if a.content == b.content:
        return np.float32(1)
    cosine: np.float32 = cosines[a.content, b.content]
    return cosine if cosine >= max(THRESHOLDS[a.dataset], THRESHOLDS[b.dataset]) else None


def pairs_of(
    pictures: Pictures, by_key: dict[str, Picture], cosines: npt.NDArray[np.float32]
) -> pa.Table:
    keys = [key.decode() for key in pictures.key[pictures.to_compare()].tolist()]
    assert keys == sorted(keys)
    rows = [
        {"key_a": a, "key_b": b, "similarity": alike}
        for a in keys
        for b in keys
        if a < b and (alike := similarity(by_key[a], by_key[b], cosines)) is not None
    ]
    return pa.Table.from_pylist(rows, schema=PAIRS)


@pytest.mark.parametrize("seed", range(25))
def test_random_corpora(tmp_path: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    corpus, cosines = some_pictures(rng), some_cosines(rng)
    by_key = {picture.key: picture for picture in corpus}
    kept: list[Picture] = []
    for picture in sorted(corpus, key=lambda picture: picture.rank):
        if all(similarity(other, picture, cosines) is None for other in kept):
            kept.append(picture)
    expected = {}
    for picture in corpus:
        if picture in kept:
            continue
        # Copies under one rule go together, so it is the best of them that finds the keeper.
        same = [p for p in corpus if (p.content, p.dataset) == (picture.content, picture.dataset)]
        first = min(same, key=lambda picture: picture.rank)
        better = [other for other in kept if other.rank < first.rank]
        keepers = [first] if first in kept else better
        alike = [similarity(picture, other, cosines) for other in keepers]
        expected[picture.key] = max(cosine for cosine in alike if cosine is not None)

    shuffled = [corpus[i] for i in rng.permutation(len(corpus))]
    for number, order in enumerate([corpus, shuffled]):
        pictures = write(tmp_path / str(number), order, shards_per_dataset=1 + number)
        table = removals(pictures, pairs_of(pictures, by_key, cosines))
        rows = table.to_pylist()
        assert {row["key"]: row["similarity"] for row in rows} == expected
        places = [(row["dataset"], row["shard"], row["row"]) for row in rows]
        assert places == sorted(set(places))
        for row in rows:
            removed, keeper = by_key[row["key"]], by_key[row["duplicate_of"]]
            assert keeper in kept
            assert keeper.rank < removed.rank
            assert row["similarity"] == similarity(removed, keeper, cosines)
            is_copy = removed.content == keeper.content
            assert row["rule"] == ("exact_copy" if is_copy else "near_duplicate")


def test_a_million_copies_would_make_no_pairs(tmp_path: Path) -> None:
    copies = [Picture("loose", f"{i:032x}", 0, file=1, num_pixels=9) for i in range(1_000)]
    pictures = write(tmp_path, copies, shards_per_dataset=3)
    assert len(pictures.to_compare()) == 1
    table = removals(pictures, PAIRS.empty_table())
    assert table.num_rows == 999
    assert set(table["duplicate_of"].to_pylist()) == {f"{0:032x}"}


def test_a_dataset_of_exact_copies_only_keeps_what_is_merely_similar(tmp_path: Path) -> None:
    best = Picture("loose", "a" * 32, content=0, file=1, num_pixels=200)
    near = Picture("loose", "b" * 32, content=1, file=2, num_pixels=100)
    copy_of_near = Picture("graphics", "c" * 32, content=1, file=1, num_pixels=100)
    corpus = [best, near, copy_of_near]
    cosines = np.full((2, 2), 0.8, np.float32)
    pictures = write(tmp_path, corpus, shards_per_dataset=1)
    pairs = pairs_of(pictures, {picture.key: picture for picture in corpus}, cosines)
    rows = removals(pictures, pairs).to_pylist()
    # What its copy lost against is no copy of it.
    assert [(row["key"], row["duplicate_of"]) for row in rows] == [(near.key, best.key)]


def test_of_a_repeated_id_the_first_counts(tmp_path: Path) -> None:
    first = Picture("loose", "a" * 32, content=0, file=1, num_pixels=1)
    again = Picture("loose", "a" * 32, content=1, file=9, num_pixels=900)
    alike = Picture("loose", "b" * 32, content=1, file=1, num_pixels=900)
    pictures = write(tmp_path, [first, again, alike], shards_per_dataset=1)
    (row,) = removals(pictures, PAIRS.empty_table()).to_pylist()
    assert (row["row"], row["key"], row["duplicate_of"], row["rule"]) == (
        1, first.key, first.key, "exact_copy",
    )  # fmt: skip
