"""Google Cloud Storage in its own words, where gcsfs says less than a corpus needs.

gcsfs signs in, keeps the connections, and tries a request again five times over half a minute. Its
own uploads frame small objects with a constant boundary, which the bytes of a picture may contain,
go on at the wrong place when the store has kept nothing of a chunk, and hide behind the clean-up of
a failed upload why it failed. Its own listings ask for one page after the other, with all that is
known of each object. So both are here, as the JSON API has them:
https://cloud.google.com/storage/docs/performing-resumable-uploads and
https://cloud.google.com/storage/docs/json_api/v1/objects/list.
"""

import json
import os
import uuid
from base64 import b64encode
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import chain, pairwise
from typing import Any

import fsspec
import google_crc32c

from pipeline.stores import ask, is_absence, status_of

# Else gcsfs, which looks at this when it is imported, asks over gRPC before each read what kind of
# bucket it is, and where that cannot be reached, for half a minute.
os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")

_CHUNK_BYTES = 8 << 20  # a multiple of 256 KiB, as the store demands
_CONCURRENT_LISTINGS = 32  # of pages, which have 1,000 objects
_OBJECT_FIELDS = "name,size,crc32c"
_UPLOAD = "evenmix-upload"
"""The metadata by which an upload whose answer was lost is known again."""


def upload(fs: fsspec.AbstractFileSystem, url: str, path: str, data: bytes, create: bool) -> bool:
    """Write an object, in chunks; the store compares its CRC-32C before it appears.

    Returns False, and changes nothing, if ``create`` and another upload has taken the name.

    Raises:
        EvenmixError: it cannot be written, also after the attempts of :func:`pipeline.stores.ask`.
    """
    upload_id = uuid.uuid4().hex
    return ask(url, partial(_upload, fs, path, data, create, upload_id), "written")


def _upload(
    fs: fsspec.AbstractFileSystem, path: str, data: bytes, create: bool, upload_id: str
) -> bool:
    bucket, _, name = path.partition("/")
    crc32c = b64encode(google_crc32c.Checksum(data).digest()).decode()
    condition = {"ifGenerationMatch": "0"} if create else {}
    try:
        headers, _ = fs.call(
            "POST",
            fs.base.replace("/storage/v1/", "/upload/storage/v1/") + "b/{}/o",
            bucket,
            uploadType="resumable",
            json={"name": name, "crc32c": crc32c, "metadata": {_UPLOAD: upload_id}},
            **condition,
        )
        _send(fs, headers["Location"], data)
    except FileExistsError:
        try:
            found = object_info(fs, path, "metadata")
        except FileNotFoundError:
            # Another build has swept it meanwhile, so the name is free again.
            raise ConnectionError("what had the name is gone") from None
        return bool(found.get("metadata", {}).get(_UPLOAD) == upload_id)
    return True


def _send(fs: fsspec.AbstractFileSystem, session: str, data: bytes) -> None:
    """Send the chunks of an upload, each from where the store says that it has got to.

    Raises:
        ConnectionError: the store has lost the upload, which must begin anew.
    """
    view, start = memoryview(data), 0
    while True:
        chunk = view[start : start + _CHUNK_BYTES]
        place = f"{start}-{start + len(chunk) - 1}" if chunk else "*"
        content_range = {"Content-Range": f"bytes {place}/{len(data)}"}
        try:
            headers, reply = fs.call("PUT", session, headers=content_range, data=chunk)
        except Exception as error:
            # Of whatever type: gcsfs has one for each status.
            if is_absence(error):
                raise ConnectionError("the store no longer knows the upload") from None
            raise
        if reply:
            return  # It describes the object.
        if "Range" not in headers:
            raise ConnectionError("the store has kept nothing of the upload")
        kept = int(headers["Range"].rpartition("-")[2]) + 1
        if kept <= start:
            raise ConnectionError("the store has kept nothing more of the upload")
        start = kept


def object_info(
    fs: fsspec.AbstractFileSystem, path: str, fields: str = _OBJECT_FIELDS
) -> dict[str, Any]:
    """Return what the store says of one object, in one request.

    Raises:
        FileNotFoundError: there is no such object.
    """
    bucket, _, name = path.partition("/")
    info: dict[str, Any] = fs.call("GET", "b/{}/o/{}", bucket, name, json_out=True, fields=fields)
    return info


def read_tail(fs: fsspec.AbstractFileSystem, path: str, num_bytes: int) -> tuple[bytes, int]:
    """Return the last ``num_bytes`` bytes of an object, or all, and its size, in one request.

    Raises:
        FileNotFoundError: there is no such object.
    """
    try:
        headers, tail = fs.call("GET", fs.url(path), headers={"Range": f"bytes=-{num_bytes}"})
    except Exception as error:
        if status_of(error) == 416:  # An empty object has no last byte.
            return b"", 0
        raise
    return bytes(tail), int(headers["Content-Range"].rpartition("/")[2])


def list_objects(
    fs: fsspec.AbstractFileSystem,
    url: str,
    path: str,
    boundaries: Sequence[str] = (),
    prefix: str = "",
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield path and description of the objects below a folder, sorted by name.

    The parts between ``boundaries``, which are names in order, are listed at once; without any,
    pages are asked for as they are wanted. ``prefix`` is how the names begin.

    Raises:
        EvenmixError: the store is out of reach, or there is no such bucket.
    """
    bucket, _, folder = path.rstrip("/").partition("/")
    folder = f"{folder}/" if folder else ""
    pages = partial(_pages, fs, url, bucket, f"{folder}{prefix}")
    listed: Iterator[list[dict[str, Any]]]
    with ThreadPoolExecutor(_CONCURRENT_LISTINGS) as pool:
        if boundaries:
            ends = [None, *(f"{folder}{boundary}" for boundary in boundaries), None]
            parts = pool.map(lambda part: list(pages(*part)), pairwise(ends))
            listed = chain.from_iterable(parts)
        else:
            listed = pages(None, None)
        for found in chain.from_iterable(listed):
            yield f"{bucket}/{found['name']}", found


def _pages(
    fs: fsspec.AbstractFileSystem,
    url: str,
    bucket: str,
    prefix: str,
    start: str | None,
    end: str | None,
) -> Iterator[list[dict[str, Any]]]:
    """Yield the objects from ``start`` (None: the first) up to and without ``end``, by the page."""
    page: dict[str, Any] = {"nextPageToken": None}
    while "nextPageToken" in page:
        request = partial(
            fs.call,
            "GET",
            "b/{}/o",
            bucket,
            prefix=prefix or None,
            startOffset=start,
            endOffset=end,
            pageToken=page["nextPageToken"],
            fields=f"nextPageToken,items({_OBJECT_FIELDS})",
        )
        page = json.loads(ask(url, request)[1])
        yield page.get("items", [])
