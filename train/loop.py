"""A training run from first to last: data, step, log, checkpoints, evaluation.

The output folder holds ``checkpoints/``, ``loss.jsonl`` (one line each ``log_every_steps``),
``loss.png`` and, at the end, ``evaluation.json``.
"""

import hashlib
import json
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mixing.manifest import load_manifest
from train.checkpoint import Checkpoints, TrainState
from train.config import TrainConfig
from train.data import TrainingData, check_mixture, prefetch, read_validation
from train.evaluate import Evaluation, as_json, evaluate
from train.flow import draw, losses, posterior_keys
from train.log import LossLog
from train.model import Params, Velocity, init_params, velocity_fn
from train.optimiser import make_optimiser, update_ema
from train.output import writing_to
from train.weights import load_weights

# (params, ema, opt_state), the device's share of the state.
Weights = tuple[Params, Params, optax.OptState]


@dataclass(frozen=True)
class Inputs:
    """A batch made ready for the device: pictures uint8, caption float32, mask bool."""

    pictures: np.ndarray
    caption: np.ndarray
    mask: np.ndarray
    num_replaced: int


def make_step(
    config: TrainConfig, velocity: Velocity, optimiser: optax.GradientTransformation
) -> Callable[..., tuple[Weights, dict[str, jax.Array]]]:
    """Return the training step: (weights, step, latents, caption, mask) to (weights, metrics).

    The weights that are given in are donated: they are gone afterwards.
    """

    @partial(jax.jit, donate_argnums=0)
    def train_step(
        weights: Weights,
        step: jax.Array,
        data: jax.Array,
        caption: jax.Array,
        mask: jax.Array,
    ) -> tuple[Weights, dict[str, jax.Array]]:
        params, ema, opt_state = weights
        draws = draw(config.seed, step, data.shape, config.text.dropout, config.time_shift)

        def mean_loss(params: Params) -> jax.Array:
            return losses(velocity, params, data, caption=caption, mask=mask, draws=draws).mean()

        loss, gradients = jax.value_and_grad(mean_loss)(params)
        updates, opt_state = optimiser.update(gradients, opt_state, params)
        params = optax.apply_updates(params, updates)
        ema = update_ema(ema, params, config.optimiser.ema_decay)
        metrics = {"loss": loss, "gradient_norm": optax.tree.norm(gradients)}
        return (params, ema, opt_state), metrics

    return train_step


def train(config: TrainConfig, stop: threading.Event) -> dict[str, Evaluation] | None:
    """Train, or resume training, to ``config.steps``; evaluate at the end.

    When ``stop`` is set, the step at hand is finished, a checkpoint written, and None returned.

    Raises:
        EvenmixError: the mixture is not whole or does not fit, or the output is another run's.
    """
    manifest = load_manifest(config.mixture)
    check_mixture(config.mixture, manifest, config.resolution)
    data = TrainingData(config.mixture, manifest, config.seed, config.batch_size)
    encoder, codec = config.text_encoder(), config.latent_codec()
    model_config = config.model_config_for(codec)
    velocity = velocity_fn(model_config)
    optimiser = make_optimiser(config.optimiser)

    def fresh() -> TrainState:
        if config.init is None:
            params = init_params(model_config, config.seed)
        else:
            params = jax.tree.map(jnp.asarray, load_weights(config.init, model_config))
        return TrainState(0, params, jax.tree.map(jnp.copy, params), optimiser.init(params))

    mixture_sha256 = hashlib.sha256(manifest.model_dump_json().encode()).hexdigest()
    checkpoints = Checkpoints(config.output, config, mixture_sha256)
    # No name keeps the fresh weights: a resumed run would hold them all along.
    state = checkpoints.resume(fresh())
    log = LossLog(Path(config.output), from_step=state.step)
    say = partial(print, flush=True)
    num_parameters = sum(x.size for x in jax.tree.leaves(state.params))
    say(f"{num_parameters:,} parameters, from step {state.step}")

    def ready(step: int) -> Inputs:
        batch = data.batch(step)
        return Inputs(batch.pictures, *encoder(batch.captions), batch.num_replaced)

    train_step = make_step(config, velocity, optimiser)
    step, weights = state.step, (state.params, state.ema, state.opt_state)
    window: list[dict[str, Any]] = []
    window_start = time.monotonic()
    inputs = prefetch(ready, step, config.loader_threads)
    while step < config.steps and not stop.is_set():
        batch = next(inputs)
        keys = posterior_keys(config.seed, step, config.batch_size)
        latents = codec.encode(jnp.asarray(batch.pictures), keys)
        weights, metrics = train_step(weights, step, latents, batch.caption, batch.mask)
        step += 1
        window.append(metrics | {"replaced_samples": batch.num_replaced})
        if step % config.log_every_steps == 0 or step == config.steps:
            say(log.write(step, window, window_start, config))
            window, window_start = [], time.monotonic()
        if step % config.checkpoint_every_steps == 0:
            checkpoints.save(TrainState(step, *weights))
            log.draw()
    inputs.close()
    checkpoints.save(TrainState(step, *weights))
    log.draw()
    if step < config.steps:
        say(f"stopped after step {step}; the same command goes on from there")
        return None

    held_out = read_validation(config.mixture, manifest, config.evaluation_samples)
    evaluations = evaluate(
        velocity, weights[1], held_out=held_out, encoder=encoder, codec=codec, config=config
    )
    report = {"step": step, "datasets": as_json(evaluations)}
    output = Path(config.output)
    with writing_to(output):
        (output / "evaluation.json").write_text(json.dumps(report, indent=2) + "\n")
    return evaluations
