"""What a mixture tells a trainer before it reads a sample: the manifest, and the offset index.

The manifest is written last, as ``mixture.json``; a mixture without one is not finished.
"""

from fractions import Fraction
from typing import Annotated, Literal

import pyarrow as pa
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from pipeline import storage
from pipeline.errors import EvenmixError

MANIFEST = "mixture.json"

OFFSETS = pa.schema(
    [
        ("key", pa.string()),
        ("image_offset", pa.int64()),
        ("image_bytes", pa.int64()),
        ("json_offset", pa.int64()),
        ("json_bytes", pa.int64()),
    ]
)
"""The offset index of a shard, ``<shard>.parquet``, in the order of its samples: where a sample's
two members have their data in the tar, in bytes."""


MAX_COMMON_DENOMINATOR = 65_536
"""A trainer tabulates one period of the weights, whose length is their common denominator."""


def _exact_fraction(text: str) -> str:
    try:
        is_share = str(Fraction(text)) == text and 0 <= Fraction(text) <= 1
    except ZeroDivisionError:
        is_share = False
    if not is_share:
        raise ValueError(f"{text!r} is not a share, a fraction in lowest terms such as 1/11")
    return text


ExactFraction = Annotated[str, AfterValidator(_exact_fraction)]


class Shard(BaseModel):
    """One tar of samples; its offset index is the Parquet file of the same name."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    num_samples: Annotated[int, Field(ge=1)]
    bytes: Annotated[int, Field(ge=1)]
    sha256: str


class Split(BaseModel):
    """The shards of one part (train or validation) of one dataset."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    num_samples: int
    shards: list[Shard]

    @model_validator(mode="after")
    def _adds_up(self) -> "Split":
        total = sum(shard.num_samples for shard in self.shards)
        if total != self.num_samples:
            raise ValueError(f"num_samples is {self.num_samples}, its shards have {total}")
        return self


class MixtureDataset(BaseModel):
    """One dataset of the mixture and the share of the trainer's samples that it gets.

    ``weight`` is what a trainer keeps exactly. ``weight_before_rounding`` is the share that was
    asked for, where the datasets' sizes gave one whose denominator was too large. ``caption_sets``
    have their shares of the captions that are drawn.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    weight: ExactFraction
    weight_before_rounding: ExactFraction | None
    licence: str
    caption_sets: dict[str, ExactFraction]
    train: Split
    validation: Split


class Manifest(BaseModel):
    """``mixture.json``: weights are exact fractions that sum to one.

    With ``crop`` ``square`` pictures are ``resolution`` x ``resolution`` pixels, with ``none`` the
    shorter edge of each has ``resolution`` pixels.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    version: Literal[2] = 2
    name: str
    resolution: int
    crop: Literal["square", "none"]
    image_format: Literal["png", "jpeg", "webp"]
    seed: int
    datasets: list[MixtureDataset]


def load_manifest(mixture_url: str) -> Manifest:
    """Read the manifest of the mixture in a folder.

    Raises:
        EvenmixError: there is no manifest, or it does not follow the schema.
    """
    url = storage.join(mixture_url, MANIFEST)
    if not storage.exists(url):
        raise EvenmixError(f"{url} does not exist; `evenmix mix` writes it when a mixture is done")
    try:
        manifest = Manifest.model_validate_json(storage.read_bytes(url))
    except ValidationError as error:
        first, *others = error.errors()
        place = ".".join(str(part) for part in first["loc"]) or "(the whole file)"
        raise EvenmixError(
            f"{url} is no manifest of a mixture: {place}: {first['msg']}"
            + (f", and {len(others)} more mistakes" if others else "")
            + "; copy or mix it again"
        ) from error
    total = sum(Fraction(dataset.weight) for dataset in manifest.datasets)
    if total != 1:
        raise EvenmixError(f"{url}: the weights of its datasets sum to {total}, not to 1")
    return manifest
