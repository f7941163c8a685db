"""Describing pictures: all that dedup keeps of them, each looked at once."""

from collections.abc import Iterable, Iterator

import pyarrow as pa

from dedup.descriptors import Descriptor
from dedup.records import embeddings_schema, to_column
from dedup.second_look import is_graphic, thumbnail
from pipeline.images import Pixels


def describe(descriptor: Descriptor, pictures: Iterable[Pixels]) -> pa.Table:
    """Describe one batch of uint8 RGB pictures, which may be decoded one by one.

    The table has the columns of :func:`dedup.records.embeddings_schema`, all but the key.
    """
    thumbnails: list[bytes] = []
    graphics: list[bool] = []

    def looked_at() -> Iterator[Pixels]:
        for picture in pictures:
            thumbnails.append(thumbnail(picture).tobytes())
            graphics.append(is_graphic(picture))
            yield picture

    vectors = descriptor.embed(looked_at())
    schema = embeddings_schema(descriptor.dimension).remove(0)
    columns = [to_column(vectors), pa.array(thumbnails, schema.field("thumbnail").type), graphics]
    return pa.table(columns, schema=schema)
