"""The folder of a machine where the processes of one user meet, and nobody else can."""

import os
import stat
import tempfile
from pathlib import Path

from pipeline.errors import EvenmixError


def own_folder() -> Path:
    """Return the folder, which is made if it is not there.

    Raises:
        EvenmixError: another user made it, or may read or write it.
    """
    base = Path(tempfile.gettempdir()) / f"evenmix-{os.getuid()}"
    base.mkdir(mode=0o700, exist_ok=True)
    status = base.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o077:
        raise EvenmixError(f"{base} is not a folder of yours alone; remove it, or set TMPDIR")
    return base
