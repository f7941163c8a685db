"""The reference numbers of i1, turned into this trainer's layout."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from train.model import ModelConfig

FOLDER = Path(__file__).parent / "golden"
# Tables that are computed here, and weights that i1 has but never uses.
NOT_WEIGHTS = ("pos_embed", "rope_embedder", "t_embedder")


def load(name: str) -> dict[str, np.ndarray]:
    """Read a file of reference numbers."""
    with np.load(FOLDER / f"{name}.npz") as file:
        return dict(file)


def model_config(golden: Mapping[str, np.ndarray]) -> ModelConfig:
    """Return the shape of the reference model."""
    prefix = "config/"
    stated = [name for name in golden if name.startswith(prefix)]
    return ModelConfig(**{name.removeprefix(prefix): int(golden[name]) for name in stated})


def channels_last(array: np.ndarray) -> np.ndarray:
    """Turn (B, C, H, W) into (B, H, W, C)."""
    return array.transpose(0, 2, 3, 1)


def weights(golden: Mapping[str, np.ndarray], prefix: str) -> dict[str, Any]:
    """Return the arrays under ``prefix`` as nested parameters: ``weight`` becomes ``kernel``."""
    tree: dict[Any, Any] = {}
    for name, array in golden.items():
        if not name.startswith(prefix) or name.removeprefix(prefix).startswith(NOT_WEIGHTS):
            continue
        *path, leaf = name.removeprefix(prefix).split(".")
        node = tree
        for part in path:
            node = node.setdefault(int(part) if part.isdigit() else part, {})
        if leaf == "weight":
            node["kernel"] = array.T if array.ndim == 2 else array.transpose(2, 3, 1, 0)
        else:
            node[leaf] = array
    return tree
