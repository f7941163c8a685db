"""Prompts to draw pictures for, from a file."""

import json
from pathlib import Path

from pipeline.errors import EvenmixError


def read_prompts(path: Path) -> list[str]:
    """Return the prompts of a text file, one a line, or the rewritten ones of a JSON-lines file.

    Raises:
        EvenmixError: the file cannot be read, is empty, or has lines of another kind.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise EvenmixError(f"cannot read prompts from {path}: {error}") from error
    lines = [line.strip() for line in lines if line.strip()]
    prompts = [_rewritten(path, line) for line in lines] if path.suffix == ".jsonl" else lines
    if not prompts:
        raise EvenmixError(f"{path} has no prompts; write one a line")
    return prompts


def _rewritten(path: Path, line: str) -> str:
    """Return the prompt of a line of `evenmix rewrite`."""
    try:
        return str(json.loads(line)["rewritten"])
    except (ValueError, KeyError, TypeError) as error:
        raise EvenmixError(
            f'{path}: {line[:80]!r} is no JSON object with "rewritten", as `evenmix rewrite` '
            "writes it; give a text file with one prompt a line"
        ) from error
