"""Batches as a pure function of (manifest, seed, step), from real tars."""

import json
from collections import Counter
from fractions import Fraction
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from mixing.manifest import load_manifest
from pipeline.errors import EvenmixError
from tests.mixtures import Member, png, write_mixture
from train.data import (
    BrokenSample,
    TrainingData,
    check_mixture,
    draw_caption,
    prefetch,
    read_validation,
)

RESOLUTION = 8


def picture(number: int) -> np.ndarray:
    """A picture that tells its number."""
    return np.full((RESOLUTION, RESOLUTION, 3), number % 251, np.uint8)


def members(dataset: str, count: int, captions: int = 1) -> list[Member]:
    return [
        Member(
            f"{dataset}{number:05d}",
            png(picture(number)),
            [f"{dataset} {number} caption {caption}" for caption in range(captions)],
        )
        for number in range(count)
    ]


def training_data(url: str, seed: int = 0, batch_size: int = 30) -> TrainingData:
    return TrainingData(url, load_manifest(url), seed, batch_size)


def test_a_batch_has_the_pictures_of_its_captions(tmp_path: Path) -> None:
    url = write_mixture(tmp_path / "m", {"a": members("a", 250), "b": members("b", 7)})
    batch = training_data(url).batch(3)
    assert batch.pictures.shape == (30, RESOLUTION, RESOLUTION, 3)
    assert batch.pictures.dtype == np.uint8
    assert batch.num_replaced == 0
    for pixels, caption in zip(batch.pictures, batch.captions, strict=True):
        np.testing.assert_array_equal(pixels, picture(int(caption.split()[1])))


def test_any_step_can_be_asked_for_and_threads_change_nothing(tmp_path: Path) -> None:
    url = write_mixture(tmp_path / "m", {"a": members("a", 250, 3), "b": members("b", 7, 3)})
    expected = [training_data(url).batch(step) for step in range(6)]
    late = training_data(url).batch(5)
    assert late.captions == expected[5].captions
    data = training_data(url)
    ahead = prefetch(data.batch, 2, threads=3)
    for batch, wanted in zip(islice(ahead, 4), expected[2:], strict=True):
        assert batch.captions == wanted.captions
        np.testing.assert_array_equal(batch.pictures, wanted.pictures)
    ahead.close()


def test_an_epoch_has_every_sample_once_and_the_next_another_order(tmp_path: Path) -> None:
    url = write_mixture(tmp_path / "m", {"a": members("a", 240)}, samples_per_shard=70)
    data = training_data(url, batch_size=60)
    first, second = (
        [caption for step in steps for caption in data.batch(step).captions]
        for steps in (range(4), range(4, 8))
    )
    assert len(set(first)) == 240
    assert set(second) == set(first)
    assert first != second
    assert training_data(url, seed=1, batch_size=60).batch(0).captions != first[:60]


def test_datasets_of_any_size_get_their_weights(tmp_path: Path) -> None:
    url = write_mixture(
        tmp_path / "m",
        {"a": members("a", 250), "b": members("b", 7)},
        weights={"a": "1/3", "b": "2/3"},
    )
    data = training_data(url)
    for step in range(5):
        counts = Counter(caption.split()[0] for caption in data.batch(step).captions)
        assert counts == {"a": 10, "b": 20}


def test_all_captions_of_a_picture_are_drawn_over_the_epochs(tmp_path: Path) -> None:
    url = write_mixture(tmp_path / "m", {"a": members("a", 5, captions=4)})
    data = training_data(url, batch_size=5)
    drawn = Counter(caption for step in range(100) for caption in data.batch(step).captions)
    assert len(drawn) == 20
    assert min(drawn.values()) >= 10


def test_caption_sets_are_drawn_by_weight() -> None:
    captions = [
        {"caption_set": "long", "text": "long 0"},
        {"caption_set": "long", "text": "long 1"},
        {"caption_set": "short", "text": "short"},
        {"caption_set": "unused", "text": "unused"},
    ]
    weights = {"long": Fraction(1, 2), "short": Fraction(1, 4), "absent": Fraction(1, 4)}

    def at(share: Fraction) -> str:
        return draw_caption(captions, weights, int(share * (1 << 56)))

    assert at(Fraction(0)) == at(Fraction(32, 100)) == "long 0"
    assert at(Fraction(34, 100)) == at(Fraction(66, 100)) == "long 1"
    assert at(Fraction(67, 100)) == at(Fraction(1) - Fraction(1, 1 << 56)) == "short"
    with pytest.raises(BrokenSample):
        draw_caption(captions, {"absent": Fraction(1)}, 0)


def damage(url: str, key: str, shard: str = "a/train-00000.tar") -> None:
    """Overwrite the picture of a sample with zeros."""
    path = Path(url) / shard
    tar = path.read_bytes()
    start = tar.index(f"{key}.png".encode()) + 512
    path.write_bytes(tar[: start + 20] + bytes(40) + tar[start + 60 :])


def test_a_broken_member_is_replaced_by_the_same_other_one_and_counted(tmp_path: Path) -> None:
    url = write_mixture(tmp_path / "m", {"a": members("a", 60)})
    whole = [training_data(url).batch(step).captions for step in range(2)]
    damage(url, "a00017")
    data = training_data(url)
    batches = [data.batch(step) for step in range(2)]
    captions = [caption for batch in batches for caption in batch.captions]
    assert "a 17 caption 0" not in captions
    assert sum(batch.num_replaced for batch in batches) == 1
    changed = [
        (before, after)
        for before, after in zip(whole[0] + whole[1], captions, strict=True)
        if before != after
    ]
    assert [before for before, _ in changed] == ["a 17 caption 0"]
    again = training_data(url)
    assert [again.batch(step).captions for step in range(2)] == [b.captions for b in batches]


def test_a_shard_without_a_whole_sample_is_an_error(tmp_path: Path) -> None:
    broken = [Member("k0", b"no picture", ["x"]), Member("k1", png(picture(0)), [])]
    url = write_mixture(tmp_path / "m", {"a": broken})
    with pytest.raises(EvenmixError, match=r"a/train-00000\.tar: none of its 2 samples"):
        training_data(url).batch(0)


def test_a_picture_of_another_size_is_named(tmp_path: Path) -> None:
    wide = Member("k0", png(np.zeros((8, 9, 3), np.uint8)), ["x"])
    url = write_mixture(tmp_path / "m", {"a": [wide]})
    with pytest.raises(EvenmixError, match=r"a/train-00000\.tar, sample k0: .* 9 x 8 pixels"):
        training_data(url).batch(0)


def check(url: str, resolution: int = RESOLUTION) -> None:
    check_mixture(url, load_manifest(url), resolution)


def test_a_mixture_is_checked_before_any_work(tmp_path: Path) -> None:
    url = write_mixture(tmp_path / "m", {"a": members("a", 60)})
    check(url)
    with pytest.raises(EvenmixError, match="have 8 px, the training configuration says 16 px"):
        check(url, resolution=16)
    tar = Path(url) / "a/train-00000.tar"
    data = tar.read_bytes()
    tar.write_bytes(data[:-1])
    with pytest.raises(EvenmixError, match=r"a/train-00000\.tar has .* the manifest says"):
        check(url)
    tar.unlink()
    with pytest.raises(EvenmixError, match=r"a/train-00000\.tar or its offset index is missing"):
        check(url)


def test_an_offset_index_of_another_length_is_an_error(tmp_path: Path) -> None:
    url = write_mixture(tmp_path / "m", {"a": members("a", 60)})
    path = Path(url) / "mixture.json"
    manifest = json.loads(path.read_text())
    manifest["datasets"][0]["train"]["shards"][0]["num_samples"] = 61
    path.write_text(json.dumps(manifest))
    with pytest.raises(EvenmixError, match=r"train-00000\.parquet lists 60 samples.* 61"):
        training_data(url).batch(0)


def test_a_weight_without_samples_is_an_error(tmp_path: Path) -> None:
    url = write_mixture(tmp_path / "m", {"a": members("a", 60), "b": []})
    with pytest.raises(EvenmixError, match="dataset b has a weight but no samples"):
        check(url)


def test_held_out_samples_are_read_evenly(tmp_path: Path) -> None:
    url = write_mixture(
        tmp_path / "m",
        {"a": members("a", 10), "b": members("b", 10)},
        validation={"a": members("held", 50), "b": members("few", 3)},
    )
    held_out = read_validation(url, load_manifest(url), max_samples=16)
    assert {name: len(samples) for name, samples in held_out.items()} == {"a": 8, "b": 3}
    assert held_out["b"][2].caption == "few 2 caption 0"
    np.testing.assert_array_equal(held_out["b"][2].picture, picture(2))
