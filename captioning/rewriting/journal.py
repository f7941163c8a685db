"""Results kept in a file as they come, so that a run which is killed goes on where it was."""

import fcntl
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

from pipeline.errors import EvenmixError


class Journal:
    """JSON lines: first the settings, then a result a line with its number.

    One process writes it at a time. What a killed one has left of a last line is dropped; a file
    of another make stays as it is. ``results`` are those that are kept, by number; of several
    with one number the last counts.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        """Begin a journal, or go on with that of the same settings.

        Raises:
            EvenmixError: it has other settings, is damaged, of another make or in use, or cannot be
                written.
        """
        self._path = path
        self.results: dict[int, dict[str, Any]] = {}
        self._file = _open_locked(path)  # and so locked, until close()
        try:
            self._begin(settings)
        except BaseException:
            self._file.close()
            raise

    def _begin(self, settings: Mapping[str, Any]) -> None:
        header = {"settings": dict(settings)}
        self._file.seek(0)
        data = self._file.read()
        whole = data[: data.rfind(b"\n") + 1]
        if not whole:
            if not _line(header).startswith(data):
                raise self._foreign()
            self._file.truncate(0)
            self._append(header)
            return
        first, *others = whole.splitlines()
        # What JSON does not tell apart is no difference.
        self._require_same(first, json.loads(_line(header))["settings"])
        try:
            results = [json.loads(line) for line in others]
            self.results = {line["number"]: line["result"] for line in results}
        except (ValueError, KeyError, TypeError) as error:
            raise EvenmixError(
                f"{self._path} is damaged ({error!r}); remove it, and its results are made again"
            ) from error
        self._file.truncate(len(whole))

    def _require_same(self, first_line: bytes, settings: Mapping[str, Any]) -> None:
        try:
            found = json.loads(first_line)["settings"]
            differing = [name for name in settings if settings[name] != found.get(name)]
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise self._foreign() from error
        if differing:
            raise EvenmixError(
                f"{self._path} is from a run with other settings ({', '.join(differing)}); name "
                "another output, or remove that file"
            )

    def _foreign(self) -> EvenmixError:
        return EvenmixError(
            f"{self._path} is where answers would be kept, but it is another file; name another "
            "output, or move that file away"
        )

    def keep(self, number: int, result: Mapping[str, Any]) -> None:
        """Add a result.

        Raises:
            EvenmixError: it cannot be written.
        """
        self._append({"number": number, "result": dict(result)})
        self.results[number] = dict(result)

    def _append(self, line: Mapping[str, Any]) -> None:
        try:
            with self._path.open("ab") as file:
                file.write(_line(line))
        except OSError as error:
            raise EvenmixError(
                f"cannot write {self._path}: {error}. What is in it is not lost; free some space "
                "and start the same command again."
            ) from error

    def close(self) -> None:
        """Let go of the file, which stays."""
        self._file.close()

    def remove(self) -> None:
        """Remove the file, when its results have another place."""
        self._path.unlink()


def _line(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value).encode() + b"\n"


def _open_locked(path: Path) -> BinaryIO:
    """Open a file, which need not be there, for this process alone."""
    while True:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = path.open("a+b")
        except OSError as error:
            raise EvenmixError(f"cannot write {path}: {error}") from error
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.close()
            raise EvenmixError(
                f"another process writes {path}; wait for it, or name another output"
            ) from error
        if _is_at(path, file):
            return file
        # Another process has finished and removed it since it was opened here.
        file.close()


def _is_at(path: Path, file: BinaryIO) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False
