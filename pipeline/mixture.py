"""``[mixture]`` of a recipe: which pictures of the corpus, with which captions, in which shares."""

import re
from fractions import Fraction
from typing import Annotated, Literal

from pydantic import AfterValidator, Discriminator, Field, FiniteFloat, Tag, model_validator

from pipeline.config_file import Name, Section
from pipeline.images import ImageFormat, Resample
from pipeline.records import ATTRIBUTES, IMAGES

Outcome = Literal["ok", "truncated", "repeating", "wrong_script"]
"""The outcomes of captions that have a text which a mixture might want."""

Datasets = Annotated[list[Name], Field(min_length=1)]


class Filter(Section):
    """What a picture must have to be taken.

    ``column`` is one of the index (``width``), or one of an attribute table: ``quality.score`` is
    the column ``score`` of ``R/attributes/quality``. A picture without a value is not taken.
    ``datasets`` are those that the filter is for; all if absent.
    """

    column: str
    at_least: FiniteFloat | None = None
    at_most: FiniteFloat | None = None
    one_of: Annotated[list[str | int | bool], Field(min_length=1)] | None = None
    datasets: Datasets | None = None

    @model_validator(mode="after")
    def _asks_for_something(self) -> "Filter":
        if self.at_least is None and self.at_most is None and self.one_of is None:
            raise ValueError("needs at_least, at_most or one_of")
        return self

    @property
    def folder(self) -> str:
        """The folder below R whose tables have the column."""
        table = self.column.rpartition(".")[0]
        return f"{ATTRIBUTES}/{table}" if table else IMAGES

    @property
    def column_name(self) -> str:
        """The column as its table names it."""
        return self.column.rpartition(".")[2]

    def __str__(self) -> str:
        bounds = [
            f"{sign} {bound:,.15g}"
            for sign, bound in ((">=", self.at_least), ("<=", self.at_most))
            if bound is not None
        ]
        if self.one_of is not None:
            bounds.append(f"in {', '.join(map(str, self.one_of))}")
        return f"{self.column} {' and '.join(bounds)}"


CAP = re.compile(r"cap:([1-9]\d*(?:_\d+)*)")


def _weighting(text: str) -> str:
    if text not in ("equal", "size") and not CAP.fullmatch(text):
        raise ValueError(f"{text!r} is none of 'equal', 'size', 'cap:1_000_000' or a table")
    return text


def _kind(value: object) -> str:
    """Tell which of the two it is, so that an error speaks of that alone."""
    return "shares" if isinstance(value, dict) else "name"


Weighting = Annotated[str, AfterValidator(_weighting)]
Share = Annotated[FiniteFloat, Field(gt=0)]
Shares = Annotated[dict[Name, Share], Field(min_length=1), Tag("shares")]
Weights = Annotated[Annotated[Weighting, Tag("name")] | Shares, Discriminator(_kind)]
CaptionSets = Annotated[Annotated[Name, Tag("name")] | Shares, Discriminator(_kind)]


class Mixture(Section):
    """What is cut from the corpus.

    ``preset`` is one of i1's mixtures (:mod:`pipeline.presets`), which the keys beside it change.
    ``datasets`` are those that take part, all of the recipe if absent, but for those ``without``.
    ``weights`` are the datasets' shares of a trainer's samples: ``equal``; by ``size``, the number
    of pictures that are taken; ``cap:T``, by size up to T; or a share for each dataset (they need
    not sum to one). ``images_per_dataset`` takes that many by hash, all if absent;
    ``validation_fraction`` is held out by hash.

    ``captions`` is a caption set, or several with their shares: of a picture that has captions of
    all, so often one of each is drawn. ``captions_of`` says otherwise for single datasets. Of each
    set the first ``captions_per_image`` with an outcome of ``outcomes`` are kept, all if absent; a
    picture without any is not taken.

    The shorter edge is brought to ``resolution``; ``crop`` is ``square`` (i1: the middle is cut
    out) or ``none`` (the whole picture, but for the ends of one that is longer than 4:1, which are
    cut off). Pictures whose shorter edge is below ``min_short_edge_px``, by default the resolution,
    are not taken.
    """

    preset: str | None = None
    name: Name
    resolution: Annotated[int, Field(ge=1)]
    captions: CaptionSets
    captions_of: dict[Name, CaptionSets] = {}
    captions_per_image: Annotated[int, Field(ge=1)] | None = None
    outcomes: Annotated[list[Outcome], Field(min_length=1)] = ["ok", "truncated"]
    datasets: Datasets | None = None
    without: list[Name] = []
    weights: Weights = "equal"
    images_per_dataset: Annotated[int, Field(ge=1)] | None = None
    min_short_edge_px: Annotated[int, Field(ge=1)] | None = None
    filters: list[Filter] = []
    crop: Literal["square", "none"] = "square"
    resample: Resample = "bilinear"
    image_format: ImageFormat = "png"
    samples_per_shard: Annotated[int, Field(ge=1)] = 1000
    validation_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.0

    def caption_sets(self, dataset: str) -> dict[str, Fraction]:
        """Return the caption sets of a dataset and their shares, which sum to one."""
        sets = self.captions_of.get(dataset, self.captions)
        if isinstance(sets, str):
            return {sets: Fraction(1)}
        shares = {name: Fraction(str(share)) for name, share in sorted(sets.items())}
        return {name: share / sum(shares.values()) for name, share in shares.items()}

    def all_caption_sets(self, datasets: list[str]) -> list[str]:
        """Return every caption set that one of these datasets uses, in order of their names."""
        return sorted({name for dataset in datasets for name in self.caption_sets(dataset)})
