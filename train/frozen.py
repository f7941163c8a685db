"""The frozen encoders on the mesh: all that the loop, the evaluation and the sampling see of them.

Their weights are cut along ``fsdp`` and gathered where they are used: a codec's all at once, a text
encoder's layer by layer if it scans them. The rows of a batch are spread over all devices, and each
device computes its rows in parts, so that memory does not grow with the batch.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import ArrayLike

from train.encoders import LatentCodec, TextEncoder
from train.sharding import join_rows, split_rows

# Of what a device encodes or decodes at a time (but at least one row). Where the FLUX.2 VAE is
# finest, each array of 128 channels in float32 is 0.5 GiB then; T5Gemma's inner ones are 0.6 GiB.
PIXELS_AT_A_TIME = 1 << 20
TOKENS_AT_A_TIME = 1 << 14


class FrozenEncoders:
    """A text encoder and a codec whose weights are spread over the mesh.

    A batch has B rows, a multiple of the number of devices, and lies anywhere: on the devices, its
    rows spread over them, or on the host, whole in every process. What comes back has its rows
    spread over the devices, which compute it while the host goes on.
    """

    def __init__(self, text: TextEncoder, codec: LatentCodec, mesh: Mesh):
        self.text, self.codec, self.mesh = text, codec, mesh
        self._text_params = spread(mesh, text.params)
        self._codec_params = spread(mesh, codec.params)
        self._whole = NamedSharding(mesh, PartitionSpec())
        self._caption = jax.jit(self._encode_text)
        self._latents = jax.jit(self._encode_pictures)
        self._pictures = jax.jit(self._decode, out_shardings=self._whole)

    def encode(
        self, pictures: ArrayLike, tokens: ArrayLike, mask: ArrayLike, keys: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """Return latents (B, h, w, C) and captions (B, T, E), both float32.

        Args:
            pictures: (B, H, W, 3) uint8.
            tokens: (B, T, …), as ``text.tokenise`` returns them, with their mask (B, T).
            keys: (B,), by which the latents are drawn; without them they are the means.
        """
        return self._latents(self._codec_params, pictures, keys), self.caption(tokens, mask)

    def caption(self, tokens: ArrayLike, mask: ArrayLike) -> jax.Array:
        """Return captions (B, T, E) float32; see :meth:`encode`."""
        caption: jax.Array = self._caption(self._text_params, tokens, mask)
        return caption

    def decode(self, latents: ArrayLike) -> np.ndarray:
        """Wait for latents (B, h, w, C); return (B, H, W, 3) uint8, all of it in every process."""
        return np.asarray(self._pictures(self._codec_params, latents))

    def rows_for(self, number: int) -> int:
        """Return the least B that is enough for ``number`` rows."""
        return -(-number // self.mesh.size) * self.mesh.size

    @property
    def bytes_per_device(self) -> int:
        """What the weights take on a device."""
        device = self.mesh.local_devices[0]
        shards = (
            shard
            for weight in jax.tree.leaves((self._text_params, self._codec_params))
            for shard in weight.addressable_shards
        )
        return sum(shard.data.nbytes for shard in shards if shard.device == device)

    def _encode_text(self, params: Any, tokens: jax.Array, mask: jax.Array) -> jax.Array:
        def encode(rows: tuple[jax.Array, jax.Array]) -> jax.Array:
            return self.text.encode(params, *rows)

        return self._in_parts(encode, (tokens, mask), TOKENS_AT_A_TIME // mask.shape[1])

    def _encode_pictures(
        self, params: Any, pictures: jax.Array, keys: jax.Array | None
    ) -> jax.Array:
        # Else XLA may gather the activations of a convolution, many times as large, in their place.
        params = jax.lax.with_sharding_constraint(params, self._whole)

        def encode(rows: tuple[jax.Array, jax.Array | None]) -> jax.Array:
            return self.codec.encode(params, *rows)

        pixels = math.prod(pictures.shape[1:3])
        return self._in_parts(encode, (pictures, keys), PIXELS_AT_A_TIME // pixels)

    def _decode(self, params: Any, latents: jax.Array) -> jax.Array:
        params = jax.lax.with_sharding_constraint(params, self._whole)

        def decode(latents: jax.Array) -> jax.Array:
            return self.codec.decode(params, latents)

        pixels = math.prod(latents.shape[1:3]) * self.codec.downsampling**2
        return self._in_parts(decode, latents, PIXELS_AT_A_TIME // pixels)

    def _in_parts(self, encode: Callable[[Any], jax.Array], rows: Any, most: int) -> jax.Array:
        """Encode rows in as few equal parts as give no device more than ``most`` at a time."""
        of_device = jax.tree.leaves(rows)[0].shape[0] // self.mesh.size
        parts = next(
            parts
            for parts in range(1, of_device + 1)
            if of_device % parts == 0 and of_device // parts <= max(most, 1)
        )
        encoded: jax.Array = jax.lax.map(encode, split_rows(self.mesh, rows, parts))
        return join_rows(self.mesh, encoded)


def spread(mesh: Mesh, params: Any) -> Any:
    """Put weights on the devices, each cut along its last dimension that ``fsdp`` divides.

    For a table of embeddings that is their width: to look up tokens, devices then exchange what
    they have found; of a table that is cut along the vocabulary they would add up all rows.
    """
    fsdp = mesh.shape["fsdp"]

    def place(weight: np.ndarray) -> jax.Array:
        dividing = [axis for axis, size in enumerate(weight.shape) if size % fsdp == 0]
        parts = PartitionSpec(*[None] * dividing[-1], "fsdp") if dividing else PartitionSpec()
        placed: jax.Array = jax.make_array_from_callback(
            weight.shape, NamedSharding(mesh, parts), lambda where: weight[where]
        )
        return placed

    return jax.tree.map(place, params)
