"""Regrouping in files: rows sorted by destination in one file, read back a destination at a time.

What must be regrouped and is too large for a Beam shuffle goes through files in two passes. In
pass A each of many items publishes its rows as one *exchange table*. In pass B each destination
reads its slice of all of these. Memory is bounded by the rows of one item and those of one
destination. A files and B destinations take A times B reads, so where destinations are many they
are put together in groups, and a further exchange parts each group.

An exchange table is Parquet with one row and a column for each destination that has any, whose cell
is that destination's rows as an Arrow stream. So the footer is the offset table (about 150 bytes a
destination), a slice is one range of the file, and an exchange file is the table of a work item
like any other: its appearance is the commit, and it has a receipt and a digest. Row groups instead
of columns would do the same, but every table is published with those of a fixed size. A slice has
less than 2 GiB.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.ipc

from pipeline import storage
from pipeline.errors import EvenmixError

Ints = npt.NDArray[np.int64]

_CONCURRENT_READS = 16


def exchange_table(rows: pa.Table, destinations: Ints) -> pa.Table:
    """Return rows in the form in which they are exchanged.

    ``destinations`` has that of each row: shape (rows,), numbers from 0. The rows of a destination
    stay in order.
    """
    rows = rows.combine_chunks()
    order = np.argsort(destinations, kind="stable")
    found, starts = np.unique(destinations[order], return_index=True)
    # Parquet compresses: a digest of what it holds shall not depend on a compressor's version.
    return pa.table(
        {
            str(destination): _cell(rows.take(places))
            for destination, places in zip(found, np.split(order, starts[1:]), strict=False)
        }
    )


def _cell(rows: pa.Table) -> pa.Array:
    """Return a column with one binary cell, the rows as an Arrow stream."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, rows.schema) as stream:
        stream.write_table(rows)
    data = sink.getvalue()
    offsets = pa.py_buffer(np.array([0, data.size], np.int32))
    return pa.BinaryArray.from_buffers(pa.binary(), 1, [None, offsets, data])


def read_slices(urls: Sequence[str], *destinations: int) -> Iterator[pa.Table]:
    """Yield the rows that each file has for each of some destinations.

    They come in the order of the files, and of a file in that of ``destinations``; what a file has
    no rows for is left out. A few files are read at once, each is opened once.

    Raises:
        EvenmixError: a file is missing or damaged.
    """
    columns = [str(destination) for destination in destinations]
    with ThreadPoolExecutor(_CONCURRENT_READS) as pool:
        for start in range(0, len(urls), _CONCURRENT_READS):
            some = urls[start : start + _CONCURRENT_READS]
            for slices in pool.map(lambda url: _read_slices(url, columns), some):
                yield from slices


def _read_slices(url: str, columns: Sequence[str]) -> list[pa.Table]:
    with storage.open_parquet(url) as file:
        there = set(file.schema_arrow.names)
        wanted = [column for column in columns if column in there]
        if not wanted:
            return []
        try:
            cells = file.read(columns=wanted, use_threads=False)
            return [
                pa.ipc.open_stream(cells[column][0].as_buffer()).read_all() for column in wanted
            ]
        except (pa.ArrowException, OSError) as error:
            raise EvenmixError(
                f"{url} is damaged ({error}); remove the folder of this exchange and start the "
                "same command again, which writes it anew"
            ) from error
