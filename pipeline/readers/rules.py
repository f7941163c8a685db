"""From the values of a record to what evenmix keeps of it: the same rules for every layout.

The values are the record's own (the columns of its row, the keys of its JSON) and what its place
tells. A file in a folder, tar or archive has

    path     its path below the source, such as ``train/04686_Animalia/0a1b.jpg``
    folder   the folders of that path, ``train/04686_Animalia``
    parent   the last of them, ``04686_Animalia``
    stem     its name without the last suffix, ``0a1b``
    key      in a WebDataset: the path up to the first dot of its name

and the named groups of the dataset's ``path_pattern``. A row of a table has ``file`` (the table's
file without its suffix, below the source), ``folder`` (the folders of that file) and ``row`` (its
number). A value of the record's own goes before one of the same name from its place.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import PurePosixPath
from typing import Any

from pipeline.dataset import Dataset, Layout
from pipeline.reasons import RejectReason
from pipeline.templates import Unfilled, fill, names, value_of

_DEFAULT_ID_RULES: dict[Layout, str] = {"folder": "{path}", "tar": "{path}", "webdataset": "{key}"}


@dataclass(frozen=True)
class Record:
    """One record of a source: its picture's bytes or their URL, or the reason for neither.

    ``source_id``, ``join_id``, ``text`` and the like are as :class:`pipeline.dataset.Dataset`
    describes them; ``source_url`` is where the picture is or was on the web.
    """

    locator: str
    source_id: str | None
    picture: bytes = b""
    image_url: str | None = None
    join_id: str | None = None
    join_ambiguous: bool = False
    text: str | None = None
    source_url: str | None = None
    licence: str | None = None
    fields: Mapping[str, Any] = field(default_factory=dict)
    reason: RejectReason | None = None
    detail: str = ""


def describe(dataset: Dataset, locator: str, values: Mapping[str, Any]) -> Record:
    """Return the record that ``values`` describe, still without its picture's bytes.

    One whose id cannot be made, or whose texts are no Unicode, has reason ``bad_record``.
    """
    try:
        source_id = fill(dataset.id_rule or _DEFAULT_ID_RULES[dataset.layout], values)
        join_id = None if dataset.join_rule is None else fill(dataset.join_rule, values)
        image_url = None if dataset.image_url is None else fill(dataset.image_url, values)
        record = Record(
            locator,
            source_id,
            image_url=image_url,
            join_id=join_id,
            join_ambiguous=join_id is not None
            and any(fnmatchcase(join_id, pattern) for pattern in dataset.ambiguous_joins),
            text=_optional(dataset.text_field, values),
            source_url=image_url or _optional(dataset.url_field, values),
            licence=_optional(dataset.licence_field, values) or dataset.licence,
            fields={name: value_of(name, values) for name in dataset.extra_fields},
        )
        # Half of a surrogate pair is JSON, but no text.
        texts = [source_id, join_id, record.text, record.source_url, record.licence, record.fields]
        json.dumps(texts, ensure_ascii=False, default=str).encode()
    except (Unfilled, ValueError, RecursionError) as error:
        return bad_record(locator, str(error).encode(errors="backslashreplace").decode())
    return record


def bad_record(locator: str, detail: str) -> Record:
    """Return the record that stands for one, or more, that nothing is known of."""
    return Record(locator, None, reason=RejectReason.BAD_RECORD, detail=detail[:200])


def value_names(dataset: Dataset) -> list[str]:
    """Return the names of all values that a dataset's rules and fields ask for, sorted."""
    rules = [dataset.id_rule, dataset.join_rule, dataset.image_url]
    fields = [dataset.text_field, dataset.url_field, dataset.licence_field, *dataset.extra_fields]
    found = {name for rule in rules if rule for name in names(rule)}
    return sorted(found | {name for name in fields if name is not None})


def path_values(path: str, path_pattern: str | None) -> dict[str, str]:
    """Return what the place of a file tells; ``path`` is below the source."""
    place = PurePosixPath(path)
    folder = "" if str(place.parent) == "." else str(place.parent)
    values = {"path": path, "folder": folder, "parent": place.parent.name, "stem": place.stem}
    match = re.search(path_pattern, path) if path_pattern else None
    groups = match.groupdict() if match else {}
    return values | {name: value for name, value in groups.items() if value is not None}


def _optional(name: str | None, values: Mapping[str, Any]) -> str | None:
    value = None if name is None else value_of(name, values)
    return None if value is None else str(value)
