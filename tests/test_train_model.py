"""The network against i1's: positions, velocities, losses and gradients."""

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.typing import ArrayLike

from tests import golden_i1, plain_i1
from train.blocks import Rematerialise
from train.model import (
    ModelConfig,
    Params,
    abstract_params,
    init_params,
    position_table,
    rope_widths,
    rotate,
    rotation,
    velocity_fn,
)
from train.tensors import all_tensors

MODELS = ["i1_dit_256", "i1_dit_512", "i1_dit_headdim72"]
Golden = dict[str, np.ndarray]
LossAndGradients = tuple[float, np.ndarray, Params]


@lru_cache
def compiled(config: ModelConfig, rematerialise: Rematerialise) -> Callable[..., Any]:
    """Return a function to ((loss, velocity), gradients)."""
    velocity = velocity_fn(config, rematerialise=rematerialise)

    def loss(params: Params, target: jax.Array, *rows: jax.Array) -> tuple[jax.Array, jax.Array]:
        out = velocity(params, *rows)
        return jnp.mean((out - target) ** 2), out

    return jax.jit(jax.value_and_grad(loss, has_aux=True))


def loss_and_gradients(
    golden: Golden,
    *,
    dropped: ArrayLike = False,
    rematerialise: Rematerialise = "none",
    dtype: str = "float32",
) -> LossAndGradients:
    """Return the loss, the velocity and the gradients of the reference model."""
    config = replace(golden_i1.model_config(golden), dtype=dtype)
    x, target = (golden_i1.channels_last(golden[f"in/{name}"]) for name in ("x", "target"))
    dropped = np.broadcast_to(dropped, len(x))
    rows = (x, golden["in/caption"], golden["in/mask"], dropped, np.ones(len(x)))
    params = golden_i1.weights(golden, "state/")
    with jax.default_matmul_precision("highest"):
        (loss, velocity), gradients = compiled(config, rematerialise)(params, target, *rows)
    return float(loss), np.asarray(velocity), gradients


def assert_golden(found: LossAndGradients, golden: Golden) -> None:
    loss, velocity, gradients = found
    expected = golden_i1.channels_last(golden["out/velocity"])
    np.testing.assert_allclose(velocity, expected, atol=1e-5)
    assert loss == pytest.approx(float(golden["out/loss"]), abs=1e-6)
    golden_i1.assert_same_gradients(gradients, golden, tolerance=1e-5)


@pytest.mark.parametrize(
    ("name", "rematerialise"),
    [
        ("i1_dit_256", "none"),
        ("i1_dit_256", "full"),
        ("i1_dit_512", "none"),
        ("i1_dit_headdim72", "dots"),
    ],
)
def test_velocity_loss_and_gradients_are_those_of_i1(
    name: str, rematerialise: Rematerialise
) -> None:
    golden = golden_i1.load(name)
    assert_golden(loss_and_gradients(golden, rematerialise=rematerialise), golden)


def test_a_dropped_caption_becomes_the_null_caption() -> None:
    golden = golden_i1.load("i1_dit_512_dropped_caption")
    found = loss_and_gradients(golden_i1.load("i1_dit_512"), dropped=golden["in/dropped"])
    assert_golden(found, golden)


def test_bfloat16_is_near() -> None:
    """Velocity within 2 %, loss within 0.5 %, gradients within 10 % of a tensor's largest one."""
    golden = golden_i1.load("i1_dit_512")
    loss, velocity, gradients = loss_and_gradients(golden, dtype="bfloat16")
    expected = golden_i1.channels_last(golden["out/velocity"])
    error = np.linalg.norm(velocity - expected) / np.linalg.norm(expected)
    assert 1e-4 < error < 0.02
    assert loss == pytest.approx(float(golden["out/loss"]), rel=0.005)
    golden_i1.assert_same_gradients(gradients, golden, tolerance=0.1)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(gradients)} == {"float32"}


@pytest.mark.parametrize("name", MODELS)
def test_position_tables_are_those_of_i1(name: str) -> None:
    golden = golden_i1.load(name)
    config = golden_i1.model_config(golden)
    np.testing.assert_allclose(position_table(config), golden["state/pos_embed"][0], atol=1e-6)

    num_text = config.text_num_tokens
    cos, sin = rotation(config, jnp.arange(num_text)[None], jnp.array([num_text]))
    time, row, _ = np.cumsum(rope_widths(config.head_dim)) // 2
    num_image = config.grid_size**2
    for found, kind in ((cos, "cos"), (sin, "sin")):
        tables = [golden[f"state/rope_embedder.{kind}_tables.{axis}"] for axis in range(3)]
        image = np.asarray(found[0, :num_image, 0]).reshape(config.grid_size, config.grid_size, -1)
        np.testing.assert_allclose(image[0, 0, :time], tables[0][num_text], atol=1e-5)
        np.testing.assert_allclose(image[:, 0, time:row], tables[1], atol=1e-5)
        np.testing.assert_allclose(image[0, :, row:], tables[2], atol=1e-5)
        text = np.asarray(found[0, num_image:, 0])
        np.testing.assert_allclose(text[:, :time], tables[0][:num_text], atol=1e-5)


def test_rope_splits_the_channels_in_even_widths() -> None:
    assert rope_widths(72) == (36, 18, 18)
    assert rope_widths(12) == (6, 2, 4)
    assert rope_widths(32) == (16, 8, 8)


def test_rotation_turns_adjacent_pairs() -> None:
    angle = jnp.array([0.3, 1.1])
    x = jnp.array([1.0, 2.0, 3.0, 4.0])
    found = rotate(x, (jnp.cos(angle), jnp.sin(angle)))
    turned = (1 + 2j) * np.exp(0.3j), (3 + 4j) * np.exp(1.1j)
    np.testing.assert_allclose(
        found, [turned[0].real, turned[0].imag, turned[1].real, turned[1].imag], rtol=1e-6
    )


# Three blocks in one stack and two in the other.
DEEP = ModelConfig(
    input_size=6,
    image_resolution=64,
    in_channels=3,
    hidden_size=16,
    depth=7,
    num_heads=2,
    text_embed_dim=8,
    text_num_tokens=6,
)
# Whether a caption is dropped, and its mask; only the first is longer than SHORT.
TEXTS = {
    "full": (False, [1, 1, 1, 1, 1, 1]),
    "padded": (True, [1, 1, 1, 0, 0, 0]),
    "padded at the left": (False, [0, 0, 1, 1, 1, 1]),
    "with gaps": (False, [0, 1, 0, 1, 1, 0]),
    "empty": (True, [0, 0, 0, 0, 0, 0]),
}
SHORT = 4


@pytest.mark.parametrize(("first", "text_length"), [(0, None), (1, SHORT)])
def test_any_text_is_seen_where_it_stands_and_blocks_follow_one_another(
    first: int, text_length: int | None
) -> None:
    rng = np.random.default_rng(0)

    params = jax.tree.map(
        lambda weight: rng.normal(0.1, 0.3, weight.shape).astype(np.float32), abstract_params(DEEP)
    )
    tensors = all_tensors(params, {})
    null = tensors["text_encoder_adapter.learnable_null_caption"]
    texts = dict(list(TEXTS.items())[first:])
    dropped, mask = map(np.array, zip(*texts.values(), strict=True))
    latents = rng.normal(size=(len(texts), 6, 6, 3)).astype(np.float32)
    caption = rng.normal(size=(*mask.shape, 8)).astype(np.float32)
    velocity = jax.jit(velocity_fn(DEEP, text_length=text_length))
    found = velocity(params, latents, caption, mask, dropped, np.ones(len(texts)))

    seen = np.where(dropped[:, None, None], null, caption)
    for number, kind in enumerate(texts):
        x = latents[number].transpose(2, 0, 1)
        expected = plain_i1.velocity(DEEP, tensors, x, seen[number], mask[number].astype(bool))
        np.testing.assert_allclose(
            found[number], expected.transpose(1, 2, 0), atol=1e-5, err_msg=kind
        )


def test_initial_weights_follow_the_recipe() -> None:
    config = ModelConfig(
        input_size=8,
        image_resolution=32,
        in_channels=12,
        hidden_size=96,
        depth=5,
        num_heads=4,
        text_embed_dim=64,
        text_num_tokens=16,
    )
    params: Any = init_params(config, 0)
    shapes = jax.tree.map(lambda x: (x.shape, x.dtype), params)
    assert shapes == jax.tree.map(lambda x: (x.shape, x.dtype), abstract_params(config))
    assert {leaf.dtype.name for leaf in jax.tree.leaves(params)} == {"float32"}

    stack, last = params["in_blocks"], params["last_block"]
    lecun = stack["mlp_image"]["w12"]["kernel"]
    assert lecun.shape == (2, 96, 512)
    assert np.std(lecun, axis=(1, 2)) == pytest.approx(96**-0.5, rel=0.03)
    assert not np.any(lecun[0] == lecun[1])
    # Truncated at two standard deviations of the untruncated normal.
    assert np.abs(lecun).max() <= 2.0 * 96**-0.5 / 0.87962566 + 1e-6
    for kernel in (params["out_blocks"]["skip_linear_text"], last["skip_linear_image"]):
        xavier = kernel["kernel"]
        assert np.abs(xavier).max() == pytest.approx((6 / (192 + 96)) ** 0.5, rel=0.01)
    null = params["text_encoder_adapter"]["learnable_null_caption"]
    assert np.std(null) == pytest.approx(64**-0.5, rel=0.1)
    assert np.all(stack["mlp_image"]["w12"]["bias"] == 0)
    assert np.all(stack["norm1"]["scale"] == 1)
    # Of the last block's text, what nothing reads is not there.
    assert set(last) == {f"norm{i}" for i in (1, 2, 3, 4)} | {
        "attn",
        "mlp_image",
        "skip_linear_image",
        "skip_linear_text",
    }
    assert set(last["attn"]) == {"qkv_image", "kv_text", "q_norm", "k_norm", "proj_image"}
