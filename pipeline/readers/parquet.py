"""Parquet: rows with a picture's bytes, or with a struct of bytes and path as Hugging Face writes.

Items end where row groups end, as long as these are small: what is inside one is only found by
decoding it from its beginning.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from itertools import accumulate, pairwise
from pathlib import PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import storage
from pipeline.dataset import Dataset
from pipeline.errors import EvenmixError
from pipeline.readers.items import identities, shard_name
from pipeline.readers.rules import Record, describe, path_values, value_names
from pipeline.reasons import RejectReason
from pipeline.recipe import Images
from pipeline.stage import WorkItem
from pipeline.storage import FileInfo

_BATCH_ROWS = 16
_CONCURRENT_FOOTERS = 16  # a dataset can have thousands of files on a server far away


def plan(name: str, dataset: Dataset, images: Images) -> list[WorkItem]:
    """Cut the files into items of whole row groups, or parts of one; the footers are read.

    Raises:
        EvenmixError: some files lack a column or are no Parquet; every one is named.
    """
    files = storage.glob_files(dataset.source)
    items, mistakes = list[WorkItem](), list[str]()
    with ThreadPoolExecutor(_CONCURRENT_FOOTERS) as pool:
        footers = pool.map(partial(_rows_or_mistake, dataset), files)
        found = list(zip(files, identities(files), footers, strict=True))
    for file, identity, group_rows in found:
        if isinstance(group_rows, EvenmixError):
            mistakes.append(str(group_rows))
            continue
        items += [
            WorkItem(
                name,
                shard_name(file.name, start),
                inputs={**identity, "rows": [start, stop]},
                payload={"url": file.url},
            )
            for start, stop in item_rows(group_rows, images.records_per_shard)
        ]
    if mistakes:
        raise EvenmixError("\n  ".join([f"dataset {name} cannot be read:", *mistakes]))
    return items


def item_rows(group_rows: Sequence[int], records_per_shard: int) -> list[tuple[int, int]]:
    """Cut a file into ranges [start, stop) of rows, given the number of rows of its row groups.

    Groups are put together up to ``records_per_shard`` rows; one of up to twice as many stays
    whole, a larger one is cut.
    """
    ranges = list[tuple[int, int]]()
    start = 0
    for begin, end in pairwise(accumulate(group_rows, initial=0)):
        if end - start > records_per_shard and begin > start:
            ranges.append((start, begin))
            start = begin
        if end - start > 2 * records_per_shard:
            cuts = [*range(start, end, records_per_shard), end]
            ranges += pairwise(cuts)
            start = end
    num_rows = sum(group_rows)
    return [*ranges, (start, num_rows)] if num_rows > start else ranges


def read(dataset: Dataset, item: WorkItem, max_bytes: int) -> Iterator[Record]:
    """Yield an item's rows, row group by row group and within these batch by batch.

    Raises:
        EvenmixError: the file is damaged.
    """
    url, name = item.payload["url"], item.inputs["file"]
    start, stop = item.inputs["rows"]
    row = start
    with storage.open_parquet(url, item.inputs["num_bytes"]) as file:
        try:
            for first, batch in _batches(dataset, file, start, stop):
                for place in range(batch.num_rows):
                    row = first + place
                    yield _record(dataset, name, row, batch.slice(place, 1))
        except (pa.ArrowException, OSError) as error:
            raise EvenmixError(
                f"{url} is damaged after row {row} ({error}); fetch the file again"
            ) from error


def _batches(
    dataset: Dataset, file: pq.ParquetFile, start: int, stop: int
) -> Iterator[tuple[int, pa.RecordBatch]]:
    """Yield the rows from ``start`` to ``stop`` in batches, each with the number of its first."""
    columns = [name for name in value_names(dataset) if name in file.schema_arrow.names]
    group_rows = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
    for group, (begin, end) in enumerate(pairwise(accumulate(group_rows, initial=0))):
        if end <= start or begin >= stop:
            continue
        row = begin
        # One group at a time: Arrow keeps what it has read ahead until the iterator ends.
        for batch in file.iter_batches(
            _BATCH_ROWS, [group], [*columns, dataset.image_field], use_threads=False
        ):
            first, last = max(start - row, 0), min(stop - row, batch.num_rows)
            if first < last:
                yield row + first, batch.slice(first, last - first)
            row += batch.num_rows
            if row >= stop:
                break


def _rows_or_mistake(dataset: Dataset, file: FileInfo) -> list[int] | EvenmixError:
    try:
        return _check(dataset, file.name, file.url)
    except EvenmixError as error:
        return error


def _check(dataset: Dataset, name: str, url: str) -> list[int]:
    """Check the columns of a file by its footer and return the rows of its row groups."""
    with storage.open_parquet(url) as file:
        schema, metadata = file.schema_arrow, file.metadata
    known = {*schema.names, *_place_values(dataset, name, row=0)}
    missing = [column for column in value_names(dataset) if column not in known]
    if dataset.image_field not in schema.names:
        missing.append(dataset.image_field)
    if missing:
        raise EvenmixError(
            f"{url} has no column {', '.join(missing)} (it has {', '.join(schema.names)}); correct "
            "the rules and field names of the dataset in the recipe, or replace the file"
        )
    image = schema.field(dataset.image_field).type
    if not _holds_bytes(image):
        raise EvenmixError(
            f"{url}: column {dataset.image_field} is {image}, neither bytes nor a struct with "
            "bytes; correct image_field in the recipe"
        )
    return [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]


def _holds_bytes(column: pa.DataType) -> bool:
    if pa.types.is_struct(column):
        return bool(column.get_field_index("bytes") >= 0)
    is_binary = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view)
    return any(test(column) for test in is_binary)


def _place_values(dataset: Dataset, name: str, row: int) -> dict[str, Any]:
    """Return what the place of a row tells; ``name`` is its file's path below the source."""
    file = str(PurePosixPath(name).with_suffix(""))
    return path_values(name, dataset.path_pattern) | {"file": file, "row": row}


def _record(dataset: Dataset, name: str, row: int, columns: pa.RecordBatch) -> Record:
    locator = f"{name}:{row}"
    try:
        (values,) = columns.to_pylist()
    except UnicodeDecodeError as error:
        return Record(locator, None, reason=RejectReason.BAD_RECORD, detail=f"its text: {error}")
    record = describe(dataset, locator, _place_values(dataset, name, row) | values)
    image = values[dataset.image_field]
    picture = image["bytes"] if isinstance(image, dict) else image
    if record.reason is not None:
        return record
    if picture is None:
        return replace(record, reason=RejectReason.MISSING_PICTURE, detail="null image")
    return replace(record, picture=picture)
