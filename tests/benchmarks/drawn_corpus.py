"""A corpus with drawn descriptors, as large as one likes, published as ingest and embed would.

The descriptors are like those of real pictures in what makes a search hard: topics of very unequal
sizes, with subtopics, so that clusters cut through what belongs together; and copies at cosines
from 0.75 to 0.99 around a fifth of the pictures. The pictures themselves are single pixels.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from dedup.records import THUMBNAIL_BYTES, embeddings_schema, to_column
from pipeline import storage
from pipeline.receipts import Counts
from pipeline.records import IMAGES, INDEX, key_of
from pipeline.stage import Output, WorkItem
from pipeline.tars import TarWriter
from tests.pictures import png
from tests.stages import run_here

Vectors = npt.NDArray[np.float32]

DATASET, DESCRIPTOR = "drawn", "drawn"
DIMENSION = 512

PICTURES_PER_TOPIC, SUBTOPICS = 1_000, 10
COPIES = 0.2
LEAST_COSINE, GREATEST_COSINE = 0.75, 0.99
_OF_TOPIC, _OF_SUBTOPIC, _OWN = 0.35, 0.35, 0.869
"""Lengths of a vector's three parts. With these, one clustering finds 0.92 of the pairs of 100,000
vectors in 400 clusters, and 0.82 of those of a million in 1,265; of 18,000 real pictures in 64 to
1,024 clusters it finds 0.89 to 0.92."""

_PICTURES_PER_SHARD = 10_000
_BLOCK = 10_000


def draw_vectors(num_pictures: int, seed: int = 0) -> Vectors:
    """Return descriptors of length 1, float32 (num_pictures, DIMENSION), in random order."""
    rng = np.random.default_rng(seed)
    num_copies = int(COPIES * num_pictures)
    num_originals = num_pictures - num_copies
    vectors = np.empty((num_pictures, DIMENSION), np.float32)

    num_topics = max(1, num_pictures // PICTURES_PER_TOPIC)
    topics = _directions(rng, num_topics)
    subtopics = _directions(rng, num_topics * SUBTOPICS)
    topic = _zipf(rng, num_topics, num_originals)
    subtopic = SUBTOPICS * topic + _zipf(rng, SUBTOPICS, num_originals)
    for start in range(0, num_originals, _BLOCK):
        rows = slice(start, min(start + _BLOCK, num_originals))
        vectors[rows] = _OF_TOPIC * topics[topic[rows]] + _OF_SUBTOPIC * subtopics[subtopic[rows]]
        vectors[rows] += _OWN * _directions(rng, rows.stop - start)
        vectors[rows] /= np.linalg.norm(vectors[rows], axis=1, keepdims=True)

    # Some originals have many copies, most have none.
    original = (num_originals * rng.random(num_copies) ** 1.5).astype(np.int64)
    cosine = rng.uniform(LEAST_COSINE, GREATEST_COSINE, (num_copies, 1)).astype(np.float32)
    for start in range(0, num_copies, _BLOCK):
        some = slice(start, min(start + _BLOCK, num_copies))
        rows = slice(num_originals + some.start, num_originals + some.stop)
        # In so many dimensions a random direction is almost perpendicular to any other.
        change = np.sqrt(1 - cosine[some] ** 2) * _directions(rng, some.stop - start)
        vectors[rows] = cosine[some] * vectors[original[some]] + change
        vectors[rows] /= np.linalg.norm(vectors[rows], axis=1, keepdims=True)
    rng.shuffle(vectors)
    return vectors


def _directions(rng: np.random.Generator, number: int) -> Vectors:
    vectors = rng.standard_normal((number, DIMENSION), np.float32)
    directions: Vectors = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    return directions


def _zipf(rng: np.random.Generator, number: int, size: int) -> npt.NDArray[np.int64]:
    """Draw numbers below ``number``, the i-th of them with a chance as 1 / i."""
    chances = 1 / np.arange(1, number + 1)
    return rng.choice(number, size, p=chances / chances.sum())


def key_of_row(row: int) -> str:
    """Return the key of the picture that a row of the vectors describes."""
    return key_of(DATASET, str(row))


def publish(root: str, vectors: Vectors, folder: Path) -> None:
    """Publish a corpus of pictures with these descriptors; ``folder`` is for temporary files."""
    path = folder / "vectors.npy"
    np.save(path, vectors.astype(np.float16))
    starts = range(0, len(vectors), _PICTURES_PER_SHARD)
    items = [
        WorkItem(
            DATASET,
            f"shard-{number:05}",
            {"rows": [start, min(start + _PICTURES_PER_SHARD, len(vectors))]},
        )
        for number, start in enumerate(starts)
    ]
    run_here(_Pictures(root), items)
    run_here(_Descriptors(root, str(path)), items)
    path.unlink()


@dataclass(frozen=True)
class _Pictures:
    """Stands for the ingest."""

    root: str
    name: str = "ingest"
    version: int = 1
    folder: str = IMAGES
    resource_hints: Mapping[str, str] = field(default_factory=dict)
    items_at_once: int = 1

    def config(self, dataset: str) -> Mapping[str, Any]:
        return {}

    def process(self, item: WorkItem) -> Output:
        tar = TarWriter()
        rows = []
        for row in range(*item.inputs["rows"]):
            key, pixel = key_of_row(row), row.to_bytes(3, "big")
            picture = png(1, 1, 8, 2, b"\0" + pixel)
            rows.append(
                {
                    "key": key,
                    "source_id": str(row),
                    "format": "PNG",
                    "width": 1,
                    "height": 1,
                    "num_bytes": len(picture),
                    "sha256": hashlib.sha256(picture).hexdigest(),
                    "pixels_sha256": hashlib.sha256(pixel).hexdigest(),
                    "offset": tar.add(f"{key}.png", picture),
                }
            )
        counts = Counts(len(rows), len(rows))
        return Output(pa.Table.from_pylist(rows, schema=INDEX), counts, tar=tar.close())


@dataclass(frozen=True)
class _Descriptors:
    """Stands for embed; ``vectors`` is the path of an array."""

    root: str
    vectors: str
    name: str = "embed"
    version: int = 1
    folder: str = f"embeddings/{DESCRIPTOR}"
    resource_hints: Mapping[str, str] = field(default_factory=dict)
    items_at_once: int = 1

    def config(self, dataset: str) -> Mapping[str, Any]:
        return {"descriptor": {"model": "drawn", "dimension": DIMENSION}}

    def process(self, item: WorkItem) -> Output:
        start, stop = item.inputs["rows"]
        vectors = np.load(self.vectors, mmap_mode="r")[start:stop]
        index_url = storage.join(self.root, IMAGES, item.dataset, f"{item.shard}.parquet")
        keys = storage.read_parquet(index_url, ["key"])["key"].combine_chunks()
        # Thumbnails of photographs, which do not compress; no rule looks at them.
        noise = np.random.default_rng(start).bytes(len(keys) * THUMBNAIL_BYTES)
        offsets = np.arange(0, len(noise), THUMBNAIL_BYTES)
        columns = [
            keys,
            to_column(vectors),
            pa.array([noise[at : at + THUMBNAIL_BYTES] for at in offsets.tolist()]),
            pa.array(np.zeros(len(keys), np.bool_)),
        ]
        schema = embeddings_schema(DIMENSION)
        table = pa.table([c.cast(f.type) for c, f in zip(columns, schema, strict=True)], schema)
        return Output(table, Counts(table.num_rows, table.num_rows))
