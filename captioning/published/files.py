"""Published captions as they lie: for each dataset a folder of Parquet files, a picture a row.

Column ``key`` has the identifiers of the pictures, ``caption1``, ``caption2`` and so on have the
captions, as many as there are; other columns are not read.
"""

import re
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import PurePosixPath

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline import hub, storage
from pipeline.errors import EvenmixError
from pipeline.readers.rows import RowGroup
from pipeline.storage import FileInfo

KEY = "key"

MAX_TEXT_BYTES = 64 << 10
"""A longer caption, or identifier, counts as none: that is 20,000 letters of most scripts."""

_CAPTION = re.compile(r"caption(\d+)")
_BATCH_ROWS = 1024
_READ_BYTES = 512 << 20
_ROW_BYTES = 2048
_MAX_EXPANSION = 3
"""How often longer texts may be than a footer says, which counts those of a dictionary once."""

_CONCURRENT_REQUESTS = 16

Row = tuple[str | None, list[str | None]]
"""A picture's identifier, and its captions."""


@dataclass(frozen=True)
class PublishedFile:
    """A file, the names of its columns of captions in order, and the sizes of its row groups."""

    info: FileInfo
    captions: Sequence[str]
    row_groups: Sequence[RowGroup]

    @property
    def num_bytes(self) -> int:
        """The bytes of identifiers and captions, by the footer; see :func:`_num_bytes`."""
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
        """The bytes of all files."""
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
    published = [file for file in found if isinstance(file, PublishedFile)]
    if not any(group.num_rows for file in published for group in file.row_groups):
        raise EvenmixError(f"{located}: no file has a row; correct the caption set's source")
    whole = located.removesuffix(f"/{subset}/*.parquet")
    return Subset(
        origin=whole if "://" in whole else PurePosixPath(whole).name,
        revision=commit,
        files=published,
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
    groups = map(metadata.row_group, range(metadata.num_row_groups))
    return PublishedFile(
        file,
        captions,
        [RowGroup(group.num_rows, _num_bytes(group, {KEY, *captions})) for group in groups],
    )


def _is_text(column: pa.DataType) -> bool:
    return column in (pa.string(), pa.large_string())


def _num_bytes(group: pq.RowGroupMetaData, columns: Collection[str]) -> int:
    """Return the bytes of some columns, by the footer; a row counts as 2 KB at least."""
    chunks = map(group.column, range(group.num_columns))
    sizes = (chunk.total_uncompressed_size for chunk in chunks if chunk.path_in_schema in columns)
    num_bytes: int = max(sum(sizes), group.num_rows * _ROW_BYTES)
    return num_bytes


def read_rows(
    url: str, num_bytes: int, captions: Sequence[str], start: int, stop: int
) -> Iterator[list[Row]]:
    """Yield the rows from ``start`` to ``stop``, some at a time.

    What is null, no UTF-8 or longer than MAX_TEXT_BYTES is None. If the footer does not lie, a
    batch of what the file has takes 512 MB at most, and all texts together three times that.

    Raises:
        EvenmixError: the file is damaged, or has far more text than its footer says.
    """
    columns = [KEY, *captions]
    rows = list[Row]()
    text_bytes = footer_bytes = 0
    with storage.open_parquet(url, num_bytes) as file:
        groups = [file.metadata.row_group(i) for i in range(file.num_row_groups)]
        ends = accumulate((group.num_rows for group in groups), initial=0)
        try:
            for number, (begin, end) in enumerate(pairwise(ends)):
                row = begin
                if end <= start or begin >= stop:
                    continue
                group_bytes = _num_bytes(groups[number], columns)
                footer_bytes += group_bytes
                # No text is longer than its group, and one in a dictionary may be that of all rows.
                batch_rows = max(1, min(_BATCH_ROWS, _READ_BYTES // group_bytes))
                # One group at a time: Arrow keeps what it has read ahead until the iterator ends.
                for batch in file.iter_batches(batch_rows, [number], columns, use_threads=False):
                    first, last = max(start - row, 0), min(stop - row, batch.num_rows)
                    if first < last:
                        wanted = batch.slice(first, last - first).select(columns)
                        texts = [_texts(column) for column in wanted]
                        text_bytes += sum(column.nbytes for column in texts)
                        if text_bytes > _MAX_EXPANSION * min(footer_bytes, _READ_BYTES):
                            raise EvenmixError(
                                f"{url} has far more text behind row {start} than its footer says "
                                f"(more than {text_bytes:,} bytes); write the file anew without "
                                "dictionaries (pyarrow: use_dictionary=False)"
                            )
                        keys, *others = (map(_decode, column.to_pylist()) for column in texts)
                        rows += ((key, found) for key, *found in zip(keys, *others, strict=True))
                    if len(rows) >= _BATCH_ROWS:
                        yield rows
                        rows = []
                    row += batch.num_rows
                    if row >= stop:
                        break
        except (pa.ArrowException, OSError) as error:
            raise EvenmixError(
                f"{url} is damaged behind row {start} ({error}); fetch the file again"
            ) from error
    yield rows


def _texts(column: pa.Array) -> pa.LargeBinaryArray:
    """Return the texts of a column as bytes, null for those that are too long."""
    if pa.types.is_integer(column.type):
        column = column.cast(pa.string())
    texts = column.cast(pa.large_binary())
    too_long = pc.greater(pc.binary_length(texts), MAX_TEXT_BYTES)
    return pc.replace_with_mask(texts, too_long, pa.scalar(None, texts.type))


def _decode(text: bytes | None) -> str | None:
    try:
        return None if text is None else text.decode()
    except UnicodeDecodeError:
        return None
