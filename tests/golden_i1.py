"""The reference numbers of i1, turned into this trainer's layout."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from train.model import ModelConfig, Params, abstract_params
from train.tensors import all_tensors, read_params, unused_shapes

FOLDER = Path(__file__).parent / "golden"


def load(name: str) -> dict[str, np.ndarray]:
    """Read a file of reference numbers."""
    with np.load(FOLDER / f"{name}.npz") as file:
        return dict(file)


def model_config(golden: Mapping[str, np.ndarray]) -> ModelConfig:
    """Return the shape of the reference model."""
    prefix = "config/"
    stated = [name for name in golden if name.startswith(prefix)]
    sizes: Any = {name.removeprefix(prefix): int(golden[name]) for name in stated}
    return ModelConfig(**sizes)


def channels_last(array: np.ndarray) -> np.ndarray:
    """Turn (B, C, H, W) into (B, H, W, C)."""
    return array.transpose(0, 2, 3, 1)


def weights(golden: Mapping[str, np.ndarray], prefix: str) -> Params:
    """Return the arrays under ``prefix`` as parameters."""
    like = abstract_params(model_config(golden))
    return read_params(like, lambda name: golden[prefix + name])


def unused(golden: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return the weights that i1's network has and does not use."""
    shapes = unused_shapes(abstract_params(model_config(golden)))
    return {name: golden[f"state/{name}"][: shape[0]] for name, shape in shapes.items()}


def assert_same_gradients(
    gradients: Params, golden: Mapping[str, np.ndarray], tolerance: float = 2e-5
) -> None:
    """Compare all gradients that the reference has, by their names in PyTorch.

    Those of weights that are not used are zero. ``tolerance`` is relative to the largest number of
    a tensor.
    """
    expected = {n.removeprefix("grad/"): x for n, x in golden.items() if n.startswith("grad/")}
    assert expected
    for name, (rows, *_) in unused_shapes(gradients).items():
        assert name not in expected or not expected[name][:rows].any(), name
    found = all_tensors(gradients, {})
    for name, array in expected.items():
        atol = tolerance * np.abs(array).max()
        np.testing.assert_allclose(found[name], array, atol=atol, err_msg=name)
