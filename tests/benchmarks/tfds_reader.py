"""Reads exported mixtures as i1's trainers do, and compares them with the mixtures' tars.

    python tfds_reader.py ROOT MIXTURE...

It runs where TensorFlow and TFDS are (tfds.txt) and evenmix is not. i1's trainers build a dataset
from each folder, leave the pictures encoded, divide the files among the processes, decode with
TensorFlow, reshape to ``image/shape``, draw one of the captions, and mix the datasets by weight.
"""

import json
import os
import sys
import tarfile
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import tensorflow as tf
import tensorflow_datasets as tfds

tf.get_logger().setLevel("ERROR")

NUM_PROCESSES = (1, 2)
BATCH_SIZE = 8


def main(root: Path, names: list[str]) -> None:
    """Check the exports of some mixtures.

    Raises:
        AssertionError: one is not read as it was written.
    """
    for name in names:
        mixture, export = root / "mixtures" / name, root / "tfrecords" / name
        manifest = json.loads((mixture / "mixture.json").read_text())
        for dataset in manifest["datasets"]:
            builder = tfds.builder_from_directory(str(export / dataset["name"]))
            for split in ("train", "validation"):
                expected = dict(read_tars(mixture, dataset[split]["shards"]))
                assert len(expected) == dataset[split]["num_samples"]
                if expected:
                    check_split(builder, split, expected)
                else:
                    assert split not in builder.info.splits
                print(f"{name} {dataset['name']} {split}: {len(expected)} samples are equal")
        if manifest["crop"] == "square":
            check_batch(manifest, export)
            print(f"{name}: a batch of {BATCH_SIZE} is mixed by weight")


def read_tars(mixture: Path, shards: list[dict[str, Any]]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield what a reader must find of each sample, by its source id."""
    for shard in shards:
        data = (mixture / shard["name"]).read_bytes()
        with tarfile.open(mixture / shard["name"]) as tar:
            members = [data[m.offset_data : m.offset_data + m.size] for m in tar]
        for image, text in zip(members[::2], members[1::2], strict=True):
            sample = json.loads(text)
            features = {
                "image": image,
                "image/shape": [sample["height"], sample["width"], 3],
                "caption": [caption["text"] for caption in sample["captions"]],
            }
            yield sample["source_id"], features


def check_split(
    builder: tfds.core.DatasetBuilder, split: str, expected: dict[str, dict[str, Any]]
) -> None:
    """Compare a split, read by several numbers of processes, with what its tars hold."""
    assert builder.info.splits[split].num_examples == len(expected)
    for num_processes in NUM_PROCESSES if len(expected) > 1 else (1,):
        found = {}
        for part in tfds.even_splits(split, num_processes):
            for record in read(builder, part).as_numpy_iterator():
                shape = record["image/shape"].tolist()
                assert decode(record["image"], shape).shape == shape
                found[record["image_name"].decode()] = {
                    "image": record["image"],
                    "image/shape": shape,
                    "caption": [caption.decode() for caption in record["caption"]],
                }
        assert found == expected, (split, num_processes)
    # TFDS's own decoder has to know what it reads, too.
    for record in builder.as_dataset(split=split).as_numpy_iterator():
        shape = record["image/shape"].tolist()
        picture = decode(expected[record["image_name"].decode()]["image"], shape)
        assert (record["image"] == picture.numpy()).all()


def read(builder: tfds.core.DatasetBuilder, split: Any) -> tf.data.Dataset:
    """Return a split's samples with their pictures encoded, in the order of shuffled files."""
    return builder.as_dataset(
        split=split,
        shuffle_files=True,
        decoders={"image": tfds.decode.SkipDecoding()},
        read_config=tfds.ReadConfig(skip_prefetch=True, try_autocache=False, add_tfds_id=True),
    )


def decode(image: bytes | tf.Tensor, shape: list[int] | tf.Tensor) -> tf.Tensor:
    """Decode a picture; i1 takes ``decode_png``, which reads JPEG as well."""
    return tf.reshape(tf.io.decode_png(image, channels=3), tf.cast(shape, tf.int32))


def check_batch(manifest: dict[str, Any], export: Path) -> None:
    """Take one batch of all datasets, decoded and with a caption for each picture."""

    def prepare(record: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        captions = tf.reshape(record["caption"], [-1])
        drawn = tf.random.uniform([], maxval=tf.shape(captions)[0], dtype=tf.int32)
        return {
            "image": decode(record["image"], record["image/shape"]),
            "caption": captions[drawn],
        }

    datasets = []
    for dataset in manifest["datasets"]:
        builder = tfds.builder_from_directory(str(export / dataset["name"]))
        datasets.append(read(builder, "train").repeat().shuffle(100).map(prepare))
    weights = [float(Fraction(dataset["weight"])) for dataset in manifest["datasets"]]
    mixed = tf.data.Dataset.sample_from_datasets(datasets, weights, stop_on_empty_dataset=True)
    batch = next(mixed.batch(BATCH_SIZE, drop_remainder=True).as_numpy_iterator())
    edge = manifest["resolution"]
    assert batch["image"].shape == (BATCH_SIZE, edge, edge, 3)
    assert all(caption.decode() for caption in batch["caption"])


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
