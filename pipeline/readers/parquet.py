"""Parquet: rows with a picture's bytes, or with bytes and path in a struct, as on Hugging Face."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import pyarrow as pa

from pipeline import storage
from pipeline.dataset import Dataset
from pipeline.errors import EvenmixError
from pipeline.readers import rows
from pipeline.readers.items import plan_files
from pipeline.readers.rules import Record
from pipeline.reasons import RejectReason
from pipeline.recipe import Images
from pipeline.stage import WorkItem
from pipeline.storage import FileInfo

_BATCH_ROWS = 16


def plan(name: str, dataset: Dataset, images: Images) -> list[WorkItem]:
    """Cut the files into items of whole row groups, or parts of one; the footers are read.

    Raises:
        EvenmixError: some files lack a column or are no Parquet; every one is named.
    """
    files = storage.glob_files(dataset.source)
    return plan_files(name, files, partial(_plan_file, name, dataset, images))


def read(dataset: Dataset, item: WorkItem, max_bytes: int) -> Iterator[Record]:
    """Yield an item's rows, row group by row group and within these batch by batch.

    Raises:
        EvenmixError: the file is damaged.
    """
    for record, values in rows.read(dataset, item, _BATCH_ROWS):
        if record.reason is not None:
            yield record
            continue
        image = values[dataset.image_field]
        picture = image["bytes"] if isinstance(image, dict) else image
        if picture is None:
            yield replace(record, reason=RejectReason.MISSING_PICTURE, detail="null image")
        else:
            yield replace(record, picture=picture)


def _plan_file(
    name: str, dataset: Dataset, images: Images, file: FileInfo, identity: Mapping[str, Any]
) -> list[WorkItem]:
    with storage.open_parquet(file.url, file.num_bytes) as opened:
        items = rows.plan_file(name, dataset, images, file, identity, opened=opened)
        image = opened.schema_arrow.field(dataset.image_field).type
    if not _holds_bytes(image):
        raise EvenmixError(
            f"{file.url}: column {dataset.image_field} is {image}, neither bytes nor a struct with "
            "bytes; correct image_field in the recipe"
        )
    return items


def _holds_bytes(column: pa.DataType) -> bool:
    if pa.types.is_struct(column):
        place = column.get_field_index("bytes")
        return place >= 0 and _holds_bytes(column.field(place).type)
    is_binary = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view)
    return any(test(column) for test in is_binary)
