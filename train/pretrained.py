"""The files of a pretrained model: in a folder, or at a commit on the Hugging Face Hub.

Tensors come from safetensors files alone, which are data and no program; each has the shape that
is asked for, or is an error that names it. Of a model on the Hub only the files that are asked for
are fetched.
"""

import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from pydantic import BaseModel, ValidationError
from safetensors import SafetensorError, safe_open

from pipeline.errors import EvenmixError
from pipeline.hub import model_file

Json = TypeVar("Json", bound=BaseModel)

_NAME_ON_HUB = re.compile(r"[\w.-]+/[\w.-]+")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_TENSOR_FILE = re.compile(r"[\w-][\w.-]*\.safetensors")
_FLOATS = {"BF16", "F16", "F32"}


@dataclass(frozen=True)
class Pretrained:
    """A model by its folder, or by its name on the Hub and a commit.

    The token for gated models is HF_TOKEN in the environment, which huggingface_hub reads.

    Raises:
        EvenmixError: there is no such folder, or the name has no commit.
    """

    name: str
    revision: str | None = None

    def __post_init__(self) -> None:
        if self._folder.is_dir():
            if self.revision is not None:
                raise EvenmixError(f"{self.name} is a folder: remove the revision {self.revision}")
        elif not _NAME_ON_HUB.fullmatch(self.name):
            raise EvenmixError(
                f"the folder {self.name} does not exist; name one that holds a model, or a model "
                "on the Hugging Face Hub as OWNER/NAME"
            )
        elif self.revision is None or not _COMMIT.fullmatch(self.revision):
            raise EvenmixError(
                f"{self.name} is no folder here; if it is a model on the Hugging Face Hub, set "
                "revision to a commit of it, all 40 digits, so that its weights never change"
            )

    @property
    def _folder(self) -> Path:
        return Path(self.name).expanduser()

    def path(self, file: str) -> Path:
        """Return where a file is on this machine.

        Raises:
            EvenmixError: the model has no such file, or it cannot be had.
        """
        found = self._find(file)
        if found is None:
            raise EvenmixError(f"{self.name} has no {file}; give all files of the model")
        return found

    def parse(self, file: str, model: type[Json]) -> Json:
        """Read a JSON file.

        Raises:
            EvenmixError: as :meth:`path`, or it is no such JSON; the text has all mistakes.
        """
        path = self.path(file)
        try:
            return model.model_validate_json(path.read_bytes())
        except ValidationError as error:
            mistakes = "; ".join(
                f"{'.'.join(str(part) for part in details['loc']) or 'the file'}: {details['msg']}"
                for details in error.errors()
            )
            raise EvenmixError(f"{path} is of another kind of model: {mistakes}") from error

    @contextmanager
    def tensors(self, wanted: re.Pattern[str]) -> Iterator["Tensors"]:
        """Open the files with the tensors whose full name matches, known by the group ``name``.

        Raises:
            EvenmixError: as :meth:`path`, or a file is damaged.
        """
        with ExitStack() as stack:
            found = {}
            for path in self._tensor_files(wanted):
                try:
                    file = stack.enter_context(safe_open(path, framework="numpy"))
                except (SafetensorError, OSError) as error:
                    raise EvenmixError(
                        f"{path} is damaged or no safetensors file ({error}); download it again"
                    ) from error
                for full in file.keys():  # noqa: SIM118 - it is no mapping
                    if match := wanted.fullmatch(full):
                        found[match["name"]] = _Place(path, file, full)
            yield Tensors(self.name, found)

    def _tensor_files(self, wanted: re.Pattern[str]) -> list[Path]:
        index = "model.safetensors.index.json"
        if self._find(index) is None:
            return [self.path("model.safetensors")]
        files = self.parse(index, _Index).weight_map
        needed = sorted({file for name, file in files.items() if wanted.fullmatch(name)})
        if odd := [file for file in needed if not _TENSOR_FILE.fullmatch(file)]:
            raise EvenmixError(f"{self.name}: {index} names {odd[0]!r}, which is no file of it")
        return [self.path(file) for file in needed]

    def _find(self, file: str) -> Path | None:
        if self.revision is not None:
            return model_file(self.name, self.revision, file)
        path = self._folder / file
        return path if path.is_file() else None


@dataclass(frozen=True)
class _Place:
    """A tensor in a file that is open."""

    path: Path
    file: Any
    name: str


@dataclass(frozen=True)
class Tensors:
    """The tensors of a model's open files; see :meth:`Pretrained.tensors`."""

    model: str
    places: Mapping[str, _Place]

    def check(self, name: str, shape: tuple[int, ...]) -> None:
        """Look for a tensor of floats in the files' headers.

        Raises:
            EvenmixError: there is none, or it is of another shape or type.
        """
        place = self.places.get(name)
        if place is None:
            raise EvenmixError(f"{self.model} has no tensor {name}; give all files of the model")
        tensor = place.file.get_slice(place.name)
        found, dtype = tuple(tensor.get_shape()), tensor.get_dtype()
        if found != shape or dtype not in _FLOATS:
            raise EvenmixError(
                f"{place.path}: {place.name} is {dtype} {found}, not floats of {shape}, as the "
                "model's configuration has it; the files are of different models"
            )

    def read(self, name: str) -> np.ndarray:
        """Read a tensor that is there."""
        place = self.places[name]
        tensor: np.ndarray = place.file.get_tensor(place.name)
        return tensor


class _Index(BaseModel):
    """What lists the files of a model that has several: the file of each tensor."""

    weight_map: dict[str, str]
