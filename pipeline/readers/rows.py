"""Rows of Parquet files, for the layouts that have them: checked, cut into items, read.

Items end where row groups end, as long as these are small: what is inside one is only found by
decoding it from its beginning.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import storage
from pipeline.dataset import Dataset
from pipeline.errors import EvenmixError
from pipeline.readers.items import shard_name, states
from pipeline.readers.rules import Record, bad_record, describe, path_values, value_names
from pipeline.recipe import Images
from pipeline.stage import WorkItem
from pipeline.storage import FileInfo


@dataclass(frozen=True)
class RowGroup:
    """A row group, and how many bytes the columns that are read take in the file."""

    num_rows: int
    num_bytes: int


def plan_file(
    name: str,
    dataset: Dataset,
    images: Images,
    file: FileInfo,
    identity: Mapping[str, Any],
    *,
    opened: pq.ParquetFile,
) -> list[WorkItem]:
    """Cut a file into items of rows; ``opened`` is the file, of which only the footer is read.

    Raises:
        EvenmixError: it lacks a column.
    """
    names = opened.schema_arrow.names
    known = {*names, *place_values(dataset, file.name, row=0)}
    # A picture's column, unlike other values, can be nowhere but in the file.
    missing = [value for value in value_names(dataset) if value not in known]
    missing += [value for value in _picture(dataset) if value not in (*names, *missing)]
    if missing:
        raise EvenmixError(
            f"{file.url} has no column {', '.join(missing)} (it has {', '.join(names)}); correct "
            "the rules and field names of the dataset in the recipe, or replace the file"
        )
    return [
        WorkItem(
            name,
            shard_name(file.name, start),
            inputs={**identity, "rows": [start, stop]},
            payload={"url": file.url, "states": states([file])},
        )
        for start, stop in item_rows(_row_groups(opened, _columns(dataset, opened)), images)
    ]


def item_rows(groups: Sequence[RowGroup], images: Images) -> list[tuple[int, int]]:
    """Cut a file into ranges [start, stop) of rows.

    Groups are put together up to ``records_per_shard`` rows and ``bytes_per_shard`` bytes; one of
    up to twice as much stays whole, a larger one is cut into ranges of equally many rows.
    """
    max_rows, max_bytes = images.records_per_shard, images.bytes_per_shard
    ranges = list[tuple[int, int]]()
    start = end = num_bytes = 0
    for group in groups:
        begin, end = end, end + group.num_rows
        if begin > start and (end - start > max_rows or num_bytes + group.num_bytes > max_bytes):
            ranges.append((start, begin))
            start, num_bytes = begin, 0
        num_bytes += group.num_bytes
        if end - start > 2 * max_rows or num_bytes > 2 * max_bytes:
            # Footers can say anything of their sizes.
            within_bytes = max_bytes * group.num_rows // max(num_bytes, 1)
            ranges += pairwise([*range(start, end, max(1, min(max_rows, within_bytes))), end])
            start, num_bytes = end, 0
    return [*ranges, (start, end)] if end > start else ranges


def read(
    dataset: Dataset, item: WorkItem, batch_rows: int
) -> Iterator[tuple[Record, Mapping[str, Any]]]:
    """Yield the record of each row and the row's own values, ``batch_rows`` at a time in memory.

    Raises:
        EvenmixError: the file is damaged.
    """
    url, name = item.payload["url"], item.inputs["file"]
    start, stop = item.inputs["rows"]
    row = start
    with storage.open_parquet(url, item.inputs["num_bytes"]) as file:
        try:
            for first, batch in _batches(file, _columns(dataset, file), batch_rows, start, stop):
                for place in range(batch.num_rows):
                    row = first + place
                    yield _record(dataset, name, row, batch.slice(place, 1))
        except (pa.ArrowException, OSError) as error:
            raise EvenmixError(
                f"{url} is damaged after row {row} ({error}); fetch the file again"
            ) from error


def place_values(dataset: Dataset, table: str, row: int) -> dict[str, Any]:
    """Return what the place of a row tells; ``table`` is its file's path in source or archive."""
    file = str(PurePosixPath(table).with_suffix(""))
    return path_values(table, dataset.path_pattern) | {"file": file, "row": row}


def _picture(dataset: Dataset) -> list[str]:
    return [] if dataset.is_fetched else [dataset.image_field]


def _columns(dataset: Dataset, file: pq.ParquetFile) -> list[str]:
    """Return the names of the columns that are read."""
    wanted = {*value_names(dataset), *_picture(dataset)}
    return [name for name in file.schema_arrow.names if name in wanted]


def _row_groups(file: pq.ParquetFile, columns: Sequence[str]) -> list[RowGroup]:
    # Of a struct each field has chunks of its own, named after it: image.bytes.
    paths = [file.schema.column(i).path for i in range(len(file.schema))]
    chunks = [
        i
        for i, path in enumerate(paths)
        if any(path == column or path.startswith(f"{column}.") for column in columns)
    ]
    groups = [file.metadata.row_group(i) for i in range(file.num_row_groups)]
    return [
        RowGroup(group.num_rows, sum(group.column(i).total_compressed_size for i in chunks))
        for group in groups
    ]


def _batches(
    file: pq.ParquetFile, columns: Sequence[str], batch_rows: int, start: int, stop: int
) -> Iterator[tuple[int, pa.RecordBatch]]:
    """Yield the rows from ``start`` to ``stop`` in batches, each with the number of its first."""
    group_rows = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
    for group, (begin, end) in enumerate(pairwise(accumulate(group_rows, initial=0))):
        if end <= start or begin >= stop:
            continue
        row = begin
        # One group at a time: Arrow keeps what it has read ahead until the iterator ends.
        for batch in file.iter_batches(batch_rows, [group], columns, use_threads=False):
            first, last = max(start - row, 0), min(stop - row, batch.num_rows)
            if first < last:
                yield row + first, batch.slice(first, last - first)
            row += batch.num_rows
            if row >= stop:
                break


def _record(
    dataset: Dataset, table: str, row: int, values: pa.RecordBatch
) -> tuple[Record, Mapping[str, Any]]:
    locator = f"{table}:{row}"
    try:
        (own,) = values.to_pylist()
    except (ValueError, OverflowError) as error:
        # Text that is no UTF-8; a time or duration beyond what Python's can be.
        return bad_record(locator, f"its values: {error}"), {}
    return describe(dataset, locator, place_values(dataset, table, row) | own), own
