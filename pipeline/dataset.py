"""What a recipe or the catalogue says of one dataset: where it is, how a record is read.

Identifiers and URLs are made by rules (:mod:`pipeline.templates`), of the values of a record: its
columns, the keys of its JSON, and what its place in the source tells (:mod:`pipeline.readers.rules`
lists those names).
"""

import re
from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from pipeline import templates

Layout = Literal["folder", "parquet", "webdataset", "tar", "url_list", "sqlite"]

PromptKind = Literal["describe", "rendered_text", "annotation", "metadata", "composite"]
"""What a captioning model is told beside the picture (:mod:`captioning.prompts`)."""

Duplicates = Literal["near", "exact", "off"]
SecondLook = Literal["none", "graphics", "all"]
Threshold = Annotated[float, Field(gt=0, le=1)]

_TABLES = ("parquet", "url_list", "sqlite")
_FETCHED = ("url_list", "sqlite")


def _pattern(text: str) -> str:
    try:
        re.compile(text)
    except re.error as error:
        raise ValueError(f"{text!r} is no regular expression: {error}") from error
    return text


def without_secrets(source: str) -> str:
    """Return a URL or path that may be stored.

    Raises:
        ValueError: it has a password or a token in it.
    """
    address = urlsplit(source)
    if "@" in address.netloc:
        raise ValueError(
            "has a user name or a password in it, which would be stored; remove them: credentials "
            "come from the environment"
        )
    if address.scheme in ("http", "https") and address.query:
        raise ValueError(
            "has a query ('?…') in it, which may be a signature or a token, and would be stored; "
            "remove it, or download the file and give its local path"
        )
    return source


Rule = Annotated[str, AfterValidator(templates.check)]


class Dataset(BaseModel):
    """Where a dataset's records are, how to read one, and what counts as its duplicate.

    ``source`` is a folder (layout ``folder``) or a file or glob pattern (all others), at any
    fsspec URL without passwords and tokens: it is stored with every picture, and credentials come
    from the environment. ``revision`` is the commit of an hf:// source, of which the first digits
    are enough. A ``mirror``-ed source is copied into the corpus by `evenmix mirror` before it is
    ingested.

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

    ``duplicates`` is ``near`` (copies by descriptor, at cosine ``threshold``), ``exact`` (equal
    bytes or pixels only) or ``off`` (copies stay). Pictures of text and plain graphics look alike
    to a copy detector, so a cosine is not enough there: ``second_look`` compares the pictures
    themselves as well, where both are such pictures (``graphics``), of ``all`` pictures, or of
    ``none``. A ``mirrored`` picture counts as a copy, or does not. Of two datasets the stricter
    rule holds, unless the recipe has one for the pair.

    ``prompt`` is the kind of prompt that suits the pictures; ``lines_field`` leads to the list of
    the lines of text in a picture, through the names of ``extra_fields``
    (``ocr_annotation.text``). ``caption_subset`` is the dataset's folder in i1's published
    captions.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    layout: Layout
    source: Annotated[str, AfterValidator(without_secrets)]
    revision: str | None = None
    mirror: bool = False
    licence: str
    id_rule: Rule | None = None
    join_rule: Rule | None = None
    ambiguous_joins: list[str] = []
    path_pattern: Annotated[str, AfterValidator(_pattern)] | None = None
    image_field: str = "image"
    image_url: Rule | None = None
    text_field: str | None = None
    url_field: str | None = None
    licence_field: str | None = None
    extra_fields: list[str] = []
    table: str | None = None
    records_field: str | None = None
    min_bytes: Annotated[int, Field(ge=0)] = 0
    placeholder_bytes: list[int] = []
    placeholder_urls: list[str] = []
    duplicates: Duplicates = "near"
    threshold: Threshold = 0.75
    second_look: SecondLook = "graphics"
    mirrored: bool = True
    prompt: PromptKind = "describe"
    lines_field: str | None = None
    caption_subset: str | None = None

    @model_validator(mode="after")
    def _fits_together(self) -> "Dataset":
        if self.revision is not None and not self.source.startswith("hf://"):
            raise ValueError("revision is one of a source on the Hub (hf://…), which this is not")
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
