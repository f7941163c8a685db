"""i1's network in its plainest form, in float64: one sample, block after block, a mask of keys.

It follows the recipe's text and PyTorch's names of the weights, and shares no code with
train.model: texts stay where they are, wherever their padding is, and nothing is left out.
"""

from collections.abc import Mapping

import numpy as np

from train.model import ModelConfig

Weights = Mapping[str, np.ndarray]


def velocity(
    config: ModelConfig,
    weights: Weights,
    latents: np.ndarray,
    caption: np.ndarray,
    mask: np.ndarray,
) -> np.ndarray:
    """Return the velocity of ``latents`` (C, H, W) under a ``caption`` (T, E), ``mask`` (T,)."""
    weights = {name: np.asarray(tensor, np.float64) for name, tensor in weights.items()}
    channels, grid, patch = len(latents), config.grid_size, config.patch_size
    cut = latents.reshape(channels, grid, patch, grid, patch).transpose(1, 3, 0, 2, 4)
    kernel = weights["x_embedder.proj.weight"].reshape(config.hidden_size, -1)
    image = cut.reshape(grid**2, -1) @ kernel.T + weights["x_embedder.proj.bias"]
    image += _table(config)
    text = _adapter(weights, config.num_heads, np.asarray(caption, np.float64))
    positions = _positions(config, mask)
    skips: list[tuple[np.ndarray, np.ndarray]] = []
    half = config.depth // 2
    names = [f"in_blocks.{i}" for i in range(half)] + ["mid_block"]
    names += [f"out_blocks.{i}" for i in range(half)]
    for name in names:
        if name.startswith("out"):
            skip = skips.pop()
            image, text = (
                _linear(weights, f"{name}.skip_linear_{kind}", np.concatenate([x, other], axis=1))
                for kind, x, other in zip(("image", "text"), (image, text), skip, strict=True)
            )
        image, text = _block(weights, name, config.num_heads, image, text, mask, positions)
        if name.startswith("in"):
            skips.append((image, text))
    out = _linear(weights, "final_layer.linear", _norm(weights, "final_layer.norm_final", image))
    out = out.reshape(grid, grid, patch, patch, channels).transpose(4, 0, 2, 1, 3)
    return out.reshape(latents.shape)


def _linear(weights: Weights, name: str, x: np.ndarray) -> np.ndarray:
    mapped: np.ndarray = x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]
    return mapped


def _norm(weights: Weights, name: str, x: np.ndarray) -> np.ndarray:
    normalised: np.ndarray = x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + 1e-6)
    return normalised * weights[f"{name}.scale"]


def _mlp(weights: Weights, name: str, x: np.ndarray) -> np.ndarray:
    gate, value = np.split(_linear(weights, f"{name}.w12", x), 2, axis=1)
    return _linear(weights, f"{name}.w3", gate / (1 + np.exp(-gate)) * value)


def _heads(weights: Weights, name: str, num_heads: int, x: np.ndarray) -> np.ndarray:
    """Return queries, keys and values, (3, S, heads, head_dim)."""
    return _linear(weights, name, x).reshape(len(x), 3, num_heads, -1).transpose(1, 0, 2, 3)


def _attend(q: np.ndarray, k: np.ndarray, v: np.ndarray, is_key: np.ndarray) -> np.ndarray:
    logits = np.einsum("qhd,khd->hqk", q, k) / np.sqrt(q.shape[-1])
    logits = np.where(is_key, logits, -np.inf)
    shares = np.exp(logits - logits.max(axis=-1, keepdims=True))
    shares /= shares.sum(axis=-1, keepdims=True)
    attended: np.ndarray = np.einsum("hqk,khd->qhd", shares, v).reshape(len(q), -1)
    return attended


def _adapter(weights: Weights, num_heads: int, caption: np.ndarray) -> np.ndarray:
    name = "text_encoder_adapter.connector"
    x = _linear(weights, f"{name}_in", caption)
    for before_attn, attn, before_mlp, mlp in ((1, "attn", 2, "mlp"), (3, "attn2", 4, "mlp2")):
        normalised = _norm(weights, f"{name}_norm{before_attn}", x)
        q, k, v = _heads(weights, f"{name}_{attn}.qkv", num_heads, normalised)
        q, k = (_norm(weights, f"{name}_{attn}.{of}_norm", x) for of, x in (("q", q), ("k", k)))
        x = x + _linear(weights, f"{name}_{attn}.proj", _attend(q, k, v, np.ones(len(x), bool)))
        x = x + _mlp(weights, f"{name}_{mlp}", _norm(weights, f"{name}_norm{before_mlp}", x))
    return x


def _table(config: ModelConfig) -> np.ndarray:
    row, column = np.indices((config.grid_size,) * 2) * 256 / config.image_resolution
    frequency = 10_000.0 ** -np.linspace(0, 1, config.hidden_size // 4, endpoint=False)
    of_column, of_row = (np.outer(axis.ravel(), frequency) for axis in (column, row))
    of_both = [np.sin(of_column), np.cos(of_column), np.sin(of_row), np.cos(of_row)]
    return np.concatenate(of_both, axis=1)


def _positions(config: ModelConfig, mask: np.ndarray) -> np.ndarray:
    """Return by what the channel pairs of [image, text] are turned: (S, 1, head_dim / 2)."""
    row, column = np.indices((config.grid_size,) * 2) * 256 / config.image_resolution
    image = [np.full(row.size, mask.sum()), row.ravel(), column.ravel()]
    text = [np.arange(len(mask)) * mask, 0 * mask, 0 * mask]
    time_width = config.head_dim // 2 // 2 * 2
    row_width = (config.head_dim - time_width) // 2 // 2 * 2
    widths = (time_width, row_width, config.head_dim - time_width - row_width)
    angles = [
        np.outer(np.concatenate(axis), config.rope_theta ** -(np.arange(0, width, 2) / width))
        for axis, width in zip(zip(image, text, strict=True), widths, strict=True)
    ]
    return np.exp(1j * np.concatenate(angles, axis=1))[:, None]


def _turn(x: np.ndarray, by: np.ndarray) -> np.ndarray:
    """Turn adjacent pairs of channels, each a complex number."""
    turned: np.ndarray = (np.ascontiguousarray(x).view(complex) * by).view(float)
    return turned


def _block(
    weights: Weights,
    name: str,
    num_heads: int,
    image: np.ndarray,
    text: np.ndarray,
    mask: np.ndarray,
    positions: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    num_image = len(image)
    streams = {"image": image, "text": text}
    each = [
        _heads(weights, f"{name}.attn.qkv_{kind}", num_heads, _norm(weights, f"{name}.norm1", x))
        for kind, x in streams.items()
    ]
    q, k, v = np.concatenate(each, axis=1)
    q = _turn(_norm(weights, f"{name}.attn.q_norm", q), positions)
    k = _turn(_norm(weights, f"{name}.attn.k_norm", k), positions)
    is_key = np.concatenate([np.ones(num_image, bool), mask])
    out = _attend(q, k, v, is_key) * is_key[:, None]
    for kind, attended in (("image", out[:num_image]), ("text", out[num_image:])):
        added = _linear(weights, f"{name}.attn.proj_{kind}", attended)
        x = streams[kind] + _norm(weights, f"{name}.norm3", added)
        added = _mlp(weights, f"{name}.mlp_{kind}", _norm(weights, f"{name}.norm2", x))
        streams[kind] = x + _norm(weights, f"{name}.norm4", added)
    return streams["image"], streams["text"] * mask[:, None]
