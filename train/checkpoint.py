"""Checkpoints: the state of a run after a step, written whole or not at all, by orbax.

orbax writes into a temporary folder and renames it when all is there, so a run that is killed
while it writes resumes from the checkpoint before. It writes while the run goes on, each process
its own part of the state, so several processes need a folder that they share. A checkpoint does not
know on how many devices it was written. The run's identity (the settings and the data that its
weights depend on) lies beside the state.
"""

from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
import orbax.checkpoint as ocp
from jax.sharding import Mesh

from pipeline.errors import EvenmixError
from train.config import TrainConfig
from train.model import ModelConfig, Params, abstract_params
from train.output import writing_to
from train.sharding import place_state
from train.tensors import stated_shape
from train.weights import SHAPE

KEPT_CHECKPOINTS = 2


class TrainState(NamedTuple):
    """What changes while training; ``step`` counts the steps that are done."""

    step: int
    params: Params
    ema: Params
    opt_state: optax.OptState


class Checkpoints:
    """The checkpoints below the output folder of a run; to be closed at its end.

    Args:
        output: a local folder.
        config: the run's configuration.
        model: the network's shape.
        mixture_sha256: hash of the manifest, the data's share of the run's identity.
    """

    def __init__(self, output: str, config: TrainConfig, model: ModelConfig, mixture_sha256: str):
        self.folder = checkpoint_folder(output)
        self._identity = config.identity() | {"mixture_sha256": mixture_sha256}
        self._run = {
            "identity": self._identity,
            "config": config.model_dump(),
            "model": stated_shape(model),
        }
        with writing_to(self.folder):
            self._manager = ocp.CheckpointManager(
                self.folder,
                options=ocp.CheckpointManagerOptions(
                    max_to_keep=KEPT_CHECKPOINTS,
                    keep_period=config.keep_every_steps,
                    # What a run that was killed has half written; it may be tens of gigabytes.
                    cleanup_tmp_directories=True,
                ),
            )

    @property
    def newest_step(self) -> int | None:
        """The step of the newest checkpoint, None if there is none."""
        step: int | None = self._manager.latest_step()
        return step

    def save(self, state: TrainState) -> None:
        """Begin to write a checkpoint, if this step has none yet, and remove the oldest ones.

        The state may be donated afterwards.

        Raises:
            EvenmixError: it, or the one before it, cannot be written; those that are there are
                whole.
        """
        if self.newest_step == state.step:
            return
        args = ocp.args.Composite(
            params=ocp.args.StandardSave(state.params),
            ema=ocp.args.StandardSave(state.ema),
            opt_state=ocp.args.StandardSave(state.opt_state),
            run=ocp.args.JsonSave(self._run),
        )
        with self._writing():
            self._manager.save(state.step, args=args)

    def check(self) -> None:
        """Tell of a checkpoint that could not be written; one that is being written goes on.

        Raises:
            EvenmixError: as :meth:`close`.
        """
        if not self._manager.is_saving_in_progress():
            self._wait()

    def close(self) -> None:
        """Wait until all is written.

        Raises:
            EvenmixError: the last checkpoint cannot be written.
        """
        self._wait()
        self._manager.close()

    def _wait(self) -> None:
        with self._writing():
            self._manager.wait_until_finished()

    @contextmanager
    def _writing(self) -> Iterator[None]:
        with writing_to(self.folder):
            try:
                yield
            except ValueError as error:
                # So tensorstore, to which orbax leaves the arrays, says that a disk is full.
                raise OSError(str(error)) from error

    def resume(self, like: TrainState) -> TrainState | None:
        """Return the state of the newest checkpoint, if there is one.

        ``like`` has the shapes of the state, placed on the devices where it is to be.

        Raises:
            EvenmixError: the checkpoint belongs to a run of another identity.
        """
        step = self.newest_step
        if step is None:
            return None
        stored = _restore(self._manager, step, run=ocp.args.JsonRestore())["run"]["identity"]
        if differences := _differences(stored, self._identity):
            raise EvenmixError(
                f"{self.folder}/{step} was trained with other settings ({'; '.join(differences)}). "
                "Set them back, or choose another output for a new run."
            )
        return _restore_state(self._manager, step, like)


def checkpoint_folder(output: str) -> Path:
    """Return where a run keeps its checkpoints; orbax wants an absolute path."""
    return Path(output).absolute() / "checkpoints"


class NewestCheckpoint:
    """The newest checkpoint of a run, to be read: its step, the run's configuration, the model."""

    def __init__(self, manager: ocp.CheckpointManager, step: int):
        self._manager = manager
        self.step = step
        run = _restore(manager, step, run=ocp.args.JsonRestore())["run"]
        self.config = TrainConfig.model_validate(run["config"])
        self.model = SHAPE.validate_python(run["model"])

    def restore(self, like: TrainState) -> TrainState:
        """Return the state; ``like`` has its shapes, placed on the devices where it is to be."""
        return _restore_state(self._manager, self.step, like)

    def weights(self, like: Params, *, averaged: bool = True) -> Params:
        """Return the weights, placed as ``like`` is: where it has no sharding, numpy arrays."""
        name = "ema" if averaged else "params"

        def wanted(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct | np.ndarray:
            # Of a shape without a sharding orbax would look for the devices of the run.
            return x if x.sharding else np.broadcast_to(np.zeros((), x.dtype), x.shape)

        restore = ocp.args.StandardRestore(jax.tree.map(wanted, like))
        params: Params = _restore(self._manager, self.step, **{name: restore})[name]
        return params


@contextmanager
def newest_checkpoint(output: str) -> Iterator[NewestCheckpoint]:
    """Open the newest checkpoint of a run, which may go on meanwhile.

    Raises:
        EvenmixError: there is no checkpoint in this folder.
    """
    folder = checkpoint_folder(output)
    if folder.is_dir():
        with closing(ocp.CheckpointManager(folder)) as manager:
            step = manager.latest_step()
            if step is not None:
                yield NewestCheckpoint(manager, step)
                return
    raise EvenmixError(
        f"{folder} holds no checkpoint; give the output folder of a run of `evenmix train` "
        "that has reached its first one"
    )


def load_averaged(output: str, mesh: Mesh) -> tuple[int, TrainConfig, Params]:
    """Return the step, the configuration and the averaged weights of a run's newest checkpoint.

    Raises:
        EvenmixError: there is no checkpoint in this folder.
    """
    with newest_checkpoint(output) as checkpoint:
        like = place_state(mesh, abstract_params(checkpoint.model))
        return checkpoint.step, checkpoint.config, checkpoint.weights(like)


def _restore_state(manager: ocp.CheckpointManager, step: int, like: TrainState) -> TrainState:
    restored = _restore(
        manager,
        step,
        params=ocp.args.StandardRestore(like.params),
        ema=ocp.args.StandardRestore(like.ema),
        opt_state=ocp.args.StandardRestore(like.opt_state),
    )
    return TrainState(step, restored["params"], restored["ema"], restored["opt_state"])


def _restore(manager: ocp.CheckpointManager, step: int, **parts: Any) -> Any:
    return manager.restore(step, args=ocp.args.Composite(**parts))


def _differences(stored: dict[str, Any], wanted: dict[str, Any], prefix: str = "") -> list[str]:
    """Name the settings in which two identities differ, with both values."""
    found: list[str] = []
    for name in sorted(stored.keys() | wanted.keys()):
        old, new = stored.get(name), wanted.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            found += _differences(old, new, f"{prefix}{name}.")
        elif old != new:
            found.append(f"{prefix}{name} was {old}, is {new}")
    return found
