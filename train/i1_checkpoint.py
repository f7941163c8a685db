"""i1's published checkpoints: read into our weights, and written so that i1's code loads them.

They are ``{256,512,1024}_resolution_checkpoint_torch.pt`` of the Hugging Face models
zlab-princeton/i1-3B and i1-1B: a dict of ``config``, the model's shape, and ``model``, its averaged
weights; what else is in the file (``train_state``) is not read. Tables of positions belong to a
resolution and are computed, never loaded, so a model goes on at another resolution.
"""

from dataclasses import asdict
from typing import Any

import numpy as np
from pydantic import Field, ValidationError

from pipeline.errors import EvenmixError
from train.config import NetworkConfig
from train.model import (
    REFERENCE_RESOLUTION_PX,
    ModelConfig,
    Params,
    abstract_params,
    position_table,
    rope_widths,
)
from train.torch_file import StoredTensor, TorchFile, write_torch_file
from train.torch_layout import check_tensors, from_torch, to_torch, torch_shapes

# What i1's module has but our weights do not: tables, and a timestep embedder that it never uses.
NOT_WEIGHTS = ("pos_embed", "rope_embedder.", "t_embedder.")
TIMESTEP_FREQUENCIES = 256


def read_i1_checkpoint(path: str) -> tuple[ModelConfig, Params]:
    """Return the shape that the file states and the averaged weights, numpy arrays.

    Raises:
        EvenmixError: the file is missing, damaged, unsafe, or no checkpoint of i1's.
    """
    with TorchFile(path) as file:
        content = file.value if isinstance(file.value, dict) else {}
        config = _stated_config(path, content.get("config"))
        tensors = _tensors(path, content.get("model"))
        like = abstract_params(config)
        check_tensors(
            path, {name: tensor.shape for name, tensor in tensors.items()}, torch_shapes(like)
        )
        params: Params = from_torch(like, lambda name: file.read(tensors[name]))
    return config, params


def write_i1_checkpoint(path: str, config: ModelConfig, params: Params) -> None:
    """Save weights as i1's code loads them strictly; its unused timestep embedder gets zeros.

    Raises:
        OSError: the file cannot be written.
    """
    model = to_torch(params) | _tables(config) | _timestep_embedder(config.hidden_size)
    write_torch_file(path, {"config": asdict(config), "model": model})


class _StatedConfig(NetworkConfig, extra="ignore"):
    """``config`` of a checkpoint, within bounds that keep a wrong one from being expensive."""

    depth: int = Field(gt=0, le=1000)
    input_size: int = Field(gt=0)
    image_resolution: int = Field(gt=0)
    in_channels: int = Field(gt=0)
    text_embed_dim: int = Field(gt=0)
    text_num_tokens: int = Field(gt=0)


def _stated_config(path: str, stated: Any) -> ModelConfig:
    try:
        return ModelConfig(**_StatedConfig.model_validate(stated).model_dump())
    except ValidationError as error:
        mistakes = "; ".join(
            f"config{''.join(f'.{part}' for part in details['loc'])}: {details['msg']}"
            for details in error.errors()
        )
        raise EvenmixError(f"{path} is no checkpoint of i1's: {mistakes}") from error


def _tensors(path: str, model: Any) -> dict[str, StoredTensor]:
    """Return the weights among the entries of ``model``."""
    if not isinstance(model, dict):
        raise EvenmixError(f"{path} is no checkpoint of i1's: it has no model")
    weights = {str(name): entry for name, entry in model.items()}
    weights = {name: e for name, e in weights.items() if not name.startswith(NOT_WEIGHTS)}
    if odd := [name for name, entry in weights.items() if not isinstance(entry, StoredTensor)]:
        raise EvenmixError(f"{path} is no checkpoint of i1's: model has {odd[0]}, no tensor")
    return weights


def _tables(config: ModelConfig) -> dict[str, np.ndarray]:
    """Return the tables of positions by the names that i1 gives them."""
    scale = REFERENCE_RESOLUTION_PX / config.image_resolution
    axes = [(config.text_num_tokens + 1, 1.0)] + [(config.grid_size, scale)] * 2
    tables = {"pos_embed": position_table(config)[None]}
    for axis, (width, (length, scale)) in enumerate(
        zip(rope_widths(config.head_dim), axes, strict=True)
    ):
        frequency = config.rope_theta ** -(np.arange(0, width, 2) / width)
        angles = np.outer(np.arange(length) * scale, frequency)
        for name, table in (("cos", np.cos(angles)), ("sin", np.sin(angles))):
            tables[f"rope_embedder.{name}_tables.{axis}"] = table.astype(np.float32)
    return tables


def _timestep_embedder(width: int) -> dict[str, np.ndarray]:
    shapes = {
        "linear1.weight": (width, TIMESTEP_FREQUENCIES),
        "linear1.bias": (width,),
        "linear2.weight": (width, width),
        "linear2.bias": (width,),
    }
    return {f"t_embedder.{name}": np.zeros(shape, np.float32) for name, shape in shapes.items()}
