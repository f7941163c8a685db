"""The frozen encoders on a mesh: the same numbers, cut weights, bounded memory."""

import dataclasses
import json
import re
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from tests.eight_devices import on_eight_devices
from train import frozen
from train.encoders import ByteTextEncoder, PixelCodec
from train.flow import posterior_keys
from train.flux2_vae import VaeConfig, draw_flux2_codec
from train.frozen import FrozenEncoders
from train.sharding import join_rows, make_mesh, split_rows
from train.t5gemma import T5GEMMA_2B, T5GemmaEncoder, draw_t5gemma

ROWS, SIDE, TOKENS, LAYERS = 32, 16, 4, 8
BY_ROWS = PartitionSpec(("data", "fsdp"))
MOVES = re.compile(r"all-gather|all-to-all|all-reduce|collective-permute")


@pytest.mark.parametrize(("rows", "most", "parts"), [(6, 4, 2), (7, 4, 7), (4, 4, 1), (2, 0, 2)])
def test_a_device_encodes_as_many_rows_at_a_time_as_divide_and_are_allowed(
    rows: int, most: int, parts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(frozen, "PIXELS_AT_A_TIME", most * 8**2)
    text, codec = ByteTextEncoder(TOKENS, 8), PixelCodec(2)
    encoders = FrozenEncoders(text, codec, make_mesh(1))
    pictures = np.random.default_rng(0).integers(0, 256, (rows, 8, 8, 3), np.uint8)
    tokens, mask = text.tokenise(["a red fox"] * rows)
    latents, caption = encoders.encode(pictures, tokens, mask)
    expected = codec.encode({}, jax.numpy.asarray(pictures))
    np.testing.assert_allclose(latents, expected, atol=1e-6)
    np.testing.assert_array_equal(caption, tokens)
    np.testing.assert_array_equal(encoders.decode(latents), pictures)
    program = str(jax.make_jaxpr(encoders.encode)(pictures, tokens, mask))
    assert f"length={parts}\n" in program


def text_encoder() -> T5GemmaEncoder:
    """A T5Gemma in float32, whose layers together are large beside its activations."""
    shape = {
        "vocab_size": 64,
        "hidden_size": 64,
        "intermediate_size": 512,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "layer_types": ("full_attention",) * LAYERS,
    }
    text = draw_t5gemma(T5GEMMA_2B.model_copy(update=shape), seed=0, num_tokens=TOKENS)
    params = jax.tree.map(lambda weight: weight.astype(np.float32), text.params)
    return dataclasses.replace(text, params=params)


def compare() -> None:
    """Print how far eight devices are from one, and how much memory T5Gemma takes on each."""
    frozen.TOKENS_AT_A_TIME, frozen.PIXELS_AT_A_TIME = 2 * TOKENS, 2 * SIDE**2
    text = text_encoder()
    codec = draw_flux2_codec(VaeConfig((32, 32, 32, 64), (64, 32, 32, 32), "float32"), seed=0)
    encoders = FrozenEncoders(text, codec, make_mesh(4))
    rng = np.random.default_rng(0)
    pictures = rng.integers(0, 256, (ROWS, SIDE, SIDE, 3), np.uint8)
    ids = rng.integers(0, 64, (ROWS, TOKENS)).astype(np.int32)
    mask = np.arange(TOKENS) < rng.integers(1, TOKENS + 1, (ROWS, 1))
    keys = posterior_keys(0, 0, ROWS)

    latents, caption = encoders.encode(pictures, ids, mask, keys)
    by_rows = NamedSharding(encoders.mesh, BY_ROWS)
    assert latents.sharding == caption.sharding == by_rows
    decoded = encoders.decode(latents).astype(np.float32)
    one_latents = jax.jit(codec.encode)(codec.params, pictures, keys)
    one_caption = jax.jit(text.encode)(text.params, ids, mask)
    one_decoded = np.asarray(jax.jit(codec.decode)(codec.params, one_latents), np.float32)
    compiled: Any = encoders._caption.lower(encoders._text_params, ids, mask).compile()
    mlp = encoders._text_params["layers"]["mlp.up_proj"]
    found = {
        "latents": float(np.abs(latents - one_latents).max()),
        "caption": float(np.abs(caption - one_caption).max()),
        "decoded": float(np.abs(decoded - one_decoded).max()),
        "share": mlp.addressable_shards[0].data.size / mlp.size,
        "memory": compiled.memory_analysis().temp_size_in_bytes,
        "layers": sum(weight.nbytes for weight in jax.tree.leaves(text.params["layers"])),
        "moves": moves_of_split_and_join(encoders.mesh),
    }
    print(json.dumps(found))


def moves_of_split_and_join(mesh: jax.sharding.Mesh) -> list[str]:
    """Return how a program that splits rows and joins them moves numbers between devices."""

    def there_and_back(rows: dict[str, jax.Array]) -> jax.Array:
        parts = split_rows(mesh, rows, 3)
        assert parts["x"].shape == (3, 16, 5)
        sums: jax.Array = jax.lax.map(lambda part: part["x"] + part["y"], parts)
        return join_rows(mesh, sums)

    x = np.arange(48 * 5).reshape(48, 5)
    by_rows = jax.device_put({"x": x, "y": x[:, :1]}, NamedSharding(mesh, BY_ROWS))
    compiled: Any = jax.jit(there_and_back).lower(by_rows).compile()
    np.testing.assert_array_equal(compiled(by_rows), x + x[:, :1])
    moves: list[str] = MOVES.findall(compiled.as_text())
    return moves


@pytest.fixture(scope="module")
def on_eight() -> Any:
    return json.loads(on_eight_devices(compare))


def test_eight_devices_encode_as_one(on_eight: Any) -> None:
    assert on_eight["latents"] < 1e-5
    assert on_eight["caption"] < 1e-5
    assert on_eight["decoded"] <= 1


def test_weights_are_cut_and_those_of_one_layer_gathered_at_a_time(on_eight: Any) -> None:
    assert on_eight["share"] == 1 / 4
    assert on_eight["memory"] < on_eight["layers"] / 2


def test_parts_of_a_batch_move_no_row(on_eight: Any) -> None:
    assert on_eight["moves"] == []
