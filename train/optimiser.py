"""Adam with clipped gradients and a constant rate, and the moving average of the weights.

Source: Kingma and Ba 2015, with bias correction; gradients are clipped by their global norm.
"""

from typing import TypeVar

import jax
import jax.numpy as jnp
import optax

from train.config import OptimiserConfig

Tree = TypeVar("Tree")


def make_optimiser(config: OptimiserConfig) -> optax.GradientTransformation:
    """Return clipping, Adam and the constant learning rate."""
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        _scale_by_adam(config.b1, config.b2, jnp.dtype(config.mu_dtype)),
        optax.scale_by_learning_rate(config.learning_rate),
    )


def _scale_by_adam(b1: float, b2: float, mu_dtype: jnp.dtype) -> optax.GradientTransformation:
    """Adam that keeps its first moment in ``mu_dtype`` and computes in float32.

    optax's own ``mu_dtype`` also rounds the product b1 * mu, which loses another bit.
    """
    adam = optax.scale_by_adam(b1=b1, b2=b2, eps=1e-8)

    def with_mu_as(dtype: jnp.dtype, state: optax.ScaleByAdamState) -> optax.ScaleByAdamState:
        return state._replace(mu=optax.tree.cast(state.mu, dtype))

    def init(params: optax.Params) -> optax.OptState:
        return with_mu_as(mu_dtype, adam.init(params))

    def update(
        updates: optax.Updates, state: optax.OptState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, optax.OptState]:
        updates, state = adam.update(updates, with_mu_as(jnp.dtype("float32"), state), params)
        return updates, with_mu_as(mu_dtype, state)

    return optax.GradientTransformation(init, update)


def update_ema(ema: Tree, params: Tree, decay: float) -> Tree:
    """Move the average towards the weights; it starts as a copy of them, without debiasing."""
    averaged: Tree = jax.tree.map(lambda old, new: decay * old + (1 - decay) * new, ema, params)
    return averaged
