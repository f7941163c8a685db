"""Attention over keys of which each sample has its own number, by the fastest way there is.

On a GPU and in bfloat16 that is cuDNN's flash attention (Dao 2023), which never has the S x S
weights in memory and does not look at keys beyond a sample's; elsewhere XLA's own.
"""

import jax
import jax.numpy as jnp

from train.sharding import keep_rows

# What cuDNN takes on every GPU that has bfloat16.
MIN_COMPUTE_CAPABILITY = 8.0
CUDNN_MAX_HEAD_DIM = 128
CUDNN_HEAD_DIM_MULTIPLE = 8


def attend(q: jax.Array, k: jax.Array, v: jax.Array, lengths: jax.Array | None = None) -> jax.Array:
    """Attend from ``q`` (B, T, heads, head_dim) to the first ``lengths`` (B,) of S keys.

    ``k`` and ``v`` are (B, S, heads, head_dim); without ``lengths`` all keys count. Logits are
    scaled by head_dim ** -0.5. Returns (B, T, heads, head_dim).
    """
    head_dim = q.shape[-1]
    flash = (
        _has_flash()
        and q.dtype == jnp.bfloat16
        and head_dim <= CUDNN_MAX_HEAD_DIM
        and head_dim % CUDNN_HEAD_DIM_MULTIPLE == 0
    )
    if lengths is not None:
        # cuDNN's call is cut by the samples of q: each device must have the lengths of its own.
        lengths = keep_rows(lengths)
    return jax.nn.dot_product_attention(
        q, k, v, key_value_seq_lengths=lengths, implementation="cudnn" if flash else "xla"
    )


def _has_flash() -> bool:
    """Tell whether the devices are NVIDIA's, of a generation for which cuDNN has such attention."""
    device = jax.devices()[0]
    # AMD's are called gpu too.
    is_nvidia = device.platform == "gpu" and "cuda" in device.client.platform_version
    return is_nvidia and float(device.compute_capability) >= MIN_COMPUTE_CAPABILITY
