"""What a long copy shows: how many bytes are done, how fast, and how long it will take."""

import threading
import time
from datetime import timedelta

from rich.filesize import decimal
from rich.live import Live
from rich.text import Text

from pipeline.progress import console

_LINE_EVERY_S = 15.0
_REFRESH_EVERY_S = 0.5


class ByteProgress:
    """Counts bytes, from any thread: live on a terminal, else a line now and then.

    ``done_bytes`` were done before, in an earlier run.
    """

    def __init__(self, what: str, total_bytes: int, done_bytes: int = 0) -> None:
        self._what = what
        self._total = total_bytes
        self._done_before = self._done = done_bytes
        self._lock = threading.Lock()
        self._started = time.monotonic()
        self._every_s = _REFRESH_EVERY_S if console.is_terminal else _LINE_EVERY_S
        self._next = self._started + self._every_s
        self._live = Live(console=console, transient=True, auto_refresh=False)

    def __enter__(self) -> "ByteProgress":
        if console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._live.stop()

    def advance(self, num_bytes: int) -> None:
        """Count ``num_bytes`` more as done."""
        with self._lock:
            self._done += num_bytes
            now = time.monotonic()
            if now < self._next:
                return
            self._next = now + self._every_s
            if console.is_terminal:
                self._live.update(Text(self._line(now)), refresh=True)
            else:
                console.print(self._line(now), soft_wrap=True)

    def _line(self, now: float) -> str:
        per_s = (self._done - self._done_before) / (now - self._started)
        left = round((self._total - self._done) / per_s) if per_s else None
        return (
            f"{self._what}: {decimal(self._done)} of {decimal(self._total)}, "
            f"{decimal(round(per_s))}/s" + (f", {timedelta(seconds=left)} left" if left else "")
        )
