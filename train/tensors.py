"""A model's weights as the tensors of a file: PyTorch's names, and nothing of i1's missing.

i1's network has weights on which its output does not depend: a timestep embedder, and what the last
block does to the text. They are neither computed nor trained here. But i1's code loads checkpoints
strictly, so those of a file are kept beside the weights, and each file that is written has them. Of
the last block's ``attn.qkv_text``, queries, keys and values, the queries are unused; ``kv_text`` is
the rest.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from train.model import ModelConfig, Params
from train.torch_layout import LAST_BLOCK, Shape, from_torch, last_block, to_torch, torch_shapes

# By their names in PyTorch; of a tensor that is used in part, its first rows.
Unused = Mapping[str, np.ndarray]
# From a tensor's name to its numbers.
Read = Callable[[str], np.ndarray]

TIMESTEP_FREQUENCIES = 256


@dataclass(frozen=True)
class StoredTraining:
    """Where a training stood: its step, the weights before averaging, and Adam's state."""

    step: int
    raw: Read
    count: int
    mu: Read
    nu: Read


@dataclass(frozen=True)
class WeightsFile:
    """An open file of weights; its tensors are those of its model.

    ``like`` are the shapes of the weights. ``read`` gives the averaged ones if there are others,
    which ``training`` has.
    """

    config: ModelConfig
    like: Params
    read: Read
    training: StoredTraining | None = None

    def unused(self) -> Unused:
        """Return what the file has of weights that are not used, float32."""
        rows = {name: shape[0] for name, shape in unused_shapes(self.like).items()}
        return {name: np.array(self.read(name)[:count], np.float32) for name, count in rows.items()}


def stated_shape(config: ModelConfig) -> dict[str, Any]:
    """Return how a file states the shape of its model; the activations' type is not part of it."""
    return {name: value for name, value in asdict(config).items() if name != "dtype"}


def tensor_shapes(params: Params) -> dict[str, Shape]:
    """Return the names and shapes of the tensors of a file with these weights."""
    shapes = unused_shapes(params)
    for name, (rows, *others) in torch_shapes(params).items():
        unused_rows, *_ = shapes.get(_whole(name), (0,))
        shapes[_whole(name)] = (unused_rows + rows, *others)
    return shapes


def unused_shapes(params: Params) -> dict[str, Shape]:
    """Return the names and shapes of the weights that i1 has beside these; baselines have none."""
    if LAST_BLOCK not in params:
        return {}
    of_last = f"{last_block(params)}."
    image = {n: shape for n, shape in torch_shapes(params).items() if n.startswith(of_last)}
    (width,) = image[f"{of_last}norm1.scale"]
    unused: dict[str, Shape] = {
        "t_embedder.linear1.weight": (width, TIMESTEP_FREQUENCIES),
        "t_embedder.linear1.bias": (width,),
        "t_embedder.linear2.weight": (width, width),
        "t_embedder.linear2.bias": (width,),
        f"{of_last}attn.qkv_text.weight": (width, width),
        f"{of_last}attn.qkv_text.bias": (width,),
    }
    for module in ("attn.proj_", "mlp_"):
        begin = f"{of_last}{module}"
        unused |= {
            name.replace(f"{begin}image", f"{begin}text"): shape
            for name, shape in image.items()
            if name.startswith(f"{begin}image")
        }
    return unused


def read_params(like: Params, read: Read) -> Params:
    """Return the weights of a file, as :func:`train.torch_layout.from_torch` places them."""
    unused = unused_shapes(like)

    def used(name: str) -> np.ndarray:
        unused_rows, *_ = unused.get(_whole(name), (0,))
        return read(_whole(name))[unused_rows:]

    params: Params = from_torch(like, used)
    return params


def all_tensors(params: Params, unused: Unused) -> dict[str, np.ndarray]:
    """Return the tensors of a file: the weights, and the unused ones, zeros where there are none.

    They are views where they can be, not contiguous.
    """
    tensors = {name: np.zeros(shape, np.float32) for name, shape in unused_shapes(params).items()}
    tensors |= unused
    for name, tensor in to_torch(params).items():
        whole = _whole(name)
        tensors[whole] = np.concatenate([tensors[whole], tensor]) if whole in tensors else tensor
    return tensors


def _whole(name: str) -> str:
    """Return the name of the tensor that this one is a part of, or is."""
    return name.replace(".kv_text.", ".qkv_text.")
