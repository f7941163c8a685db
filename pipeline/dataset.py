"""What a recipe or the catalogue says of one dataset: where it is, how a record is read.

Identifiers, texts and URLs are made by rules. A rule is a text in which ``{name}`` stands for a
value of the record: a column, a key of its JSON, or what its place in the source tells
(:mod:`pipeline.readers.rules` lists those names).
"""

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

Layout = Literal["folder", "parquet", "webdataset", "tar", "url_list", "sqlite"]

_TABLES = ("parquet", "url_list", "sqlite")
_FETCHED = ("url_list", "sqlite")


def _pattern(text: str) -> str:
    try:
        re.compile(text)
    except re.error as error:
        raise ValueError(f"{text!r} is no regular expression: {error}") from error
    return text


class Dataset(BaseModel):
    """Where a dataset's records are, how to read one, and what counts as its duplicate.

    ``source`` is a folder (layout ``folder``) or a file or glob pattern (all others), at any
    fsspec URL; ``revision`` is the commit of an hf:// source, of which the first digits are enough.
    A ``mirror``-ed source is copied into the corpus by `evenmix mirror` before it is ingested.

    ``id_rule`` makes the source id, which must be unique in the dataset; ``join_rule`` makes the
    identifier by which i1's published captions know the picture, None where that is not known;
    joins that match one of ``ambiguous_joins`` (shell patterns) stand for several pictures.
    ``path_pattern`` is a regular expression whose named groups become values of a record; it is
    searched in the path of the record's file in its folder or archive.

    ``image_field`` is the column of the picture's bytes; ``image_url`` is the rule for its URL
    where there are none (``url_list``, ``sqlite``). ``text_field``, ``url_field`` (where a picture
    with bytes came from), ``licence_field`` and ``extra_fields`` name values that are kept with
    the picture. ``table`` is the table of a SQLite file; ``records_field`` is the list of records
    in a JSON file of a ``url_list``.

    Fetched pictures of less than ``min_bytes`` bytes, of a size among ``placeholder_bytes``, or
    from a final URL that matches one of ``placeholder_urls`` (shell patterns) are not the picture.

    ``duplicates`` is ``near`` (copies by descriptor, at cosine ``threshold``) or ``exact`` (equal
    bytes or pixels only): pictures of text and plain graphics look alike to a copy detector and
    want ``exact``.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    layout: Layout
    source: str
    revision: str | None = None
    mirror: bool = False
    licence: str
    id_rule: str | None = None
    join_rule: str | None = None
    ambiguous_joins: list[str] = []
    path_pattern: Annotated[str, AfterValidator(_pattern)] | None = None
    image_field: str = "image"
    image_url: str | None = None
    text_field: str | None = None
    url_field: str | None = None
    licence_field: str | None = None
    extra_fields: list[str] = []
    table: str | None = None
    records_field: str | None = None
    min_bytes: Annotated[int, Field(ge=0)] = 0
    placeholder_bytes: list[int] = []
    placeholder_urls: list[str] = []
    duplicates: Literal["near", "exact"] = "near"
    threshold: Annotated[float, Field(gt=0, le=1)] = 0.75

    @model_validator(mode="after")
    def _layout_has_what_it_needs(self) -> "Dataset":
        needs = {
            "id_rule": (_TABLES, "the rule of its ids, such as '{id}'"),
            "image_url": (_FETCHED, "the rule of its pictures' URLs, such as '{url}'"),
            "table": (("sqlite",), "the table to read"),
        }
        for field, (layouts, what) in needs.items():
            if self.layout in layouts and getattr(self, field) is None:
                raise ValueError(f"a dataset of layout {self.layout!r} needs {field}, {what}")
        return self

    @property
    def is_fetched(self) -> bool:
        """Tell whether the pictures are downloaded one by one, from URLs."""
        return self.layout in _FETCHED
