"""Adam, clipping and the moving average against i1's numbers."""

import jax
import numpy as np
import optax
import pytest

from tests import golden_i1
from train.config import OptimiserConfig
from train.optimiser import make_optimiser, update_ema


@pytest.mark.parametrize(("name", "mu_dtype"), [("fp32", "float32"), ("bf16", "bfloat16")])
def test_three_steps_are_those_of_i1(name: str, mu_dtype: str) -> None:
    golden = golden_i1.load("adam_ema")
    config = OptimiserConfig.model_validate(
        {
            "learning_rate": float(golden["in/lr"]),
            "ema_decay": float(golden["in/ema_decay"]),
            "mu_dtype": mu_dtype,
        }
    )
    optimiser = make_optimiser(config)
    params: optax.Params = {leaf: golden[f"in/{leaf}"] for leaf in "ab"}
    ema, state = params, optimiser.init(params)
    for step in range(3):
        gradients = {leaf: golden[f"in/grad{step}_{leaf}"] for leaf in "ab"}
        norm = float(optax.tree.norm(gradients))
        assert norm == pytest.approx(float(golden[f"out/{name}_norm{step}"]), rel=1e-6)
        updates, state = optimiser.update(gradients, state, params)
        params = optax.apply_updates(params, updates)
        ema = update_ema(ema, params, config.ema_decay)
    for leaf in "ab":
        np.testing.assert_allclose(params[leaf], golden[f"out/{name}_{leaf}"], atol=2e-7)
        np.testing.assert_allclose(ema[leaf], golden[f"out/{name}_ema_{leaf}"], atol=2e-7)


def test_the_first_moment_is_kept_in_the_given_dtype() -> None:
    params = {"a": np.ones(3, np.float32)}
    optimiser = make_optimiser(OptimiserConfig(mu_dtype="bfloat16"))
    state = optimiser.init(params)
    _, state = optimiser.update(params, state, params)
    dtypes = [leaf.dtype.name for leaf in jax.tree.leaves(state) if leaf.ndim]
    assert dtypes == ["bfloat16", "float32"]
