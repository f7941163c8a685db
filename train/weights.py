"""The weights of a model in one file: our own in safetensors, or a checkpoint of i1's (``.pt``).

Ours have PyTorch's names and layouts too, so that any library reads them; the model's shape is in
the file's metadata.
"""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import numpy as np
from pydantic import Field, TypeAdapter, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from pipeline.errors import EvenmixError
from train.baselines import BaselineConfig
from train.i1_checkpoint import read_i1_checkpoint
from train.model import ModelConfig, Params, abstract_params
from train.torch_layout import check_tensors, from_torch, to_torch, torch_shapes

METADATA_KEY = "model"
# Tried in this order: only a baseline's shape states its kind.
SHAPE: TypeAdapter[ModelConfig] = TypeAdapter(
    Annotated[BaselineConfig | ModelConfig, Field(union_mode="left_to_right")]
)
OF_A_RESOLUTION = {"input_size", "image_resolution"}


def load_weights(path: str, config: ModelConfig) -> Params:
    """Read the weights of a model of this shape, which may be of another resolution; numpy arrays.

    Raises:
        EvenmixError: the file is missing or damaged, or of another model.
    """
    read = read_i1_checkpoint if path.endswith(".pt") else read_safetensors
    stated, params = read(path)
    found, wanted = ({"kind": "i1"} | asdict(shape) for shape in (stated, config))
    differences = [
        f"{name} is {found.get(name)}, not {wanted.get(name)}"
        for name in wanted | found
        if found.get(name) != wanted.get(name) and name not in OF_A_RESOLUTION
    ]
    if differences:
        raise EvenmixError(
            f"{path} is of another model than the configured one: {'; '.join(differences)}"
        )
    return params


def read_safetensors(path: str) -> tuple[ModelConfig, Params]:
    """Return the shape and the weights that :func:`write_safetensors` has written.

    Raises:
        EvenmixError: the file is missing, damaged, or not one of ours.
    """
    try:
        with safe_open(Path(path).expanduser(), framework="numpy") as file:
            stated = (file.metadata() or {}).get(METADATA_KEY, "")
            config = SHAPE.validate_json(stated)
            names = file.keys()
            found = {name: tuple(file.get_slice(name).get_shape()) for name in names}
            like = abstract_params(config)
            check_tensors(path, found, torch_shapes(like))
            params: Params = from_torch(like, file.get_tensor)
    except (OSError, SafetensorError) as error:
        raise EvenmixError(f"cannot read the weights {path}: {error}") from error
    except ValidationError as error:
        raise EvenmixError(
            f"{path} does not state the shape of its model; give weights of evenmix, or a "
            "checkpoint of i1's (.pt)"
        ) from error
    return config, params


def write_safetensors(path: str, config: ModelConfig, params: Params) -> None:
    """Save weights with the shape of their model.

    Raises:
        OSError: the file cannot be written.
    """
    tensors = {name: np.ascontiguousarray(array) for name, array in to_torch(params).items()}
    metadata = {METADATA_KEY: json.dumps(asdict(config))}
    try:
        save_file(tensors, path, metadata)
    except SafetensorError as error:
        raise OSError(str(error)) from error
