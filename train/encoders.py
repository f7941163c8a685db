"""What stands before the network: text to embeddings, pictures to latents and back.

Two small interfaces, and for each an implementation that needs no weights: bytes of words for the
text, space-to-depth for the pixels. A large model puts a pretrained encoder and a VAE in their
place. Weights are an argument of the functions that use them, so that whoever calls decides where
they lie; :class:`train.frozen.FrozenEncoders` spreads them over a mesh.
"""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

# A token is a run of letters and digits, at most this long, or a single mark.
TOKEN = re.compile(r"\w{1,24}|[^\w\s]")
# What a token's neighbours add to its embedding, relative to the token itself.
NEIGHBOUR_SCALE = 0.5


class TextEncoder(Protocol):
    """Frozen text encoder: texts to tokens on the host, tokens to embeddings on the device."""

    @property
    def num_tokens(self) -> int:
        """Tokens of each text; longer texts are cut."""

    @property
    def embed_dim(self) -> int:
        """Width of a token's embedding."""

    @property
    def params(self) -> Any:
        """The weights, a tree of numpy arrays; {} where there are none."""

    def tokenise(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Return tokens (B, num_tokens, …) and the mask (B, num_tokens) bool.

        The mask is True where there is text, which is at the front (but see T5GemmaEncoder). It may
        run in several threads at once.
        """

    def encode(self, params: Any, tokens: jax.Array, mask: jax.Array) -> jax.Array:
        """Turn tokens into embeddings (B, num_tokens, embed_dim) float32; it may be traced."""


class LatentCodec(Protocol):
    """Pictures to the latents that the network denoises, and back."""

    @property
    def channels(self) -> int:
        """Numbers in the latent of one place."""

    @property
    def downsampling(self) -> int:
        """Side in pixels of the square that one place stands for."""

    @property
    def params(self) -> Any:
        """The weights, a tree of numpy arrays; {} where there are none."""

    def encode(self, params: Any, pictures: jax.Array, keys: jax.Array | None = None) -> jax.Array:
        """Turn (B, H, W, 3) uint8 into (B, H / d, W / d, channels) float32, d = downsampling.

        A codec whose latents are a distribution draws them by the ``keys`` (B,), one for each
        picture; without keys it returns the means. It may be traced, as :meth:`decode`.
        """

    def decode(self, params: Any, latents: jax.Array) -> jax.Array:
        """Turn latents into (B, H, W, 3) uint8."""


@dataclass(frozen=True)
class ByteTextEncoder:
    """A text encoder without parameters, made of the UTF-8 bytes of words.

    Each word or mark is one token. Its embedding is the normalised sum of fixed Gaussian vectors,
    one for each run of one to three bytes of the lower-cased word (begin and end marked) and one,
    as heavy as all runs together, for the whole word, so that equal words are equal, related words
    are near, and others are nearly orthogonal (the hashed n-grams of fastText, Bojanowski et al.
    2017, section 3.2). As the states of a pretrained encoder know their context, half as much is
    added of the same sums, under another hash, of the word before and of the word after. Vectors
    are drawn from a hash, so they are the same on every machine.

    All of that is done on the host: its tokens are the embeddings.
    """

    num_tokens: int
    embed_dim: int

    @property
    def params(self) -> dict[str, np.ndarray]:
        """No weights."""
        return {}

    def tokenise(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Return embeddings (B, num_tokens, embed_dim) float32 and the mask; see TextEncoder."""
        embeddings = np.zeros((len(texts), self.num_tokens, self.embed_dim), np.float32)
        mask = np.zeros((len(texts), self.num_tokens), bool)
        for row, text in enumerate(texts):
            words = TOKEN.findall(text.lower())
            for column, word in enumerate(words[: self.num_tokens]):
                before = words[column - 1] if column else ""
                after = words[column + 1] if column + 1 < len(words) else ""
                embeddings[row, column] = (
                    _word_vector(word, "word", self.embed_dim)
                    + NEIGHBOUR_SCALE * _word_vector(before, "before", self.embed_dim)
                    + NEIGHBOUR_SCALE * _word_vector(after, "after", self.embed_dim)
                ) / np.sqrt(1 + 2 * NEIGHBOUR_SCALE**2)
                mask[row, column] = True
        return embeddings, mask

    def encode(self, params: Any, tokens: jax.Array, mask: jax.Array) -> jax.Array:
        """Return the tokens; see TextEncoder."""
        return tokens


@lru_cache(maxsize=1 << 16)
def _word_vector(word: str, role: str, width: int) -> np.ndarray:
    """Return the vector of a word, (width,) float32, of mean square 1; no word is all zeros."""
    if not word:
        return np.zeros(width, np.float32)
    plain = word.encode()
    marked = b"\x02" + plain + b"\x03"
    runs = [plain[i : i + 1] for i in range(len(plain))]
    runs += [marked[i : i + n] for n in (2, 3) for i in range(len(marked) - n + 1)]
    total = _gaussian(role, marked, width) * np.sqrt(len(runs))
    total += np.sum([_gaussian(role, run, width) for run in runs], axis=0)
    vector: np.ndarray = (total / np.sqrt(np.mean(total**2))).astype(np.float32)
    return vector


def _gaussian(role: str, run: bytes, width: int) -> np.ndarray:
    """Return normal numbers drawn from a hash by the Box-Muller transform, (width,)."""
    stream = hashlib.shake_128(role.encode() + b"\0" + run).digest(8 * width)
    uniform = (np.frombuffer(stream, "<u4").reshape(2, width) + 0.5) / 2.0**32
    normal: np.ndarray = np.sqrt(-2 * np.log(uniform[0])) * np.cos(2 * np.pi * uniform[1])
    return normal


@dataclass(frozen=True)
class PixelCodec:
    """Latents without a VAE: pixels as x / 127.5 - 1; each square of them is one vector."""

    downsampling: int

    @property
    def channels(self) -> int:
        """Three colours for each pixel of a square."""
        return 3 * self.downsampling**2

    @property
    def params(self) -> dict[str, np.ndarray]:
        """No weights."""
        return {}

    def encode(self, params: Any, pictures: jax.Array, keys: jax.Array | None = None) -> jax.Array:
        """Encode pictures, which needs no ``keys``; see LatentCodec."""
        side = self.downsampling
        batch, height, width, _ = pictures.shape
        x = pictures.astype(jnp.float32) / 127.5 - 1
        x = x.reshape(batch, height // side, side, width // side, side, 3)
        return x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, height // side, width // side, -1)

    def decode(self, params: Any, latents: jax.Array) -> jax.Array:
        """Decode latents; see LatentCodec."""
        side = self.downsampling
        batch, height, width, _ = latents.shape
        x = latents.reshape(batch, height, width, side, side, 3).transpose(0, 1, 3, 2, 4, 5)
        x = x.reshape(batch, height * side, width * side, 3)
        return jnp.clip(jnp.round((x + 1) * 127.5), 0, 255).astype(jnp.uint8)
