"""The backbones of i1's controlled experiments: sizes, what each sees, and that each learns."""

from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from pipeline.errors import EvenmixError
from train.baselines import BaselineConfig, BaselineKind
from train.config import TrainConfig
from train.flow import draw, losses
from train.model import ModelConfig, abstract_params, init_params, velocity_fn
from train.sampling import SamplingConfig, integrate
from train.weights import load_weights, write_safetensors

KINDS: tuple[BaselineKind, ...] = get_args(BaselineKind)
TINY = BaselineConfig(
    input_size=4,
    image_resolution=32,
    in_channels=3,
    hidden_size=16,
    depth=3,
    num_heads=2,
    text_embed_dim=8,
    text_num_tokens=4,
    kind="cross_attention",
)
NO_ADALN: dict[str, Any] = {"adaln_timestep": False, "adaln_pooled_text": False}


def num_parameters(config: ModelConfig) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(abstract_params(config)))


@pytest.mark.parametrize(
    ("kind", "published", "exact"),
    # Billions of the project page: MLP adapter, one transformer block, MLP without AdaLN.
    [
        ("cross_attention", (0.89, 0.91, 0.66), (893_773_472, 908_384_816, 658_376_096)),
        ("single_stream", (0.82, 0.83, 0.57), (819_389_072, 834_000_416, 568_052_624)),
        ("dual_stream", (1.24, 1.25, 1.01), (1_239_044_048, 1_253_655_392, 1_003_646_672)),
    ],
)
def test_the_sizes_are_those_of_the_experiments(
    kind: BaselineKind, published: tuple[float, ...], exact: tuple[int, ...]
) -> None:
    width: dict[str, Any] = {
        "input_size": 32,
        "image_resolution": 256,
        "in_channels": 32,
        "hidden_size": 1152,
    }
    text: dict[str, Any] = {"num_heads": 16, "text_embed_dim": 2304, "text_num_tokens": 256}
    one = BaselineConfig(**width, **text, depth=1, kind=kind)
    found = []
    for changes in ({}, {"adapter_blocks": 1}, NO_ADALN):
        shallow, three = (num_parameters(replace(one, depth=d, **changes)) for d in (1, 3))
        # Each further pair of blocks is like the first, so depth 29 need not be traced.
        found.append(shallow + 14 * (three - shallow))
    assert tuple(found) == exact
    # i1 counts its table of positions, and a timestep embedder that is not used without AdaLN.
    unused = 256 * 1152 + np.array([0, 0, 256 * 1152 + 1152 + 1152 * 1152 + 1152])
    assert tuple(np.round((found + unused) / 1e9, 2)) == published


def inputs(seed: int = 0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    return {
        "latents": rng.normal(size=(2, 4, 4, 3)).astype(np.float32),
        "caption": rng.normal(size=(2, 4, 8)).astype(np.float32),
        "mask": np.array([[1, 1, 0, 0], [1, 1, 1, 1]]),
        "dropped": np.array([False, False]),
        "t": np.array([0.3, 0.8], np.float32),
    }


@pytest.mark.parametrize("kind", KINDS)
def test_a_velocity_depends_on_text_and_time_but_not_on_padding(kind: BaselineKind) -> None:
    config = replace(TINY, kind=kind, depth=3 if kind == "dual_stream" else 1)
    params, velocity = init_params(config, 0), jax.jit(velocity_fn(config))

    def at(**changes: Any) -> np.ndarray:
        return np.asarray(velocity(params, *(inputs() | changes).values()))

    usual = at()
    assert usual.shape == (2, 4, 4, 3)
    # i1 begins with ordinary weights throughout, so nothing is zero at first.
    assert np.abs(usual).mean() > 0.1

    noisy = inputs()["caption"].copy()
    noisy[0, 2:] = 100
    np.testing.assert_allclose(at(caption=noisy), usual, atol=1e-6)

    noisy[0, 1] += 1
    other = at(caption=noisy)
    assert np.abs(other - usual)[0].max() > 1e-3
    np.testing.assert_array_equal(other[1], usual[1])

    later = at(t=np.array([0.3, 0.9], np.float32))
    assert np.abs(later - usual)[1].max() > 1e-5
    np.testing.assert_array_equal(later[0], usual[0])

    null = at(dropped=np.array([True, False]))
    assert np.abs(null - usual)[0].max() > 1e-3
    shuffled = at(caption=np.flip(inputs()["caption"], 0), dropped=np.array([True, False]))
    np.testing.assert_array_equal(null[0], shuffled[0])

    short = inputs() | {"mask": np.array([[1, 1, 0, 0], [0, 1, 0, 0]])}
    trimmed = jax.jit(velocity_fn(config, text_length=2))(params, *short.values())
    np.testing.assert_allclose(trimmed, at(**short), atol=1e-6)


def test_without_adaln_no_time_is_seen() -> None:
    for kind in KINDS:
        names = str(abstract_params(replace(TINY, kind=kind, depth=1, **NO_ADALN)))
        assert "adaln" not in names
        assert "t_embedder" not in names
    config = replace(TINY, depth=1, **NO_ADALN)
    params, velocity = init_params(config, 0), jax.jit(velocity_fn(config))
    found = [
        velocity(params, *(inputs() | {"t": t}).values()) for t in (np.zeros(2), inputs()["t"])
    ]
    np.testing.assert_array_equal(found[0], found[1])


def test_adaln_goes_by_what_it_is_conditioned_on() -> None:
    rng = np.random.default_rng(0)
    text = jnp.asarray(rng.normal(size=(2, 4, 16)), jnp.float32)
    valid = jnp.asarray(inputs()["mask"], jnp.float32)[..., None]
    t = jnp.array(inputs()["t"])
    of_text = replace(TINY, depth=1, adaln_timestep=False)
    pooled: Any = of_text.network(nnx.Rngs(0))
    np.testing.assert_allclose(
        pooled.condition(t, text, valid), [text[0, :2].mean(0), text[1].mean(0)], rtol=1e-5
    )
    # A caption without a token adds nothing.
    np.testing.assert_array_equal(pooled.condition(t, text, 0 * valid), np.zeros((2, 16)))

    both: Any = replace(TINY, depth=1).network(nnx.Rngs(0))
    of_time = both.t_embedder(t)
    assert np.abs(of_time[0] - of_time[1]).max() > 1e-3
    np.testing.assert_allclose(
        both.condition(t, text, valid), pooled.condition(t, text, valid) + of_time, rtol=1e-5
    )


def test_long_skips_carry_what_the_way_in_has_seen() -> None:
    """They are linear layers of two inputs each, and may be left out at equal depth."""
    with_skips, without = (
        abstract_params(replace(TINY, kind="dual_stream", long_skips=there))
        for there in (True, False)
    )
    merge = with_skips["merges"][0]["linears"]
    assert [merge[stream]["kernel"].shape for stream in (0, 1)] == [(32, 16), (32, 16)]
    assert [len(with_skips[part]) for part in ("in_blocks", "mid_blocks", "out_blocks")] == [1] * 3
    assert len(without["mid_blocks"]) == 3
    assert "merges" not in without


@pytest.mark.parametrize("kind", KINDS)
def test_a_few_steps_lower_the_loss(kind: BaselineKind) -> None:
    config = replace(TINY, kind=kind, depth=1)
    params, velocity = init_params(config, 0), velocity_fn(config, rematerialise="full")
    data = jnp.broadcast_to(jnp.linspace(-2, 2, 48).reshape(4, 4, 3), (8, 4, 4, 3))
    caption, mask = jnp.ones((8, 4, 8)), jnp.ones((8, 4))
    draws = draw(0, jnp.array(0), data.shape, 0.1, 1.0)

    def loss_of(params: Any) -> jax.Array:
        return losses(velocity, params, data, caption=caption, mask=mask, draws=draws).mean()

    step = jax.jit(jax.value_and_grad(loss_of))
    found = []
    for _ in range(12):
        loss, gradients = step(params)
        params = jax.tree.map(lambda p, g: p - 0.02 * g, params, gradients)
        found.append(float(loss))
    assert found[-1] < 0.7 * found[0]


def test_sampling_tells_each_step_its_time() -> None:
    """A velocity that is the time itself integrates to the sum of t dt."""

    def velocity(*given: Any) -> jax.Array:
        latents, t = jnp.asarray(given[1]), jnp.asarray(given[-1])
        return jnp.zeros_like(latents) + t[:, None, None, None]

    config = SamplingConfig(guidance=1, rescale=0, steps=4, shift=1)
    noise, caption, mask = jnp.zeros((2, 2, 2, 1)), jnp.zeros((2, 1, 1)), jnp.ones((2, 1))
    found = integrate(velocity, {}, noise, caption=caption, mask=mask, config=config)
    np.testing.assert_allclose(found, (0 + 0.25 + 0.5 + 0.75) / 4, rtol=1e-6)


def settings(**model: Any) -> dict[str, Any]:
    return {
        "mixture": "m",
        "output": "o",
        "resolution": 8,
        "steps": 1,
        "batch_size": 4,
        "model": {"hidden_size": 16, "depth": 3, "num_heads": 2} | model,
        "text": {"encoder": "bytes", "num_tokens": 4, "embed_dim": 8},
        "latent": {"encoder": "pixels", "downsampling": 2},
    }


def test_a_configuration_names_the_kind_and_i1_is_the_default() -> None:
    config = TrainConfig.model_validate(settings())
    assert type(config.model_config_for(config.latent_codec())) is ModelConfig

    config = TrainConfig.model_validate(settings(kind="single_stream", adaln_pooled_text=False))
    shape = config.model_config_for(config.latent_codec())
    assert isinstance(shape, BaselineConfig)
    assert (shape.kind, shape.adaln_timestep, shape.adaln_pooled_text) == (
        "single_stream",
        True,
        False,
    )
    # What a checkpoint keeps of it is read back as the same.
    assert TrainConfig.model_validate(config.model_dump()) == config

    with pytest.raises(ValueError, match="Extra inputs are not permitted"):
        TrainConfig.model_validate(settings(long_skips=False))
    with pytest.raises(ValueError, match="'i1', 'cross_attention', 'single_stream'"):
        TrainConfig.model_validate(settings(kind="unet"))


def test_files_of_weights_know_their_kind(tmp_path: Path) -> None:
    config = replace(TINY, kind="dual_stream", depth=1)
    path = str(tmp_path / "weights.safetensors")
    params = init_params(config, 3)
    write_safetensors(path, config, params)
    jax.tree.map(np.testing.assert_array_equal, load_weights(path, config), params)
    with pytest.raises(EvenmixError, match="adapter_blocks is 0, not 1"):
        load_weights(path, replace(config, adapter_blocks=1))
    of_i1 = TrainConfig.model_validate(settings()).model_config_for
    i1 = of_i1(TrainConfig.model_validate(settings()).latent_codec())
    with pytest.raises(EvenmixError, match="kind is dual_stream, not i1"):
        load_weights(path, i1)
