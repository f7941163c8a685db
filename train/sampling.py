"""From prompts to pictures: Euler steps along the velocity, with classifier-free guidance.

Source: Ho and Salimans 2022 (guidance); Lin et al. 2023, "Common Diffusion Noise Schedules and
Sample Steps are Flawed", section 3.4 (rescaled guidance).
"""

import math
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from pipeline.errors import EvenmixError
from train.flow import shift_time
from train.frozen import FrozenEncoders
from train.model import Params, Velocity

# Or a few more, as many on each device.
PICTURES_AT_A_TIME = 16


@dataclass(frozen=True)
class SamplingConfig:
    """How to sample; the defaults are i1's.

    ``guidance`` 1 is none; ``rescale`` (0 to 1) brings the guided velocity's spread back to that
    of the conditional one; ``shift`` below 1 spends more of the ``steps`` near the noise.

    Raises:
        EvenmixError: values that give no picture; all of them are in the message.
    """

    guidance: float = 12.0
    rescale: float = 1.0
    steps: int = 250
    shift: float = 0.3
    seed: int = 0

    def __post_init__(self) -> None:
        mistakes = []
        if not math.isfinite(self.guidance):
            mistakes.append(f"guidance {self.guidance} is not a finite number")
        if not 0 <= self.rescale <= 1:
            mistakes.append(f"rescale {self.rescale} is not between 0 and 1")
        if self.steps < 1:
            mistakes.append(f"steps {self.steps} is below 1")
        if not 0 < self.shift < math.inf:
            mistakes.append(f"shift {self.shift} is not above 0")
        if mistakes:
            raise EvenmixError(f"cannot sample so: {'; '.join(mistakes)}")


def guide(conditional: jax.Array, unconditional: jax.Array, config: SamplingConfig) -> jax.Array:
    """Combine two velocities (B, H, W, C) into the guided one."""
    guided = conditional + (config.guidance - 1) * (conditional - unconditional)
    axes = (1, 2, 3)
    spread = conditional.std(axis=axes, ddof=1, keepdims=True)
    ratio = spread / (guided.std(axis=axes, ddof=1, keepdims=True) + 1e-8)
    return guided * (1 - config.rescale + config.rescale * ratio)


def integrate(
    velocity: Velocity,
    params: Params,
    noise: jax.Array,
    *,
    caption: jax.Array,
    mask: jax.Array,
    config: SamplingConfig,
) -> jax.Array:
    """Follow the guided velocity from ``noise`` (B, H, W, C) at t = 0 to latents at t = 1.

    The unguided velocity is that of the learned null caption under the caption's own mask.
    """
    times = shift_time(jnp.linspace(0, 1, config.steps + 1, dtype=jnp.float32), config.shift)
    # Behind each row comes the same one without its caption, so that both are on one device.
    caption, mask = jnp.repeat(caption, 2, axis=0), jnp.repeat(mask, 2, axis=0)
    dropped = jnp.arange(len(mask)) % 2 == 1

    def euler_step(x: jax.Array, interval: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        start, end = interval
        t = jnp.full(len(mask), start)
        both = velocity(params, jnp.repeat(x, 2, axis=0), caption, mask, dropped, t)
        conditional, unconditional = jnp.moveaxis(both.reshape(-1, 2, *x.shape[1:]), 1, 0)
        return x + (end - start) * guide(conditional, unconditional, config), None

    latents, _ = jax.lax.scan(euler_step, noise, (times[:-1], times[1:]))
    return latents


def sample(
    velocity: Velocity,
    params: Params,
    prompts: list[str],
    *,
    encoders: FrozenEncoders,
    resolution: int,
    config: SamplingConfig,
) -> np.ndarray:
    """Draw one picture for each prompt, (len(prompts), R, R, 3) uint8, the same in all processes.

    The noise of picture i depends on (seed, i) alone.
    """
    side = resolution // encoders.codec.downsampling
    shape = (side, side, encoders.codec.channels)
    rows = encoders.rows_for(PICTURES_AT_A_TIME)
    pictures = []
    for first in range(0, len(prompts), rows):
        chunk = prompts[first : first + rows]
        # The last chunk is filled up, so that all have one shape and compile once.
        tokens, mask = encoders.text.tokenise(chunk + [""] * (rows - len(chunk)))
        caption = encoders.caption(tokens, mask)
        latents = _draw(velocity, shape, config, params, first + np.arange(rows), caption, mask)
        pictures.append(encoders.decode(latents)[: len(chunk)])
    return np.concatenate(pictures)


@partial(jax.jit, static_argnums=(0, 1, 2))
def _draw(
    velocity: Velocity,
    shape: tuple[int, int, int],
    config: SamplingConfig,
    params: Params,
    index: jax.Array,
    caption: jax.Array,
    mask: jax.Array,
) -> jax.Array:
    """Return latents (B, *shape); a run that samples again and again compiles this once."""
    key = jax.random.key(config.seed)
    noise = jax.vmap(lambda i: jax.random.normal(jax.random.fold_in(key, i), shape))(index)
    return integrate(velocity, params, noise, caption=caption, mask=mask, config=config)
