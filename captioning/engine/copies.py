"""A model in a bucket, copied once to each machine that asks it: vLLM wants files.

All processes of a machine share the copy. The first that wants it makes it, under a lock of the
kernel, so that one that is killed leaves the work to the next.
"""

import fcntl
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath

import google_crc32c

from captioning.engine.models import is_url, listing_digest, locate
from captioning.engine.own_folder import own_folder
from pipeline import storage
from pipeline.errors import EvenmixError
from pipeline.storage import FileInfo

_CONCURRENT_FILES = 8
_CHUNK_BYTES = 16 << 20


def on_this_machine(model: str) -> str:
    """Return where vLLM finds a model from this machine: a folder, or its name on the Hub.

    A model at a URL is copied, if that has not been done yet; so this may take minutes.

    Raises:
        EvenmixError: there is no such model, it cannot be read, or the disk is full.
    """
    location = locate(model)
    return str(_copy(location)) if is_url(location) else location


def _copy(url: str) -> Path:
    digest = listing_digest(url).removeprefix("listing-sha256:")
    folder = own_folder() / "models" / digest[:16]
    folder.parent.mkdir(exist_ok=True)
    partial = folder.with_suffix(".partial")
    lock = os.open(folder.with_suffix(".lock"), os.O_RDWR | os.O_CREAT, mode=0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if folder.is_dir():
            return folder
        shutil.rmtree(partial, ignore_errors=True)
        with ThreadPoolExecutor(_CONCURRENT_FILES) as pool:
            for _ in pool.map(lambda file: _copy_file(file, partial), storage.list_files(url)):
                pass
        partial.rename(folder)
        return folder
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise EvenmixError(
            f"the model {url} cannot be copied to {folder}: {error}; if the disk is full, give the "
            "machine a larger one (resources.caption.disk_gb)"
        ) from error
    finally:
        os.close(lock)


def _copy_file(file: FileInfo, folder: Path) -> None:
    name = PurePosixPath(file.name)
    if name.is_absolute() or ".." in name.parts:
        raise EvenmixError(f"{file.url} has a name that leads out of its folder; rename it")
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    crc = google_crc32c.Checksum()
    with path.open("xb") as copy:
        for chunk in storage.read_chunks(file.url, _CHUNK_BYTES):
            crc.update(chunk)
            copy.write(chunk)
        num_bytes = copy.tell()
    is_known = (file.version or "").startswith("crc32c:")
    is_other = is_known and file.version != f"crc32c:{crc.hexdigest().decode()}"
    if num_bytes != file.num_bytes or is_other:
        raise EvenmixError(f"{file.url} has changed while it was copied; start the command again")
