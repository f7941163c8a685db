"""The names and layouts that PyTorch gives to the weights that are held here as nested dicts.

A module's path, joined by dots, is its name in a checkpoint. Here a linear weight is ``kernel``
(in, out) and a convolution's (height, width, in, out); there both are ``weight``, (out, in) and
(out, in, height, width). All other arrays are equal.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from pipeline.errors import EvenmixError

Shape = tuple[int, ...]

# Where PyTorch's axes of a kernel are among ours, by their number; and the inverse.
TO_TORCH = {2: (1, 0), 4: (3, 2, 0, 1)}
FROM_TORCH = {2: (1, 0), 4: (2, 3, 1, 0)}
NAMED_AT_ONCE = 3


def torch_shapes(params: Any) -> dict[str, Shape]:
    """Return the names and shapes that these weights (arrays, or their shapes) have in PyTorch."""
    return {
        _torch_name(path): tuple(leaf.shape[axis] for axis in _axes(path, leaf, TO_TORCH))
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }


def to_torch(params: Any) -> dict[str, np.ndarray]:
    """Return the weights by their names in PyTorch: views with its axes, not contiguous."""
    return {
        _torch_name(path): np.asarray(leaf).transpose(_axes(path, leaf, TO_TORCH))
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }


def from_torch(like: Any, read: Callable[[str], np.ndarray]) -> Any:
    """Return weights shaped and typed as ``like``, each read by its name in PyTorch; numpy arrays.

    The names and shapes are those that :func:`check_tensors` has accepted.
    """

    def one(path: tuple[Any, ...], leaf: Any) -> np.ndarray:
        array = read(_torch_name(path))
        array = array.transpose(_axes(path, array, FROM_TORCH))
        return np.ascontiguousarray(array, dtype=leaf.dtype)

    return jax.tree_util.tree_map_with_path(one, like)


def check_tensors(place: str, found: Mapping[str, Shape], expected: Mapping[str, Shape]) -> None:
    """Compare the tensors of a file with those of the model it is read for.

    Raises:
        EvenmixError: tensors are missing, unknown, or of another shape.
    """
    wrong = [name for name in expected if name in found and found[name] != expected[name]]
    problems = [
        _list("lacks", [name for name in expected if name not in found]),
        _list("has unknown", [name for name in found if name not in expected]),
        _list("has", [f"{name} {found[name]} instead of {expected[name]}" for name in wrong]),
    ]
    if any(problems):
        raise EvenmixError(
            f"{place} is of another model: it {'; it '.join(filter(None, problems))}. "
            "Give the file that belongs to the configured model."
        )


def _list(verb: str, items: list[str]) -> str:
    more = f" and {len(items) - NAMED_AT_ONCE} more" if len(items) > NAMED_AT_ONCE else ""
    return f"{verb} {', '.join(items[:NAMED_AT_ONCE])}{more}" if items else ""


def _torch_name(path: tuple[Any, ...]) -> str:
    *modules, leaf = (str(entry.key) for entry in path)
    return ".".join([*modules, "weight" if leaf == "kernel" else leaf])


def _axes(path: tuple[Any, ...], leaf: Any, order: Mapping[int, Shape]) -> Shape:
    return order[leaf.ndim] if path[-1].key == "kernel" else tuple(range(leaf.ndim))
