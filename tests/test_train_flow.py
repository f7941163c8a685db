"""Rectified flow: times, paths, targets, and draws that depend on (seed, step, index) alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from train.flow import Draws, draw, interpolate, losses, shift_time


def test_paths_go_from_noise_to_data() -> None:
    data, noise = jnp.full((3, 2, 2, 1), 5.0), jnp.full((3, 2, 2, 1), 1.0)
    x = interpolate(data, noise, jnp.array([0.0, 0.25, 1.0]))
    np.testing.assert_array_equal(x[:, 0, 0, 0], [1.0, 2.0, 5.0])


def test_shift_moves_times_towards_the_noise() -> None:
    t = jnp.array([0.0, 0.5, 1.0])
    np.testing.assert_allclose(shift_time(t, 0.3), [0.0, 0.15 / 0.65, 1.0], rtol=1e-6)
    np.testing.assert_array_equal(shift_time(t, 1.0), t)


def test_the_true_velocity_has_no_loss_and_a_wrong_one_its_squared_error() -> None:
    data, noise = jnp.full((2, 2, 2, 1), 5.0), jnp.full((2, 2, 2, 1), 1.0)
    draws = Draws(noise, jnp.array([0.2, 0.7]), jnp.zeros(2, bool))
    nothing = jnp.zeros((2, 1, 1))
    true = losses(lambda *_: data - noise, {}, data, caption=nothing, mask=nothing, draws=draws)
    np.testing.assert_array_equal(true, [0.0, 0.0])
    off_by_three = losses(
        lambda *_: data - noise + 3, {}, data, caption=nothing, mask=nothing, draws=draws
    )
    np.testing.assert_allclose(off_by_three, [9.0, 9.0])


def test_a_draw_depends_on_seed_step_and_index_alone() -> None:
    large = draw(7, jnp.array(3), (8, 4, 4, 2), 0.5, 1.0)
    small = draw(7, jnp.array(3), (5, 4, 4, 2), 0.5, 1.0)
    np.testing.assert_array_equal(large.noise[:5], small.noise)
    np.testing.assert_array_equal(large.t[:5], small.t)
    np.testing.assert_array_equal(large.dropped[:5], small.dropped)
    other_step = draw(7, jnp.array(4), (8, 4, 4, 2), 0.5, 1.0)
    assert not np.any(np.asarray(large.noise) == np.asarray(other_step.noise))


def test_draws_have_their_distributions() -> None:
    draws = draw(0, jnp.array(0), (4096, 1, 1, 4), 0.1, 1.0)
    logit = jax.scipy.special.logit(draws.t)
    assert float(logit.mean()) == pytest.approx(0.0, abs=0.06)
    assert float(logit.std()) == pytest.approx(1.0, abs=0.04)
    assert float(draws.noise.mean()) == pytest.approx(0.0, abs=0.03)
    assert float(draws.noise.std()) == pytest.approx(1.0, abs=0.02)
    assert float(draws.dropped.mean()) == pytest.approx(0.1, abs=0.02)
    # Noise and time of a sample come from different keys.
    assert abs(np.corrcoef(draws.noise[:, 0, 0, 0], logit)[0, 1]) < 0.06
