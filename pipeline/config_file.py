"""Reading a TOML file into a pydantic model, with every mistake reported at once."""

import tomllib
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, NamedTuple, TypeVar, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError
from pydantic_core import ErrorDetails

from pipeline import storage
from pipeline.errors import EvenmixError, did_you_mean

Model = TypeVar("Model", bound=BaseModel)


class Section(BaseModel):
    """A table of a configuration file: unknown keys are errors, values do not change."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def _file_name(name: str) -> str:
    if not name.replace("-", "").replace("_", "").replace(".", "").isalnum() or name[0] in "._":
        raise ValueError(
            f"{name!r} becomes a folder name: use letters, digits, '-', '_' and '.', and begin "
            "with a letter or a digit"
        )
    return name


Name = Annotated[str, AfterValidator(_file_name)]
"""The name of something that becomes a folder."""


class Layer(NamedTuple):
    """One of the files that make a configuration together: where it is, and what it says itself."""

    place: str
    document: dict[str, Any]


def load_toml(url: str, model: type[Model], overrides: Mapping[str, Any]) -> Model:
    """Read and check a configuration file.

    ``overrides`` replace values by their dotted names (``mixture.resolution``); a value of None
    leaves the file's.

    Raises:
        EvenmixError: the file is missing or no TOML, or it breaks the model; the text lists all
            mistakes, with a suggestion for each unknown key.
    """
    return configure(url, read_toml(url), model, overrides)


def read_toml(url: str) -> dict[str, Any]:
    """Parse a file.

    Raises:
        EvenmixError: it is missing or no TOML.
    """
    try:
        return tomllib.loads(storage.read_bytes(url).decode())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise EvenmixError(f"{url} is not TOML: {error}") from error


def configure(
    place: str,
    document: dict[str, Any],
    model: type[Model],
    overrides: Mapping[str, Any],
    layers: Sequence[Layer] = (),
) -> Model:
    """Check a configuration that is parsed already; ``place`` names it in the errors.

    ``layers`` are the files of which the document was merged, if there are several, the one that
    wins first: a mistake that is not in ``place`` names its file.

    Raises:
        EvenmixError: as :func:`load_toml`.
    """
    for name, value in overrides.items():
        if value is not None:
            *tables, key = name.split(".")
            section = document
            for table in tables:
                section = section.setdefault(table, {})
                if not isinstance(section, dict):
                    raise EvenmixError(f"{place}: {table} is a value, but must be a table")
            section[key] = value
    try:
        return model.model_validate(document)
    except ValidationError as error:
        lines = [
            f"  {_describe(details, model)}{_elsewhere(details, place, layers)}"
            for details in error.errors()
        ]
        count = f"{len(lines)} mistake" + ("s" if len(lines) > 1 else "")
        raise EvenmixError("\n".join([f"{place} has {count}:", *lines])) from error


def _describe(details: ErrorDetails, model: type[BaseModel]) -> str:
    place = ".".join(str(part) for part in details["loc"]) or "(the whole file)"
    if details["type"] == "extra_forbidden":
        known = _known_keys(model, details["loc"][:-1])
        hint = did_you_mean(str(details["loc"][-1]), known, f"known are {', '.join(sorted(known))}")
        return f"{place}: unknown key{hint}"
    return f"{place}: {details['msg'].removeprefix('Value error, ')}"


def _elsewhere(details: ErrorDetails, place: str, layers: Sequence[Layer]) -> str:
    """Return in which other file a mistake is: the first that says most of where it is."""
    # Where a key is missing, the table is to blame.
    path = details["loc"][:-1] if details["type"] == "missing" else details["loc"]

    def parts_said(layer: Layer) -> int:
        said, found = 0, layer.document
        for part in path:
            # The kind of a table is a part of the path, too, but no key of the file.
            if isinstance(found, dict) and part in found:
                said, found = said + 1, found[part]
        return said

    origin = max(layers, key=parts_said, default=Layer(place, {})).place
    return "" if origin == place else f" (in {origin})"


def _known_keys(model: type[BaseModel], path: tuple[int | str, ...]) -> list[str]:
    """Return the field names of the (sub-)model at a place, looking through containers."""
    models = [model]
    for part in path:
        fields = [m.model_fields[part].annotation for m in models if part in m.model_fields]
        models = [found for annotation in fields for found in _models_in(annotation)] or models
    return [name for found in models for name in found.model_fields]


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [found for argument in get_args(annotation) for found in _models_in(argument)]
