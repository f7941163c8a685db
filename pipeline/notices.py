"""What a command, and the workers of its job on this machine, tell whoever waits: a few lines.

Workers' logging is silenced, and what they printed would tear the display of the command. So the
messages of a few loggers, such as that a model's server is down, go into a file, which the command
reads as it waits, and prints above its display.
"""

import logging
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from pipeline.printable import printable

_LOGGERS = ("captioning", "pipeline.stores")
"""The loggers whose messages are for people; they say a thing once, not once a record."""

_FILE = "EVENMIX_NOTICES"


def send_notices() -> None:
    """Have this process, which is one of a job, write its notices where the command reads them."""
    if (file := os.environ.get(_FILE)) is None:
        return
    handler = logging.FileHandler(file, encoding="utf-8", errors="backslashreplace")
    for name in _LOGGERS:
        logger = logging.getLogger(name)
        logger.setLevel(logging.INFO)
        logger.addHandler(handler)


@contextmanager
def print_notices() -> Iterator[None]:
    """Print the notices of this process itself."""
    printer = _Printer()
    for name in _LOGGERS:
        logging.getLogger(name).setLevel(logging.INFO)
        logging.getLogger(name).addHandler(printer)
    try:
        yield
    finally:
        for name in _LOGGERS:
            logging.getLogger(name).removeHandler(printer)


class _Printer(logging.Handler):
    """Prints to what stderr is at the time: a live display prints above itself."""

    def emit(self, record: logging.LogRecord) -> None:
        print(printable(record.getMessage()), file=sys.stderr)


class Notices:
    """The command's end: a file of notices, of which the new ones are printed now and then."""

    def __init__(self, file: IO[str]) -> None:
        self._file = file
        self.environment = {_FILE: file.name}

    def show(self) -> None:
        """Print what is new."""
        from pipeline.progress import console  # noqa: PLC0415  # workers do without rich

        for line in self._file.read().splitlines():
            console.print(printable(line), markup=False, soft_wrap=True)


@contextmanager
def notices() -> Iterator[Notices]:
    """Open a file for the notices of a job; the last ones are printed when it ends."""
    with tempfile.TemporaryDirectory(prefix="notices-") as folder:
        path = Path(folder) / "notices"
        path.touch()
        with path.open(encoding="utf-8", errors="replace") as file:
            its_notices = Notices(file)
            try:
                yield its_notices
            finally:
                its_notices.show()
