"""Writing below the folder that the user named for a command's output."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pipeline.errors import EvenmixError


@contextmanager
def writing_to(folder: Path) -> Iterator[None]:
    """Make the folder if need be, and tell the user which folder it is that cannot be written to.

    Raises:
        EvenmixError: an OSError inside the block, or the folder cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        raise EvenmixError(
            f"cannot write to {folder}: {error}; free some space, check the permissions or choose "
            "another folder"
        ) from error
