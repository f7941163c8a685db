"""The dual-stream MMDiT of i1: image and text tokens with their own weights and one attention.

The network sees no timestep. It is a U-shape of transformer blocks: ``depth // 2`` on the way in,
one in the middle, ``depth // 2`` on the way out, each of which also receives the output of its
counterpart. All shapes are written B (batch), N (image tokens), T (text tokens), D (hidden size).

Source: the i1 recipe (z-lab Princeton, "i1-3B"); the module names are those of its checkpoints.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import ArrayLike

# Positions are stretched to the grid of a picture of this size (i1's first training stage).
REFERENCE_RESOLUTION_PX = 256

Rotation = tuple[jax.Array, jax.Array]


@dataclass(frozen=True)
class ModelConfig:
    """The shape of the network; the names are those of i1's checkpoints.

    ``input_size`` is the side of the latent grid, ``image_resolution`` that of the picture in
    pixels. ``depth`` is odd.
    """

    input_size: int
    image_resolution: int
    in_channels: int
    hidden_size: int
    depth: int
    num_heads: int
    text_embed_dim: int
    text_num_tokens: int
    patch_size: int = 2
    mlp_ratio: float = 4.0
    rope_theta: float = 10_000.0

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_heads

    @property
    def grid_size(self) -> int:
        """Side of the square of image tokens."""
        return self.input_size // self.patch_size

    def network(self, rngs: nnx.Rngs) -> Callable[..., jax.Array]:
        """Return the network with fresh weights."""
        return DualStreamDiT(self, rngs)


def position_table(config: ModelConfig) -> np.ndarray:
    """Return the fixed 2D sine-cosine table added to the image tokens, (N, D) float32.

    The first half of the channels encodes the column, the second the row, each sines then cosines.
    """
    scale = REFERENCE_RESOLUTION_PX / config.image_resolution
    row, column = np.indices((config.grid_size, config.grid_size)).reshape(2, -1) * scale
    quarter = config.hidden_size // 4
    frequency = 10_000.0 ** -(np.arange(quarter) / quarter)
    angles = [np.outer(axis, frequency) for axis in (column, row)]
    halves = [np.concatenate([np.sin(angle), np.cos(angle)], axis=1) for angle in angles]
    table: np.ndarray = np.concatenate(halves, axis=1).astype(np.float32)
    return table


def rope_widths(head_dim: int) -> tuple[int, int, int]:
    """Split a head's channels over the axes time, row and column; each width is even."""
    time = head_dim // 2 // 2 * 2
    row = (head_dim - time) // 2 // 2 * 2
    return time, row, head_dim - time - row


def rotation(config: ModelConfig, mask: jax.Array) -> Rotation:
    """Return the cosines and sines of RoPE for [image, text], each (B, N + T, 1, head_dim // 2).

    A text token stands at (its index, 0, 0), a padded one at the origin; an image token at
    (number of text tokens, row, column). ``mask`` is (B, T), 1 where there is text.
    """
    scale = REFERENCE_RESOLUTION_PX / config.image_resolution
    batch, num_tokens = mask.shape
    mask = mask.astype(jnp.float32)
    grid = jnp.indices((config.grid_size, config.grid_size)).reshape(2, -1) * scale
    length = mask.sum(axis=1)
    image = [
        jnp.broadcast_to(length[:, None], (batch, grid.shape[1])),
        *(jnp.broadcast_to(axis, (batch, grid.shape[1])) for axis in grid),
    ]
    text = [jnp.arange(num_tokens) * mask, jnp.zeros_like(mask), jnp.zeros_like(mask)]
    angles = []
    for width, of_image, of_text in zip(rope_widths(config.head_dim), image, text, strict=True):
        frequency = config.rope_theta ** -(np.arange(0, width, 2) / width)
        position = jnp.concatenate([of_image, of_text], axis=1)
        angles.append(position[..., None] * frequency.astype(np.float32))
    angle = jnp.concatenate(angles, axis=-1)[:, :, None, :]
    return jnp.cos(angle), jnp.sin(angle)


def rotate(x: jax.Array, by: Rotation) -> jax.Array:
    """Rotate adjacent channel pairs of ``x`` (B, S, heads, head_dim) (RoFormer, eq. 34)."""
    cos, sin = (angle[..., None] for angle in by)
    pair = x.reshape(*x.shape[:-1], -1, 2)
    turned = jnp.stack([-pair[..., 1], pair[..., 0]], axis=-1)
    return (pair * cos + turned * sin).reshape(x.shape).astype(x.dtype)


def rms_norm(width: int, rngs: nnx.Rngs) -> nnx.RMSNorm:
    """An RMSNorm with a learned scale, computed in float32."""
    return nnx.RMSNorm(width, epsilon=1e-6, rngs=rngs)


def xavier_linear(width_in: int, width_out: int, rngs: nnx.Rngs) -> nnx.Linear:
    """A linear layer with Xavier-uniform weights (the adapter's input and the skips)."""
    return nnx.Linear(width_in, width_out, kernel_init=nnx.initializers.xavier_uniform(), rngs=rngs)


def split_qkv(qkv: jax.Array, num_heads: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Split (B, S, 3 * D) into queries, keys and values, each (B, S, heads, head_dim)."""
    batch, length, width = qkv.shape
    q, k, v = jnp.moveaxis(qkv.reshape(batch, length, 3, num_heads, width // 3 // num_heads), 2, 0)
    return q, k, v


class SwiGLU(nnx.Module):
    """The gated MLP; the hidden width is two thirds of ``mlp_ratio`` times the input's."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        width = int(2 / 3 * int(config.mlp_ratio * config.hidden_size))
        self.w12 = nnx.Linear(config.hidden_size, 2 * width, rngs=rngs)
        self.w3 = nnx.Linear(width, config.hidden_size, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map (B, S, D) to (B, S, D)."""
        gate, value = jnp.split(self.w12(x), 2, axis=-1)
        return self.w3(nnx.silu(gate) * value)


class SelfAttention(nnx.Module):
    """The adapter's attention over the text tokens: no positions, and no mask."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        self.num_heads = config.num_heads
        self.qkv = nnx.Linear(config.hidden_size, 3 * config.hidden_size, rngs=rngs)
        self.q_norm = rms_norm(config.head_dim, rngs)
        self.k_norm = rms_norm(config.head_dim, rngs)
        self.proj = nnx.Linear(config.hidden_size, config.hidden_size, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Attend over all T tokens, (B, T, D) to (B, T, D)."""
        q, k, v = split_qkv(self.qkv(x), self.num_heads)
        out = jax.nn.dot_product_attention(self.q_norm(q), self.k_norm(k), v)
        return self.proj(out.reshape(x.shape))


def null_caption(config: ModelConfig, rngs: nnx.Rngs) -> nnx.Param[jax.Array]:
    """The learned embedding of no caption, (1, T, text_embed_dim)."""
    shape = (1, config.text_num_tokens, config.text_embed_dim)
    return nnx.Param(nnx.initializers.normal(config.text_embed_dim**-0.5)(rngs.params(), shape))


class TextEncoderAdapter(nnx.Module):
    """Two transformer blocks between the frozen text encoder and the network.

    It owns the learned null caption, which replaces the embedding of a dropped one.
    """

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        self.learnable_null_caption = null_caption(config, rngs)
        self.connector_in = xavier_linear(config.text_embed_dim, config.hidden_size, rngs)
        self.connector_norm1 = rms_norm(config.hidden_size, rngs)
        self.connector_norm2 = rms_norm(config.hidden_size, rngs)
        self.connector_attn = SelfAttention(config, rngs)
        self.connector_mlp = SwiGLU(config, rngs)
        self.connector_norm3 = rms_norm(config.hidden_size, rngs)
        self.connector_norm4 = rms_norm(config.hidden_size, rngs)
        self.connector_attn2 = SelfAttention(config, rngs)
        self.connector_mlp2 = SwiGLU(config, rngs)

    def __call__(self, caption: jax.Array, dropped: jax.Array) -> jax.Array:
        """Map (B, T, text_embed_dim) to (B, T, D); ``dropped`` is (B,) bool."""
        null = self.learnable_null_caption[...]
        x = self.connector_in(jnp.where(dropped[:, None, None], null, caption))
        x += self.connector_attn(self.connector_norm1(x))
        x += self.connector_mlp(self.connector_norm2(x))
        x += self.connector_attn2(self.connector_norm3(x))
        return x + self.connector_mlp2(self.connector_norm4(x))


class JointAttention(nnx.Module):
    """One attention over image and text; each stream has its own projections.

    Masked text is no key, and its own output is zero.
    """

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        width = config.hidden_size
        self.num_heads = config.num_heads
        self.qkv_image = nnx.Linear(width, 3 * width, rngs=rngs)
        self.qkv_text = nnx.Linear(width, 3 * width, rngs=rngs)
        self.q_norm = rms_norm(config.head_dim, rngs)
        self.k_norm = rms_norm(config.head_dim, rngs)
        self.proj_image = nnx.Linear(width, width, rngs=rngs)
        self.proj_text = nnx.Linear(width, width, rngs=rngs)

    def __call__(
        self, image: jax.Array, text: jax.Array, mask: jax.Array, positions: Rotation
    ) -> tuple[jax.Array, jax.Array]:
        """Return what attention adds to image (B, N, D) and to text (B, T, D)."""
        num_image = image.shape[1]
        streams = (
            split_qkv(self.qkv_image(image), self.num_heads),
            split_qkv(self.qkv_text(text), self.num_heads),
        )
        q, k, v = (jnp.concatenate(pair, axis=1) for pair in zip(*streams, strict=True))
        valid = jnp.concatenate([jnp.ones(image.shape[:2], bool), mask.astype(bool)], axis=1)
        out = jax.nn.dot_product_attention(
            rotate(self.q_norm(q), positions),
            rotate(self.k_norm(k), positions),
            v,
            mask=valid[:, None, None, :],
        )
        out = out.reshape(*out.shape[:2], -1)
        of_text = out[:, num_image:] * mask[..., None]
        return self.proj_image(out[:, :num_image]), self.proj_text(of_text)


class DualStreamBlock(nnx.Module):
    """Attention and MLP with norms before and after; both streams share the norms."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        self.norm1 = rms_norm(config.hidden_size, rngs)
        self.norm2 = rms_norm(config.hidden_size, rngs)
        self.norm3 = rms_norm(config.hidden_size, rngs)
        self.norm4 = rms_norm(config.hidden_size, rngs)
        self.attn = JointAttention(config, rngs)
        self.mlp_image = SwiGLU(config, rngs)
        self.mlp_text = SwiGLU(config, rngs)

    def __call__(
        self, image: jax.Array, text: jax.Array, mask: jax.Array, positions: Rotation
    ) -> tuple[jax.Array, jax.Array]:
        """Return both streams after the block; masked text (B, T) leaves it as zeros."""
        from_image, from_text = self.attn(self.norm1(image), self.norm1(text), mask, positions)
        image += self.norm3(from_image)
        text += self.norm3(from_text)
        image += self.norm4(self.mlp_image(self.norm2(image)))
        text += self.norm4(self.mlp_text(self.norm2(text)))
        return image, text * mask[..., None]


class SkipBlock(DualStreamBlock):
    """A block on the way out: it first merges the output of its counterpart on the way in."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        super().__init__(config, rngs)
        self.skip_linear_image = xavier_linear(2 * config.hidden_size, config.hidden_size, rngs)
        self.skip_linear_text = xavier_linear(2 * config.hidden_size, config.hidden_size, rngs)

    def merge(
        self, image: jax.Array, text: jax.Array, skip: tuple[jax.Array, jax.Array]
    ) -> tuple[jax.Array, jax.Array]:
        """Mix both streams with those of the block's counterpart."""
        return (
            self.skip_linear_image(jnp.concatenate([image, skip[0]], axis=-1)),
            self.skip_linear_text(jnp.concatenate([text, skip[1]], axis=-1)),
        )


class PatchEmbedder(nnx.Module):
    """Latents (B, H, W, C) to tokens (B, N, D), row by row."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        patch = (config.patch_size, config.patch_size)
        self.proj = nnx.Conv(config.in_channels, config.hidden_size, patch, patch, rngs=rngs)

    def __call__(self, latents: jax.Array) -> jax.Array:
        """Cut (B, H, W, C) into patches and embed each."""
        tokens = self.proj(latents)
        return tokens.reshape(tokens.shape[0], -1, tokens.shape[-1])


class FinalLayer(nnx.Module):
    """Tokens (B, N, D) back to latents (B, H, W, C)."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        self.config = config
        self.norm_final = rms_norm(config.hidden_size, rngs)
        width_out = config.patch_size**2 * config.in_channels
        self.linear = nnx.Linear(config.hidden_size, width_out, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Normalise the tokens and return (B, H, W, C)."""
        return self.to_latents(self.norm_final(tokens))

    def to_latents(self, normalised: jax.Array) -> jax.Array:
        """Map normalised tokens (B, N, D) to (B, H, W, C)."""
        grid, patch = self.config.grid_size, self.config.patch_size
        x = self.linear(normalised)
        x = x.reshape(-1, grid, grid, patch, patch, self.config.in_channels)
        x = x.transpose(0, 1, 3, 2, 4, 5)
        return x.reshape(-1, grid * patch, grid * patch, self.config.in_channels)


class DualStreamDiT(nnx.Module):
    """The whole network: noisy latents and a caption to a velocity."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        self.config = config
        self.x_embedder = PatchEmbedder(config, rngs)
        self.text_encoder_adapter = TextEncoderAdapter(config, rngs)
        half = range(config.depth // 2)
        self.in_blocks = nnx.List([DualStreamBlock(config, rngs) for _ in half])
        self.mid_block = DualStreamBlock(config, rngs)
        self.out_blocks = nnx.List([SkipBlock(config, rngs) for _ in half])
        self.final_layer = FinalLayer(config, rngs)

    def __call__(
        self,
        latents: jax.Array,
        caption: jax.Array,
        mask: jax.Array,
        dropped: jax.Array,
        t: jax.Array | None = None,
    ) -> jax.Array:
        """Predict the velocity of ``latents``.

        Args:
            latents: (B, H, W, C) float32, H = W = ``input_size``.
            caption: (B, T, text_embed_dim) float32, from the text encoder.
            mask: (B, T), 1 where there is text; the text is at the front.
            dropped: (B,) bool, True where the null caption replaces the caption.
            t: the time of the latents, which this network does not look at.

        Returns:
            (B, H, W, C) float32, the velocity from noise to data.
        """
        mask = mask.astype(latents.dtype)
        positions = rotation(self.config, mask)
        image = self.x_embedder(latents)
        image += position_table(self.config).astype(image.dtype)
        text = self.text_encoder_adapter(caption, dropped)
        skips = []
        for block in self.in_blocks:
            image, text = block(image, text, mask, positions)
            skips.append((image, text))
        image, text = self.mid_block(image, text, mask, positions)
        for block in self.out_blocks:
            image, text = block.merge(image, text, skips.pop())
            image, text = block(image, text, mask, positions)
        return self.final_layer(image)


# The weights, a nested dict of float32 arrays whose keys are the modules' names.
Params = dict[str, Any]


class Velocity(Protocol):
    """A network as a pure function.

    ``t`` (B,) float32 is the time of the latents; a network that does not see it needs none.
    """

    def __call__(
        self,
        params: Params,
        latents: ArrayLike,
        caption: ArrayLike,
        mask: ArrayLike,
        dropped: ArrayLike,
        t: ArrayLike | None = None,
        /,
    ) -> jax.Array:
        """Return the velocity (B, H, W, C) of ``latents``."""
        ...


def init_params(config: ModelConfig, seed: int) -> Params:
    """Draw initial weights (LeCun truncated normal; Xavier-uniform for input and skips)."""
    params: Params = nnx.to_pure_dict(nnx.state(config.network(nnx.Rngs(seed)), nnx.Param))
    return params


def abstract_params(config: ModelConfig) -> Params:
    """Return the shapes and dtypes of the weights without drawing them."""
    shapes: Params = jax.eval_shape(lambda: init_params(config, 0))
    return shapes


def velocity_fn(config: ModelConfig) -> Velocity:
    """Return the network as a pure function of (params, latents, caption, mask, dropped, t)."""
    graphdef = nnx.graphdef(nnx.eval_shape(lambda: config.network(nnx.Rngs(0))))

    def velocity(
        params: Params,
        latents: ArrayLike,
        caption: ArrayLike,
        mask: ArrayLike,
        dropped: ArrayLike,
        t: ArrayLike | None = None,
        /,
    ) -> jax.Array:
        inputs = map(jnp.asarray, (latents, caption, mask, dropped))
        out: jax.Array = nnx.merge(graphdef, params)(*inputs, t)
        return out

    return velocity
