"""Reading a dataset where it is: one reader per layout, all giving the same records.

A reader has two halves. ``plan`` lists a dataset's files once and cuts them into work items,
naming all that decides an item's content; ``read`` turns one item into records, on a worker. A
record that cannot be read is a record with a reason, never an exception.
"""

from collections.abc import Iterator, Mapping
from typing import Protocol

from pipeline.dataset import Dataset, Layout
from pipeline.errors import EvenmixError
from pipeline.readers import folder, parquet, sqlite, tar, url_list, webdataset
from pipeline.readers.items import require_unchanged
from pipeline.readers.rules import Record
from pipeline.recipe import Images
from pipeline.stage import WorkItem

__all__ = ["Record", "plan", "read"]


class Reader(Protocol):
    """What the module of a layout has."""

    def plan(self, name: str, dataset: Dataset, images: Images) -> list[WorkItem]:
        """Cut a dataset into work items."""

    def read(self, dataset: Dataset, item: WorkItem, max_bytes: int) -> Iterator[Record]:
        """Read the records of a work item."""


_READERS: Mapping[Layout, Reader] = {
    "folder": folder,
    "parquet": parquet,
    "webdataset": webdataset,
    "tar": tar,
    "url_list": url_list,
    "sqlite": sqlite,
}


def plan(name: str, dataset: Dataset, images: Images, *, is_trial: bool = False) -> list[WorkItem]:
    """Cut a dataset into work items; the order in which its files are listed does not matter.

    Listings, footers and headers are read, and local files for their checksums. For a trial, which
    wants the first records only, a compressed tar will do too (:mod:`pipeline.readers.tar`).

    Raises:
        EvenmixError: there are no files, or some cannot be read at all (every one is named).
    """
    if is_trial and dataset.layout == "tar":
        items = tar.plan(name, dataset, images, is_trial=True)
    else:
        items = _READERS[dataset.layout].plan(name, dataset, images)
    if not items:
        raise EvenmixError(
            f"dataset {name}: no records at {dataset.source}; correct datasets.{name}.source"
        )
    return items


def read(dataset: Dataset, item: WorkItem, max_bytes: int) -> Iterator[Record]:
    """Read the records of a work item in the order of the source.

    Where the source says how large a file is, one above ``max_bytes`` is not read at all. Read to
    the end, an item is known to be what was planned.

    Raises:
        EvenmixError: a file is damaged or out of reach, or has changed since it was planned.
    """
    try:
        yield from _READERS[dataset.layout].read(dataset, item, max_bytes)
    except EvenmixError:
        # A change explains what looks like damage.
        require_unchanged(item.payload["states"])
        raise
    require_unchanged(item.payload["states"])
