"""The schema of every table that the pipeline stores, and how a picture gets its key.

Tables of one shard are row-aligned: row i of an embeddings, duplicates or captions file speaks of
row i of the image index, which ``key`` confirms. The families of captioning, dedup and mixing
declare their schemas in their own packages, on the same ground.
"""

import hashlib

import pyarrow as pa

IMAGES = "images"
"""The folder below R with the pictures and their index, on which all other families align."""

SOURCES = "sources"
"""The folder below R with the mirrored sources."""

EXCLUSIONS = "exclusions"
"""The folder below R with the lists of excluded pictures that were used."""

ATTRIBUTES = "attributes"
"""The folder below R with tables that users bring, for the filters of mixtures."""

NOTES = "notes"
"""The folder below R where runs note things for later ones; no part of the corpus."""


def embeddings_folder(descriptor: str) -> str:
    """Return the folder below R with a descriptor of each picture."""
    return f"embeddings/{descriptor}"


def duplicates_folder(name: str) -> str:
    """Return the folder below R with what a search for duplicates found (``dedup.name``)."""
    return f"duplicates/{name}"


def captions_folder(name: str) -> str:
    """Return the folder below R with a caption set."""
    return f"captions/{name}"


def mixture_folder(name: str) -> str:
    """Return the folder below R with a mixture."""
    return f"mixtures/{name}"


INDEX = pa.schema(
    [
        ("key", pa.string()),
        ("source_id", pa.string()),
        ("join_id", pa.string()),
        ("join_ambiguous", pa.bool_()),
        ("source", pa.string()),
        ("revision", pa.string()),
        ("locator", pa.string()),
        ("source_url", pa.string()),
        ("final_url", pa.string()),
        ("licence", pa.string()),
        ("text", pa.string()),
        ("fields", pa.string()),
        ("format", pa.string()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("num_bytes", pa.int64()),
        ("sha256", pa.string()),
        ("pixels_sha256", pa.string()),
        ("offset", pa.int64()),
    ]
)
"""One kept picture. ``join_id`` is the identifier by which i1's published captions know it, null
where that is not known; ``join_ambiguous`` says that it stands for other pictures too. ``source``
(null: a local one) and ``revision`` are the dataset's, ``locator`` is the record's place in it;
``final_url`` is where redirects led from ``source_url``, null if there were none.
``width`` and ``height`` are as displayed (EXIF orientation applied), in pixels; ``text`` is the
dataset's own text or null; ``fields`` is a JSON object of its further fields; ``offset`` is where
the picture's bytes begin in the shard's tar."""

REJECTED = pa.schema(
    [
        ("key", pa.string()),
        ("source_id", pa.string()),
        ("locator", pa.string()),
        ("source_url", pa.string()),
        ("reason", pa.string()),
        ("detail", pa.string()),
        ("attempts", pa.int32()),
        ("retryable", pa.bool_()),
    ]
)
"""One record that was not kept. ``locator`` says where it stands in the source, ``reason`` is one
of :class:`pipeline.reasons.RejectReason`; key and source id are null where there was none.
``attempts`` counts downloads, over all generations; ``retryable`` records may be had by
`evenmix ingest --retry`."""

FETCHED = pa.schema(
    [
        ("key", pa.string()),
        ("url", pa.string()),
        ("final_url", pa.string()),
        ("status", pa.int32()),
        ("outcome", pa.string()),
        ("attempts", pa.int32()),
        ("started", pa.timestamp("ms", tz="UTC")),
        ("duration_s", pa.float32()),
    ]
)
"""One download, as it was observed: ``outcome`` is ``kept`` or the reason why not, ``status`` that
of the last response (null: there was none), ``duration_s`` from the first request to the last byte,
waits between attempts included."""


def key_of(dataset: str, source_id: str) -> str:
    """Return the 128-bit key (32 hex digits) of a picture: unique, and random when sorted."""
    return hashlib.sha256(f"{dataset}\0{source_id}".encode()).hexdigest()[:32]


def uniform_hash(seed: int, key: str, purpose: str) -> int:
    """Return 64 bits that stand for a random draw about ``key``.

    Every random choice of a pure stage is one of these, so it depends on neither the order of
    work nor the number of workers. ``purpose`` keeps independent choices independent.
    """
    digest = hashlib.sha256(f"{purpose}\0{seed}\0{key}".encode()).digest()
    return int.from_bytes(digest[:8], "big")
