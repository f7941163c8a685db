"""The network against i1's: positions, velocities, losses and gradients."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import golden_i1
from train.model import (
    ModelConfig,
    abstract_params,
    init_params,
    position_table,
    rope_widths,
    rotate,
    rotation,
    velocity_fn,
)

MODELS = ["i1_dit_256", "i1_dit_512", "i1_dit_headdim72"]


def loss_and_gradients(
    golden: dict[str, np.ndarray], dropped: np.ndarray
) -> tuple[float, np.ndarray, Any]:
    velocity = velocity_fn(golden_i1.model_config(golden))
    target = golden_i1.channels_last(golden["in/target"])

    def loss(params: Any) -> tuple[jax.Array, jax.Array]:
        x = golden_i1.channels_last(golden["in/x"])
        out = velocity(params, x, golden["in/caption"], golden["in/mask"], dropped)
        return jnp.mean((out - target) ** 2), out

    params = golden_i1.weights(golden, "state/")
    with jax.default_matmul_precision("highest"):
        (value, out), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    return float(value), np.asarray(out), gradients


def assert_same_gradients(gradients: Any, expected: Any) -> None:
    found = dict(jax.tree_util.tree_leaves_with_path(gradients))
    for path, array in jax.tree_util.tree_leaves_with_path(expected):
        scale = np.abs(array).max()
        np.testing.assert_allclose(found[path], array, atol=2e-5 * scale, err_msg=str(path))


@pytest.mark.parametrize("name", MODELS)
def test_velocity_loss_and_gradients_are_those_of_i1(name: str) -> None:
    golden = golden_i1.load(name)
    loss, velocity, gradients = loss_and_gradients(golden, np.zeros(3, bool))
    expected = golden_i1.channels_last(golden["out/velocity"])
    np.testing.assert_allclose(velocity, expected, atol=2e-5)
    assert loss == pytest.approx(float(golden["out/loss"]), abs=1e-6)
    assert_same_gradients(gradients, golden_i1.weights(golden, "grad/"))


def test_a_dropped_caption_becomes_the_null_caption() -> None:
    dropped = golden_i1.load("i1_dit_512_dropped_caption")
    loss, velocity, gradients = loss_and_gradients(
        golden_i1.load("i1_dit_512"), dropped["in/dropped"]
    )
    expected = golden_i1.channels_last(dropped["out/velocity"])
    np.testing.assert_allclose(velocity, expected, atol=2e-5)
    assert loss == pytest.approx(float(dropped["out/loss"]), abs=1e-6)
    assert_same_gradients(gradients, golden_i1.weights(dropped, "grad/"))


@pytest.mark.parametrize("name", MODELS)
def test_position_tables_are_those_of_i1(name: str) -> None:
    golden = golden_i1.load(name)
    config = golden_i1.model_config(golden)
    np.testing.assert_allclose(position_table(config), golden["state/pos_embed"][0], atol=1e-6)

    full_text = jnp.ones((1, config.text_num_tokens))
    cos, sin = rotation(config, full_text)
    time, row, _ = np.cumsum(rope_widths(config.head_dim)) // 2
    num_image = config.grid_size**2
    for found, kind in ((cos, "cos"), (sin, "sin")):
        tables = [golden[f"state/rope_embedder.{kind}_tables.{axis}"] for axis in range(3)]
        image = np.asarray(found[0, :num_image, 0]).reshape(config.grid_size, config.grid_size, -1)
        np.testing.assert_allclose(image[0, 0, :time], tables[0][config.text_num_tokens], atol=1e-5)
        np.testing.assert_allclose(image[:, 0, time:row], tables[1], atol=1e-5)
        np.testing.assert_allclose(image[0, :, row:], tables[2], atol=1e-5)
        text = np.asarray(found[0, num_image:, 0])
        np.testing.assert_allclose(text[:, :time], tables[0][: config.text_num_tokens], atol=1e-5)


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


def test_padding_does_not_change_the_velocity_of_the_blocks() -> None:
    """Beyond the adapter (whose attention is unmasked) masked text must have no influence."""
    golden = golden_i1.load("i1_dit_256")
    config = golden_i1.model_config(golden)
    velocity = jax.jit(velocity_fn(config))
    params = golden_i1.weights(golden, "state/")
    adapter = params["text_encoder_adapter"]
    for layer in ("connector_attn", "connector_attn2"):
        adapter[layer]["proj"] = jax.tree.map(jnp.zeros_like, adapter[layer]["proj"])
    x, caption = golden_i1.channels_last(golden["in/x"]), golden["in/caption"]
    mask = np.arange(config.text_num_tokens) < np.array([[4], [7], [10]])
    noisy = caption + 5 * (1 - mask[..., None])
    kept = np.zeros(3, bool)
    np.testing.assert_allclose(
        velocity(params, x, noisy, mask, kept), velocity(params, x, caption, mask, kept), atol=1e-6
    )


def test_initial_weights_follow_the_recipe() -> None:
    config = ModelConfig(
        input_size=8,
        image_resolution=32,
        in_channels=12,
        hidden_size=96,
        depth=3,
        num_heads=4,
        text_embed_dim=64,
        text_num_tokens=16,
    )
    params: Any = init_params(config, 0)
    shapes = jax.tree.map(lambda x: (x.shape, x.dtype), params)
    assert shapes == jax.tree.map(lambda x: (x.shape, x.dtype), abstract_params(config))

    block = params["out_blocks"][0]
    lecun = block["mlp_image"]["w12"]["kernel"]
    assert np.std(lecun) == pytest.approx(96**-0.5, rel=0.03)
    # Truncated at two standard deviations of the untruncated normal.
    assert np.abs(lecun).max() <= 2.0 * 96**-0.5 / 0.87962566 + 1e-6
    xavier = block["skip_linear_image"]["kernel"]
    assert np.abs(xavier).max() == pytest.approx((6 / (192 + 96)) ** 0.5, rel=0.01)
    null = params["text_encoder_adapter"]["learnable_null_caption"]
    assert np.std(null) == pytest.approx(64**-0.5, rel=0.1)
    assert np.all(block["mlp_image"]["w12"]["bias"] == 0)
    assert np.all(block["norm1"]["scale"] == 1)
