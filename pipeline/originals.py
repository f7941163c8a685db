"""Reading pictures back from R/images, as the stages after ingest do."""

import hashlib
from collections.abc import Mapping
from typing import Any

from pipeline import images, storage
from pipeline.errors import EvenmixError
from pipeline.images import Limits, Pixels
from pipeline.reasons import PictureError

COLUMNS = ["key", "width", "height", "num_bytes", "sha256", "offset"]
"""The columns of the image index that the functions here need."""


class DamagedPictureError(EvenmixError):
    """The bytes of a picture in the corpus are not those that were ingested."""


def read_original(tar_url: str, row: Mapping[str, Any]) -> Pixels:
    """Read and decode the picture of an index row: uint8 RGB of shape (height, width, 3).

    Raises:
        DamagedPictureError: the tar does not hold what its index says.
        EvenmixError: the tar cannot be read.
    """
    data = storage.read_bytes(tar_url, row["offset"], row["num_bytes"])
    return decode_original(tar_url, row, data)


def decode_original(
    tar_url: str, row: Mapping[str, Any], data: bytes, short_edge_px: int | None = None
) -> Pixels:
    """Decode the bytes of an index row's picture, which were read from ``tar_url``.

    ``short_edge_px`` is as in :func:`pipeline.images.decode`.

    Raises:
        DamagedPictureError: they are not the bytes that were ingested.
    """
    # What was ingested was within that run's limits; these admit it and nothing larger.
    limits = Limits(1, max_pixels=row["width"] * row["height"], max_bytes=row["num_bytes"])
    try:
        if hashlib.sha256(data).hexdigest() == row["sha256"]:
            return images.decode(data, limits, short_edge_px)
        problem = "other bytes than its index says"
    except PictureError as error:
        problem = str(error)
    raise DamagedPictureError(
        f"{tar_url}, picture {row['key']}: {problem}. The shard is damaged (`evenmix verify` lists "
        "all that are): remove its dataset's folder and run `evenmix ingest` again"
    )
