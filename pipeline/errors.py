"""What a user is told when a run cannot go on."""

import difflib
from collections.abc import Iterable


class EvenmixError(Exception):
    """An obstacle that the user can remove; its text names the file, the record and the remedy.

    The command line prints it as one line and exits with status 1.
    """


def did_you_mean(word: str, known: Iterable[str], otherwise: str = "") -> str:
    """Return the end of a sentence about an unknown word: the likely one, else ``otherwise``."""
    close = difflib.get_close_matches(word, list(known), n=1)
    hint = f"did you mean {close[0]!r}?" if close else otherwise
    return f"; {hint}" if hint else ""
