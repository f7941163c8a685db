"""States of tiny runs, drawn at random instead of trained."""

from pathlib import Path
from typing import Any

import jax
import numpy as np

from train.checkpoint import Checkpoints, TrainState
from train.config import TrainConfig
from train.model import ModelConfig, abstract_params
from train.optimiser import make_optimiser
from train.tensors import unused_shapes
from train.weights import save_unused

SETTINGS: dict[str, Any] = {
    "mixture": "",
    "resolution": 8,
    "steps": 1,
    "batch_size": 4,
    "log_every_steps": 1,
    "evaluation_samples": 0,
    "model": {"hidden_size": 16, "depth": 5, "num_heads": 2},
    "text": {"encoder": "bytes", "num_tokens": 2, "embed_dim": 8},
    "latent": {"encoder": "pixels", "downsampling": 2},
}


def model_of(config: TrainConfig) -> ModelConfig:
    """Return the shape of a run's network."""
    return config.model_config_for(config.latent_codec())


def state_shapes(config: TrainConfig) -> tuple[Any, Any, Any]:
    """Return the shapes of (params, ema, opt_state)."""
    params = abstract_params(model_of(config))
    return params, params, jax.eval_shape(make_optimiser(config.optimiser).init, params)


def drawn(shapes: Any, seed: int) -> Any:
    """Return numpy arrays of these shapes and types: small positive numbers, counters are 5."""
    rng = np.random.default_rng(seed)

    def draw(leaf: Any) -> Any:
        if leaf.dtype == np.int32:
            return np.full(leaf.shape, 5, np.int32)
        return rng.uniform(0.01, 0.1, leaf.shape).astype(leaf.dtype)

    return jax.tree.map(draw, shapes)


def write_run(output: Path, *, step: int = 3, **changes: Any) -> tuple[TrainConfig, TrainState]:
    """Write the output folder of a run that has a checkpoint, and unused weights if i1's has."""
    config = TrainConfig.model_validate(SETTINGS | {"output": str(output)} | changes)
    state = TrainState(step, *drawn(state_shapes(config), seed=step))
    checkpoints = Checkpoints(config.output, config, model_of(config), "hash")
    checkpoints.save(state)
    checkpoints.close()
    if shapes := unused_shapes(state.params):
        save_unused(output, {name: np.full(shape, 3, np.float32) for name, shape in shapes.items()})
    return config, state
