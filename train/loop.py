"""A training run from first to last: data, step, log, checkpoints, evaluation.

The output folder holds ``checkpoints/``, what :class:`train.log.RunLog` writes and, at the end,
``evaluation.json``. The loop waits for the device only where it logs, validates, draws samples or
writes a checkpoint.
"""

import hashlib
import json
import threading
import time
from collections.abc import Callable
from contextlib import closing, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec

from mixing.manifest import load_manifest
from pipeline.errors import EvenmixError
from train.checkpoint import Checkpoints, TrainState
from train.config import TrainConfig
from train.data import TrainingData, check_mixture, prefetch, read_validation
from train.evaluate import Evaluation, as_json, make_evaluation
from train.flops import flop_per_picture
from train.flow import Draws, draw, losses, posterior_keys
from train.grid import draw_grid
from train.log import RunLog
from train.model import Params, Velocity, abstract_params, init_params, velocity_fn
from train.optimiser import make_optimiser, update_ema
from train.output import writing_to
from train.precision import at_precision
from train.prompts import read_prompts
from train.sampling import SamplingConfig, sample
from train.sharding import (
    check_batch,
    cut,
    make_mesh,
    place_state,
    shardings_of,
    share_rows,
    stop_asked,
)
from train.weights import load_weights

# (params, ema, opt_state), the device's share of the state.
Weights = tuple[Params, Params, optax.OptState]
# Arrays with a row for each sample: latents, caption, mask, noise, t, dropped.
Rows = tuple[jax.Array, ...]
NO_STEP = -1


@dataclass(frozen=True)
class Inputs:
    """A batch made ready for the device: pictures uint8, caption float32, mask bool."""

    pictures: np.ndarray
    caption: np.ndarray
    mask: np.ndarray
    num_replaced: int


def make_step(
    config: TrainConfig,
    velocity: Velocity,
    optimiser: optax.GradientTransformation,
    shardings: Weights,
) -> Callable[..., tuple[Weights, jax.Array, dict[str, jax.Array]]]:
    """Return the training step: weights, broken, step, latents, caption, mask to new ones.

    It returns (weights, broken, metrics). ``broken`` is the first step whose loss or gradient norm
    was not finite, NO_STEP if there was none; from that step on the weights stay as they were.

    The weights that are given in are donated: they are gone afterwards. Those that come out are
    placed by ``shardings``.
    """

    @partial(jax.jit, donate_argnums=0, out_shardings=(shardings, None, None))
    def train_step(
        weights: Weights,
        broken: jax.Array,
        step: jax.Array,
        data: jax.Array,
        caption: jax.Array,
        mask: jax.Array,
    ) -> tuple[Weights, jax.Array, dict[str, jax.Array]]:
        params, ema, opt_state = weights
        draws = draw(config.seed, step, data.shape, config.text.dropout, config.time_shift)

        def mean_loss(params: Params, rows: Rows) -> jax.Array:
            data, caption, mask, noise, t, dropped = rows
            draws = Draws(noise, t, dropped)
            return losses(velocity, params, data, caption=caption, mask=mask, draws=draws).mean()

        rows = (data, caption, mask, draws.noise, draws.t, draws.dropped)
        loss, gradients = mean_gradients(mean_loss, params, rows, config.accumulate)
        updates, opt_state = optimiser.update(gradients, opt_state, params)
        params = optax.apply_updates(params, updates)
        ema = update_ema(ema, params, config.optimiser.ema_decay)
        norm = optax.tree.norm(gradients)
        finite = jnp.isfinite(loss) & jnp.isfinite(norm)
        broken = jnp.where((broken == NO_STEP) & ~finite, step, broken)
        updated = (params, ema, opt_state)
        weights = jax.tree.map(partial(jnp.where, broken == NO_STEP), updated, weights)
        return weights, broken, {"loss": loss, "gradient_norm": norm}

    return train_step


def mean_gradients(
    mean_loss: Callable[[Params, Rows], jax.Array], params: Params, rows: Rows, accumulate: int
) -> tuple[jax.Array, Params]:
    """Return a loss that is a mean over rows, and its gradients, computed in so many parts."""
    loss_and_gradients = jax.value_and_grad(mean_loss)
    if accumulate == 1:
        return loss_and_gradients(params, rows)

    def part_of_each_device(x: jax.Array) -> jax.Array:
        # Part i has the rows i, i + accumulate, …: so no row moves to another device.
        return x.reshape(-1, accumulate, *x.shape[1:]).swapaxes(0, 1)

    def add(total: tuple[jax.Array, Params], part: Rows) -> tuple[tuple[jax.Array, Params], None]:
        return jax.tree.map(jnp.add, total, loss_and_gradients(params, part)), None

    nothing = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, params))
    total, _ = jax.lax.scan(add, nothing, jax.tree.map(part_of_each_device, rows))
    mean: tuple[jax.Array, Params] = jax.tree.map(lambda x: x / accumulate, total)
    return mean


def check_finite(broken: jax.Array, data: TrainingData) -> None:
    """Wait for the device, and stop the run if one of the steps since the last time was broken.

    Raises:
        EvenmixError: it was; the message has the keys of its samples (those of this process).
    """
    step = int(broken)
    if step != NO_STEP:
        raise EvenmixError(
            f"step {step + 1}: the loss or its gradients are not finite; weights and checkpoints "
            f"are those of before. Look at its samples ({', '.join(data.keys(step))}), or begin a "
            "new run with a lower `optimiser.learning_rate`"
        )


def train(config: TrainConfig, stop: threading.Event) -> dict[str, Evaluation] | None:
    """Train, or resume training, to ``config.steps``; evaluate at the end.

    When ``stop`` is set, the step at hand is finished (with several processes: the steps until the
    next log), a checkpoint written, and None returned.

    Raises:
        EvenmixError: the mixture is not whole or does not fit, or the output is another run's; or a
            loss is not finite.
    """
    manifest = load_manifest(config.mixture)
    check_mixture(config.mixture, manifest, config.resolution)
    mesh = make_mesh(config.mesh.fsdp)
    check_batch(mesh, config.batch_size, config.accumulate)
    threads = config.loader_threads
    data = TrainingData(
        config.mixture,
        manifest,
        config.seed,
        config.batch_size,
        process_index=jax.process_index(),
        num_processes=jax.process_count(),
        threads=threads,
    )
    encoder, codec = config.text_encoder(), config.latent_codec()
    model_config = config.model_config_for(codec)
    velocity = at_precision(velocity_fn(model_config), config.precision)
    optimiser = make_optimiser(config.optimiser)

    def begin(params: Params) -> Weights:
        return params, jax.tree.map(jnp.copy, params), optimiser.init(params)

    like = place_state(mesh, jax.eval_shape(begin, abstract_params(model_config)))
    shardings = shardings_of(like)

    def fresh() -> TrainState:
        if config.init is None:
            draw_params = partial(init_params, model_config, config.seed)
            params = jax.jit(draw_params, out_shardings=shardings[0])()
        else:
            params = cut(load_weights(config.init, model_config), shardings[0])
        begun = jax.jit(begin, donate_argnums=0, out_shardings=shardings)
        return TrainState(0, *begun(params))

    mixture_sha256 = hashlib.sha256(manifest.model_dump_json().encode()).hexdigest()
    checkpoints = Checkpoints(config.output, config, mixture_sha256)
    state = checkpoints.resume(TrainState(0, *like)) or fresh()
    # One process speaks and writes for all.
    first = jax.process_index() == 0
    flop = flop_per_picture(model_config, encoder, codec)
    log = RunLog(config, state.step, flop) if first else None

    def say(text: str) -> None:
        if first:
            print(text, flush=True)

    num_parameters = sum(x.size for x in jax.tree.leaves(state.params))
    say(f"{num_parameters:,} parameters on {mesh.size} devices, from step {state.step}")

    def ready(step: int) -> Inputs:
        batch = data.batch(step)
        return Inputs(batch.pictures, *encoder(batch.captions), batch.num_replaced)

    held_out = read_validation(config.mixture, manifest, config.evaluation_samples)
    evaluate = make_evaluation(
        velocity, held_out=held_out, encoder=encoder, codec=codec, config=config
    )
    prompts = config.samples.prompts if config.samples else []
    if isinstance(prompts, str):
        prompts = read_prompts(Path(prompts))
    draw_samples = partial(
        sample,
        velocity,
        prompts=prompts,
        encoder=encoder,
        codec=codec,
        resolution=config.resolution,
        config=SamplingConfig(seed=config.seed),
    )
    train_step = make_step(config, velocity, optimiser, shardings)
    step, weights = state.step, (state.params, state.ema, state.opt_state)
    broken = jax.device_put(np.int32(NO_STEP), NamedSharding(mesh, PartitionSpec()))
    stopping = False
    with (
        closing(data),
        closing(prefetch(ready, step, threads)) as inputs,
        closing(checkpoints),
        closing(log) if log else nullcontext(),
    ):
        while step < config.steps and not stopping:
            asked_s = time.monotonic()
            batch = next(inputs)
            got_s = time.monotonic()
            pictures, caption, mask = share_rows(mesh, batch.pictures, batch.caption, batch.mask)
            keys = posterior_keys(config.seed, step, config.batch_size)
            latents = codec.encode(pictures, keys)
            weights, broken, metrics = train_step(weights, broken, step, latents, caption, mask)
            step += 1
            if log:
                log.add(metrics, batch.mask, batch.num_replaced, asked_s=asked_s, got_s=got_s)
            at_log = step % config.log_every_steps == 0 or step == config.steps
            at_checkpoint = step % config.checkpoint_every_steps == 0
            stopping = stop_asked(stop, at_log)
            if at_log or at_checkpoint or stopping:
                check_finite(broken, data)
            if at_log and log:
                say(log.write(step))
            if config.validate_every_steps and step % config.validate_every_steps == 0:
                evaluations = evaluate(weights[1])
                if log:
                    say(log.write_evaluation(step, evaluations))
            if config.samples and step % config.samples.every_steps == 0:
                drawn = draw_samples(weights[1])
                if log:
                    log.write_samples(step, draw_grid(drawn, prompts))
            if at_checkpoint:
                checkpoints.save(TrainState(step, *weights))
                if log:
                    log.draw()
        checkpoints.save(TrainState(step, *weights))
    if log:
        log.draw()
    if step < config.steps:
        say(f"stopped after step {step}; the same command goes on from there")
        return None

    evaluations = evaluate(weights[1])
    report = {"step": step, "datasets": as_json(evaluations)}
    output = Path(config.output)
    if first:
        with writing_to(output):
            (output / "evaluation.json").write_text(json.dumps(report, indent=2) + "\n")
    return evaluations
