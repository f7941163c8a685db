"""A stage begins where the last one ended, and a file of weights gives pictures."""

import argparse
import json
import threading
from functools import partial
from pathlib import Path

import jax
import numpy as np
import optax
import pytest
from PIL import Image
from safetensors.numpy import save_file

from pipeline.errors import EvenmixError
from tests.mixtures import Member, png, write_mixture
from tests.train_states import SETTINGS, drawn, model_of, state_shapes, write_run
from train import sample_command
from train.checkpoint import newest_checkpoint
from train.config import TrainConfig
from train.i1_checkpoint import write_i1_checkpoint
from train.loop import train
from train.optimiser import update_ema
from train.weights import load_unused, open_weights, write_safetensors

# The smallest network, since it is compiled.
TINY = SETTINGS | {"model": {"hidden_size": 16, "depth": 3, "num_heads": 2}}


def test_a_stage_goes_on_where_the_last_one_ended(tmp_path: Path) -> None:
    """It takes one step, with the weights, the average, the optimiser and the count before it."""
    ended_config, ended = write_run(tmp_path / "one", step=7, model=TINY["model"])
    members = [Member(f"{i:03d}", png(np.full((4, 4, 3), i, np.uint8)), ["a"]) for i in range(8)]
    (tmp_path / "mixture").mkdir()
    changes = {
        "mixture": write_mixture(tmp_path / "mixture", {"a": members}, resolution=4),
        "output": str(tmp_path / "two"),
        "init": str(tmp_path / "one"),
        "resolution": 4,
        "steps": 8,
    }
    train(TrainConfig.model_validate(TINY | changes), threading.Event())
    with newest_checkpoint(str(tmp_path / "two")) as checkpoint:
        found = checkpoint.restore(ended)
        assert (found.step, checkpoint.model.image_resolution) == (8, 4)
    moved = jax.tree.map(lambda new, old: np.abs(new - old).max(), found.params, ended.params)
    # Adam's moments, drawn from 0.01 to 0.1, move each weight by no more than that many rates.
    assert 0 < max(jax.tree.leaves(moved)) < 10 * ended_config.optimiser.learning_rate
    averaged = update_ema(ended.ema, found.params, ended_config.optimiser.ema_decay)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-6), found.ema, averaged)
    adam, before = (
        next(part for part in state.opt_state if isinstance(part, optax.ScaleByAdamState))
        for state in (found, ended)
    )
    assert adam.count == before.count + 1
    kept = load_unused(tmp_path / "two")
    assert kept
    jax.tree.map(np.testing.assert_array_equal, kept, load_unused(tmp_path / "one"))


def sample(tmp_path: Path, *more: str) -> None:
    parser = argparse.ArgumentParser()
    sample_command.add_arguments(parser)
    line = ["--prompt", "a", "--steps", "1", "--output", str(tmp_path / "pictures"), *more]
    assert sample_command.run(parser.parse_args(line)) == 0


def test_pictures_are_drawn_with_the_weights_of_a_file(tmp_path: Path) -> None:
    run = TrainConfig.model_validate(TINY | {"output": ""})
    weights = str(tmp_path / "weights.pt")
    write_i1_checkpoint(weights, model_of(run), drawn(state_shapes(run)[0], seed=7))
    with pytest.raises(EvenmixError, match="is a file of weights; say by --config how"):
        sample(tmp_path, "--checkpoint", weights)

    lines = []
    for name, value in ({"output": ""} | TINY).items():
        entries = value.items() if isinstance(value, dict) else []
        lines += [f"[{name}]"] if entries else [f"{name} = {json.dumps(value)}"]
        lines += [f"{key} = {json.dumps(entry)}" for key, entry in entries]
    config = tmp_path / "train.toml"
    config.write_text("\n".join(lines))
    sample(tmp_path, "--checkpoint", weights, "--config", str(config))
    with Image.open(tmp_path / "pictures/0000.png") as picture:
        assert picture.size == (8, 8)
        assert picture.info["weights"] == "weights.pt"


def test_only_files_of_ours_are_read(tmp_path: Path) -> None:
    def refused(path: Path, message: str) -> None:
        with pytest.raises(EvenmixError, match=message), open_weights(str(path)):
            pass

    run = TrainConfig.model_validate(TINY | {"output": ""})
    path = tmp_path / "weights.safetensors"
    write_safetensors(str(path), model_of(run), drawn(state_shapes(run)[0], seed=7))
    path.write_bytes(path.read_bytes()[:-1])
    refused(path, r"cannot read the weights .*weights\.safetensors: ")
    other = tmp_path / "other.safetensors"
    save_file({"a": np.zeros(1)}, other)
    refused(other, "does not state the shape of its model")
