"""The rules of a recipe: texts in which ``{name}`` stands for a value of a record.

``{name:function}`` stands for what a function of :data:`FUNCTIONS` makes of the value.
"""

import hashlib
import re
from collections.abc import Callable, Mapping
from typing import Any

_NAME = re.compile(r"\{(\w+)(?::(\w+))?\}")


class Unfilled(Exception):
    """A value that a rule asks for is missing or cannot stand in a text."""


def multimedia_commons_path(download_url: str) -> str:
    """Return where the Multimedia Commons bucket keeps a YFCC100M picture, without its suffix.

    The name is the MD5 of the picture's Flickr URL with each byte in hex, but without the zero of
    a byte below 16; its first six digits are two folders.
    """
    digest = hashlib.md5(download_url.encode(), usedforsecurity=False).digest()
    name = "".join(f"{byte:x}" for byte in digest)
    return f"{name[:3]}/{name[3:6]}/{name}"


FUNCTIONS: Mapping[str, Callable[[str], str]] = {"multimedia_commons_path": multimedia_commons_path}


def check(rule: str) -> str:
    """Return a rule that is one.

    Raises:
        ValueError: it names no value, has a brace too many, or asks for an unknown function.
    """
    found = list(_NAME.finditer(rule))
    if not found or set("{}") & set(_NAME.sub("", rule)):
        raise ValueError(f"{rule!r} is no rule: it needs a {{name}}, and each brace its other one")
    unknown = {match[2] for match in found if match[2]} - FUNCTIONS.keys()
    if unknown:
        known = ", ".join(sorted(FUNCTIONS))
        raise ValueError(f"{rule!r} asks for {', '.join(sorted(unknown))}; there is {known}")
    return rule


def names(rule: str) -> set[str]:
    """Return the names of the values that a rule asks for."""
    return {match[1] for match in _NAME.finditer(rule)}


def fill(rule: str, values: Mapping[str, Any]) -> str:
    """Put values into a rule.

    Raises:
        Unfilled: one is missing, null or no text or number, a folder is asked for where there is
            none, or nothing at all comes out.
    """

    def put(match: re.Match[str]) -> str:
        name, function = match.groups()
        value = value_of(name, values)
        if value is None:
            raise Unfilled(f"its {name} is null")
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            raise Unfilled(f"its {name} is a {type(value).__name__}, neither a text nor a number")
        if value == "" and name in ("folder", "parent"):
            raise Unfilled(f"its {name} is empty: the source must be a pattern with that folder")
        return FUNCTIONS[function](str(value)) if function else str(value)

    filled = _NAME.sub(put, rule)
    if not filled:
        raise Unfilled(f"{rule} gives nothing")
    return filled


def value_of(name: str, values: Mapping[str, Any]) -> Any:
    """Return a value by its name.

    Raises:
        Unfilled: there is none.
    """
    if name not in values:
        raise Unfilled(f"it has no {name!r}; it has {', '.join(sorted(values))}")
    return values[name]
