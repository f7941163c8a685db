"""Recipes: configurations that come with evenmix, and that others build on.

    base = "i1-1b-256"
    output = "runs/mine"
    [text]
    weights = "models/t5gemma"

is a whole configuration: ``base`` names a recipe of this package, or a file by its path from the
file that names it, and what is said here wins. Tables are merged key by key; but one that says
another ``kind`` or ``encoder`` than below takes the other's place, since its keys are others, too.
"""

import posixpath
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline.config_file import Layer, read_toml
from pipeline.errors import EvenmixError, did_you_mean

RECIPES = Path(__file__).with_name("recipes")

# The keys that say which keys their table has.
DISCRIMINATORS = ("kind", "encoder")


def recipe_names() -> list[str]:
    """Return the names of the recipes of this package."""
    return sorted(path.stem for path in RECIPES.glob("*.toml"))


def read_layers(name: str) -> list[Layer]:
    """Return a recipe or a file and, one after the other, what it builds on.

    Raises:
        EvenmixError: one of them is missing or no TOML, or builds on itself.
    """
    return _read_layers(_locate(name), ())


def merge(layers: Sequence[Layer]) -> dict[str, Any]:
    """Return what the layers say together; an earlier one wins over a later one."""
    merged: dict[str, Any] = {}
    for layer in reversed(layers):
        merged = _over(merged, layer.document)
    return merged


def _read_layers(place: str, built_on_it: tuple[str, ...]) -> list[Layer]:
    if place in built_on_it:
        raise EvenmixError(f"{place} builds on itself; remove a `base`")
    document = read_toml(place)
    base = document.pop("base", None)
    if base is None:
        return [Layer(place, document)]
    if not isinstance(base, str):
        raise EvenmixError(f"{place}: base is {base!r}; name a recipe or a file")
    try:
        below = _read_layers(_locate(base, place), (*built_on_it, place))
    except EvenmixError as error:
        raise EvenmixError(f"{place}: base: {error}") from error
    return [Layer(place, document), *below]


def _locate(name: str, named_by: str = "") -> str:
    """Return the path or URL of a recipe, or of a file beside the one that names it."""
    if "/" not in name and not name.endswith(".toml"):
        if name not in (known := recipe_names()):
            hint = did_you_mean(name, known, f"there are {', '.join(known)}")
            raise EvenmixError(f"{name!r} is no recipe{hint} (a file: {name}.toml, or ./{name})")
        return str(RECIPES / f"{name}.toml")
    if "://" in name:
        return name
    scheme, separator, path = named_by.rpartition("://")
    # Without "..", so that a file has one name, by which a circle is seen.
    return scheme + separator + posixpath.normpath(posixpath.join(posixpath.dirname(path), name))


def _over(below: Any, above: Any) -> Any:
    """Return what is said above something else: a table goes on with the other's keys."""
    if not (isinstance(below, dict) and isinstance(above, dict)) or _differ(below, above):
        return above
    return below | {key: _over(below.get(key), value) for key, value in above.items()}


def _differ(below: dict[str, Any], above: dict[str, Any]) -> bool:
    return any(below[key] != above[key] for key in DISCRIMINATORS if key in below and key in above)
