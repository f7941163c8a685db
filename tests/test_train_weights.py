"""A file of weights begins a run, and gives pictures."""

import argparse
import json
import threading
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

from pipeline.errors import EvenmixError
from tests.mixtures import Member, png, write_mixture
from train import sample_command
from train.checkpoint import load_averaged
from train.config import TrainConfig
from train.i1_checkpoint import write_i1_checkpoint
from train.loop import train
from train.model import init_params
from train.weights import read_safetensors, write_safetensors

SETTINGS: dict[str, Any] = {
    "resolution": 8,
    "steps": 1,
    "batch_size": 4,
    "evaluation_samples": 0,
    "model": {"hidden_size": 16, "depth": 1, "num_heads": 2},
    "text": {"encoder": "bytes", "num_tokens": 2, "embed_dim": 8},
    "latent": {"encoder": "pixels", "downsampling": 2},
    # So small a rate that the weights stay what they are.
    "optimiser": {"learning_rate": 1e-30},
}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A folder with a model's weights for 4 px in both kinds of files, and the weights."""
    folder = tmp_path_factory.mktemp("weights")
    config = TrainConfig.model_validate(SETTINGS | {"mixture": "", "output": "", "resolution": 4})
    model_config = config.model_config_for(config.latent_codec())
    params = init_params(model_config, 7)
    write_i1_checkpoint(str(folder / "weights.pt"), model_config, params)
    write_safetensors(str(folder / "weights.safetensors"), model_config, params)
    return folder, params


def test_a_run_begins_with_the_weights_of_a_file(files: tuple[Path, Any], tmp_path: Path) -> None:
    folder, params = files
    members = [Member(f"{i:03d}", png(np.full((8, 8, 3), i, np.uint8)), ["a"]) for i in range(8)]
    (tmp_path / "mixture").mkdir()
    places = {
        "mixture": write_mixture(tmp_path / "mixture", {"a": members}),
        "output": str(tmp_path / "run"),
        "init": str(folder / "weights.pt"),
    }
    train(TrainConfig.model_validate(SETTINGS | places), threading.Event())
    step, _, averaged = load_averaged(str(tmp_path / "run"))
    assert step == 1
    jax.tree.map(partial(np.testing.assert_allclose, rtol=0, atol=1e-30), averaged, params)


def sample(tmp_path: Path, *more: str) -> None:
    parser = argparse.ArgumentParser()
    sample_command.add_arguments(parser)
    line = ["--prompt", "a", "--steps", "1", "--output", str(tmp_path / "pictures"), *more]
    assert sample_command.run(parser.parse_args(line)) == 0


def test_pictures_are_drawn_with_the_weights_of_a_file(
    files: tuple[Path, Any], tmp_path: Path
) -> None:
    weights = str(files[0] / "weights.pt")
    with pytest.raises(EvenmixError, match="is a file of weights; say by --config how"):
        sample(tmp_path, "--checkpoint", weights)

    lines = []
    for name, value in ({"mixture": "", "output": ""} | SETTINGS).items():
        entries = value.items() if isinstance(value, dict) else []
        lines += [f"[{name}]"] if entries else [f"{name} = {json.dumps(value)}"]
        lines += [f"{key} = {json.dumps(entry)}" for key, entry in entries]
    config = tmp_path / "train.toml"
    config.write_text("\n".join(lines))
    sample(tmp_path, "--checkpoint", weights, "--config", str(config))
    with Image.open(tmp_path / "pictures/0000.png") as picture:
        assert picture.size == (8, 8)
        assert picture.info["weights"] == "weights.pt"


def test_only_files_of_ours_are_read(files: tuple[Path, Any], tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    path.write_bytes((files[0] / path.name).read_bytes()[:-1])
    with pytest.raises(EvenmixError, match=r"cannot read the weights .*weights\.safetensors: "):
        read_safetensors(str(path))
    other = tmp_path / "other.safetensors"
    save_file({"a": np.zeros(1)}, other)
    with pytest.raises(EvenmixError, match="does not state the shape of its model"):
        read_safetensors(str(other))
