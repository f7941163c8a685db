"""The names and layouts that PyTorch gives to the weights that are held here as nested dicts.

A module's path, joined by dots, is its name in a checkpoint. Here a linear weight is ``kernel``
(in, out) and a convolution's (height, width, in, out); there both are ``weight``, (out, in) and
(out, in, height, width). All other arrays are equal.

Blocks that are computed in a loop are one module here, whose arrays have a leading axis for them;
there each has its number, and the last block, here a module of its own, has the next one.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from pipeline.errors import EvenmixError
from train.sharding import cut

Shape = tuple[int, ...]

STACKS = ("in_blocks", "out_blocks")
LAST_BLOCK = "last_block"
# Where PyTorch's axes of a kernel are among ours, by their number.
TO_TORCH = {2: (1, 0), 4: (3, 2, 0, 1)}
NAMED_AT_ONCE = 3


def torch_shapes(params: Any) -> dict[str, Shape]:
    """Return the names and shapes that these weights (arrays, or their shapes) have in PyTorch."""
    # Arrays of these shapes that take no memory.
    hollow = jax.tree.map(lambda leaf: np.broadcast_to(0.0, leaf.shape), params)
    return {name: tensor.shape for name, tensor in to_torch(hollow).items()}


def to_torch(params: Any) -> dict[str, np.ndarray]:
    """Return the weights by their names in PyTorch: views with its axes, not contiguous."""
    tensors: dict[str, np.ndarray] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        tensors |= _views(params, path, np.asarray(leaf))
    return tensors


def from_torch(like: Any, read: Callable[[str], np.ndarray]) -> Any:
    """Return weights shaped and typed as ``like``, each read by its name in PyTorch.

    They are numpy arrays; or where ``like`` has a sharding, arrays that are placed so. One is read
    and placed after the other. The names and shapes are those that :func:`check_tensors` has
    accepted.
    """

    def one(path: tuple[Any, ...], leaf: Any) -> Any:
        array = np.empty(leaf.shape, leaf.dtype)
        for name, view in _views(like, path, array).items():
            view[...] = read(name)
        return array if leaf.sharding is None else cut(array, leaf.sharding)

    return jax.tree_util.tree_map_with_path(one, like)


def last_block(params: Any) -> str:
    """Return what PyTorch calls the last block: it follows the stacked blocks on the way out.

    Those are one less than on the way in, and there may be none.
    """
    on_the_way_in = jax.tree.leaves(params["in_blocks"])[0].shape[0]
    return f"out_blocks.{on_the_way_in - 1}"


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


def _views(params: Any, path: tuple[Any, ...], array: np.ndarray) -> dict[str, np.ndarray]:
    """Return the tensors of the weight at ``path`` by their names: views of ``array``."""
    module, *others = (str(entry.key) for entry in path)
    blocks = {module: array}
    if module == LAST_BLOCK:
        blocks = {last_block(params): array}
    elif module in STACKS and not others[0].isdigit():
        blocks = {f"{module}.{number}": array[number] for number in range(len(array))}
    if path[-1].key != "kernel":
        return {".".join([block, *others]): view for block, view in blocks.items()}
    return {
        ".".join([block, *others[:-1], "weight"]): view.transpose(TO_TORCH[view.ndim])
        for block, view in blocks.items()
    }
