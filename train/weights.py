"""The weights of a model in one file: our own in safetensors, or a checkpoint of i1's (``.pt``).

Ours have PyTorch's names and layouts too, those of i1's model exactly i1's, so that any library
reads them; the model's shape is in the file's metadata.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Annotated

import numpy as np
from pydantic import Field, TypeAdapter, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file, save_file

from pipeline.errors import EvenmixError
from train.baselines import BaselineConfig
from train.i1_checkpoint import open_i1_checkpoint
from train.model import ModelConfig, Params, abstract_params
from train.tensors import (
    Unused,
    WeightsFile,
    all_tensors,
    read_params,
    stated_shape,
    tensor_shapes,
)
from train.torch_layout import check_tensors

METADATA_KEY = "model"
# Tried in this order: only a baseline's shape states its kind.
SHAPE: TypeAdapter[ModelConfig] = TypeAdapter(
    Annotated[BaselineConfig | ModelConfig, Field(union_mode="left_to_right")]
)
OF_A_RESOLUTION = {"input_size", "image_resolution"}
UNUSED_FILE = "unused.safetensors"


def load_weights(path: str, config: ModelConfig) -> Params:
    """Read the weights of a model of this shape, which may be of another resolution; numpy arrays.

    Raises:
        EvenmixError: the file is missing or damaged, or of another model.
    """
    with open_weights(path) as file:
        check_same_model(path, file.config, config)
        return read_params(file.like, file.read)


def open_weights(path: str) -> AbstractContextManager[WeightsFile]:
    """Open a file of weights of either kind.

    Raises:
        EvenmixError: the file is missing, damaged, or of neither kind.
    """
    return open_i1_checkpoint(path) if path.endswith(".pt") else open_safetensors(path)


def check_same_model(place: str, found: ModelConfig, wanted: ModelConfig) -> None:
    """Compare the shapes of two models, but for the resolution.

    Raises:
        EvenmixError: they differ.
    """
    one, other = ({"kind": "i1"} | stated_shape(shape) for shape in (found, wanted))
    differences = [
        f"{name} is {one.get(name)}, not {other.get(name)}"
        for name in other | one
        if one.get(name) != other.get(name) and name not in OF_A_RESOLUTION
    ]
    if differences:
        raise EvenmixError(
            f"{place} is of another model than the configured one: {'; '.join(differences)}"
        )


@contextmanager
def open_safetensors(path: str) -> Iterator[WeightsFile]:
    """Open a file that :func:`write_safetensors` has written.

    Raises:
        EvenmixError: the file is missing, damaged, or not one of ours.
    """
    with ExitStack() as opened:
        try:
            file = opened.enter_context(safe_open(Path(path).expanduser(), framework="numpy"))
            config = SHAPE.validate_json((file.metadata() or {}).get(METADATA_KEY, ""))
            names = file.keys()
            found = {name: tuple(file.get_slice(name).get_shape()) for name in names}
        except (OSError, SafetensorError) as error:
            raise EvenmixError(f"cannot read the weights {path}: {error}") from error
        except ValidationError as error:
            raise EvenmixError(
                f"{path} does not state the shape of its model; give weights of evenmix, or a "
                "checkpoint of i1's (.pt)"
            ) from error
        like = abstract_params(config)
        check_tensors(path, found, tensor_shapes(like))
        yield WeightsFile(config, like, file.get_tensor)


def write_safetensors(
    path: str, config: ModelConfig, params: Params, unused: Unused | None = None
) -> None:
    """Save weights with the shape of their model; those that i1 has and never uses may be zeros.

    Raises:
        OSError: the file cannot be written; one that was there before is untouched.
    """
    metadata = {METADATA_KEY: json.dumps(stated_shape(config))}
    _save(Path(path), all_tensors(params, unused or {}), metadata)


def save_unused(output: Path, unused: Unused) -> None:
    """Keep weights that are not used in the output folder of a run, for its export.

    Raises:
        OSError: the file cannot be written.
    """
    _save(output / UNUSED_FILE, unused, {})


def load_unused(output: Path) -> Unused:
    """Return the unused weights that the output folder of a run keeps, if it does.

    Raises:
        EvenmixError: their file is damaged.
    """
    path = output / UNUSED_FILE
    if not path.exists():
        return {}
    try:
        unused: Unused = load_file(path)
    except (OSError, SafetensorError) as error:
        raise EvenmixError(
            f"{path} is damaged ({error}); remove it: an export then has zeros in its place"
        ) from error
    return unused


def _save(path: Path, tensors: Mapping[str, np.ndarray], metadata: dict[str, str]) -> None:
    part = path.with_name(f"{path.name}.part")
    try:
        save_file({name: np.ascontiguousarray(x) for name, x in tensors.items()}, part, metadata)
    except SafetensorError as error:
        raise OSError(str(error)) from error
    part.replace(path)
