"""A training step: from a batch on the host to new weights, which stay on the devices.

The frozen encoders come first, on their own; then one compiled function draws noise, times and
dropped captions, computes the gradients (in parts, if asked to) and updates weights, average and
optimiser, in the memory of the old ones.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec

from train.config import TrainConfig
from train.flow import Draws, draw, losses, posterior_keys
from train.frozen import FrozenEncoders
from train.memory import StepMemory, check_state, step_memory
from train.model import Params, abstract_params, init_params, velocity_fn
from train.optimiser import make_optimiser, update_ema
from train.sharding import keep_rows, place_state, shardings_of, share_rows, split_rows

# (params, ema, opt_state): the devices' share of the state.
Weights = tuple[Params, Params, optax.OptState]
# Arrays with a row for each sample: latents, caption, mask and what is drawn.
Rows = tuple[jax.Array, jax.Array, jax.Array, Draws]
LossAndGradients = tuple[jax.Array, Params]
NO_STEP = -1


@dataclass(frozen=True)
class Inputs:
    """This process's rows of a batch: pictures uint8, text tokens (B, T, …), their mask (B, T)."""

    pictures: np.ndarray
    tokens: np.ndarray
    mask: np.ndarray


class TrainingStep:
    """The step of a configuration, on the mesh of its encoders; :meth:`compile` it first.

    Raises:
        EvenmixError: the devices have no room for the state.
    """

    def __init__(self, config: TrainConfig, encoders: FrozenEncoders):
        self.model = config.model_config_for(encoders.codec)
        self._config, self._encoders, self._mesh = config, encoders, encoders.mesh
        self._optimiser = make_optimiser(config.optimiser)
        shapes = jax.eval_shape(self._begin, abstract_params(self.model))
        self.like: Weights = place_state(self._mesh, shapes)
        check_state(self.like, encoders)
        shardings = shardings_of(self.like)
        self._by_rows = NamedSharding(self._mesh, PartitionSpec(("data", "fsdp")))
        self._update = jax.jit(
            self._update_weights, donate_argnums=0, out_shardings=(shardings, None, None)
        )
        self._keys = jax.jit(
            lambda step: posterior_keys(config.seed, step, config.batch_size),
            out_shardings=self._by_rows,
        )
        self.begin = jax.jit(self._begin, donate_argnums=0, out_shardings=shardings)
        self._compiled: Callable[..., tuple[Weights, jax.Array, dict[str, jax.Array]]]

    def fresh(self) -> Weights:
        """Return what a run begins with that is given no weights."""
        draw_params = partial(init_params, self.model, self._config.seed)
        params = jax.jit(draw_params, out_shardings=shardings_of(self.like[0]))()
        begun: Weights = self.begin(params)
        return begun

    def compile(self) -> tuple[float, StepMemory]:
        """Compile the update; return the seconds that took, and the memory that a step needs.

        Raises:
            EvenmixError: the devices have less.
        """
        config, model = self._config, self.model

        def rows(dtype: str, *shape: int) -> jax.ShapeDtypeStruct:
            shape = (config.batch_size, *shape)
            return jax.ShapeDtypeStruct(shape, dtype, sharding=self._by_rows)

        latents = rows("float32", model.input_size, model.input_size, model.in_channels)
        caption = rows("float32", model.text_num_tokens, model.text_embed_dim)
        mask = rows("bool", model.text_num_tokens)
        number = jax.ShapeDtypeStruct((), "int32", sharding=self.not_broken().sharding)
        begun_s = time.monotonic()
        lowered = self._update.lower(self.like, number, number, latents, caption, mask)
        self._compiled = lowered.compile()
        return time.monotonic() - begun_s, step_memory(self._compiled, self._encoders)

    def not_broken(self) -> jax.Array:
        """Return NO_STEP on all devices: the ``broken`` that a run begins with."""
        none: jax.Array = jax.device_put(
            np.int32(NO_STEP), NamedSharding(self._mesh, PartitionSpec())
        )
        return none

    def __call__(
        self, weights: Weights, broken: jax.Array, step: int, inputs: Inputs
    ) -> tuple[Weights, jax.Array, dict[str, jax.Array]]:
        """Begin a step, and return its (weights, broken, metrics) without waiting for them.

        ``broken`` is the first step whose loss or gradient norm was not finite, NO_STEP if there
        was none; from that step on the weights stay as they were. The weights that are given in are
        gone afterwards. Metrics are ``loss`` and ``gradient_norm``.
        """
        pictures, tokens, mask = share_rows(self._mesh, inputs.pictures, inputs.tokens, inputs.mask)
        latents, caption = self._encoders.encode(pictures, tokens, mask, self._keys(step))
        return self._compiled(weights, broken, np.int32(step), latents, caption, mask)

    def _begin(self, params: Params) -> Weights:
        return params, jax.tree.map(jnp.copy, params), self._optimiser.init(params)

    def _update_weights(
        self,
        weights: Weights,
        broken: jax.Array,
        step: jax.Array,
        latents: jax.Array,
        caption: jax.Array,
        mask: jax.Array,
    ) -> tuple[Weights, jax.Array, dict[str, jax.Array]]:
        config = self._config
        params, ema, opt_state = weights
        draws = draw(config.seed, step, latents.shape, config.text.dropout, config.time_shift)
        rows = (latents, caption, mask, jax.tree.map(keep_rows, draws))
        loss, gradients = self._mean_gradients(params, rows)
        updates, opt_state = self._optimiser.update(gradients, opt_state, params)
        params = optax.apply_updates(params, updates)
        ema = update_ema(ema, params, config.optimiser.ema_decay)
        norm = optax.tree.norm(gradients)
        finite = jnp.isfinite(loss) & jnp.isfinite(norm)
        broken = jnp.where((broken == NO_STEP) & ~finite, step, broken)
        updated = (params, ema, opt_state)
        weights = jax.tree.map(partial(jnp.where, broken == NO_STEP), updated, weights)
        return weights, broken, {"loss": loss, "gradient_norm": norm}

    def _mean_gradients(self, params: Params, rows: Rows) -> LossAndGradients:
        """Return the mean loss and its gradients, computed in ``accumulate`` parts."""
        accumulate = self._config.accumulate
        if accumulate == 1:
            return self._of_part(params, rows)

        def add(total: LossAndGradients, part: Rows) -> tuple[LossAndGradients, None]:
            return jax.tree.map(jnp.add, total, self._of_part(params, part)), None

        nothing = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, params))
        total, _ = jax.lax.scan(add, nothing, split_rows(self._mesh, rows, accumulate))
        mean: LossAndGradients = jax.tree.map(lambda x: x / accumulate, total)
        return mean

    def _of_part(self, params: Params, rows: Rows) -> LossAndGradients:
        """Return loss and gradients, with no more text tokens than the longest text asks for."""
        lengths: Sequence[int | None] = (*self._config.text.trim_to, None)
        branches = [jax.value_and_grad(self._mean_loss(length)) for length in lengths]
        longest = rows[2].sum(axis=1).max()
        fitting = jnp.searchsorted(jnp.array(self._config.text.trim_to), longest)
        found: LossAndGradients = jax.lax.switch(fitting, branches, params, rows)
        return found

    def _mean_loss(self, text_length: int | None) -> Callable[[Params, Rows], jax.Array]:
        velocity = velocity_fn(
            self.model, rematerialise=self._config.rematerialise, text_length=text_length
        )

        def mean_loss(params: Params, rows: Rows) -> jax.Array:
            latents, caption, mask, draws = rows
            each = losses(velocity, params, latents, caption=caption, mask=mask, draws=draws)
            return each.mean()

        return mean_loss
