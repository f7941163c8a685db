"""``mirror.json``: what a finished mirror holds, and of what it is one.

It is written last, and is the commit. The checksums in it are of the files as they were published,
so that nobody who plans to read these has to compute them again.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace

from pipeline import storage
from pipeline.errors import EvenmixError
from pipeline.receipts import Checksum
from pipeline.storage import FileInfo

MANIFEST = "mirror.json"


@dataclass(frozen=True)
class Manifest:
    """What a mirror is a copy of, and the checksums of the files to be read, by name.

    ``revision`` is the full commit of a source on the Hub, None elsewhere.
    """

    source: str
    revision: str | None
    files: Mapping[str, Checksum]


def publish_manifest(folder: str, manifest: Manifest) -> None:
    """Declare a mirror finished."""
    document = json.dumps(asdict(manifest), sort_keys=True, indent=1)
    storage.publish(storage.join(folder, MANIFEST), document.encode())


def read_manifest(folder: str) -> Manifest | None:
    """Return the manifest of a mirror, or None if it is not finished.

    Raises:
        EvenmixError: it is damaged.
    """
    url = storage.join(folder, MANIFEST)
    if not storage.exists(url):
        return None
    try:
        document = json.loads(storage.read_bytes(url))
        source, revision = document["source"], document["revision"]
        files = {name: Checksum(**file) for name, file in document["files"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise EvenmixError(f"{url} is damaged ({error}); remove it and mirror again") from error
    return Manifest(source, revision, files)


def with_known_versions(files: Sequence[FileInfo]) -> list[FileInfo]:
    """Give files that have no version of their own the one in the manifest beside them, if any.

    Raises:
        EvenmixError: one has not the size that the manifest says, or the manifest is damaged.
    """
    folders = {file.url.removesuffix(f"/{file.name}") for file in files if file.version is None}
    known = {
        storage.join(folder, name): checksum
        for folder in folders
        if "://" not in folder and (manifest := read_manifest(folder))
        for name, checksum in manifest.files.items()
    }
    return [_with_version(file, known.get(file.url)) for file in files]


def _with_version(file: FileInfo, known: Checksum | None) -> FileInfo:
    if known is None:
        return file
    if file.num_bytes != known.num_bytes:
        raise EvenmixError(
            f"{file.url} has {file.num_bytes:,} bytes, but was mirrored with {known.num_bytes:,}; "
            "remove the mirror and make it again"
        )
    return replace(file, version=f"crc32c:{known.crc32c}")
