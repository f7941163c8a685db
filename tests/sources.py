"""What the tests of all readers share: a dataset in a line, its records, and small tars."""

import io
import tarfile
from typing import Any

from pipeline import readers
from pipeline.dataset import Dataset
from pipeline.readers import Record
from pipeline.recipe import Images

Members = list[tuple[str, bytes]]

MAX_BYTES = 1 << 20


def dataset(layout: str, source: object, **options: object) -> Dataset:
    return Dataset.model_validate(
        {"layout": layout, "source": str(source), "licence": "CC0 1.0", **options}
    )


def record(
    locator: str, source_id: str, picture: bytes, text: str | None = None, **options: Any
) -> Record:
    """Return a record as it is read from a :func:`dataset`."""
    return Record(locator, source_id, picture, text=text, licence="CC0 1.0", **options)


def read_all(
    spec: Dataset, records_per_shard: int = 100, bytes_per_shard: int = 1 << 28
) -> list[Record]:
    images = Images(records_per_shard=records_per_shard, bytes_per_shard=bytes_per_shard)
    return [
        record
        for item in readers.plan("d", spec, images)
        for record in readers.read(spec, item, MAX_BYTES)
    ]


def summary(records: list[Record]) -> list[tuple[str | None, bytes, str | None]]:
    return [(record.source_id, record.picture, record.reason) for record in records]


def tar_bytes(members: Members, tar_format: int = tarfile.USTAR_FORMAT) -> bytes:
    """Return a tar; a member whose name ends with a slash is a folder."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tar_format) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.type = tarfile.DIRTYPE if name.endswith("/") else tarfile.REGTYPE
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()
