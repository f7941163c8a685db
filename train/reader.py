"""Samples out of shards: neighbours in one request, decoded one by one.

A shard is a plain tar. Its offset index, read once and kept, says where the samples are, so that a
stretch of neighbouring samples is one range of bytes.
"""

import io
import json
import math
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, ImageFile

from mixing.manifest import OFFSETS, Manifest, MixtureDataset, Shard
from pipeline import storage
from pipeline.errors import EvenmixError
from train.schedule import hash_text

_REQUESTS_AT_ONCE = 8
_INDEXES_PER_DATASET = 4  # a block of steps ends in one shard, begins in another; so does the next


class BrokenSample(Exception):
    """A member of a shard that cannot be used; its text names the shard and the sample."""


@dataclass(frozen=True)
class ShardIndex:
    """Where the samples of a shard are in its tar, in bytes, in the order of the samples."""

    keys: list[str]
    image_offset: np.ndarray
    image_bytes: np.ndarray
    json_offset: np.ndarray
    json_bytes: np.ndarray

    def starts(self) -> np.ndarray:
        """Return where each sample's members begin."""
        starts: np.ndarray = np.minimum(self.image_offset, self.json_offset)
        return starts

    def ends(self) -> np.ndarray:
        """Return where each sample's members end."""
        ends: np.ndarray = np.maximum(
            self.image_offset + self.image_bytes, self.json_offset + self.json_bytes
        )
        return ends


@dataclass(frozen=True)
class Stretch:
    """Neighbouring samples of a shard: ``data`` are the bytes from ``start`` of the tar."""

    shard: int
    index: ShardIndex
    start: int
    data: bytes

    def image(self, sample: int) -> bytes:
        """Return the picture of a sample (by its place in the shard), encoded."""
        return self._member(self.index.image_offset[sample], self.index.image_bytes[sample])

    def json(self, sample: int) -> bytes:
        """Return the JSON of a sample."""
        return self._member(self.index.json_offset[sample], self.index.json_bytes[sample])

    def _member(self, offset: int, num_bytes: int) -> bytes:
        return self.data[offset - self.start : offset - self.start + num_bytes]


class SampleReader:
    """Reads the shards of one split of some datasets; shards are numbered through all of these."""

    def __init__(
        self,
        mixture_url: str,
        manifest: Manifest,
        datasets: Sequence[MixtureDataset],
        split: Literal["train", "validation"],
    ):
        self.shards: list[Shard] = []
        self._shares: list[Mapping[str, int]] = []
        for dataset in datasets:
            shards = getattr(dataset, split).shards
            self.shards += shards
            self._shares += [_integer_shares(dataset.caption_sets)] * len(shards)
        self._mixture_url = mixture_url
        self._format = manifest.image_format.upper()
        self._resolution = manifest.resolution
        self._pool = ThreadPoolExecutor(_REQUESTS_AT_ONCE, thread_name_prefix="fetch")
        self._indexes: dict[int, Future[ShardIndex]] = {}  # the one used last is last
        self._num_indexes = _INDEXES_PER_DATASET * len(datasets)
        self._lock = threading.Lock()

    def shard_url(self, shard: int) -> str:
        """Return the URL of a shard's tar."""
        return storage.join(self._mixture_url, self.shards[shard].name)

    def fetch(self, shard: int, first: int, count: int) -> Future[Stretch]:
        """Begin to read ``count`` neighbouring samples of a shard: one request.

        The result raises an EvenmixError if the shard or its index is missing, too short, or not
        what the manifest says.
        """
        with self._lock:
            index = self._indexes.pop(shard, None) or self._pool.submit(self._read_index, shard)
            self._indexes[shard] = index
            if len(self._indexes) > self._num_indexes:
                del self._indexes[next(iter(self._indexes))]
            # The pool begins in the order of submission: who waits for an index waits for a thread
            # that is reading it.
            return self._pool.submit(self._read_stretch, index, shard, first, count)

    def close(self) -> None:
        """Give up what has not been read yet; wait for the requests that are under way."""
        self._pool.shutdown(cancel_futures=True)

    def decode(self, stretch: Stretch, sample: int, seed: str, out: np.ndarray) -> str:
        """Decode a sample's picture into ``out`` (R, R, 3) uint8; return the caption drawn for it.

        ``seed`` and the sample's key decide which of its captions that is.

        Raises:
            BrokenSample: the picture or its JSON cannot be used; ``out`` is then undefined.
        """
        key = stretch.index.keys[sample]
        try:
            record = json.loads(stretch.json(sample))
            if record["key"] != key:
                raise ValueError(f"another sample is in its place: {record['key']!r}")
            draw = hash_text(f"{seed}/{key}")
            caption = draw_caption(record["captions"], self._shares[stretch.shard], draw)
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise self._broken(stretch.shard, key, "JSON", error) from error
        try:
            self._decode_picture(stretch.image(sample), out)
        except Exception as error:
            # Pillow raises any exception on broken bytes, and nothing else runs here.
            raise self._broken(stretch.shard, key, "picture", error) from error
        return caption

    def _decode_picture(self, data: bytes, out: np.ndarray) -> None:
        ImageFile.LOAD_TRUNCATED_IMAGES = False  # another library may have set it
        with Image.open(io.BytesIO(data), formats=[self._format]) as picture:
            # Only the header has been read so far.
            if picture.size != (self._resolution, self._resolution) or picture.mode != "RGB":
                size = f"{picture.width} x {picture.height}"
                raise ValueError(f"it has {size} pixels of mode {picture.mode}")
            out[:] = np.asarray(picture)

    def _broken(self, shard: int, key: str, member: str, error: Exception) -> BrokenSample:
        reason = f"{type(error).__name__}: {error}"[:200]
        return BrokenSample(f"{self.shard_url(shard)}, the {member} of sample {key} ({reason})")

    def _read_stretch(
        self, index: Future[ShardIndex], shard: int, first: int, count: int
    ) -> Stretch:
        of_shard = index.result()
        start = int(of_shard.starts()[first])
        num_bytes = int(of_shard.ends()[first + count - 1]) - start
        data = storage.read_bytes(self.shard_url(shard), start, num_bytes)
        return Stretch(shard, of_shard, start, data)

    def _read_index(self, shard: int) -> ShardIndex:
        url = self.shard_url(shard).removesuffix(".tar") + ".parquet"
        data = storage.read_bytes(url)
        try:
            index = _parse_index(data, self.shards[shard])
        except (ValueError, OSError, pa.ArrowException) as error:
            raise EvenmixError(
                f"{url} is not the offset index of its shard: {error}; copy or mix the shard again"
            ) from error
        return index


def _parse_index(data: bytes, shard: Shard) -> ShardIndex:
    file = pq.ParquetFile(pa.BufferReader(data))
    if not file.schema_arrow.equals(OFFSETS):
        raise ValueError(f"its columns are {', '.join(file.schema_arrow.names)}")
    if file.metadata.num_rows != shard.num_samples:
        raise ValueError(
            f"it lists {file.metadata.num_rows:,} samples, the manifest {shard.num_samples:,}"
        )
    table = file.read()
    keys, *numbers = (column.to_pylist() for column in table.columns)
    if any(column.null_count for column in table.columns):
        raise ValueError("it has empty fields")
    index = ShardIndex(keys, *(np.array(column, np.int64) for column in numbers))
    # No number is above the shard's size, so that no sum of two can overflow.
    fits = all(min(column) >= 0 and max(column) <= shard.bytes for column in numbers)
    in_order = np.all(index.ends()[:-1] <= index.starts()[1:]) and index.ends()[-1] <= shard.bytes
    if not (fits and in_order):
        raise ValueError(f"its offsets do not fit a shard of {shard.bytes:,} bytes")
    return index


def _integer_shares(caption_sets: Mapping[str, str]) -> dict[str, int]:
    shares = {name: Fraction(share) for name, share in caption_sets.items()}
    denominator = math.lcm(*(share.denominator for share in shares.values()))
    return {name: int(share * denominator) for name, share in shares.items()}


def draw_caption(captions: list[dict[str, Any]], shares: Mapping[str, int], draw: int) -> str:
    """Choose one of a sample's captions: a caption set by its share, then a caption of that set.

    ``draw`` is a 56-bit hash. Sets that the sample lacks leave their share to the others.

    Raises:
        ValueError: the sample has no caption of these sets, or the one that is drawn is no text.
    """
    by_set: dict[str, list[str]] = {}
    for caption in captions:
        if shares.get(caption["caption_set"]):
            by_set.setdefault(caption["caption_set"], []).append(caption["text"])
    if not by_set:
        raise ValueError("no caption of the mixture's caption sets")
    names = sorted(by_set)
    point = draw * sum(shares[name] for name in names)  # in units of 2**-56 of a share
    for name in names:
        width = shares[name] << 56
        if point < width:
            break
        point -= width
    texts = by_set[name]
    text = texts[point * len(texts) // width]
    if not isinstance(text, str):
        raise ValueError(f"a caption is {text!r}")
    text.encode()  # JSON can have half a character (a lone surrogate), which is no Unicode
    return text
