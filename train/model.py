"""The dual-stream MMDiT of i1: image and text tokens with their own weights and one attention.

The network sees no timestep. It is a U-shape of transformer blocks: ``depth // 2`` on the way in,
one in the middle, ``depth // 2`` on the way out, each of which also receives the output of its
counterpart. All shapes are written B (batch), N (image tokens), T (text tokens), D (hidden size).

Source: the i1 recipe (z-lab Princeton, "i1-3B"); the module names are those of its checkpoints.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import ArrayLike

from train.attention import attend
from train.blocks import Rematerialise, recomputed, scan_blocks, stacked
from train.sharding import keep_rows

# Positions are stretched to the grid of a picture of this size (i1's first training stage).
REFERENCE_RESOLUTION_PX = 256

Rotation = tuple[jax.Array, jax.Array]
# Image tokens (B, N, D) and text tokens (B, T, D).
Streams = tuple[jax.Array, jax.Array]


@dataclass(frozen=True)
class ModelConfig:
    """The shape of the network; the names are those of i1's checkpoints.

    ``input_size`` is the side of the latent grid, ``image_resolution`` that of the picture in
    pixels. ``depth`` is odd and at least 3. ``dtype`` is the type of the activations and of what
    matrices are multiplied by; the weights themselves are float32, which their gradients become.
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
    dtype: str = "float32"

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


def rotation(config: ModelConfig, text_place: jax.Array, length: jax.Array) -> Rotation:
    """Return the cosines and sines of RoPE for [image, text], each (B, N + T, 1, head_dim // 2).

    A text token stands at (its place in the text, 0, 0), a padded one at the origin; an image token
    at (number of text tokens, row, column). ``text_place`` is (B, T), ``length`` (B,).
    """
    scale = REFERENCE_RESOLUTION_PX / config.image_resolution
    batch = len(length)
    grid = jnp.indices((config.grid_size, config.grid_size)).reshape(2, -1) * scale
    image = [
        jnp.broadcast_to(length[:, None].astype(jnp.float32), (batch, grid.shape[1])),
        *(jnp.broadcast_to(axis, (batch, grid.shape[1])) for axis in grid),
    ]
    nowhere = jnp.zeros(text_place.shape, jnp.float32)
    text = [text_place.astype(jnp.float32), nowhere, nowhere]
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


class RMSNorm(nnx.RMSNorm):
    """A norm with a learned scale, both computed in float32 whatever the type of the input."""

    def __call__(self, x: jax.Array) -> jax.Array:  # type: ignore[override]
        """Normalise the last axis of ``x``."""
        normal: jax.Array = super().__call__(x).astype(x.dtype)
        return normal


def rms_norm(width: int, rngs: nnx.Rngs) -> RMSNorm:
    """A norm of this width, as all of i1's are."""
    return RMSNorm(width, epsilon=1e-6, dtype="float32", rngs=rngs)


class Linear(nnx.Linear):
    """A linear layer with bias, of whose output each sample stays where it was in the input."""

    def __call__(self, x: jax.Array) -> jax.Array:  # type: ignore[override]
        """Map (B, …, width_in) to (B, …, width_out)."""
        return keep_rows(super().__call__(x))


def linear(config: ModelConfig, width_in: int, width_out: int, rngs: nnx.Rngs) -> Linear:
    """A linear layer whose weights begin as LeCun's truncated normal."""
    return Linear(width_in, width_out, dtype=config.dtype, rngs=rngs)


def xavier_linear(config: ModelConfig, width_in: int, width_out: int, rngs: nnx.Rngs) -> Linear:
    """A linear layer with Xavier-uniform weights (the adapter's input and the skips)."""
    xavier = nnx.initializers.xavier_uniform()
    return Linear(width_in, width_out, kernel_init=xavier, dtype=config.dtype, rngs=rngs)


def split_heads(x: jax.Array, parts: int, num_heads: int) -> jax.Array:
    """Split (B, S, parts * D), queries, keys and values, to (parts, B, S, heads, D / heads)."""
    batch, length, width = x.shape
    shape = (batch, length, parts, num_heads, width // parts // num_heads)
    return jnp.moveaxis(x.reshape(shape), 2, 0)


class SwiGLU(nnx.Module):
    """The gated MLP; the hidden width is two thirds of ``mlp_ratio`` times the input's."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        width = int(2 / 3 * int(config.mlp_ratio * config.hidden_size))
        self.w12 = linear(config, config.hidden_size, 2 * width, rngs)
        self.w3 = linear(config, width, config.hidden_size, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map (B, S, D) to (B, S, D)."""
        gate, value = jnp.split(self.w12(x), 2, axis=-1)
        return self.w3(nnx.silu(gate) * value)


class SelfAttention(nnx.Module):
    """The adapter's attention over the text tokens: no positions, and no mask."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        self.num_heads = config.num_heads
        self.qkv = linear(config, config.hidden_size, 3 * config.hidden_size, rngs)
        self.q_norm = rms_norm(config.head_dim, rngs)
        self.k_norm = rms_norm(config.head_dim, rngs)
        self.proj = linear(config, config.hidden_size, config.hidden_size, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Attend over all T tokens, (B, T, D) to (B, T, D)."""
        q, k, v = split_heads(self.qkv(x), 3, self.num_heads)
        return self.proj(attend(self.q_norm(q), self.k_norm(k), v).reshape(x.shape))


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
        self.connector_in = xavier_linear(config, config.text_embed_dim, config.hidden_size, rngs)
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
        null = self.learnable_null_caption[...].astype(caption.dtype)
        x = self.connector_in(jnp.where(dropped[:, None, None], null, caption))
        x += self.connector_attn(self.connector_norm1(x))
        x += self.connector_mlp(self.connector_norm2(x))
        x += self.connector_attn2(self.connector_norm3(x))
        return x + self.connector_mlp2(self.connector_norm4(x))


class Surroundings(NamedTuple):
    """What every block sees beside its tokens.

    ``valid`` (B, T, 1) is 1 where there is text and 0 behind it, ``num_keys`` (B,) the number of
    image and valid text tokens, ``positions`` RoPE's rotation of [image, text].
    """

    valid: jax.Array
    num_keys: jax.Array
    positions: Rotation


class JointAttention(nnx.Module):
    """One attention over image and text; each stream has its own projections.

    Text behind a sample's own is no key, and its own output is zero.
    """

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        width = config.hidden_size
        self.num_heads = config.num_heads
        self.qkv_image = linear(config, width, 3 * width, rngs)
        self.qkv_text = linear(config, width, 3 * width, rngs)
        self.q_norm = rms_norm(config.head_dim, rngs)
        self.k_norm = rms_norm(config.head_dim, rngs)
        self.proj_image = linear(config, width, width, rngs)
        self.proj_text = linear(config, width, width, rngs)

    def __call__(
        self, image: jax.Array, text: jax.Array, around: Surroundings
    ) -> tuple[jax.Array, jax.Array]:
        """Return what attention adds to image (B, N, D) and to text (B, T, D)."""
        of_image = split_heads(self.qkv_image(image), 3, self.num_heads)
        of_text = split_heads(self.qkv_text(text), 3, self.num_heads)
        q, k, v = jnp.concatenate([of_image, of_text], axis=2)
        q, k = rotate(self.q_norm(q), around.positions), rotate(self.k_norm(k), around.positions)
        out = attend(q, k, v, around.num_keys)
        out_image, out_text = jnp.split(out.reshape(*out.shape[:2], -1), [image.shape[1]], axis=1)
        return self.proj_image(out_image), self.proj_text(out_text * around.valid)


class ReadingAttention(nnx.Module):
    """The last block's attention: image tokens look at both streams, text is only looked at."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        width = config.hidden_size
        self.num_heads = config.num_heads
        self.qkv_image = linear(config, width, 3 * width, rngs)
        self.kv_text = linear(config, width, 2 * width, rngs)
        self.q_norm = rms_norm(config.head_dim, rngs)
        self.k_norm = rms_norm(config.head_dim, rngs)
        self.proj_image = linear(config, width, width, rngs)

    def __call__(self, image: jax.Array, text: jax.Array, around: Surroundings) -> jax.Array:
        """Return what attention adds to image (B, N, D)."""
        q, *of_image = split_heads(self.qkv_image(image), 3, self.num_heads)
        of_text = split_heads(self.kv_text(text), 2, self.num_heads)
        k, v = jnp.concatenate([jnp.stack(of_image), of_text], axis=2)
        cos, sin = around.positions
        q = rotate(self.q_norm(q), (cos[:, : image.shape[1]], sin[:, : image.shape[1]]))
        out = attend(q, rotate(self.k_norm(k), around.positions), v, around.num_keys)
        return self.proj_image(out.reshape(image.shape))


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

    def __call__(self, streams: Streams, around: Surroundings) -> Streams:
        """Return both streams after the block; text behind a sample's own leaves it as zeros."""
        image, text = streams
        from_image, from_text = self.attn(self.norm1(image), self.norm1(text), around)
        image += self.norm3(from_image)
        text += self.norm3(from_text)
        image += self.norm4(self.mlp_image(self.norm2(image)))
        text += self.norm4(self.mlp_text(self.norm2(text)))
        return image, text * around.valid


class SkipMerge(nnx.Module):
    """What every block on the way out begins with: it takes in its counterpart's output."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        width = config.hidden_size
        self.skip_linear_image = xavier_linear(config, 2 * width, width, rngs)
        self.skip_linear_text = xavier_linear(config, 2 * width, width, rngs)

    def merge(self, streams: Streams, skip: Streams) -> Streams:
        """Mix both streams with those that left the block's counterpart on the way in."""
        image, text = (
            jnp.concatenate([stream, other], axis=-1)
            for stream, other in zip(streams, skip, strict=True)
        )
        return self.skip_linear_image(image), self.skip_linear_text(text)


class SkipBlock(SkipMerge, DualStreamBlock):
    """A block on the way out."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        SkipMerge.__init__(self, config, rngs)
        DualStreamBlock.__init__(self, config, rngs)


class LastBlock(SkipMerge):
    """The block before the final layer: as its text goes nowhere, it computes the image alone.

    i1's checkpoints have weights for the rest of the text's way, which nothing reads.
    """

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        super().__init__(config, rngs)
        self.norm1 = rms_norm(config.hidden_size, rngs)
        self.norm2 = rms_norm(config.hidden_size, rngs)
        self.norm3 = rms_norm(config.hidden_size, rngs)
        self.norm4 = rms_norm(config.hidden_size, rngs)
        self.attn = ReadingAttention(config, rngs)
        self.mlp_image = SwiGLU(config, rngs)

    def __call__(self, streams: Streams, around: Surroundings) -> jax.Array:
        """Return the image (B, N, D) after the block."""
        image, text = streams
        image += self.norm3(self.attn(self.norm1(image), self.norm1(text), around))
        after: jax.Array = image + self.norm4(self.mlp_image(self.norm2(image)))
        return after


class PatchEmbedder(nnx.Module):
    """Latents (B, H, W, C) to tokens (B, N, D), row by row."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        patch = (config.patch_size, config.patch_size)
        self.proj = nnx.Conv(
            config.in_channels, config.hidden_size, patch, patch, dtype=config.dtype, rngs=rngs
        )

    def __call__(self, latents: jax.Array) -> jax.Array:
        """Cut (B, H, W, C) into patches and embed each."""
        tokens = keep_rows(self.proj(latents))
        return tokens.reshape(tokens.shape[0], -1, tokens.shape[-1])


class FinalLayer(nnx.Module):
    """Tokens (B, N, D) back to latents (B, H, W, C)."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        self.config = config
        self.norm_final = rms_norm(config.hidden_size, rngs)
        width_out = config.patch_size**2 * config.in_channels
        self.linear = linear(config, config.hidden_size, width_out, rngs)

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
    """The whole network: noisy latents and a caption to a velocity.

    Blocks of one kind are one module whose weights have a leading axis, so that they are compiled
    once. The last two are alone: the middle one has no counterpart, the last one a smaller shape.
    """

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        self.config = config
        self.x_embedder = PatchEmbedder(config, rngs)
        self.text_encoder_adapter = TextEncoderAdapter(config, rngs)
        half = config.depth // 2
        self.in_blocks = stacked(DualStreamBlock, half, config, rngs)
        self.mid_block = DualStreamBlock(config, rngs)
        self.out_blocks = stacked(SkipBlock, half - 1, config, rngs) if half > 1 else None
        self.last_block = LastBlock(config, rngs)
        self.final_layer = FinalLayer(config, rngs)

    def __call__(
        self,
        latents: jax.Array,
        caption: jax.Array,
        mask: jax.Array,
        dropped: jax.Array,
        t: jax.Array,
        *,
        rematerialise: Rematerialise,
        text_length: int | None,
    ) -> jax.Array:
        """Predict the velocity of ``latents``; see :func:`velocity_fn`."""
        image = self.x_embedder(latents)
        image += position_table(self.config).astype(image.dtype)
        text = self.text_encoder_adapter(caption, dropped)
        text, around = place_text(self.config, text, mask, text_length)

        def way_in(streams: Streams, block: DualStreamBlock) -> tuple[Streams, Streams]:
            streams = block(streams, around)
            return streams, streams

        def way_out(streams: Streams, block: SkipBlock, skip: Streams) -> tuple[Streams, None]:
            return block(block.merge(streams, skip), around), None

        def middle(streams: Streams) -> Streams:
            return self.mid_block(streams, around)

        def last(streams: Streams, skip: Streams) -> jax.Array:
            return self.last_block(self.last_block.merge(streams, skip), around)

        streams, skips = scan_blocks(way_in, (image, text), self.in_blocks, (), rematerialise)
        streams = recomputed(middle, rematerialise)(streams)
        first_skip = jax.tree.map(lambda x: x[0], skips)
        if self.out_blocks is not None:
            # Last in, first out.
            others = jax.tree.map(lambda x: x[:0:-1], skips)
            streams, _ = scan_blocks(way_out, streams, self.out_blocks, (others,), rematerialise)
        image = recomputed(last, rematerialise)(streams, first_skip)
        return self.final_layer(image)


def place_text(
    config: ModelConfig, text: jax.Array, mask: jax.Array, text_length: int | None
) -> tuple[jax.Array, Surroundings]:
    """Bring each sample's valid text to the front, cut to ``text_length``; see it in its place.

    ``text`` is (B, T, D), ``mask`` (B, T): some tokenizers pad at the left. Positions are those
    that the tokens had.
    """
    mask = mask.astype(bool)
    place = jnp.argsort(~mask, axis=1, stable=True)[:, :text_length]

    def take(tokens: jax.Array, place: jax.Array) -> jax.Array:
        # None twice: else XLA would add up gradients at each place, one after the other.
        return tokens.at[place].get(unique_indices=True, mode="promise_in_bounds")

    text = jax.vmap(take)(text, place)
    length = mask.sum(axis=1, dtype=jnp.int32)
    valid = jnp.arange(text.shape[1]) < length[:, None]
    positions = rotation(config, place * valid, length)
    num_keys = config.grid_size**2 + length
    return text, Surroundings(valid[..., None].astype(text.dtype), num_keys, positions)


# The weights, a nested dict of float32 arrays whose keys are the modules' names.
Params = dict[str, Any]

# A network as a pure function: (params, latents, caption, mask, dropped, t) to the velocity
# (B, H, W, C). ``t`` (B,) float32 is the time of the latents, which not every network looks at.
Velocity = Callable[[Params, ArrayLike, ArrayLike, ArrayLike, ArrayLike, ArrayLike], jax.Array]


def init_params(config: ModelConfig, seed: int) -> Params:
    """Draw initial weights (LeCun truncated normal; Xavier-uniform for input and skips)."""
    params: Params = nnx.to_pure_dict(nnx.state(config.network(nnx.Rngs(seed)), nnx.Param))
    return params


def abstract_params(config: ModelConfig) -> Params:
    """Return the shapes and dtypes of the weights without drawing them."""
    _, shapes = _structure(config)
    return shapes


@lru_cache
def _structure(config: ModelConfig) -> tuple[Any, Params]:
    """Return the network without its weights, and their shapes; it takes a second to trace."""
    graphdef, weights = nnx.split(nnx.eval_shape(lambda: config.network(nnx.Rngs(0))), nnx.Param)

    def plain(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        # Where a mesh is set, flax puts it in.
        return jax.ShapeDtypeStruct(x.shape, x.dtype)

    return graphdef, jax.tree.map(plain, nnx.to_pure_dict(weights))


def velocity_fn(
    config: ModelConfig, *, rematerialise: Rematerialise = "none", text_length: int | None = None
) -> Velocity:
    """Return the network as a pure function.

    Its arguments are the weights; latents (B, H, W, C), H = W = ``input_size``; caption
    (B, T, text_embed_dim), the text encoder's states; mask (B, T), 1 where there is text; dropped
    (B,) bool, True where the learned null caption replaces the caption; and t (B,), the time. It
    returns the velocity from noise to data, (B, H, W, C) float32. Latents and caption are taken in
    ``config.dtype``.

    Args:
        config: the network's shape.
        rematerialise: what of each block the backward pass computes again.
        text_length: how many tokens are kept behind the adapter, whose attention sees all of them;
            no fewer than the longest text has, and the velocity is the same. None keeps all.
    """
    graphdef, _ = _structure(config)

    def velocity(
        params: Params,
        latents: ArrayLike,
        caption: ArrayLike,
        mask: ArrayLike,
        dropped: ArrayLike,
        t: ArrayLike,
    ) -> jax.Array:
        latents, caption = (jnp.asarray(x, config.dtype) for x in (latents, caption))
        mask, dropped, t = map(jnp.asarray, (mask, dropped, t))
        out: jax.Array = nnx.merge(graphdef, params)(
            latents,
            caption,
            mask,
            dropped,
            t,
            rematerialise=rematerialise,
            text_length=text_length,
        )
        return out.astype(jnp.float32)

    return velocity
