"""The three backbones of i1's controlled experiments, from which its model was chosen.

They differ in how text reaches the image tokens: by cross-attention in every block, as part of one
stream (after two refining blocks for text and two for the image), or as a stream with its own
weights. Text comes through an MLP or through transformer blocks; AdaLN, long skips and sandwich
norms can be there or not; the rest, positions included, is that of :mod:`train.model`, and so is
the notation of shapes (S is the length of a stream).

Source: the i1 recipe (z-lab Princeton), the project page's tables and its published configurations
of these experiments, whose choices are the defaults here (hidden size 1152, depth 29, 16 heads).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from train.attention import attend
from train.blocks import Rematerialise, recomputed
from train.model import (
    REFERENCE_RESOLUTION_PX,
    FinalLayer,
    JointAttention,
    ModelConfig,
    PatchEmbedder,
    Rotation,
    SelfAttention,
    Surroundings,
    SwiGLU,
    linear,
    null_caption,
    place_text,
    position_table,
    rms_norm,
    rotate,
    split_heads,
    xavier_linear,
)

BaselineKind = Literal["cross_attention", "single_stream", "dual_stream"]

TIMESTEP_FREQUENCIES = 256
# Of each modality, before the single stream's two are joined.
REFINING_BLOCKS = 2

# The one stream of tokens (B, S, D) of a backbone, or image and text.
Streams = tuple[jax.Array, ...]


@dataclass(frozen=True, kw_only=True)
class BaselineConfig(ModelConfig):
    """The shape of a baseline.

    AdaLN is there if it is conditioned on anything: the timestep, the mean of the caption's
    tokens, or their sum. ``adapter_blocks`` is the number of the text adapter's transformer
    blocks; with none of them it is an MLP.
    """

    kind: BaselineKind
    adaln_timestep: bool = True
    adaln_pooled_text: bool = True
    adapter_blocks: int = 0
    long_skips: bool = True
    sandwich_norms: bool = False

    @property
    def has_adaln(self) -> bool:
        """Whether blocks are modulated."""
        return self.adaln_timestep or self.adaln_pooled_text

    def network(self, rngs: nnx.Rngs) -> Callable[..., jax.Array]:
        """Return the network with fresh weights."""
        return BACKBONES[self.kind](self, rngs)


class Given(NamedTuple):
    """What every block sees beside its tokens.

    ``condition`` (B, D) is what AdaLN goes by; ``text`` (B, T, D) the adapter's output, its valid
    tokens first. ``around`` is about the stream [image, text] where it is one, else about the text
    that the image attends to.
    """

    condition: jax.Array
    text: jax.Array
    around: Surroundings


class MLPAdapter(nnx.Module):
    """Two linear layers between the frozen text encoder and the network; see TextEncoderAdapter."""

    def __init__(self, config: BaselineConfig, rngs: nnx.Rngs):
        self.learnable_null_caption = null_caption(config, rngs)
        self.linear1 = xavier_linear(config, config.text_embed_dim, config.hidden_size, rngs)
        self.linear2 = xavier_linear(config, config.hidden_size, config.hidden_size, rngs)

    def __call__(self, caption: jax.Array, dropped: jax.Array) -> jax.Array:
        """Map (B, T, text_embed_dim) to (B, T, D); ``dropped`` is (B,) bool."""
        null = self.learnable_null_caption[...].astype(caption.dtype)
        x = self.linear1(jnp.where(dropped[:, None, None], null, caption))
        return self.linear2(nnx.gelu(x, approximate=False))


class AdapterBlock(nnx.Module):
    """A pre-norm transformer block over the text, padding included."""

    def __init__(self, config: BaselineConfig, rngs: nnx.Rngs):
        self.norm1 = rms_norm(config.hidden_size, rngs)
        self.norm2 = rms_norm(config.hidden_size, rngs)
        self.attn = SelfAttention(config, rngs)
        self.mlp = SwiGLU(config, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map (B, T, D) to (B, T, D)."""
        x += self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class TransformerAdapter(nnx.Module):
    """A linear layer and transformer blocks; with two of them it is i1's TextEncoderAdapter."""

    def __init__(self, config: BaselineConfig, rngs: nnx.Rngs):
        self.learnable_null_caption = null_caption(config, rngs)
        self.linear = xavier_linear(config, config.text_embed_dim, config.hidden_size, rngs)
        self.blocks = nnx.List([AdapterBlock(config, rngs) for _ in range(config.adapter_blocks)])

    def __call__(self, caption: jax.Array, dropped: jax.Array) -> jax.Array:
        """Map (B, T, text_embed_dim) to (B, T, D); ``dropped`` is (B,) bool."""
        null = self.learnable_null_caption[...].astype(caption.dtype)
        x = self.linear(jnp.where(dropped[:, None, None], null, caption))
        for block in self.blocks:
            x = block(x)
        return x


class TimestepEmbedder(nnx.Module):
    """Times between 0 (noise) and 1 (data), by cosines and sines, to vectors."""

    def __init__(self, config: BaselineConfig, rngs: nnx.Rngs):
        self.linear1 = linear(config, TIMESTEP_FREQUENCIES, config.hidden_size, rngs)
        self.linear2 = linear(config, config.hidden_size, config.hidden_size, rngs)

    def __call__(self, t: jax.Array) -> jax.Array:
        """Map (B,) to (B, D)."""
        half = TIMESTEP_FREQUENCIES // 2
        frequency = 10_000.0 ** -(np.arange(half, dtype=np.float32) / half)
        angle = t[:, None] * frequency
        x = self.linear1(jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], axis=-1))
        return self.linear2(nnx.silu(x))


class Residual(nnx.Module):
    """The path around attention or an MLP: x + gate * norm_out(f(shift + (1 + scale) * norm(x))).

    Shift, scale and gate are AdaLN's (Peebles and Xie 2023), but like i1's not zero to begin with;
    ``norm_out`` is the sandwich norm. A block's streams share them all.
    """

    def __init__(self, config: BaselineConfig, rngs: nnx.Rngs, *, conditioned: bool = True):
        width = config.hidden_size
        self.norm = rms_norm(width, rngs)
        self.norm_out = rms_norm(width, rngs) if config.sandwich_norms else nnx.identity
        conditioned = conditioned and config.has_adaln
        self.adaln = linear(config, width, 3 * width, rngs) if conditioned else None

    def __call__(
        self, f: Callable[..., Streams], streams: Streams, condition: jax.Array
    ) -> Streams:
        """Return the streams after ``f``, which maps all of them at once."""
        shift, scale, gate = jnp.array([0.0, 0.0, 1.0], streams[0].dtype)
        if self.adaln is not None:
            shift, scale, gate = jnp.split(self.adaln(nnx.silu(condition))[:, None], 3, axis=-1)
        added = f(*(shift + (1 + scale) * self.norm(x) for x in streams))
        return tuple(x + gate * self.norm_out(y) for x, y in zip(streams, added, strict=True))


class StreamAttention(nnx.Module):
    """Self-attention with RoPE; masked tokens are no keys, and their own output is zero."""

    def __init__(self, config: BaselineConfig, rngs: nnx.Rngs):
        self.num_heads = config.num_heads
        self.qkv = linear(config, config.hidden_size, 3 * config.hidden_size, rngs)
        self.q_norm = rms_norm(config.head_dim, rngs)
        self.k_norm = rms_norm(config.head_dim, rngs)
        self.proj = linear(config, config.hidden_size, config.hidden_size, rngs)

    def __call__(self, x: jax.Array, around: Surroundings) -> jax.Array:
        """Attend over the valid of all tokens, (B, S, D) to (B, S, D)."""
        q, k, v = split_heads(self.qkv(x), 3, self.num_heads)
        q, k = rotate(self.q_norm(q), around.positions), rotate(self.k_norm(k), around.positions)
        return self.proj(attend(q, k, v, around.num_keys).reshape(x.shape) * around.valid)


class CrossAttention(nnx.Module):
    """Image tokens look at the valid text tokens; no norm comes before it, and no modulation."""

    def __init__(self, config: BaselineConfig, rngs: nnx.Rngs):
        width = config.hidden_size
        self.num_heads = config.num_heads
        self.q = linear(config, width, width, rngs)
        self.k = linear(config, width, width, rngs)
        self.v = linear(config, width, width, rngs)
        self.q_norm = rms_norm(config.head_dim, rngs)
        self.k_norm = rms_norm(config.head_dim, rngs)
        self.proj = linear(config, width, width, rngs)

    def __call__(self, image: jax.Array, given: Given) -> jax.Array:
        """Return what the text adds to the image (B, N, D)."""
        q, k, v = (
            x.reshape(*x.shape[:2], self.num_heads, -1)
            for x in (self.q(image), self.k(given.text), self.v(given.text))
        )
        out = attend(self.q_norm(q), self.k_norm(k), v, given.around.num_keys)
        return self.proj(out.reshape(image.shape))


class CrossAttentionBlock(nnx.Module):
    """Self-attention of the image, cross-attention to the text, MLP."""

    def __init__(self, config: BaselineConfig, rngs: nnx.Rngs):
        self.around_attn = Residual(config, rngs)
        self.around_mlp = Residual(config, rngs)
        self.attn = StreamAttention(config, rngs)
        self.cross_attn = CrossAttention(config, rngs)
        self.mlp = SwiGLU(config, rngs)

    def __call__(self, streams: Streams, given: Given) -> Streams:
        """Return the image after the block."""

        def look(image: jax.Array) -> Streams:
            everywhere = jnp.full(len(image), image.shape[1], jnp.int32)
            all_valid = Surroundings(
                jnp.ones_like(image[..., :1]), everywhere, given.around.positions
            )
            return (self.attn(image, all_valid),)

        (image,) = self.around_attn(look, streams, given.condition)
        image += self.cross_attn(image, given)
        return self.around_mlp(lambda x: (self.mlp(x),), (image,), given.condition)


class SingleStreamBlock(nnx.Module):
    """Attention and MLP with the same weights for all tokens."""

    def __init__(self, config: BaselineConfig, rngs: nnx.Rngs, *, conditioned: bool = True):
        self.around_attn = Residual(config, rngs, conditioned=conditioned)
        self.around_mlp = Residual(config, rngs, conditioned=conditioned)
        self.attn = StreamAttention(config, rngs)
        self.mlp = SwiGLU(config, rngs)

    def __call__(self, streams: Streams, given: Given) -> Streams:
        """Return the stream after the block; masked tokens leave it as zeros."""

        def look(tokens: jax.Array) -> Streams:
            return (self.attn(tokens, given.around),)

        streams = self.around_attn(look, streams, given.condition)
        (x,) = self.around_mlp(lambda x: (self.mlp(x),), streams, given.condition)
        return (x * given.around.valid,)


class DualStreamBlock(nnx.Module):
    """One attention over image and text, which have their own weights but for the norms."""

    def __init__(self, config: BaselineConfig, rngs: nnx.Rngs):
        self.around_attn = Residual(config, rngs)
        self.around_mlp = Residual(config, rngs)
        self.attn = JointAttention(config, rngs)
        self.mlp_image = SwiGLU(config, rngs)
        self.mlp_text = SwiGLU(config, rngs)

    def __call__(self, streams: Streams, given: Given) -> Streams:
        """Return image and text after the block; masked text leaves it as zeros."""

        def look(image: jax.Array, text: jax.Array) -> Streams:
            return self.attn(image, text, given.around)

        def feed_forward(image: jax.Array, text: jax.Array) -> Streams:
            return self.mlp_image(image), self.mlp_text(text)

        streams = self.around_attn(look, streams, given.condition)
        image, text = self.around_mlp(feed_forward, streams, given.condition)
        return image, text * given.around.valid


class Merge(nnx.Module):
    """A long skip: each stream is mixed with what it was after the counterpart on the way in."""

    def __init__(self, config: BaselineConfig, num_streams: int, rngs: nnx.Rngs):
        width = config.hidden_size
        self.linears = nnx.List(
            [xavier_linear(config, 2 * width, width, rngs) for _ in range(num_streams)]
        )

    def __call__(self, streams: Streams, skips: Streams) -> Streams:
        """Return the mixed streams."""
        pairs = zip(self.linears, streams, skips, strict=True)
        return tuple(mix(jnp.concatenate([x, skip], axis=-1)) for mix, x, skip in pairs)


class Backbone(nnx.Module):
    """What the three have in common; a subclass says what its blocks are and begin with."""

    block: ClassVar[type[CrossAttentionBlock | SingleStreamBlock | DualStreamBlock]]
    num_streams: ClassVar[int] = 1

    def __init__(self, config: BaselineConfig, rngs: nnx.Rngs):
        width = config.hidden_size
        self.config = config
        self.x_embedder = PatchEmbedder(config, rngs)
        adapter = TransformerAdapter if config.adapter_blocks else MLPAdapter
        self.text_encoder_adapter = adapter(config, rngs)
        self.t_embedder = TimestepEmbedder(config, rngs) if config.adaln_timestep else None
        block = self.block
        half = config.depth // 2 if config.long_skips else 0
        self.in_blocks = nnx.List([block(config, rngs) for _ in range(half)])
        self.mid_blocks = nnx.List([block(config, rngs) for _ in range(config.depth - 2 * half)])
        self.merges = nnx.List([Merge(config, self.num_streams, rngs) for _ in range(half)])
        self.out_blocks = nnx.List([block(config, rngs) for _ in range(half)])
        self.final_adaln = linear(config, width, 2 * width, rngs) if config.has_adaln else None
        self.final_layer = FinalLayer(config, rngs)

    def begin(self, image: jax.Array, given: Given) -> tuple[Streams, Given]:
        """Return what the first block is given; ``given.around`` is about [image, text] yet."""
        raise NotImplementedError

    def condition(self, t: jax.Array, text: jax.Array, valid: jax.Array) -> jax.Array:
        """Return what AdaLN is conditioned on, (B, D); the text's mean is over its valid tokens."""
        condition = jnp.zeros_like(text[:, 0])
        if self.t_embedder is not None:
            condition += self.t_embedder(t).astype(text.dtype)
        if self.config.adaln_pooled_text:
            condition += (text * valid).sum(axis=1) / jnp.maximum(valid.sum(axis=1), 1)
        return condition

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
        """Predict the velocity of ``latents`` at ``t``; see :func:`train.model.velocity_fn`."""
        image = self.x_embedder(latents)
        image += position_table(self.config).astype(image.dtype)
        text = self.text_encoder_adapter(caption, dropped)
        text, around = place_text(self.config, text, mask, text_length)
        condition = self.condition(t, text, around.valid)
        num_image = image.shape[1]
        streams, given = self.begin(image, Given(condition, text, around))

        def run(block: Callable[[Streams, Given], Streams], streams: Streams) -> Streams:
            return recomputed(lambda streams: block(streams, given), rematerialise)(streams)

        skips = []
        for block in self.in_blocks:
            streams = run(block, streams)
            skips.append(streams)
        for block in self.mid_blocks:
            streams = run(block, streams)
        for merge, block in zip(self.merges, self.out_blocks, strict=True):
            streams = run(block, merge(streams, skips.pop()))
        x = self.final_layer.norm_final(streams[0][:, :num_image])
        if self.final_adaln is not None:
            shift, scale = jnp.split(self.final_adaln(nnx.silu(condition))[:, None], 2, axis=-1)
            x = shift + (1 + scale) * x
        return self.final_layer.to_latents(x)


class CrossAttentionBackbone(Backbone):
    """The image is the only stream."""

    block = CrossAttentionBlock

    def begin(self, image: jax.Array, given: Given) -> tuple[Streams, Given]:
        """Return the image alone; its keys are the text's."""
        text_length = given.around.valid[..., 0].sum(axis=1).astype(jnp.int32)
        # A sample without text looks at what the adapter made of padding: there is nothing else.
        num_keys = jnp.maximum(text_length, 1)
        around = Surroundings(given.around.valid, num_keys, self.positions())
        return (image,), given._replace(around=around)

    def positions(self) -> Rotation:
        """Return RoPE's rotation of the image: half of a head for the row, half for the column."""
        config = self.config
        scale = REFERENCE_RESOLUTION_PX / config.image_resolution
        width = config.head_dim // 2
        frequency = config.rope_theta ** -(np.arange(0, width, 2) / width)
        axes = np.indices((config.grid_size, config.grid_size)).reshape(2, -1) * scale
        angle = np.concatenate([np.outer(axis, frequency) for axis in axes], axis=1)
        angle = angle[None, :, None].astype(np.float32)
        return jnp.cos(angle), jnp.sin(angle)


class SingleStreamBackbone(Backbone):
    """Image and text are refined apart, the text without AdaLN, and then are one sequence."""

    block = SingleStreamBlock

    def __init__(self, config: BaselineConfig, rngs: nnx.Rngs):
        super().__init__(config, rngs)
        each = range(REFINING_BLOCKS)
        self.context_refiner = nnx.List(
            [SingleStreamBlock(config, rngs, conditioned=False) for _ in each]
        )
        self.noise_refiner = nnx.List([SingleStreamBlock(config, rngs) for _ in each])

    def begin(self, image: jax.Array, given: Given) -> tuple[Streams, Given]:
        """Return [image, text], refined apart, as one stream."""
        num_image = image.shape[1]
        ones = jnp.ones_like(image[..., :1])
        valid, num_keys, (cos, sin) = given.around
        in_image = (cos[:, :num_image], sin[:, :num_image])
        in_text = (cos[:, num_image:], sin[:, num_image:])
        of_image = Surroundings(ones, jnp.full_like(num_keys, num_image), in_image)
        refined_image: Streams = (image,)
        for block in self.noise_refiner:
            refined_image = block(refined_image, given._replace(around=of_image))
        of_text = Surroundings(valid, jnp.maximum(num_keys - num_image, 1), in_text)
        refined_text: Streams = (given.text,)
        for block in self.context_refiner:
            refined_text = block(refined_text, given._replace(around=of_text))
        sequence = jnp.concatenate([*refined_image, *refined_text], axis=1)
        of_both = given.around._replace(valid=jnp.concatenate([ones, valid], axis=1))
        return (sequence,), given._replace(around=of_both)


class DualStreamBackbone(Backbone):
    """Image and text are streams of their own."""

    block = DualStreamBlock
    num_streams = 2

    def begin(self, image: jax.Array, given: Given) -> tuple[Streams, Given]:
        """Return both."""
        return (image, given.text), given


BACKBONES: dict[BaselineKind, type[Backbone]] = {
    "cross_attention": CrossAttentionBackbone,
    "single_stream": SingleStreamBackbone,
    "dual_stream": DualStreamBackbone,
}
