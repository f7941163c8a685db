"""Mixtures as TFRecords: the bytes that TensorFlow writes, TFDS's metadata, runs that go on.

That TensorFlow and TFDS read them as i1 does is checked in tests/benchmarks/tfds_check.py.
"""

import json
import shutil
import struct
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from mixing.export import Export, publish_metadata
from mixing.manifest import Manifest, MixtureDataset, Shard, Split
from mixing.tfrecord import RecordFile, dataset_info_json, example, features_json, frame
from pipeline import storage
from pipeline.cli import main
from pipeline.errors import EvenmixError
from pipeline.images import ImageFormat
from pipeline.publishing import publish_item
from pipeline.receipts import Counts, checksum
from pipeline.records import key_of
from pipeline.tars import TarWriter
from pipeline.verify import verify
from tests.pictures import save, smooth
from tests.stages import run_here

GOLDEN = Path(__file__).parent / "golden"
RECIPE = """
root = "{root}"
[datasets.photographs]
layout = "folder"
source = "s"
licence = "CC0 1.0"
[datasets.shapes]
layout = "folder"
source = "s"
licence = "CC0 1.0"
[captions.own]
engine = "source"
[mixture]
name = "small"
resolution = 8
captions = "own"
"""
NUM_SAMPLES = {"train": [3, 2], "validation": [1]}
WEIGHTS = {"photographs": "2/3", "shapes": "1/3"}


def sample(dataset: str, number: int) -> dict[str, Any]:
    source_id = f"{dataset}/ä {number}"
    return {
        "key": key_of(dataset, source_id),
        "source_id": source_id,
        "height": 8,
        "width": 8 + number,
        "captions": [{"text": f"Käse {number} {n}"} for n in range(1 + number % 3)],
    }


def write_mixture(root: Path, image_format: ImageFormat = "png", first: int = 0) -> Manifest:
    """Write a mixture of two datasets, each with two shards to train on and one held out.

    The samples of a dataset are numbered from ``first``. Between the two was one without samples.
    """
    datasets = []
    for dataset, weight in WEIGHTS.items():
        splits, next_number = {}, first
        for split, lengths in NUM_SAMPLES.items():
            shards = []
            for number, length in enumerate(lengths):
                shard = f"{dataset}/{split}-{2 * number:05d}.tar"
                samples = [sample(dataset, next_number + place) for place in range(length)]
                shards.append(_write_shard(root / "mixtures/small" / shard, samples, image_format))
                next_number += length
            splits[split] = Split(num_samples=sum(lengths), shards=shards)
        datasets.append(
            MixtureDataset(
                name=dataset,
                weight=weight,
                weight_before_rounding=None,
                licence="CC0 1.0",
                caption_sets={"source": "1"},
                **splits,
            )
        )
    manifest = Manifest(
        name="small",
        resolution=8,
        crop="none",
        image_format=image_format,
        seed=0,
        datasets=datasets,
    )
    (root / "mixtures/small/mixture.json").write_text(manifest.model_dump_json())
    return manifest


def _write_shard(path: Path, samples: list[dict[str, Any]], image_format: ImageFormat) -> Shard:
    tar = TarWriter()
    for each in samples:
        picture = smooth(each["height"], each["width"])
        tar.add(f"{each['key']}.{image_format}", save(picture, image_format.upper()))
        tar.add(f"{each['key']}.json", json.dumps(each).encode())
    data = tar.close()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return Shard(
        name="/".join(path.parts[-2:]),
        num_samples=len(samples),
        bytes=len(data),
        sha256=checksum([data]).sha256,
    )


def export(root: Path, manifest: Manifest) -> dict[str, bytes]:
    """Export a mixture as the command does, in this process; return all files by name."""
    stage = Export(str(root), "small")
    run_here(stage, stage.plan(manifest))
    for dataset in manifest.datasets:
        publish_metadata(stage, manifest, dataset)
    return contents(root)


def contents(root: Path) -> dict[str, bytes]:
    files = storage.list_files(str(root / "tfrecords/small"))
    return {file.name: storage.read_bytes(file.url) for file in files}


def write_recipe(root: Path) -> str:
    """Write a recipe of the mixture beside the root; return its path."""
    path = root.parent / "recipe.toml"
    path.write_text(RECIPE.format(root=root))
    return str(path)


# A reader of its own, written from the formats' descriptions.


def read_records(data: bytes) -> Iterator[bytes]:
    """Yield the records of a TFRecord file, whose CRCs must be right."""
    while data:
        length, length_crc = struct.unpack_from("<QI", data)
        record = data[12 : 12 + length]
        (record_crc,) = struct.unpack_from("<I", data, 12 + length)
        assert unmasked(length_crc) == crc32c(data[:8])
        assert unmasked(record_crc) == crc32c(record)
        yield record
        data = data[16 + length :]


def unmasked(crc: int) -> int:
    rotated = (crc - 0xA282EAD8) % 2**32
    return (rotated << 15 | rotated >> 17) % 2**32


def crc32c(data: bytes) -> int:
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def read_example(record: bytes) -> dict[str, Any]:
    """Return the features of a serialised ``tf.train.Example`` by name."""
    (features,) = read_fields(record, 1)
    found: dict[str, Any] = {}
    for entry in read_fields(features, 1):
        (name,), (feature,) = read_fields(entry, 1), read_fields(entry, 2)
        values: list[Any] = [
            value for values in read_fields(feature, 1) for value in read_fields(values, 1)
        ]
        for rest in (packed for v in read_fields(feature, 3) for packed in read_fields(v, 1)):
            while rest:
                number, rest = read_varint(rest)  # noqa: PLW2901
                values.append(number)
        found[name.decode()] = values
    return found


def read_fields(message: bytes, wanted: int) -> list[bytes]:
    """Return the fields of a message that have a number; all fields have a length."""
    found = []
    while message:
        tag, message = read_varint(message)
        length, message = read_varint(message)
        assert tag & 7 == 2
        if tag >> 3 == wanted:
            found.append(message[:length])
        message = message[length:]
    return found


def read_varint(data: bytes) -> tuple[int, bytes]:
    number = 0
    for place, byte in enumerate(data):
        number |= (byte & 0x7F) << 7 * place
        if byte < 0x80:
            return number, data[place + 1 :]
    raise AssertionError("a number without an end")


# The formats


def test_a_record_has_the_bytes_that_tensorflow_writes() -> None:
    """TFRecordWriter of TensorFlow 2.19 wrote the file, with deterministic serialisation."""
    data = example(b"\x89PNG", 2, 300, ["a cat", "ein Kätzchen"], "photo/1")
    assert frame(data) == (GOLDEN / "tensorflow.tfrecord").read_bytes()


def test_metadata_are_those_that_tfds_writes() -> None:
    """``tfds.folder_dataset.write_metadata`` of TFDS 4.9.9 wrote the files."""
    features = json.loads((GOLDEN / "tfds_features.json").read_bytes())
    assert json.loads(features_json("png")) == features
    features["featuresDict"]["features"]["image"]["image"]["encodingFormat"] = "jpeg"
    assert json.loads(features_json("jpeg")) == features
    splits = {
        "train": [RecordFile(2, 359), RecordFile(1, 178)],
        "validation": [RecordFile(1, 177)],
        "test": [],
    }
    info = json.loads((GOLDEN / "tfds_dataset_info.json").read_bytes())
    assert json.loads(dataset_info_json("D", "CC0", splits)) == info


@pytest.mark.parametrize("num_bytes", [0, 1, 127, 128, 16_383, 16_384, 100_000])
def test_pictures_of_any_size_are_read_back(num_bytes: int) -> None:
    image = bytes(range(256)) * 400
    (record,) = read_records(frame(example(image[:num_bytes], 1, 70_000, [], "")))
    assert read_example(record) == {
        "image": [image[:num_bytes]],
        "image/shape": [1, 70_000, 3],
        "caption": [],
        "image_name": [b""],
    }


# The folders


@pytest.mark.parametrize("image_format", ["png", "jpeg"])
def test_every_sample_is_in_its_place(tmp_path: Path, image_format: ImageFormat) -> None:
    files = export(tmp_path, write_mixture(tmp_path, image_format))
    for dataset in WEIGHTS:
        folder = f"{dataset}/dataset"
        numbers = iter(range(6))
        for name, length in {
            f"{folder}-train.tfrecord-00000-of-00002": 3,
            f"{folder}-train.tfrecord-00001-of-00002": 2,
            f"{folder}-validation.tfrecord-00000-of-00001": 1,
        }.items():
            samples = [sample(dataset, next(numbers)) for _ in range(length)]
            assert [read_example(record) for record in read_records(files[name])] == [
                {
                    "image": [save(smooth(each["height"], each["width"]), image_format)],
                    "image/shape": [each["height"], each["width"], 3],
                    "caption": [caption["text"].encode() for caption in each["captions"]],
                    "image_name": [each["source_id"].encode()],
                }
                for each in samples
            ]
        assert json.loads(files[f"{dataset}/features.json"]) == json.loads(
            features_json(image_format)
        )
        info = json.loads(files[f"{dataset}/dataset_info.json"])
        assert info["redistributionInfo"] == {"license": "CC0 1.0"}
        assert {s["name"]: s["shardLengths"] for s in info["splits"]} == {
            "train": ["3", "2"],
            "validation": ["1"],
        }
    assert len(files) == 2 * (3 + 3 + 3)  # records, their commits, metadata and the summary


def test_verify_knows_an_export_and_finds_what_is_damaged(tmp_path: Path) -> None:
    export(tmp_path, write_mixture(tmp_path))
    shutil.rmtree(tmp_path / "mixtures")
    counts = {f"tfrecords/small/{dataset}": Counts(6, 6) for dataset in WEIGHTS}
    assert verify(str(tmp_path), deep=False) == (counts, [])

    folder = tmp_path / "tfrecords/small/shapes"
    (folder / "dataset-train.tfrecord-00001-of-00002").write_bytes(b"cut")
    (folder / "dataset-validation.tfrecord-00000-of-00001").unlink()
    (folder / "dataset-train.tfrecord-00000-of-00009").write_bytes(b"stray")
    info = folder / "dataset_info.json"
    info.write_text(info.read_text().replace('"3"', '"4"'))
    (tmp_path / "tfrecords/small/photographs/dataset_info.json").unlink()
    _, findings = verify(str(tmp_path), deep=False)
    places = [finding.split(":")[0].split(" ")[0] for finding in findings]
    assert places == [
        f"{folder.parent}/photographs/dataset_info.json",
        f"{folder}/dataset-train.tfrecord-00001-of-00002",
        f"{folder}/dataset-validation.tfrecord-00000-of-00001",
        f"{folder}/dataset_info.json",
        f"{folder}/dataset-train.tfrecord-00000-of-00009",
    ]


# Runs that are repeated, cut off, at once


def test_runs_at_once_and_after_one_that_was_killed_end_with_equal_files(tmp_path: Path) -> None:
    manifest = write_mixture(tmp_path / "whole")
    expected = export(tmp_path / "whole", manifest)
    assert export(tmp_path / "whole", manifest) == expected

    root = tmp_path / "cut"
    write_mixture(root)
    stage = Export(str(root), "small")
    items = stage.plan(manifest)
    publish_item(stage, items[0])
    # Killed between the records and the commit, one of a mixture with other shards among them.
    folder = root / "tfrecords/small/shapes"
    folder.mkdir()
    (folder / items[3].inputs["file"]).write_bytes(b"of other settings")
    (folder / "dataset-train.tfrecord-00000-of-00009").write_bytes(b"of other settings")
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda item: publish_item(stage, item), items * 2))
    assert export(root, manifest) == expected


def test_another_mixture_of_the_name_is_refused(tmp_path: Path) -> None:
    expected = export(tmp_path, write_mixture(tmp_path))
    other = write_mixture(tmp_path, first=10)
    with pytest.raises(EvenmixError, match="was made in another way") as caught:
        export(tmp_path, other)
    assert "photographs/train-00000.parquet" in str(caught.value)
    assert contents(tmp_path) == expected


def test_other_metadata_are_refused(tmp_path: Path) -> None:
    manifest = write_mixture(tmp_path)
    export(tmp_path, manifest)
    url = tmp_path / "tfrecords/small/photographs/features.json"
    url.write_text("{}")
    with pytest.raises(EvenmixError, match=f"{url} was made in another way; remove"):
        export(tmp_path, manifest)


def test_a_damaged_shard_is_named(tmp_path: Path) -> None:
    manifest = write_mixture(tmp_path)
    tar = tmp_path / "mixtures/small/shapes/train-00002.tar"
    tar.write_bytes(tar.read_bytes()[:-1] + b"x")
    with pytest.raises(EvenmixError, match=f"{tar} is damaged: its sha256 is not that of"):
        export(tmp_path, manifest)
    tar.unlink()
    with pytest.raises(EvenmixError, match=f"{tar}"):
        export(tmp_path, manifest)


def test_webp_and_a_mixture_that_is_not_finished_are_refused_before_any_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write_recipe(tmp_path / "R")
    assert main(["tfrecords", recipe]) == 1
    assert "mixture.json does not exist; `evenmix mix` writes it" in capsys.readouterr().err
    write_mixture(tmp_path / "R", "webp")
    assert main(["tfrecords", recipe]) == 1
    assert "has WebP pictures, but TFDS knows PNG and JPEG only" in capsys.readouterr().err
    assert contents(tmp_path / "R") == {}


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    expected = export(tmp_path / "here", write_mixture(tmp_path / "here"))
    write_mixture(tmp_path / "R")
    assert main(["tfrecords", write_recipe(tmp_path / "R"), "--workers", "1"]) == 0
    printed = capsys.readouterr().err
    assert f"('{tmp_path}/R/tfrecords/small/photographs', 2/3)," in printed
    assert f"('{tmp_path}/R/tfrecords/small/shapes', 1/3)," in printed
    assert contents(tmp_path / "R") == expected
