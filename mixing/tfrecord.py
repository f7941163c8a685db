"""TFRecord files of samples, and the metadata that make a folder of them a dataset of TFDS.

i1's trainers read each dataset with ``tfds.builder_from_directory`` (TensorFlow Datasets) and
tf.data. What they find in a sample:

    image         the encoded picture; they decode it themselves
    image/shape   height, width and 3, to which they reshape what they have decoded
    caption       all captions; they draw one at random, each as often as the others
    image_name    the source id, by which i1's captions are joined too, but for the datasets whose
                  ``join_rule`` is not their ``id_rule`` in the catalogue; they do not read it

A sample is a ``tf.train.Example``, a protocol buffer message. Serialisers do not promise equal
bytes from one version to the next, even when asked to be deterministic, and a map has no order;
messages as simple as these are encoded here, byte for byte as TensorFlow does today.
"""

import json
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import google_crc32c

_FRAME_BYTES = 16
"""What a record takes in its file besides its data."""

_NAME = "dataset"
PREFIX = f"{_NAME}-"
"""Begins the name of every file of records."""

FEATURES, DATASET_INFO = "features.json", "dataset_info.json"
"""The names of the files with TFDS's metadata."""


@dataclass(frozen=True)
class RecordFile:
    """What the metadata say of one file of records; ``num_bytes`` is its size."""

    num_samples: int
    num_bytes: int


def file_name(split: str, number: int, num_files: int) -> str:
    """Return the name that TFDS expects of a split's file; ``number`` counts from 0."""
    return f"{PREFIX}{split}.tfrecord-{number:05d}-of-{num_files:05d}"


def frame(data: bytes) -> bytes:
    """Return a record as it stands in a TFRecord file: its length and data, each with a CRC.

    Lengths and CRCs are little-endian. A CRC-32C is masked, as TensorFlow says of its record
    writer: rotated right by 15 bits, plus a constant.
    """
    length = struct.pack("<Q", len(data))
    return b"".join([length, _masked_crc(length), data, _masked_crc(data)])


def _masked_crc(data: bytes) -> bytes:
    crc = google_crc32c.value(data)
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)


def example(
    image: bytes, height: int, width: int, captions: Sequence[str], image_name: str
) -> bytes:
    """Return a sample as a serialised ``tf.train.Example``."""
    features = {
        "caption": _bytes_list(caption.encode() for caption in captions),
        "image/shape": _int64_list([height, width, 3]),
        "image_name": _bytes_list([image_name.encode()]),
        "image": _bytes_list([image]),
    }
    # Example.features.feature, a map: its entries have the field 1 for the key, 2 for the value.
    entries = [
        _field(1, _field(1, name.encode()) + _field(2, feature))
        for name, feature in features.items()
    ]
    return _field(1, b"".join(entries))


def _bytes_list(values: Iterable[bytes]) -> bytes:
    """Return a ``Feature`` whose ``bytes_list`` has these values."""
    return _field(1, b"".join(_field(1, value) for value in values))


def _int64_list(values: Iterable[int]) -> bytes:
    """Return a ``Feature`` whose ``int64_list`` has these values, none of them negative."""
    return _field(3, _field(1, b"".join(map(_varint, values))))


def _field(number: int, data: bytes) -> bytes:
    """Return a field of a protocol buffer message that has a length: bytes, text or a message."""
    return b"".join([_varint(number << 3 | 2), _varint(len(data)), data])


def _varint(number: int) -> bytes:
    """Return a number in groups of seven bits, the lowest first, all but the last one marked."""
    groups = bytearray()
    while number > 0x7F:
        groups.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*groups, number])


def features_json(image_format: str) -> bytes:
    """Return ``features.json``, by which TFDS knows how to read an example.

    ``image_format`` is ``png`` or ``jpeg``; TFDS has no other. -1 is a length that varies.
    """
    text = _feature("text_feature.Text", text={})
    return _json(
        _feature(
            "features_dict.FeaturesDict",
            featuresDict={
                "features": {
                    "caption": _feature(
                        "sequence_feature.Sequence", sequence={"feature": text, "length": "-1"}
                    ),
                    "image": _feature(
                        "image_feature.Image",
                        image={
                            "dtype": "uint8",
                            "encodingFormat": image_format,
                            "shape": {"dimensions": ["-1", "-1", "3"]},
                        },
                    ),
                    "image/shape": _feature(
                        "tensor_feature.Tensor",
                        tensor={
                            "dtype": "int64",
                            "encoding": "none",
                            "shape": {"dimensions": ["3"]},
                        },
                    ),
                    "image_name": text,
                }
            },
        )
    )


def _feature(class_name: str, **content: Any) -> dict[str, Any]:
    return {"pythonClassName": f"tensorflow_datasets.core.features.{class_name}", **content}


def dataset_info_json(
    description: str, licence: str, splits: Mapping[str, Sequence[RecordFile]]
) -> bytes:
    """Return ``dataset_info.json``, by which TFDS knows the files of each split.

    A split without files is left out. Numbers are strings, as protocol buffers have them in JSON.
    TFDS counts the bytes of examples, without their frames.
    """
    return _json(
        {
            "description": description,
            "fileFormat": "tfrecord",
            "name": _NAME,
            "redistributionInfo": {"license": licence},
            "splits": [
                {
                    "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
                    "name": name,
                    "numBytes": str(
                        sum(file.num_bytes - _FRAME_BYTES * file.num_samples for file in files)
                    ),
                    "shardLengths": [str(file.num_samples) for file in files],
                }
                for name, files in splits.items()
                if files
            ],
            "version": "1.0.0",
        }
    )


def _json(document: Mapping[str, Any]) -> bytes:
    return (json.dumps(document, ensure_ascii=False, indent=2, sort_keys=True) + "\n").encode()
