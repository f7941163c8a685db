"""Batches as a pure function of (manifest, seed, step), from real tars."""

import json
import shutil
import struct
import threading
import time
import zlib
from collections import Counter
from collections.abc import Callable
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor, wait
from fractions import Fraction
from itertools import islice, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow.parquet as pq
import pytest

import train.data
from mixing.manifest import Manifest, MixtureDataset, Shard, Split, load_manifest
from pipeline import storage
from pipeline.errors import EvenmixError
from tests.mixtures import Member, png, write_mixture
from train.data import Batch, TrainingData, block_steps, check_mixture, prefetch, read_validation
from train.reader import SampleReader, Stretch, draw_caption

if TYPE_CHECKING:
    from tests.gcs import Proxy

RESOLUTION = 8
BATCH_SIZE = 24


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


def training_data(
    url: str, seed: int = 0, batch_size: int = BATCH_SIZE, process: int = 0, of: int = 1
) -> TrainingData:
    return TrainingData(
        url, load_manifest(url), seed, batch_size, process_index=process, num_processes=of
    )


def damage(url: str, key: str, shard: str = "a/train-00000.tar") -> None:
    """Overwrite the picture of a sample with zeros."""
    path = Path(url) / shard
    tar = path.read_bytes()
    start = tar.index(f"{key}.png".encode()) + 512
    path.write_bytes(tar[: start + 20] + bytes(40) + tar[start + 60 :])


def assert_equal(found: Batch, expected: Batch) -> None:
    np.testing.assert_array_equal(found.pictures, expected.pictures)
    assert found.captions == expected.captions
    assert found.num_replaced == expected.num_replaced


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Three equal datasets of very different sizes: b is through within every batch."""
    datasets = {"a": members("a", 250, 3), "b": members("b", 7, 3), "c": members("c", 90, 3)}
    return write_mixture(tmp_path_factory.mktemp("whole"), datasets, samples_per_shard=70)


@pytest.fixture(scope="module")
def broken(whole: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The same with broken members: one alone, two in a row, one in the smallest dataset."""
    url = str(tmp_path_factory.mktemp("copy") / "broken")
    shutil.copytree(whole, url)
    for key in ("a00017", "a00040", "a00041"):
        damage(url, key)
    damage(url, "b00003", "b/train-00000.tar")
    path = Path(url) / "c/train-00001.tar"
    path.write_bytes(path.read_bytes().replace(b'{"key": "c00071"', b'["key": "c00071"'))
    return url


@pytest.fixture(params=["whole", "broken"])
def mixture(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Read in blocks of five steps."""
    monkeypatch.setattr(train.data, "MAX_BLOCK_STEPS", 5)
    return str(request.getfixturevalue(request.param))


# Blocks end at 5, 10 and 15, epochs of b in every batch, of c at 11.25 and of a at 31.25 batches.
STEPS = range(34)


@pytest.fixture
def expected(mixture: str) -> list[Batch]:
    data = training_data(mixture)
    batches = [data.batch(step) for step in STEPS]
    assert (sum(batch.num_replaced for batch in batches) > 0) == ("broken" in mixture)
    return batches


def test_a_batch_has_the_pictures_of_its_captions(whole: str) -> None:
    batch = training_data(whole).batch(3)
    assert batch.pictures.shape == (BATCH_SIZE, RESOLUTION, RESOLUTION, 3)
    assert batch.pictures.dtype == np.uint8
    assert batch.num_replaced == 0
    for pixels, caption in zip(batch.pictures, batch.captions, strict=True):
        np.testing.assert_array_equal(pixels, picture(int(caption.split()[1])))


def test_a_killed_run_goes_on_with_the_same_batches(mixture: str, expected: list[Batch]) -> None:
    for step in reversed(STEPS):
        assert_equal(training_data(mixture).batch(step), expected[step])


def test_any_order_of_asking_gives_the_same_batches(mixture: str, expected: list[Batch]) -> None:
    data = training_data(mixture)
    for step in np.random.default_rng(0).permutation([*STEPS, *STEPS]).tolist():
        assert_equal(data.batch(step), expected[step])


def test_threads_change_nothing(mixture: str, expected: list[Batch]) -> None:
    ahead = prefetch(training_data(mixture).batch, 2, threads=3)
    for batch, wanted in zip(islice(ahead, len(STEPS) - 2), expected[2:], strict=True):
        assert_equal(batch, wanted)
    ahead.close()


@pytest.mark.parametrize("num_processes", [2, 3, 4, 8])
def test_processes_together_have_the_batch_of_one(
    mixture: str, expected: list[Batch], num_processes: int
) -> None:
    processes = [training_data(mixture, process=p, of=num_processes) for p in range(num_processes)]
    for step in STEPS:
        parts = [data.batch(step) for data in processes]
        assert {len(part.captions) for part in parts} == {BATCH_SIZE // num_processes}
        together = Batch(
            np.concatenate([part.pictures for part in parts]),
            [caption for part in parts for caption in part.captions],
            sum(part.num_replaced for part in parts),
        )
        assert_equal(together, expected[step])


def test_every_row_keeps_to_the_shares(whole: str) -> None:
    data = training_data(whole)
    counts = Counter[str]()
    for step in range(5):
        for row, caption in enumerate(data.batch(step).captions):
            counts[caption.split()[0]] += 1
            draws = step * BATCH_SIZE + row + 1
            assert all(abs(counts[name] - Fraction(draws, 3)) < 1 for name in "abc")


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


def test_all_captions_of_a_picture_are_drawn_alike(tmp_path: Path) -> None:
    url = write_mixture(tmp_path / "m", {"a": members("a", 5, captions=4)})
    data = training_data(url, batch_size=50)
    drawn = Counter(caption for step in range(60) for caption in data.batch(step).captions)
    assert len(drawn) == 20
    # 600 epochs; four standard deviations of a binomial of 1/4 are 42.
    assert all(abs(count - 150) < 42 for count in drawn.values())


def test_caption_sets_are_drawn_by_share() -> None:
    captions = [
        {"caption_set": "long", "text": "long 0"},
        {"caption_set": "long", "text": "long 1"},
        {"caption_set": "short", "text": "short"},
        {"caption_set": "unused", "text": "unused"},
    ]
    shares = {"long": 2, "short": 1, "absent": 1}

    def at(share: Fraction) -> str:
        return draw_caption(captions, shares, int(share * (1 << 56)))

    assert at(Fraction(0)) == at(Fraction(32, 100)) == "long 0"
    assert at(Fraction(34, 100)) == at(Fraction(66, 100)) == "long 1"
    assert at(Fraction(67, 100)) == at(Fraction(1) - Fraction(1, 1 << 56)) == "short"
    with pytest.raises(ValueError, match="no caption"):
        draw_caption(captions, {"absent": 1}, 0)


class Reads:
    """What is read of a store while a test runs: (URL, offset, bytes) each."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.done: list[tuple[str, int, int]] = []
        self._begun: list[Future[Stretch]] = []
        read_bytes, fetch = storage.read_bytes, SampleReader.fetch

        def count(url: str, offset: int = 0, length: int | None = None) -> bytes:
            data = read_bytes(url, offset, length)
            self.done.append((url, offset, len(data)))
            return data

        def note(*arguments: Any) -> Future[Stretch]:
            self._begun.append(fetch(*arguments))
            return self._begun[-1]

        monkeypatch.setattr(storage, "read_bytes", count)
        monkeypatch.setattr(SampleReader, "fetch", note)

    def take(self) -> list[tuple[str, int, int]]:
        """Return all that was begun so far, and begin anew."""
        wait(self._begun)
        done, self.done = sorted(self.done), []
        return done


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Reads:
    return Reads(monkeypatch)


@pytest.fixture(scope="module")
def noisy(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Two datasets whose epochs end together, after 40 batches, with pictures of 8 kB."""
    rng = np.random.default_rng(0)

    def noise(dataset: str, count: int) -> list[Member]:
        pictures = [rng.integers(0, 256, (52, 52, 3), np.uint8) for _ in range(count)]
        return [
            Member(f"{dataset}{number:031d}", png(pixels), ["caption"])
            for number, pixels in enumerate(pictures)
        ]

    return write_mixture(
        tmp_path_factory.mktemp("noisy"),
        {"a": noise("a", 640), "b": noise("b", 320)},
        weights={"a": "2/3", "b": "1/3"},
        resolution=52,
        samples_per_shard=160,
    )


@pytest.mark.parametrize("num_processes", [1, 4])
def test_an_epoch_keeps_the_budget_of_requests_and_bytes(
    noisy: str, num_processes: int, monkeypatch: pytest.MonkeyPatch, reads: Reads
) -> None:
    monkeypatch.setattr(train.data, "BLOCK_BYTES", 1 << 20)
    manifest = load_manifest(noisy)
    block = block_steps(manifest, BATCH_SIZE)
    assert block == 4
    epoch = 40
    processes = [training_data(noisy, process=p, of=num_processes) for p in range(num_processes)]
    reads.take()
    for step in range(epoch):
        for data in processes:
            data.batch(step)
    done = reads.take()

    steps_read = epoch + block  # the next block is there already
    shards = BATCH_SIZE * (Fraction(2, 3) * Fraction(4, 640) + Fraction(1, 3) * Fraction(2, 320))
    a_batch = Fraction(BATCH_SIZE, 64) + 2 * 2 * Fraction(num_processes, block) + 3 * shards
    assert len(done) <= steps_read * a_batch
    shard_bytes = sum(
        shard.bytes for dataset in manifest.datasets for shard in dataset.train.shards
    )
    bytes_read = sum(num_bytes for _, _, num_bytes in done)
    assert shard_bytes * 0.95 < bytes_read <= 1.05 * shard_bytes * steps_read / epoch
    # Within an epoch, no byte is read twice.
    for data in processes:
        data.batch(10 * epoch)
    reads.take()
    for step in range(10 * epoch, 10 * epoch + epoch // 2):
        for data in processes:
            data.batch(step)
    tars = [read for read in reads.take() if read[0].endswith(".tar")]
    assert tars
    for (url, offset, num_bytes), (next_url, next_offset, _) in pairwise(tars):
        assert url != next_url or offset + num_bytes <= next_offset


def test_epochs_shorter_than_a_block_keep_the_budget_of_requests(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Epochs are 62.5 steps and a block 64: a process has two stretches of each dataset."""
    requests = []

    def refuse(*stretch: Any) -> Future[Stretch]:
        requests.append(stretch)
        nothing = Future[Stretch]()
        nothing.set_exception(EvenmixError("there is nothing"))
        return nothing

    monkeypatch.setattr(SampleReader, "fetch", refuse)
    processes, batch_size, block, num_blocks = 16, 32, 64, 20
    manifest = many_shards(2, 1)
    assert block_steps(manifest, batch_size) == block
    for process in range(processes):
        data = TrainingData(
            "nowhere", manifest, 0, batch_size, process_index=process, num_processes=processes
        )
        for number in range(num_blocks - 1):  # and the one after it
            with pytest.raises(EvenmixError, match="there is nothing"):
                data.batch(number * block)
    samples = num_blocks * block * batch_size
    runs = Fraction(samples, 64) + 2 * Fraction(samples, 1000)
    assert len(requests) <= runs + processes * (2 + 2) * num_blocks


def test_threads_that_ask_at_once_read_once(whole: str, reads: Reads) -> None:
    alone, asked = training_data(whole), training_data(whole)
    reads.take()
    alone.batch(0)
    expected = reads.take()
    start = threading.Barrier(8)

    def ask(step: int) -> Batch:
        start.wait()
        return asked.batch(step)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(ask, range(8)))
    assert reads.take() == expected


def test_threads_that_overtake_each_other_read_nothing_twice(
    whole: str, monkeypatch: pytest.MonkeyPatch, reads: Reads
) -> None:
    monkeypatch.setattr(train.data, "MAX_BLOCK_STEPS", 1)
    done = []
    for steps in ([0, 1, 2, 3, 4, 5], [0, 5, 4, 3, 2, 1]):
        data = TrainingData(whole, load_manifest(whole), 0, BATCH_SIZE, threads=4)
        for step in steps:
            data.batch(step)
        done.append([read for read in reads.take() if read[0].endswith(".tar")])
    assert done[0] == done[1]


def test_what_is_not_read_yet_is_given_up_on_closing(
    whole: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = load_manifest(whole)
    reader = SampleReader(whole, manifest, manifest.datasets, "train")
    read_bytes, answer = storage.read_bytes, threading.Event()

    def answer_late(*arguments: Any) -> bytes:
        answer.wait(timeout=10)
        return read_bytes(*arguments)

    monkeypatch.setattr(storage, "read_bytes", answer_late)
    ahead = [reader.fetch(0, sample, 1) for sample in range(60)]
    with ThreadPoolExecutor(1) as pool:
        closed = pool.submit(reader.close)
        with pytest.raises(CancelledError):
            ahead[-1].result()
        answer.set()
        closed.result()
    assert sum(not stretch.cancelled() for stretch in ahead) < 8


def test_batches_from_gs_are_those_of_the_disk_with_one_request_a_read(
    whole: str,
    gcs_server: "Proxy",
    gcs_bucket: str,
    monkeypatch: pytest.MonkeyPatch,
    reads: Reads,
) -> None:
    monkeypatch.setattr(train.data, "MAX_BLOCK_STEPS", 2)
    for file in storage.list_files(whole):
        storage.publish(storage.join(gcs_bucket, file.name), Path(file.url).read_bytes())
    expected = [training_data(whole).batch(step) for step in range(3)]
    check(gcs_bucket)
    data = training_data(gcs_bucket)
    reads.take()
    requests: list[str] = []
    forward = gcs_server.forward

    def count(method: str, path: str, *arguments: Any) -> Any:
        if "alt=media" in path:  # asks for content, not for what the store knows of it
            requests.append(path)
        return forward(method, path, *arguments)

    monkeypatch.setattr(gcs_server, "forward", count)
    for step in range(3):
        assert_equal(data.batch(step), expected[step])
    done = reads.take()
    assert len(requests) == len(done) > 0


def many_shards(num_datasets: int, shards_each: int) -> Manifest:
    """The manifest of a mixture that is nowhere."""
    datasets = []
    for j in range(num_datasets):
        shards = [
            Shard(name=f"d{j}/train-{i:05d}.tar", num_samples=1000, bytes=10**8, sha256="0" * 64)
            for i in range(shards_each)
        ]
        datasets.append(
            MixtureDataset(
                name=f"d{j}",
                weight=f"1/{num_datasets}",
                weight_before_rounding=None,
                licence="CC0 1.0",
                caption_sets={"source": "1"},
                train=Split(num_samples=1000 * shards_each, shards=shards),
                validation=Split(num_samples=0, shards=[]),
            )
        )
    return Manifest(
        name="m", resolution=256, crop="square", image_format="png", seed=0, datasets=datasets
    )


def test_a_late_step_of_a_large_mixture_is_reached_at_once(tmp_path: Path) -> None:
    """Up to its first request, which finds no file."""
    (tmp_path / "mixture.json").write_text(many_shards(11, 1000).model_dump_json())
    started = time.monotonic()
    with pytest.raises(EvenmixError, match=r"d\d+/train-\d{5}\.parquet does not exist"):
        training_data(str(tmp_path), batch_size=1024).batch(1_000_000)
    assert time.monotonic() - started < 30


def test_a_block_has_about_as_many_bytes_as_allowed(whole: str) -> None:
    manifest = many_shards(11, 10)  # 100,000 bytes a sample
    assert block_steps(manifest, 256) == 10
    assert block_steps(manifest, 1024) == 2
    assert block_steps(manifest, 4096) == 1
    assert block_steps(load_manifest(whole), BATCH_SIZE) == 64


def test_a_broken_member_is_replaced_by_the_next_one_and_counted(tmp_path: Path) -> None:
    url = write_mixture(tmp_path / "m", {"a": members("a", 60)})
    before = training_data(url, batch_size=60).batch(0)
    damage(url, "a00017")
    after = training_data(url, batch_size=60).batch(0)
    assert (before.num_replaced, after.num_replaced) == (0, 1)
    changed = [
        (one, other) for one, other in zip(before.captions, after.captions, strict=True)
        if one != other
    ]  # fmt: skip
    # 60 samples are one run or two, in file order.
    assert changed == [("a 17 caption 0", "a 18 caption 0")]


def no_captions(tar: bytes) -> bytes:
    return tar.replace(b'"captions"', b'"captured"')


def other_key(tar: bytes) -> bytes:
    return tar.replace(b'{"key": "a', b'{"key": "b')


def deep_json(tar: bytes) -> bytes:
    start = tar.index(b'{"key"')
    return tar[:start] + b"[" * 90 + tar[start + 90 :]


def number_for_text(tar: bytes) -> bytes:
    return tar.replace(b'"a 0 caption 0"', b"1234567890.1234")


def half_a_character(tar: bytes) -> bytes:
    return tar.replace(b'"a 0 caption 0"', b'"\\ud83d captio"')


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (no_captions, "KeyError: 'captions'"),
        (other_key, "another sample is in its place: 'b00000'"),
        (deep_json, "JSONDecodeError"),
        (number_for_text, "a caption is 1234567890.1234"),
        (half_a_character, "surrogates not allowed"),
    ],
)
def test_json_that_cannot_be_used_is_a_broken_member(
    tmp_path: Path, change: Callable[[bytes], bytes], told: str
) -> None:
    url = write_mixture(tmp_path / "m", {"a": members("a", 1)})
    path = Path(url) / "a/train-00000.tar"
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(EvenmixError, match=rf"tar, the JSON of sample a00000 \(.*{told}"):
        training_data(url).batch(0)


def bomb() -> bytes:
    """A PNG whose header says 30,000 x 30,000 pixels."""
    small = png(picture(0))
    header = small[12:16] + struct.pack(">II", 30_000, 30_000) + small[24:29]
    return small[:12] + header + struct.pack(">I", zlib.crc32(header)) + small[33:]


@pytest.mark.parametrize(
    ("odd", "told"),
    [
        (png(np.zeros((8, 9, 3), np.uint8)), "9 x 8 pixels of mode RGB"),
        (png(np.zeros((8, 8), np.uint8)), "8 x 8 pixels of mode L"),
        (png(np.zeros((8, 8), np.uint16)), "8 x 8 pixels of mode I;16"),
        (png(np.zeros((8, 8, 4), np.uint8)), "8 x 8 pixels of mode RGBA"),
        (bomb(), "DecompressionBombError"),
        (png(picture(0))[:-26], "OSError: image file is truncated"),
    ],
    ids=["wide", "grey", "16 bits", "transparent", "bomb", "cut"],
)
def test_a_picture_that_mix_would_not_write_is_a_broken_member(
    tmp_path: Path, odd: bytes, told: str
) -> None:
    url = write_mixture(tmp_path / "m", {"a": [Member("k0", odd, ["odd"])]})
    with pytest.raises(EvenmixError, match=rf"tar, the picture of sample k0 \(.*{told}"):
        training_data(url).batch(0)


def test_a_shard_without_a_whole_sample_is_an_error(tmp_path: Path) -> None:
    broken = [Member("k0", b"no picture", ["x"]), Member("k1", png(picture(0)), [])]
    url = write_mixture(tmp_path / "m", {"a": broken})
    with pytest.raises(
        EvenmixError,
        match=r"a/train-00000\.tar, the .* cannot be used, nor can the 1 samples after it",
    ):
        training_data(url).batch(0)


def test_too_many_broken_members_stop_the_run(tmp_path: Path) -> None:
    some = members("a", 50)
    some[20] = Member("a00020", b"no picture", ["x"])
    url = write_mixture(tmp_path / "m", {"a": some})
    data = training_data(url, batch_size=50)
    assert [data.batch(step).num_replaced for step in range(100)] == [1] * 100
    with pytest.raises(
        EvenmixError,
        match=r"101 of the last 10,000 samples .*a/train-00000\.tar, the picture of sample a00020",
    ):
        data.batch(100)


def check(url: str, resolution: int = RESOLUTION) -> None:
    check_mixture(url, load_manifest(url), resolution)


def change_manifest(url: str, change: Callable[[dict[str, Any]], Any]) -> None:
    path = Path(url) / "mixture.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))


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
    change_manifest(url, lambda manifest: manifest.update(crop="none"))
    with pytest.raises(EvenmixError, match="its pictures keep their aspect"):
        check(url)


def test_a_shard_that_goes_or_shrinks_later_is_named(tmp_path: Path) -> None:
    url = write_mixture(tmp_path / "m", {"a": members("a", 60)})
    tar = Path(url) / "a/train-00000.tar"
    data = tar.read_bytes()
    tar.write_bytes(data[: len(data) // 2])
    with pytest.raises(EvenmixError, match=r"a/train-00000\.tar is shorter than expected"):
        training_data(url).batch(0)
    tar.unlink()
    with pytest.raises(EvenmixError, match=r"a/train-00000\.tar does not exist"):
        training_data(url).batch(0)


def test_an_offset_index_that_disagrees_is_named(tmp_path: Path) -> None:
    url = write_mixture(tmp_path / "m", {"a": members("a", 60)})
    path = Path(url) / "a/train-00000.parquet"
    index = pq.read_table(path)

    def errors() -> str:
        with pytest.raises(EvenmixError, match=r"a/train-00000\.parquet is not the offset") as told:
            training_data(url).batch(0)
        return str(told.value)

    for table, said in [
        (index.drop_columns(["json_bytes"]), "its columns are key, image_offset"),
        (index.slice(0, 59), "lists 59 samples, the manifest 60"),
        (index.take([*range(1, 60), 0]), "do not fit a shard of"),
        (index.set_column(2, "image_bytes", [[1 << 62] * 60]), "do not fit a shard of"),
        (index.set_column(1, "image_offset", [[-1] * 60]), "do not fit a shard of"),
        (index.set_column(1, "image_offset", [[None] * 60]).cast(index.schema), "empty fields"),
    ]:
        pq.write_table(table, path)
        assert said in errors()
    path.write_bytes(b"PAR1 nothing PAR1")
    assert "copy or mix the shard again" in errors()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m["datasets"][0].update(weight="-1"), r"datasets\.0\.weight: .*'-1' is not a"),
        (lambda m: m["datasets"][0].update(weight="2/4"), r"'2/4' is not a share"),
        (lambda m: m.update(version=1), r"version: Input should be 2"),
        (lambda m: m["datasets"][0]["train"].update(num_samples=7), "its shards have 60"),
        (lambda m: m.clear(), r"name: Field required, and \d more mistakes"),
    ],
)
def test_a_bad_manifest_is_one_clear_error(
    tmp_path: Path, change: Callable[[dict[str, Any]], Any], message: str
) -> None:
    url = write_mixture(tmp_path / "m", {"a": members("a", 60)})
    change_manifest(url, change)
    with pytest.raises(EvenmixError, match=message):
        load_manifest(url)


def test_a_manifest_that_cannot_be_trained_from_is_an_error(tmp_path: Path) -> None:
    url = write_mixture(tmp_path / "m", {"a": members("a", 60), "b": []})
    with pytest.raises(EvenmixError, match="dataset b has a weight but no samples"):
        training_data(url)
    with pytest.raises(EvenmixError, match="24 samples cannot be divided evenly among 5 processes"):
        training_data(url, of=5)
    other = write_mixture(
        tmp_path / "n",
        {"a": members("a", 1), "b": members("b", 1)},
        weights={"a": "1/65537", "b": "65536/65537"},
    )
    with pytest.raises(EvenmixError, match="common denominator 65,537 is above"):
        training_data(other)


def test_held_out_samples_are_read_evenly(tmp_path: Path) -> None:
    url = write_mixture(
        tmp_path / "m",
        {"a": members("a", 10), "b": members("b", 10)},
        validation={"a": members("held", 50), "b": members("few", 3)},
    )
    damage(url, "held00002", "a/validation-00000.tar")
    held_out = read_validation(url, load_manifest(url), max_samples=16)
    assert {name: len(samples) for name, samples in held_out.items()} == {"a": 7, "b": 3}
    assert held_out["b"][2].caption == "few 2 caption 0"
    np.testing.assert_array_equal(held_out["b"][2].picture, picture(2))
