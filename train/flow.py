"""Rectified flow: straight paths from noise (t = 0) to data (t = 1).

Source: Liu et al. 2022 (rectified flow); the logit-normal times of Esser et al. 2024, section 3.1,
with location 0 and scale 1; the time shift of their section 5.3.2, s < 1 meaning more noise here.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from train.model import Params, Velocity


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Draws:
    """The random part of a step: noise (B, H, W, C) float32, t (B,) float32, dropped (B,) bool."""

    noise: jax.Array
    t: jax.Array
    dropped: jax.Array


def shift_time(t: jax.Array, shift: float) -> jax.Array:
    """Move times towards the noise for ``shift`` < 1; 1 leaves them as they are."""
    return shift * t / (1 + (shift - 1) * t)


def draw(
    seed: int,
    step: jax.Array,
    shape: tuple[int, ...],
    text_dropout: float,
    shift: float,
) -> Draws:
    """Draw noise, times and dropped captions for a global batch of ``shape`` (B, H, W, C).

    Sample i of step s depends on (seed, s, i) alone, so a batch that is spread over devices, or
    resumed, gets the same numbers.
    """
    of_step = jax.random.fold_in(jax.random.key(seed), step)

    def of_sample(index: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        for_noise, for_t, for_text = jax.random.split(jax.random.fold_in(of_step, index), 3)
        noise = jax.random.normal(for_noise, shape[1:])
        t = jax.nn.sigmoid(jax.random.normal(for_t))
        return noise, t, jax.random.bernoulli(for_text, text_dropout)

    noise, t, dropped = jax.vmap(of_sample)(jnp.arange(shape[0]))
    return Draws(noise, shift_time(t, shift), dropped)


def posterior_keys(seed: int, step: ArrayLike, batch_size: int) -> jax.Array:
    """Return the keys, one a sample, by which a codec draws the latents of a step's pictures.

    Each depends on (seed, step, sample) alone, and is another than those of :func:`draw`.
    """
    of_step = jax.random.fold_in(jax.random.key(seed), step)

    def of_sample(index: jax.Array) -> jax.Array:
        return jax.random.split(jax.random.fold_in(of_step, index), 4)[3]

    return jax.vmap(of_sample)(jnp.arange(batch_size))


def interpolate(data: jax.Array, noise: jax.Array, t: jax.Array) -> jax.Array:
    """Return the point of each path at time ``t`` (B,): (1 - t) noise + t data."""
    t = t[:, None, None, None]
    return (1 - t) * noise + t * data


def losses(
    velocity: Velocity,
    params: Params,
    data: jax.Array,
    *,
    caption: jax.Array,
    mask: jax.Array,
    draws: Draws,
) -> jax.Array:
    """Return each sample's mean squared error against the target data - noise, (B,) float32."""
    x_t = interpolate(data, draws.noise, draws.t)
    predicted = velocity(params, x_t, caption, mask, draws.dropped, draws.t)
    return jnp.mean((predicted - (data - draws.noise)) ** 2, axis=(1, 2, 3))
