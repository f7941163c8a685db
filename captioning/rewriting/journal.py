"""Results kept in a file as they come, so that a run which is killed goes on where it was."""

import fcntl
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.errors import EvenmixError


class Journal:
    """JSON lines: first the settings, then a result a line with its number.

    One process writes it at a time. What a killed one has left of a last line is dropped.
    ``results`` are those that are kept, by number; of several with one number the last counts.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        """Begin a journal, or go on with that of the same settings.

        Raises:
            EvenmixError: it has other settings, is damaged, in use, or cannot be written.
        """
        self._path = path
        self.results: dict[int, dict[str, Any]] = {}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("a+b")  # open, and so locked, until close()
        except OSError as error:
            raise EvenmixError(f"cannot write {path}: {error}") from error
        try:
            self._begin(settings)
        except BaseException:
            self._file.close()
            raise

    def _begin(self, settings: Mapping[str, Any]) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise EvenmixError(
                f"another process writes {self._path}; wait for it, or name another output"
            ) from error
        self._file.seek(0)
        data = self._file.read()
        whole = data[: data.rfind(b"\n") + 1]
        self._file.truncate(len(whole))
        if not whole:
            self._append({"settings": dict(settings)})
            return
        try:
            header, *lines = map(json.loads, whole.splitlines())
            found = header["settings"]
            self.results = {line["number"]: line["result"] for line in lines}
        except (ValueError, KeyError, TypeError) as error:
            raise EvenmixError(
                f"{self._path} is damaged ({error!r}); remove it, and its results are made again"
            ) from error
        # What JSON does not tell apart is no difference.
        wanted = json.loads(json.dumps(settings))
        if differing := [name for name in wanted if wanted[name] != found.get(name)]:
            raise EvenmixError(
                f"{self._path} is from a run with other settings ({', '.join(differing)}); name "
                "another output, or remove that file"
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
                file.write(json.dumps(line).encode() + b"\n")
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
