"""i1's published checkpoints: read into our weights, and written so that i1's code loads them.

They are ``{256,512,1024}_resolution_checkpoint_torch.pt`` of the Hugging Face models
zlab-princeton/i1-3B and i1-1B: a dict of ``config``, the model's shape, and ``model``, its averaged
weights. Its trainer adds ``train_state``: the step, Adam's state, and the weights themselves, where
they are averaged. Tables of positions belong to a resolution and are computed, never loaded, so a
model goes on at another resolution.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy as np
from pydantic import BaseModel, Field, ValidationError

from pipeline.errors import EvenmixError
from train.baselines import BaselineConfig
from train.config import NetworkConfig
from train.model import (
    REFERENCE_RESOLUTION_PX,
    ModelConfig,
    Params,
    abstract_params,
    position_table,
    rope_widths,
)
from train.tensors import (
    Read,
    StoredTraining,
    Unused,
    WeightsFile,
    all_tensors,
    stated_shape,
    tensor_shapes,
)
from train.torch_file import StoredTensor, TorchFile, write_torch_file
from train.torch_layout import Shape, check_tensors

Stated = TypeVar("Stated", bound=BaseModel)

TABLES = ("pos_embed", "rope_embedder.")


@contextmanager
def open_i1_checkpoint(path: str) -> Iterator[WeightsFile]:
    """Open a checkpoint: it is checked as a whole, its numbers are read when they are asked for.

    Raises:
        EvenmixError: the file is missing, damaged, unsafe, or no checkpoint of i1's.
    """
    with TorchFile(path) as file:
        content = file.value if isinstance(file.value, dict) else {}
        stated = _parse(path, _StatedConfig, "config", content.get("config"))
        config = ModelConfig(**stated.model_dump())
        like = abstract_params(config)
        shapes = tensor_shapes(like)

        def tensors(where: str, entries: Any) -> Read:
            return _tensors(file, where, entries, shapes)

        read = tensors("model", content.get("model"))
        if "train_state" not in content:
            yield WeightsFile(config, like, read)
            return
        state = _parse(path, _StatedTraining, "train_state", content["train_state"])
        training = StoredTraining(
            step=state.step,
            # Without a moving average the weights are in ``model``.
            raw=tensors("model_raw", state.model_raw) if state.model_raw else read,
            count=state.opt.count,
            mu=tensors("mu", state.opt.mu),
            nu=tensors("nu", state.opt.nu),
        )
        yield WeightsFile(config, like, read, training)


def write_i1_checkpoint(
    path: str, config: ModelConfig, params: Params, unused: Unused | None = None
) -> None:
    """Save weights as i1's code loads them strictly; those that it never uses may be zeros.

    Raises:
        EvenmixError: the model is not i1's.
        OSError: the file cannot be written.
    """
    if isinstance(config, BaselineConfig):
        raise EvenmixError(
            f"{path} would be a checkpoint of i1's, but the model is the baseline {config.kind}, "
            "which i1's code does not load; give a name that ends in .safetensors"
        )
    model = all_tensors(params, unused or {}) | _tables(config)
    write_torch_file(path, {"config": stated_shape(config), "model": model})


class _StatedConfig(NetworkConfig, extra="ignore"):
    """``config`` of a checkpoint, within bounds that keep a wrong one from being expensive."""

    depth: int = Field(ge=3, le=1000)
    input_size: int = Field(gt=0)
    image_resolution: int = Field(gt=0)
    in_channels: int = Field(gt=0)
    text_embed_dim: int = Field(gt=0)
    text_num_tokens: int = Field(gt=0)


class _StatedAdam(BaseModel):
    """``opt`` of a training's state."""

    count: int = Field(ge=0)
    mu: dict[str, Any]
    nu: dict[str, Any]


class _StatedTraining(BaseModel):
    """``train_state`` of a checkpoint."""

    step: int = Field(ge=0)
    opt: _StatedAdam
    model_raw: dict[str, Any] | None = None


def _parse(path: str, kind: type[Stated], name: str, value: Any) -> Stated:
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        mistakes = "; ".join(
            f"{name}{''.join(f'.{part}' for part in details['loc'])}: {details['msg']}"
            for details in error.errors()
        )
        raise EvenmixError(f"{path} is no checkpoint of i1's: {mistakes}") from error


def _tensors(file: TorchFile, where: str, entries: Any, expected: dict[str, Shape]) -> Read:
    """Return how to read the weights among these entries, after they have been checked."""
    if not isinstance(entries, dict):
        raise EvenmixError(f"{file.path} is no checkpoint of i1's: it has no {where}")
    weights = {str(name): entry for name, entry in entries.items()}
    weights = {name: e for name, e in weights.items() if not name.startswith(TABLES)}
    if odd := [name for name, entry in weights.items() if not isinstance(entry, StoredTensor)]:
        raise EvenmixError(f"{file.path} is no checkpoint of i1's: {where} has {odd[0]}, no tensor")
    check_tensors(
        f"{file.path} ({where})", {name: entry.shape for name, entry in weights.items()}, expected
    )
    return lambda name: file.read(weights[name])


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
