"""A stage begins where the one before it ended, or with a file of weights."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from pipeline.errors import EvenmixError
from tests.train_states import SETTINGS, drawn, model_of, state_shapes, write_run
from train.checkpoint import TrainState
from train.config import TrainConfig
from train.model import Params
from train.sharding import make_mesh, place_state
from train.start import begin_from, keep_unused
from train.tensors import unused_shapes
from train.weights import load_unused, write_safetensors

equal = partial(jax.tree.map, np.testing.assert_array_equal)


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, TrainConfig, TrainState]:
    """A run of 8 px that has ended: its folder, configuration and state."""
    output = tmp_path_factory.mktemp("stage")
    return output, *write_run(output, step=200)


def blank_state(config: TrainConfig) -> TrainState:
    return TrainState(0, *place_state(make_mesh(1), state_shapes(config)))


def no_beginning(_: Params) -> Any:
    raise AssertionError("it was to go on, not to begin")


def test_the_next_stage_goes_on_at_its_resolution(
    stage: tuple[Path, TrainConfig, TrainState], tmp_path: Path
) -> None:
    output, _, ended = stage
    config = TrainConfig.model_validate(
        SETTINGS | {"output": str(tmp_path / "next"), "resolution": 16, "precision": "bfloat16"}
    )
    like = blank_state(config)
    state = begin_from(str(output), model_of(config), like, no_beginning)
    assert state.step == 200
    equal(state, ended)
    found, wanted = (jax.tree.map(lambda x: (x.dtype, x.sharding), s[1:]) for s in (state, like))
    assert found == wanted

    keep_unused(str(output), tmp_path / "next")
    kept = load_unused(tmp_path / "next")
    assert kept
    equal(kept, load_unused(output))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 32}, "hidden_size is 16, not 32$"),
        (
            {"text_embed_dim": 9, "in_channels": 32},
            "in_channels is 12, not 32; text_.* is 8, not 9$",
        ),
        ({"depth": 3}, "depth is 5, not 3$"),
    ],
)
def test_a_stage_of_another_model_is_an_error(
    stage: tuple[Path, TrainConfig, TrainState], changes: dict[str, Any], message: str
) -> None:
    output, config, _ = stage
    other = replace(model_of(config), **changes)
    with pytest.raises(EvenmixError, match=f"is of another model than the configured .*{message}"):
        begin_from(str(output), other, blank_state(config), no_beginning)


def test_a_folder_without_a_checkpoint_is_an_error(
    stage: tuple[Path, TrainConfig, TrainState], tmp_path: Path
) -> None:
    _, config, _ = stage
    with pytest.raises(EvenmixError, match="holds no checkpoint"):
        begin_from(str(tmp_path), model_of(config), blank_state(config), no_beginning)


def test_weights_alone_begin_at_step_0(
    stage: tuple[Path, TrainConfig, TrainState], tmp_path: Path
) -> None:
    _, config, _ = stage
    like, path = blank_state(config), str(tmp_path / "a.safetensors")
    params = drawn(like.params, seed=1)
    unused = {name: np.ones(x, np.float32) for name, x in unused_shapes(params).items()}
    write_safetensors(path, model_of(config), params, unused)

    def begin(found: Params) -> Any:
        assert jax.tree.map(lambda x: x.sharding, found) == jax.tree.map(
            lambda x: x.sharding, like.params
        )
        equal(found, params)
        return "params", "ema", "opt_state"

    state = begin_from(path, model_of(config), like, begin)
    assert tuple(state) == (0, "params", "ema", "opt_state")
    keep_unused(path, tmp_path / "run")
    equal(load_unused(tmp_path / "run"), unused)
