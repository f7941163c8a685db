"""What a run begins with where it is given: a file of weights, or where the stage before it ended.

The network may be of another resolution, since no weight depends on it.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

from train.checkpoint import TrainState, newest_checkpoint
from train.model import ModelConfig, Params
from train.output import writing_to
from train.sharding import cut
from train.tensors import StoredTraining, Unused, read_params
from train.weights import check_same_model, load_unused, open_weights, save_unused

# From weights to (params, ema, opt_state) as a training begins with them.
Begin = Callable[[Params], tuple[Params, Params, optax.OptState]]


def begin_from(init: str, config: ModelConfig, like: TrainState, begin: Begin) -> TrainState:
    """Return the state that a run begins with.

    The output folder of a run gives the state of its newest checkpoint, a checkpoint of i1's with
    the state of its training likewise, other files their weights alone, for ``begin``, at step 0.

    Args:
        init: the folder or the file; see :mod:`train.weights`.
        config: the network's shape.
        like: shapes of the state, placed where it is to be. No process ever has more of it in its
            own memory than one tensor.
        begin: called with placed weights.

    Raises:
        EvenmixError: it is of another model, or cannot be read.
    """
    folder = Path(init).expanduser()
    if folder.is_dir():
        with newest_checkpoint(str(folder)) as checkpoint:
            check_same_model(init, checkpoint.model, config)
            return checkpoint.restore(like)
    with open_weights(init) as file:
        check_same_model(init, file.config, config)
        if file.training is None:
            return TrainState(0, *begin(read_params(like.params, file.read)))
        return TrainState(
            file.training.step,
            params=read_params(like.params, file.training.raw),
            ema=read_params(like.ema, file.read),
            opt_state=_read_adam(like.opt_state, file.training),
        )


def keep_unused(init: str, output: Path) -> None:
    """Copy the weights of ``init`` that are not used to the output folder of the run; one process.

    Raises:
        EvenmixError: they cannot be read or written.
    """
    unused = _unused(init)
    if unused:
        with writing_to(output):
            save_unused(output, unused)


def _unused(init: str) -> Unused:
    folder = Path(init).expanduser()
    if folder.is_dir():
        return load_unused(folder)
    with open_weights(init) as file:
        return file.unused()


def _read_adam(like: optax.OptState, stored: StoredTraining) -> optax.OptState:
    """Return the optimiser's state, of which Adam's is the only part that is not empty."""

    def read(part: Any) -> Any:
        if not isinstance(part, optax.ScaleByAdamState):
            return part
        count = np.asarray(stored.count, part.count.dtype)
        return optax.ScaleByAdamState(
            count=cut(count, part.count.sharding),
            mu=read_params(part.mu, stored.mu),
            nu=read_params(part.nu, stored.nu),
        )

    return jax.tree.map(read, like, is_leaf=lambda x: isinstance(x, optax.ScaleByAdamState))
