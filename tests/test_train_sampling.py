"""Sampling: i1's numbers, guidance, pictures that can be drawn again, on any number of devices."""

import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from pipeline.errors import EvenmixError
from tests import golden_i1
from tests.eight_devices import on_eight_devices
from train.encoders import ByteTextEncoder, PixelCodec
from train.frozen import FrozenEncoders
from train.grid import draw_grid
from train.model import ModelConfig, abstract_params, velocity_fn
from train.sampling import SamplingConfig, guide, integrate, sample
from train.sharding import cut, make_mesh, place_state, shardings_of

TINY = ModelConfig(
    input_size=4,
    image_resolution=8,
    in_channels=12,
    hidden_size=16,
    depth=3,
    num_heads=2,
    text_embed_dim=8,
    text_num_tokens=4,
)


def test_guided_steps_are_those_of_i1() -> None:
    model, golden = golden_i1.load("i1_dit_512"), golden_i1.load("i1_sampler_512")
    config = SamplingConfig(
        guidance=float(golden["in/guidance"]),
        rescale=float(golden["in/rescale"]),
        steps=int(golden["in/steps"]),
        shift=float(golden["in/shift"]),
    )
    velocity = velocity_fn(golden_i1.model_config(model))
    with jax.default_matmul_precision("highest"):
        latents = integrate(
            velocity,
            golden_i1.weights(model, "state/"),
            jnp.asarray(golden_i1.channels_last(golden["in/noise"])),
            caption=jnp.asarray(model["in/caption"]),
            mask=jnp.asarray(model["in/mask"]),
            config=config,
        )
    expected = golden_i1.channels_last(golden["out/latents"])
    np.testing.assert_allclose(latents, expected, atol=2e-5)


def test_guidance_one_is_the_conditional_velocity() -> None:
    rng = np.random.default_rng(0)
    conditional, other = jnp.asarray(rng.normal(size=(2, 3, 4, 4, 2)))
    plain = SamplingConfig(guidance=1, rescale=0)
    np.testing.assert_allclose(guide(conditional, other, plain), conditional, rtol=1e-6)


def test_full_rescaling_keeps_the_conditional_spread() -> None:
    rng = np.random.default_rng(0)
    conditional, other = jnp.asarray(rng.normal(size=(2, 3, 4, 4, 2)))
    guided = guide(conditional, other, SamplingConfig(guidance=7, rescale=1))
    spread = [np.std(np.asarray(v), axis=(1, 2, 3)) for v in (guided, conditional)]
    np.testing.assert_allclose(spread[0], spread[1], rtol=1e-5)


def test_settings_that_give_no_picture_are_all_told_at_once() -> None:
    with pytest.raises(EvenmixError) as caught:
        SamplingConfig(guidance=float("nan"), rescale=1.5, steps=0, shift=0.0)
    for name in ("guidance nan", "rescale 1.5", "steps 0", "shift 0.0"):
        assert name in str(caught.value)


def test_the_defaults_are_those_of_i1() -> None:
    assert SamplingConfig() == SamplingConfig(guidance=12, rescale=1, steps=250, shift=0.3)


def draw_pictures() -> None:
    """Print what is equal among the pictures of one device and of eight."""
    velocity, rng = velocity_fn(TINY), np.random.default_rng(0)
    params = jax.tree.map(
        lambda like: rng.normal(size=like.shape, scale=0.2).astype(np.float32),
        abstract_params(TINY),
    )

    def pictures(mesh: Mesh, prompts: list[str], seed: int = 0) -> np.ndarray:
        encoders = FrozenEncoders(ByteTextEncoder(4, 8), PixelCodec(2), mesh)
        placed = cut(params, shardings_of(place_state(mesh, params)))
        config = SamplingConfig(steps=3, seed=seed)
        with jax.set_mesh(mesh):
            return sample(velocity, placed, prompts, encoders=encoders, resolution=8, config=config)

    prompts = [f"prompt {number}" for number in range(17)]
    one = make_mesh(1, jax.devices()[:1])
    of_one, of_eight = pictures(one, prompts), pictures(make_mesh(2), prompts)
    difference = np.abs(of_one.astype(int) - of_eight)
    found = {
        "shape": of_one.shape,
        "type": str(of_one.dtype),
        "spread": float(of_one.std()),
        "alone": np.array_equal(pictures(one, prompts[:2]), of_one[:2]),
        "another seed": np.array_equal(pictures(one, prompts[:1], seed=1), of_one[:1]),
        "difference": int(difference.max()),
        "differing": float((difference > 0).mean()),
    }
    print(json.dumps(found))


@pytest.fixture(scope="module")
def drawn() -> Any:
    return json.loads(on_eight_devices(draw_pictures))


def test_a_picture_depends_on_its_prompt_index_and_seed_alone(drawn: Any) -> None:
    assert drawn["shape"] == [17, 8, 8, 3]
    assert drawn["type"] == "uint8"
    assert drawn["spread"] > 10
    assert drawn["alone"]
    assert not drawn["another seed"]


def test_eight_devices_draw_the_pictures_of_one(drawn: Any) -> None:
    assert drawn["difference"] <= 1
    assert drawn["differing"] < 0.01


@pytest.mark.parametrize("count", [1, 11])
def test_the_grid_shows_every_picture(count: int) -> None:
    pictures = np.stack([np.full((32, 32, 3), 10 * n, np.uint8) for n in range(count)])
    grid = np.asarray(draw_grid(pictures, ["a prompt of several words " * 9] * count))
    for number in range(count):
        top, left = 8 + number // 8 * (128 + 8 + 56), 8 + number % 8 * 136
        tile = grid[top : top + 128, left : left + 128]
        assert np.all(tile == 10 * number)
        # The prompt is written below, not over the next row.
        below = grid[top + 130 : top + 128 + 56, left : left + 128]
        assert below.min() < 100
