"""Sampling: i1's numbers, guidance, reproducible pictures, and what the command writes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pipeline.errors import EvenmixError
from tests import golden_i1
from train.encoders import ByteTextEncoder, PixelCodec
from train.grid import draw_grid
from train.model import ModelConfig, init_params, velocity_fn
from train.sampling import SamplingConfig, guide, integrate, sample

TINY = ModelConfig(
    input_size=4,
    image_resolution=8,
    in_channels=12,
    hidden_size=16,
    depth=1,
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
    np.testing.assert_allclose(latents, expected, atol=1e-4)


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


def test_a_picture_depends_on_its_prompt_index_and_seed_alone() -> None:
    params, velocity = init_params(TINY, 0), velocity_fn(TINY)

    def pictures(prompts: list[str], seed: int = 0) -> np.ndarray:
        return sample(
            velocity,
            params,
            prompts,
            encoder=ByteTextEncoder(4, 8),
            codec=PixelCodec(2),
            resolution=8,
            config=SamplingConfig(steps=3, seed=seed),
        )

    many = pictures([f"prompt {number}" for number in range(17)])
    assert many.shape == (17, 8, 8, 3)
    assert many.dtype == np.uint8
    np.testing.assert_array_equal(pictures(["prompt 0", "prompt 1"]), many[:2])
    assert not np.array_equal(pictures(["prompt 0"], seed=1), many[:1])


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
