"""Computing in bfloat16 with weights that stay float32.

The casts are inside what is differentiated, so gradients come out as float32, and so do the sums
of the optimiser and of the average.
"""

from typing import Literal

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from train.model import Params, Velocity

Precision = Literal["float32", "bfloat16"]


def at_precision(velocity: Velocity, precision: Precision) -> Velocity:
    """Return the network with its weights and activations in this type; it still gives float32."""
    if precision == "float32":
        return velocity

    def velocity_cast(
        params: Params,
        latents: ArrayLike,
        caption: ArrayLike,
        mask: ArrayLike,
        dropped: ArrayLike,
        t: ArrayLike | None = None,
        /,
    ) -> jax.Array:
        params = jax.tree.map(lambda x: x.astype(precision), params)
        latents, caption = (jnp.asarray(x).astype(precision) for x in (latents, caption))
        return velocity(params, latents, caption, mask, dropped, t).astype(jnp.float32)

    return velocity_cast
