"""The encoder of T5Gemma: captions to the last hidden states that i1's network reads.

It is Gemma 2 as an encoder (Zhang et al. 2025, arXiv 2504.06225): every token attends to every
other, in every second layer only within a window; attention logits are soft-capped; each block is
normalised before and after; norms scale by 1 + weight. All shapes are written B (texts), T
(tokens), D (hidden size), L (layers).

i1 uses google/t5gemma-2b-2b-ul2-it (D 2304, L 26, 256 tokens). It is under the Gemma Terms of Use
(https://ai.google.dev/gemma/terms) and gated: accept them on its page on the Hugging Face Hub, then
give a downloaded folder, or the name and a commit with HF_TOKEN set. Of its two halves only the
encoder is fetched and read: 2.6 billion weights, 5.2 GB in bfloat16.

Two codes of i1 read a text in two ways, and as the network's adapter also sees the padding, the
difference reaches the picture:

- ``i1``, its JAX code, on the gemma library: no special tokens, cut at the end, padded at the
  right; padded tokens attend to nothing, so attention adds nothing to them.
- ``huggingface``, its torch code, on transformers: special tokens and the padded side as the
  tokenizer's files say; padded tokens attend to the text.

Both cap the logits, as training did; transformers does so with eager attention only. A window that
is shorter than the text (none is here: 4096) counts as in transformers, whose reach is one token
longer than that of the gemma library.

In bfloat16 are the weights and the inputs of matrix products; the residual stream, norms, rotations
and softmax stay in float32. With random weights of 26 layers the states then differ from those in
float32 by 1.6 % (1.1 % from the weights, 0.9 % from the products); with all in bfloat16, as
transformers does it, by 2.3 %.

Work is split: ``tokenise`` runs on the host, ahead of the step, and ``encode`` on the device, layer
by layer in a scan, so that of weights that are spread over devices one layer is gathered at a time.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from pydantic import AliasChoices, AliasPath, BaseModel, ConfigDict, Field, model_validator
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from pipeline.errors import EvenmixError
from train.pretrained import Pretrained

Semantics = Literal["i1", "huggingface"]
Params = dict[str, Any]
Shapes = dict[str, tuple[int, ...]]
Rotation = tuple[jax.Array, jax.Array]

# The logit of a token that is not attended to; the others are within the cap, 50.
NOWHERE = -1e9
# Numbers that are drawn for random weights, which repeat them: billions would take minutes.
DRAWN_NUMBERS = 1 << 20

_ENCODER_TENSOR = re.compile(r"(?:model\.)?encoder\.(?P<name>.+)\.weight")


class T5GemmaConfig(BaseModel):
    """The encoder's shape, under the names of config.json; what is not implemented is refused."""

    model_config = ConfigDict(frozen=True)

    vocab_size: int = Field(gt=0)
    pad_token_id: int = Field(ge=0)
    hidden_size: int = Field(gt=0)
    intermediate_size: int = Field(gt=0)
    num_hidden_layers: int = Field(gt=0)
    num_attention_heads: int = Field(gt=0)
    num_key_value_heads: int = Field(gt=0)
    head_dim: int = Field(gt=0, multiple_of=2)
    layer_types: tuple[Literal["sliding_attention", "full_attention"], ...]
    sliding_window: int = Field(gt=0)
    query_pre_attn_scalar: float = Field(gt=0)
    attn_logit_softcapping: float = Field(gt=0)
    rms_norm_eps: float = Field(gt=0)
    # transformers 5 has moved it.
    rope_theta: float = Field(
        gt=1,
        validation_alias=AliasChoices(AliasPath("rope_parameters", "rope_theta"), "rope_theta"),
    )
    rope_type: Literal["default"] = Field(
        default="default", validation_alias=AliasPath("rope_parameters", "rope_type")
    )
    hidden_activation: Literal["gelu_pytorch_tanh"]
    attention_bias: Literal[False]

    @model_validator(mode="after")
    def _counts_fit(self) -> "T5GemmaConfig":
        if len(self.layer_types) != self.num_hidden_layers:
            raise ValueError(
                f"{len(self.layer_types)} layer_types, {self.num_hidden_layers} layers"
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError("num_attention_heads must be a multiple of num_key_value_heads")
        return self


T5GEMMA_2B = T5GemmaConfig(
    vocab_size=256_000,
    pad_token_id=0,
    hidden_size=2304,
    intermediate_size=9216,
    num_hidden_layers=26,
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=256,
    layer_types=("sliding_attention", "full_attention") * 13,
    sliding_window=4096,
    query_pre_attn_scalar=256,
    attn_logit_softcapping=50.0,
    rms_norm_eps=1e-6,
    rope_theta=10_000.0,
    hidden_activation="gelu_pytorch_tanh",
    attention_bias=False,
)
"""The shape of the encoder of google/t5gemma-2b-2b-ul2-it."""


def parameter_shapes(config: T5GemmaConfig) -> tuple[Shapes, Shapes]:
    """Return the shapes of the arrays outside the layers, and of those of one layer, by name."""
    hidden, inner = config.hidden_size, config.intermediate_size
    queries = config.num_attention_heads * config.head_dim
    keys = config.num_key_value_heads * config.head_dim
    outside: Shapes = {"embed_tokens": (config.vocab_size, hidden), "norm": (hidden,)}
    layer: Shapes = {
        "pre_self_attn_layernorm": (hidden,),
        "self_attn.q_proj": (queries, hidden),
        "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, queries),
        "post_self_attn_layernorm": (hidden,),
        "pre_feedforward_layernorm": (hidden,),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
        "post_feedforward_layernorm": (hidden,),
    }
    return outside, layer


def encode(
    params: Params,
    ids: jax.Array,
    mask: jax.Array,
    *,
    config: T5GemmaConfig,
    semantics: Semantics = "i1",
) -> jax.Array:
    """Return the last hidden states (B, T, D) float32 of token ids (B, T) with their mask (B, T).

    Matrix products take their inputs in the dtype of the weights and add up in float32.
    """
    place = jnp.arange(ids.shape[1])
    near = jnp.abs(place[:, None] - place) <= config.sliding_window
    rotation = _rotation(place, config)

    def layer(x: jax.Array, this: tuple[Params, jax.Array]) -> tuple[jax.Array, None]:
        weights, is_sliding = this

        def norm(name: str, x: jax.Array) -> jax.Array:
            return _rms_norm(x, weights[f"{name}_layernorm"], config.rms_norm_eps)

        allowed = mask[:, None, :] & (near | ~is_sliding)
        update = _attention(weights, norm("pre_self_attn", x), allowed, rotation, config)
        if semantics == "i1":
            update = jnp.where(mask[:, :, None], update, 0)
        x = x + norm("post_self_attn", update)
        update = _feedforward(weights, norm("pre_feedforward", x))
        return x + norm("post_feedforward", update), None

    x = params["embed_tokens"][ids].astype(jnp.float32) * math.sqrt(config.hidden_size)
    is_sliding = jnp.array([kind == "sliding_attention" for kind in config.layer_types])
    x, _ = jax.lax.scan(layer, x, (params["layers"], is_sliding))
    return _rms_norm(x, params["norm"], config.rms_norm_eps)


@dataclass(frozen=True, eq=False)
class T5GemmaEncoder:
    """A :class:`train.encoders.TextEncoder` with the weights and the tokenizer of a checkpoint.

    ``params`` are numpy arrays. Under ``huggingface`` the text is at the end of the mask where the
    tokenizer pads at the left, as Gemma's does.
    """

    config: T5GemmaConfig
    params: Params
    tokenizer: Tokenizer
    num_tokens: int
    semantics: Semantics

    @property
    def embed_dim(self) -> int:
        """Width of a token's state."""
        return self.config.hidden_size

    def tokenise(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Return token ids (B, T) int32 and their mask (B, T) bool; see TextEncoder."""
        rows = self.tokenizer.encode_batch(
            list(texts), add_special_tokens=self.semantics == "huggingface"
        )
        ids = np.array([row.ids for row in rows], np.int32)
        return ids, np.array([row.attention_mask for row in rows], bool)

    def encode(self, params: Params, tokens: jax.Array, mask: jax.Array) -> jax.Array:
        """Return the states of token ids (B, T); see TextEncoder."""
        return encode(params, tokens, mask, config=self.config, semantics=self.semantics)


def load_t5gemma(
    weights: str,
    revision: str | None = None,
    *,
    num_tokens: int,
    semantics: Semantics = "i1",
    dtype: str = "bfloat16",
) -> T5GemmaEncoder:
    """Load the encoder of a checkpoint, and its tokenizer.

    Args:
        weights: a folder with the files of a checkpoint, or its name on the Hugging Face Hub.
        revision: the commit on the Hub, all 40 digits; None for a folder.
        num_tokens: to which texts are cut and padded.
        semantics: see the module.
        dtype: of the weights and of the inputs of matrix products.

    Raises:
        EvenmixError: a file is missing or damaged, a tensor is missing or has another shape, or
            the Hub refuses.
    """
    checkpoint = Pretrained(weights, revision)
    config = checkpoint.parse("config.json", _ConfigFile).encoder
    tokenizer = _load_tokenizer(checkpoint, config, num_tokens, semantics)
    params = load_params(checkpoint, config, dtype)
    return T5GemmaEncoder(config, params, tokenizer, num_tokens, semantics)


def draw_t5gemma(config: T5GemmaConfig, seed: int, *, num_tokens: int) -> T5GemmaEncoder:
    """Return an encoder with random weights in bfloat16, to measure what one costs.

    The norms do not scale; all else is normal with variance 1 / (size of the last axis). Its
    tokenizer needs no file: each word and each mark is a token, and all are the same.
    """
    numbers = np.random.default_rng(seed).standard_normal(DRAWN_NUMBERS, np.float32)

    def draw(name: str, shape: tuple[int, ...]) -> np.ndarray:
        if name.endswith("norm"):
            return np.zeros(shape, np.float32)
        return np.resize((numbers * shape[-1] ** -0.5).astype("bfloat16"), shape)

    outside, layer = parameter_shapes(config)
    layers = config.num_hidden_layers
    params: Params = {name: draw(name, shape) for name, shape in outside.items()}
    params["layers"] = {name: draw(name, (layers, *shape)) for name, shape in layer.items()}
    tokenizer = Tokenizer(WordLevel({"<unk>": 1}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.enable_truncation(num_tokens)
    tokenizer.enable_padding(pad_id=config.pad_token_id, length=num_tokens)
    return T5GemmaEncoder(config, params, tokenizer, num_tokens, "i1")


def load_params(checkpoint: Pretrained, config: T5GemmaConfig, dtype: str) -> Params:
    """Read the encoder's weights as numpy arrays, each kind of all layers stacked: (L, ...).

    They are in ``dtype``, but the norms' in float32. Every shape is looked at before any is read.

    Raises:
        EvenmixError: as :func:`load_t5gemma`.
    """
    outside, layer = parameter_shapes(config)
    in_layers = [f"layers.{number}." for number in range(config.num_hidden_layers)]

    def empty(name: str, shape: tuple[int, ...]) -> np.ndarray:
        return np.empty(shape, "float32" if name.endswith("norm") else dtype)

    with checkpoint.tensors(_ENCODER_TENSOR) as tensors:
        for name, shape in outside.items():
            tensors.check(name, shape)
        for prefix in in_layers:
            for name, shape in layer.items():
                tensors.check(prefix + name, shape)
        params: Params = {name: empty(name, shape) for name, shape in outside.items()}
        for name, array in params.items():
            array[:] = tensors.read(name)
        params["layers"] = {}
        for name, shape in layer.items():
            stacked = params["layers"][name] = empty(name, (config.num_hidden_layers, *shape))
            for number, prefix in enumerate(in_layers):
                stacked[number] = tensors.read(prefix + name)
    return params


class _ConfigFile(BaseModel):
    """What config.json must say of the whole model."""

    model_type: Literal["t5gemma"]
    encoder: T5GemmaConfig


class _TokenizerFile(BaseModel):
    """What tokenizer_config.json says beside tokenizer.json; Gemma's tokenizer pads at the left."""

    padding_side: Literal["left", "right"] = "left"


def _load_tokenizer(
    checkpoint: Pretrained, config: T5GemmaConfig, num_tokens: int, semantics: Semantics
) -> Tokenizer:
    path = checkpoint.path("tokenizer.json")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing narrower
        raise EvenmixError(f"{path} is no tokenizer ({error}); download it again") from error
    if tokenizer.get_vocab_size() > config.vocab_size:
        raise EvenmixError(
            f"{path} has {tokenizer.get_vocab_size()} tokens, but config.json only "
            f"{config.vocab_size}; the files are of different models"
        )
    side = "right"
    if semantics == "huggingface":
        side = checkpoint.parse("tokenizer_config.json", _TokenizerFile).padding_side
    # The gemma library never takes "<bos>" in a text for the token; transformers does.
    tokenizer.encode_special_tokens = semantics == "i1"
    tokenizer.enable_truncation(num_tokens)
    tokenizer.enable_padding(direction=side, pad_id=config.pad_token_id, length=num_tokens)
    return tokenizer


def _attention(
    weights: Params, x: jax.Array, allowed: jax.Array, rotation: Rotation, config: T5GemmaConfig
) -> jax.Array:
    """Attend from (B, T, D) to where ``allowed`` (B, T, T) says: [text, from, to]."""
    batch, length, _ = x.shape
    groups = config.num_attention_heads // config.num_key_value_heads
    dtype = weights["self_attn.q_proj"].dtype

    def heads(name: str) -> jax.Array:
        projected = _linear(x, weights[f"self_attn.{name}"])
        return projected.reshape(batch, length, -1, config.head_dim)

    query, key = (_rotate(heads(name), rotation) for name in ("q_proj", "k_proj"))
    # Neighbouring queries share a key and a value.
    query = query.reshape(batch, length, -1, groups, config.head_dim)
    logits = _product("bqkgh,bskh->bkgqs", query, key, dtype)
    logits = logits * config.query_pre_attn_scalar**-0.5
    logits = config.attn_logit_softcapping * jnp.tanh(logits / config.attn_logit_softcapping)
    shares = jax.nn.softmax(jnp.where(allowed[:, None, None], logits, NOWHERE))
    mixed = _product("bkgqs,bskh->bqkgh", shares, heads("v_proj"), dtype)
    return _linear(mixed.reshape(batch, length, -1), weights["self_attn.o_proj"])


def _feedforward(weights: Params, x: jax.Array) -> jax.Array:
    gate = jax.nn.gelu(_linear(x, weights["mlp.gate_proj"]), approximate=True)
    return _linear(gate * _linear(x, weights["mlp.up_proj"]), weights["mlp.down_proj"])


def _linear(x: jax.Array, weight: jax.Array) -> jax.Array:
    """Multiply (B, T, in) by a weight (out, in), which has no bias."""
    return _product("bti,oi->bto", x, weight, weight.dtype)


def _product(spec: str, a: jax.Array, b: jax.Array, dtype: DTypeLike) -> jax.Array:
    """Multiply in ``dtype`` and add up in float32."""
    a, b = a.astype(dtype), b.astype(dtype)
    return jnp.einsum(spec, a, b, preferred_element_type=jnp.float32)


def _rms_norm(x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
    return x * jax.lax.rsqrt(jnp.mean(x**2, axis=-1, keepdims=True) + eps) * (1 + weight)


def _rotation(place: jax.Array, config: T5GemmaConfig) -> Rotation:
    """Return the cosines and sines of RoPE, each (T, 1, head_dim / 2)."""
    half = config.head_dim // 2
    frequency = config.rope_theta ** -(jnp.arange(half, dtype=jnp.float32) / half)
    angles = place[:, None, None] * frequency
    return jnp.cos(angles), jnp.sin(angles)


def _rotate(x: jax.Array, rotation: Rotation) -> jax.Array:
    """Rotate each channel of a head's first half with its counterpart in the second."""
    cos, sin = rotation
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
