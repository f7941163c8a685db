"""The FLUX.2 VAE: pictures to 32-channel latents an eighth of their size, and back.

The weights (FILE, 336 MB) are those of the Hugging Face model REPOSITORY at REVISION; i1 uses them.
Black Forest Labs released this autoencoder under Apache 2.0; the repository is gated: the licence
of its transformer, for non-commercial use, has to be accepted first. The ungated FLUX.2-klein-4B,
all of it under Apache 2.0, carries an autoencoder of the same shape.

The modules have the names of the checkpoint (diffusers' ``AutoencoderKLFlux2``). All arrays are
(B, height, width, channels).

i1 encodes in float32, which is the default here; on GPUs and TPUs XLA's default precision still
multiplies in TF32 or bfloat16. ``dtype = "bfloat16"`` halves the memory of the activations, at an
error (random weights of the real widths) of 1.6 % of the spread of the latents and 1.3 % of that of
the pictures, three or four grey levels: it holds for looking at samples. The error comes from all
convolutions alike; normalisation, attention weights and the posterior are in float32 always.
"""

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors import SafetensorError, safe_open

from pipeline.errors import EvenmixError
from train.pretrained import Pretrained
from train.torch_layout import Shape, check_tensors, from_torch, torch_shapes

REPOSITORY = "black-forest-labs/FLUX.2-dev"
REVISION = "26afe3a78bb242c0a8bb181dcc8937bb16e5c66c"
FILE = "vae/diffusion_pytorch_model.safetensors"

CHANNELS = 32
DOWNSAMPLING = 8
# Latents are normalised in squares of this side, whose 4 x 32 numbers each have their statistics.
NORMALISED_SIDE = 2
SQUARE = NORMALISED_SIDE**2 * CHANNELS
PICTURE_MULTIPLE = DOWNSAMPLING * NORMALISED_SIDE

LEVELS = 4
ENCODER_BLOCKS = 2
DECODER_BLOCKS = 3
GROUPS = 32
BATCH_NORM = ("bn.running_mean", "bn.running_var")
BATCHES_SEEN = "bn.num_batches_tracked"
GROUP_NORM_EPS = 1e-6
BATCH_NORM_EPS = 1e-4
# Of the 128 means and then the 128 variances, as float32: those by which i1's latents are scaled.
STATISTICS_SHA256 = "2319509954e1f5715b84ddb62f2841faf303b03f4180073656b577ba5fa427d6"
LOG_VARIANCE_RANGE = (-30.0, 20.0)
# At 1024 px there are 16,384 positions: their weights for all queries at once would be 1 GiB each.
QUERIES_AT_A_TIME = 1024

Params = dict[str, Any]


@dataclass(frozen=True)
class VaeConfig:
    """The channels at each level, in the order of the data, and the type of the activations."""

    encoder_widths: Shape
    decoder_widths: Shape
    dtype: str


FLUX2_VAE = VaeConfig((128, 256, 512, 512), (512, 512, 256, 128), "float32")
"""The autoencoder of REPOSITORY."""


class GroupNorm(nnx.Module):
    """Normalisation over groups of channels, in float32 whatever the type of the input."""

    def __init__(self, width: int):
        self.weight = nnx.Param(jnp.ones(width))
        self.bias = nnx.Param(jnp.zeros(width))

    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalise each sample of (B, H, W, C)."""
        groups = x.astype(jnp.float32).reshape(len(x), -1, GROUPS, x.shape[-1] // GROUPS)
        centred = groups - groups.mean(axis=(1, 3), keepdims=True)
        variance = jnp.square(centred).mean(axis=(1, 3), keepdims=True)
        normal = (centred * jax.lax.rsqrt(variance + GROUP_NORM_EPS)).reshape(x.shape)
        return (normal * self.weight[...] + self.bias[...]).astype(x.dtype)


def convolution(width_in: int, width_out: int, dtype: str, rngs: nnx.Rngs) -> nnx.Conv:
    """A 3 x 3 convolution that keeps the size."""
    return nnx.Conv(width_in, width_out, (3, 3), padding=1, dtype=dtype, rngs=rngs)


class ResnetBlock(nnx.Module):
    """Two convolutions beside a shortcut."""

    def __init__(self, width_in: int, width_out: int, dtype: str, rngs: nnx.Rngs):
        self.norm1 = GroupNorm(width_in)
        self.conv1 = convolution(width_in, width_out, dtype, rngs)
        self.norm2 = GroupNorm(width_out)
        self.conv2 = convolution(width_out, width_out, dtype, rngs)
        if width_in != width_out:
            self.conv_shortcut = nnx.Conv(width_in, width_out, (1, 1), dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map (B, H, W, width_in) to (B, H, W, width_out)."""
        y = self.conv1(nnx.silu(self.norm1(x)))
        y = self.conv2(nnx.silu(self.norm2(y)))
        return y + (self.conv_shortcut(x) if hasattr(self, "conv_shortcut") else x)


def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """Single-head attention over N positions, all (B, N, C); never are N x N weights in memory."""
    scale = q.shape[-1] ** -0.5

    def of_query(query: jax.Array) -> jax.Array:
        scores = jnp.einsum("bc,bnc->bn", query, k, preferred_element_type=jnp.float32) * scale
        weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
        return jnp.einsum("bn,bnc->bc", weights, v)

    attended = jax.lax.map(of_query, jnp.moveaxis(q, 1, 0), batch_size=QUERIES_AT_A_TIME)
    return jnp.moveaxis(attended, 0, 1)


class Attention(nnx.Module):
    """Each position looks at all positions."""

    def __init__(self, width: int, dtype: str, rngs: nnx.Rngs):
        self.group_norm = GroupNorm(width)
        self.to_q = nnx.Linear(width, width, dtype=dtype, rngs=rngs)
        self.to_k = nnx.Linear(width, width, dtype=dtype, rngs=rngs)
        self.to_v = nnx.Linear(width, width, dtype=dtype, rngs=rngs)
        self.to_out = nnx.List([nnx.Linear(width, width, dtype=dtype, rngs=rngs)])

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map (B, H, W, C) to the same shape."""
        y = self.group_norm(x).reshape(len(x), -1, x.shape[-1])
        y = attend(self.to_q(y), self.to_k(y), self.to_v(y))
        return x + self.to_out[0](y).reshape(x.shape)


class MidBlock(nnx.Module):
    """The coarsest level: attention between two blocks."""

    def __init__(self, width: int, dtype: str, rngs: nnx.Rngs):
        self.resnets = nnx.List([ResnetBlock(width, width, dtype, rngs) for _ in range(2)])
        self.attentions = nnx.List([Attention(width, dtype, rngs)])

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map (B, H, W, C) to the same shape."""
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


class Downsampler(nnx.Module):
    """Halves height and width; the picture is continued by zeros below and to the right."""

    def __init__(self, width: int, dtype: str, rngs: nnx.Rngs):
        edges = ((0, 1), (0, 1))
        self.conv = nnx.Conv(width, width, (3, 3), 2, padding=edges, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map (B, H, W, C) to (B, H / 2, W / 2, C)."""
        return self.conv(x)


class Upsampler(nnx.Module):
    """Doubles height and width by repeating each position."""

    def __init__(self, width: int, dtype: str, rngs: nnx.Rngs):
        self.conv = convolution(width, width, dtype, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map (B, H, W, C) to (B, 2 H, 2 W, C)."""
        return self.conv(x.repeat(2, axis=1).repeat(2, axis=2))


class DownBlock(nnx.Module):
    """The encoder's blocks at one resolution, and the way to the next coarser one."""

    def __init__(self, width_in: int, width: int, last: bool, dtype: str, rngs: nnx.Rngs):
        widths = [width_in] + [width] * (ENCODER_BLOCKS - 1)
        self.resnets = nnx.List([ResnetBlock(w, width, dtype, rngs) for w in widths])
        self.downsamplers = nnx.List([] if last else [Downsampler(width, dtype, rngs)])

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map (B, H, W, width_in) to (B, H / 2, W / 2, width)."""
        for layer in (*self.resnets, *self.downsamplers):
            x = layer(x)
        return x


class UpBlock(nnx.Module):
    """The decoder's blocks at one resolution, and the way to the next finer one."""

    def __init__(self, width_in: int, width: int, last: bool, dtype: str, rngs: nnx.Rngs):
        widths = [width_in] + [width] * (DECODER_BLOCKS - 1)
        self.resnets = nnx.List([ResnetBlock(w, width, dtype, rngs) for w in widths])
        self.upsamplers = nnx.List([] if last else [Upsampler(width, dtype, rngs)])

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map (B, H, W, width_in) to (B, 2 H, 2 W, width)."""
        for layer in (*self.resnets, *self.upsamplers):
            x = layer(x)
        return x


class Encoder(nnx.Module):
    """Pictures to the means and log-variances of their latents; ``widths`` is finest first."""

    def __init__(self, widths: Shape, dtype: str, rngs: nnx.Rngs):
        self.conv_in = convolution(3, widths[0], dtype, rngs)
        self.down_blocks = nnx.List(
            DownBlock(widths[max(level - 1, 0)], width, level == LEVELS - 1, dtype, rngs)
            for level, width in enumerate(widths)
        )
        self.mid_block = MidBlock(widths[-1], dtype, rngs)
        self.conv_norm_out = GroupNorm(widths[-1])
        self.conv_out = convolution(widths[-1], 2 * CHANNELS, dtype, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map (B, H, W, 3), -1 to 1, to (B, H / 8, W / 8, 64)."""
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = block(x)
        return self.conv_out(nnx.silu(self.conv_norm_out(self.mid_block(x))))


class Decoder(nnx.Module):
    """Latents to pictures; ``widths`` is coarsest first."""

    def __init__(self, widths: Shape, dtype: str, rngs: nnx.Rngs):
        self.conv_in = convolution(CHANNELS, widths[0], dtype, rngs)
        self.mid_block = MidBlock(widths[0], dtype, rngs)
        self.up_blocks = nnx.List(
            UpBlock(widths[max(level - 1, 0)], width, level == LEVELS - 1, dtype, rngs)
            for level, width in enumerate(widths)
        )
        self.conv_norm_out = GroupNorm(widths[-1])
        self.conv_out = convolution(widths[-1], 3, dtype, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map (B, h, w, 32) to (B, 8 h, 8 w, 3), about -1 to 1."""
        x = self.mid_block(self.conv_in(x))
        for block in self.up_blocks:
            x = block(x)
        return self.conv_out(nnx.silu(self.conv_norm_out(x)))


class Autoencoder(nnx.Module):
    """Both halves, and the 1 x 1 convolutions at their seam."""

    def __init__(self, config: VaeConfig, rngs: nnx.Rngs):
        self.encoder = Encoder(config.encoder_widths, config.dtype, rngs)
        self.quant_conv = nnx.Conv(2 * CHANNELS, 2 * CHANNELS, (1, 1), rngs=rngs)
        self.post_quant_conv = nnx.Conv(CHANNELS, CHANNELS, (1, 1), rngs=rngs)
        self.decoder = Decoder(config.decoder_widths, config.dtype, rngs)


def normalise(latents: jax.Array, mean: jax.Array, variance: jax.Array) -> jax.Array:
    """Bring latents (B, h, w, C) to mean 0 and variance 1, by the statistics of 2 x 2 squares.

    ``mean`` and ``variance``, (4 C,), are those of packed latents: channel, row in the square,
    column in the square.
    """
    squares = _in_squares(latents)
    normal = (squares - _of_square(mean)) / jnp.sqrt(_of_square(variance) + BATCH_NORM_EPS)
    return normal.reshape(latents.shape)


def denormalise(latents: jax.Array, mean: jax.Array, variance: jax.Array) -> jax.Array:
    """Undo :func:`normalise`."""
    squares = _in_squares(latents)
    scaled = squares * jnp.sqrt(_of_square(variance) + BATCH_NORM_EPS) + _of_square(mean)
    return scaled.reshape(latents.shape)


def _in_squares(latents: jax.Array) -> jax.Array:
    """View (B, h, w, C) as (B, h / 2, 2, w / 2, 2, C)."""
    batch, height, width, channels = latents.shape
    side = NORMALISED_SIDE
    return latents.reshape(batch, height // side, side, width // side, side, channels)


def _of_square(statistic: jax.Array) -> jax.Array:
    """Turn (4 C,), channel first, into what broadcasts to squares: (2, 1, 2, C)."""
    side = NORMALISED_SIDE
    return statistic.reshape(-1, side, side).transpose(1, 2, 0)[:, None]


@dataclass(frozen=True, eq=False)
class Flux2Codec:
    """The FLUX.2 VAE as a LatentCodec; see :func:`load_flux2_codec`.

    ``params`` are numpy arrays: ``autoencoder``, the weights of the modules, and ``mean`` and
    ``variance``, (128,), the running statistics that the checkpoint carries.
    """

    config: VaeConfig
    params: Params

    @property
    def channels(self) -> int:
        """Numbers in the latent of one place."""
        return CHANNELS

    @property
    def downsampling(self) -> int:
        """Side in pixels of the square that one place stands for."""
        return DOWNSAMPLING

    def posterior(self, params: Params, pictures: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Return the mean and the log-variance of the latents, each (B, h, w, 32) float32."""
        vae = self._autoencoder(params)
        features = vae.encoder(pictures.astype(jnp.float32) / 127.5 - 1)
        moments = vae.quant_conv(features.astype(jnp.float32))
        mean, log_variance = jnp.split(moments, 2, axis=-1)
        return mean, jnp.clip(log_variance, *LOG_VARIANCE_RANGE)

    def encode(
        self, params: Params, pictures: jax.Array, keys: jax.Array | None = None
    ) -> jax.Array:
        """Encode (B, H, W, 3) uint8, H and W multiples of PICTURE_MULTIPLE; see LatentCodec."""
        mean, log_variance = self.posterior(params, pictures)
        if keys is not None:
            noise = jax.vmap(lambda key: jax.random.normal(key, mean.shape[1:]))(keys)
            mean += jnp.exp(log_variance / 2) * noise
        return normalise(mean, params["mean"], params["variance"])

    def decode(self, params: Params, latents: jax.Array) -> jax.Array:
        """Decode latents; see LatentCodec."""
        latents = denormalise(latents, params["mean"], params["variance"])
        vae = self._autoencoder(params)
        x = vae.decoder(vae.post_quant_conv(latents)).astype(jnp.float32)
        return jnp.clip(jnp.round((x + 1) * 127.5), 0, 255).astype(jnp.uint8)

    def _autoencoder(self, params: Params) -> Autoencoder:
        graphdef = nnx.graphdef(_abstract(self.config))
        module: Autoencoder = nnx.merge(graphdef, params["autoencoder"])
        return module


@lru_cache(maxsize=1)
def load_flux2_codec(name: str, revision: str | None = None, dtype: str = "float32") -> Flux2Codec:
    """Read the autoencoder of a model: a folder that has FILE, or a name and commit on the Hub.

    The widths are the file's own. ``dtype`` is the type of the activations.

    Raises:
        EvenmixError: the file cannot be had, is damaged or of another model.
    """
    path = Pretrained(name, revision).path(FILE)
    try:
        with safe_open(path, framework="numpy") as file:
            names = file.keys()
            found = {name: tuple(file.get_slice(name).get_shape()) for name in names}
            config = VaeConfig(
                _widths(found, "encoder.down_blocks"), _widths(found, "decoder.up_blocks"), dtype
            )
            like = nnx.to_pure_dict(nnx.state(_abstract(config), nnx.Param))
            statistics = {name: (SQUARE,) for name in BATCH_NORM}
            expected = torch_shapes(like) | statistics | {BATCHES_SEEN: ()}
            check_tensors(str(path), found, expected)
            weights = from_torch(like, file.get_tensor)
            mean, variance = (file.get_tensor(name) for name in BATCH_NORM)
    except (OSError, SafetensorError) as error:
        raise EvenmixError(
            f"{path} is damaged or no safetensors file ({error}); download it again"
        ) from error
    if hashlib.sha256(mean.tobytes() + variance.tobytes()).hexdigest() != STATISTICS_SHA256:
        raise EvenmixError(
            f"{path} scales its latents otherwise than the FLUX.2 VAE; give the autoencoder of "
            f"{REPOSITORY}, in float32"
        )
    return Flux2Codec(config, {"autoencoder": weights, "mean": mean, "variance": variance})


def draw_flux2_codec(config: VaeConfig, seed: int) -> Flux2Codec:
    """Return an autoencoder with random weights, to measure what one costs."""
    rng = np.random.default_rng(seed)

    def draw(path: tuple[Any, ...], like: jax.ShapeDtypeStruct) -> np.ndarray:
        if path[-1].key == "kernel":
            drawn: np.ndarray = rng.standard_normal(like.shape, np.float32)
            drawn *= math.prod(like.shape[:-1]) ** -0.5
        else:  # normalisations neither scale nor shift
            drawn = np.full(like.shape, path[-1].key == "weight", np.float32)
        return drawn

    like = nnx.to_pure_dict(nnx.state(_abstract(config), nnx.Param))
    weights = jax.tree_util.tree_map_with_path(draw, like)
    mean, variance = np.zeros(SQUARE, np.float32), np.ones(SQUARE, np.float32)
    return Flux2Codec(config, {"autoencoder": weights, "mean": mean, "variance": variance})


def _widths(found: Mapping[str, Shape], blocks: str) -> Shape:
    """Return the channels of each level; the least possible where the file does not tell."""
    names = [f"{blocks}.{level}.resnets.0.conv1.weight" for level in range(LEVELS)]
    return tuple((*found.get(name, ()), GROUPS)[0] for name in names)


def _abstract(config: VaeConfig) -> Autoencoder:
    """Return the modules with shapes in the place of weights."""
    module: Autoencoder = nnx.eval_shape(lambda: Autoencoder(config, nnx.Rngs(0)))
    return module
