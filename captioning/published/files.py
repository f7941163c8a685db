"""Published captions as they lie: for each dataset a folder of Parquet files, a picture a row.

Column ``key`` has the identifiers of the pictures, ``caption1``, ``caption2`` and so on have the
captions, as many as there are; other columns are not read.
"""

import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import PurePosixPath

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import hub, storage
from pipeline.errors import EvenmixError
from pipeline.readers.rows import RowGroup
from pipeline.storage import FileInfo

KEY = "key"

_CAPTION = re.compile(r"caption(\d+)")
_BATCH_ROWS = 1024
_CONCURRENT_REQUESTS = 16


@dataclass(frozen=True)
class PublishedFile:
    """A file, the names of its columns of captions in order, and the sizes of its row groups."""

    info: FileInfo
    captions: Sequence[str]
    row_groups: Sequence[RowGroup]

    @property
    def num_bytes(self) -> int:
        """The bytes of identifiers and captions when they are decompressed."""
        return sum(group.num_bytes for group in self.row_groups)


@dataclass(frozen=True)
class Subset:
    """The published captions of one dataset.

    ``origin`` is where all of them come from, for people: the URL with its commit on the Hub, the
    name of a local folder. ``revision`` is that commit.
    """

    origin: str
    revision: str | None
    files: Sequence[PublishedFile]

    @property
    def num_bytes(self) -> int:
        """The bytes of all files when they are decompressed."""
        return sum(file.num_bytes for file in self.files)


def find_subset(source: str, subset: str, revision: str | None) -> Subset:
    """Find the files of a subset; only their footers are read.

    Raises:
        EvenmixError: there are none, or some are not as they should be (every one is named).
    """
    located, commit = hub.resolve(storage.join(source, subset, "*.parquet"), revision)
    files = storage.glob_files(located)
    if not files:
        raise EvenmixError(
            f"no files at {located}; correct the caption set's source, or its subsets, which name "
            "the folder of each dataset"
        )

    def open_or_mistake(file: FileInfo) -> PublishedFile | EvenmixError:
        try:
            return _open(file)
        except EvenmixError as error:
            return error

    with ThreadPoolExecutor(_CONCURRENT_REQUESTS) as pool:
        found = list(pool.map(open_or_mistake, files))
    mistakes = [str(mistake) for mistake in found if isinstance(mistake, EvenmixError)]
    if mistakes:
        raise EvenmixError("\n  ".join(mistakes))
    whole = located.removesuffix(f"/{subset}/*.parquet")
    return Subset(
        origin=whole if "://" in whole else PurePosixPath(whole).name,
        revision=commit,
        files=[file for file in found if isinstance(file, PublishedFile)],
    )


def _open(file: FileInfo) -> PublishedFile:
    with storage.open_parquet(file.url, file.num_bytes) as opened:
        schema, metadata = opened.schema_arrow, opened.metadata
    captions = [name for name in schema.names if _CAPTION.fullmatch(name)]
    if schema.names.count(KEY) != 1 or not captions or len(set(captions)) < len(captions):
        raise EvenmixError(
            f"{file.url} needs a column {KEY} with the identifiers of the pictures and columns "
            f"caption1, caption2 and so on with their captions, each once; it has "
            f"{', '.join(schema.names)}. Replace the file, or name another source or subset"
        )
    for name in (KEY, *captions):
        column = schema.field(name).type
        if not (_is_text(column) or (name == KEY and pa.types.is_integer(column))):
            raise EvenmixError(
                f"{file.url}: column {name} is {column}, not text; replace the file, or name "
                "another source or subset"
            )
    captions.sort(key=lambda name: (int(name.removeprefix("caption")), name))
    return PublishedFile(file, captions, _row_groups(metadata, {KEY, *captions}))


def _is_text(column: pa.DataType) -> bool:
    return column in (pa.string(), pa.large_string())


def _row_groups(metadata: pq.FileMetaData, columns: set[str]) -> list[RowGroup]:
    found = []
    for group in map(metadata.row_group, range(metadata.num_row_groups)):
        chunks = map(group.column, range(group.num_columns))
        wanted = [chunk for chunk in chunks if chunk.path_in_schema in columns]
        found.append(RowGroup(group.num_rows, sum(c.total_uncompressed_size for c in wanted)))
    return found


def read_rows(
    url: str, num_bytes: int, captions: Sequence[str], start: int, stop: int
) -> Iterator[list[tuple[str | None, list[str | None]]]]:
    """Yield identifier and captions of the rows from ``start`` to ``stop``, some at a time.

    What is null or no UTF-8 is None.

    Raises:
        EvenmixError: the file is damaged.
    """
    with storage.open_parquet(url, num_bytes) as file:
        groups = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
        try:
            for group, (begin, end) in enumerate(pairwise(accumulate(groups, initial=0))):
                row = begin
                if end <= start or begin >= stop:
                    continue
                # One group at a time: Arrow keeps what it has read ahead until the iterator ends.
                columns = [KEY, *captions]
                for batch in file.iter_batches(_BATCH_ROWS, [group], columns, use_threads=False):
                    first, last = max(start - row, 0), min(stop - row, batch.num_rows)
                    if first < last:
                        yield _rows(batch.slice(first, last - first), captions)
                    row += batch.num_rows
                    if row >= stop:
                        break
        except (pa.ArrowException, OSError) as error:
            raise EvenmixError(
                f"{url} is damaged behind row {start} ({error}); fetch the file again"
            ) from error


def _rows(
    batch: pa.RecordBatch, captions: Sequence[str]
) -> list[tuple[str | None, list[str | None]]]:
    keys = _texts(batch[KEY])
    columns = [_texts(batch[name]) for name in captions]
    return [(key, list(texts)) for key, *texts in zip(keys, *columns, strict=True)]


def _texts(column: pa.Array) -> list[str | None]:
    if pa.types.is_integer(column.type):
        column = column.cast(pa.string())
    return [_text(value) for value in column.cast(pa.large_binary()).to_pylist()]


def _text(value: bytes | None) -> str | None:
    try:
        return None if value is None else value.decode()
    except UnicodeDecodeError:
        return None
