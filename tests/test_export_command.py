"""`evenmix export`: from a run or a file to a file, nothing lost."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch

from pipeline.cli import main
from pipeline.errors import EvenmixError
from tests.train_states import model_of, write_run
from train.checkpoint import TrainState
from train.model import ModelConfig
from train.tensors import all_tensors, read_params, unused_shapes
from train.weights import load_unused, load_weights, open_weights


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ModelConfig, TrainState]:
    """A run's folder, its model and its state."""
    output = tmp_path_factory.mktemp("run")
    config, state = write_run(output)
    return output, model_of(config), state


def export(source: Path, output: Path, *more: str) -> int:
    return main(["export", str(source), "--output", str(output), *more])


def tensors(path: Path) -> dict[str, np.ndarray]:
    with open_weights(str(path)) as file:
        return all_tensors(read_params(file.like, file.read), file.unused())


def assert_equal_tensors(found: Any, expected: Any) -> None:
    assert found.keys() == expected.keys()
    jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.mark.parametrize("name", ["new/w.safetensors", "new/w.pt"])
def test_a_run_becomes_a_file(
    run: tuple[Path, ModelConfig, TrainState], tmp_path: Path, name: str
) -> None:
    output, config, state = run
    assert export(output, tmp_path / name) == 0
    expected = all_tensors(state.ema, load_unused(output))
    assert_equal_tensors(tensors(tmp_path / name), expected)
    assert not list(tmp_path.glob("new/*.part"))

    assert export(output, tmp_path / name, "--raw") == 0
    jax.tree.map(
        np.testing.assert_array_equal, load_weights(str(tmp_path / name), config), state.params
    )


def test_files_of_one_kind_become_the_other(
    run: tuple[Path, ModelConfig, TrainState], tmp_path: Path
) -> None:
    """There and back, dead weights and the model's shape included."""
    ours, i1s, again = (tmp_path / name for name in ("a.safetensors", "b.pt", "c.safetensors"))
    export(run[0], ours)
    export(ours, i1s)
    export(i1s, again)
    assert again.read_bytes() == ours.read_bytes()
    model = torch.load(i1s, weights_only=True)["model"]
    tables = {name for name in model if name.startswith(("pos_embed", "rope_embedder."))}
    assert len(tables) == 7
    assert model.keys() - tables == tensors(ours).keys()
    assert model["out_blocks.1.attn.qkv_text.weight"].shape == (48, 16)
    assert (model["t_embedder.linear1.bias"] == 3).all()


def test_a_run_from_fresh_weights_has_zeros_for_what_is_unused(
    run: tuple[Path, ModelConfig, TrainState], tmp_path: Path
) -> None:
    write_run(tmp_path / "run")
    (tmp_path / "run/unused.safetensors").unlink()
    export(tmp_path / "run", tmp_path / "a.pt")
    found = tensors(tmp_path / "a.pt")
    for name, (rows, *_) in unused_shapes(run[2].params).items():
        assert not found[name][:rows].any(), name


def test_a_baseline_is_no_checkpoint_of_i1s(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = {"kind": "dual_stream", "hidden_size": 16, "depth": 3, "num_heads": 2}
    config, state = write_run(tmp_path / "run", model=model)
    assert export(tmp_path / "run", tmp_path / "a.pt") == 1
    assert "the model is the baseline dual_stream, which i1's code" in capsys.readouterr().err
    assert not list(tmp_path.glob("a.pt*"))
    assert export(tmp_path / "run", tmp_path / "a.safetensors") == 0
    found = load_weights(str(tmp_path / "a.safetensors"), model_of(config))
    jax.tree.map(np.testing.assert_array_equal, found, state.ema)


@pytest.mark.parametrize("name", ["a.safetensors", "a.pt"])
def test_a_file_is_replaced_as_a_whole_or_not(
    run: tuple[Path, ModelConfig, TrainState],
    tmp_path: Path,
    name: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / name
    path.write_text("before")
    # No file can be written here.
    (tmp_path / f"{name}.part").mkdir()
    assert export(run[0], path) == 1
    assert f"cannot write to {tmp_path}: " in capsys.readouterr().err
    assert path.read_text() == "before"


def test_mistakes_are_told(
    run: tuple[Path, ModelConfig, TrainState],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def refused(message: str, source: Path, name: str, *more: str) -> None:
        assert export(source, tmp_path / name, *more) == 1
        assert message in capsys.readouterr().err

    refused("ends neither in .safetensors nor in .pt", run[0], "a.bin")
    refused("cannot read the weights", tmp_path / "absent", "a.pt")
    refused("holds no checkpoint", tmp_path, "a.pt")
    export(run[0], tmp_path / "a.safetensors")
    refused("has one set of weights only", tmp_path / "a.safetensors", "a.pt", "--raw")
    (tmp_path / "unused.safetensors").write_bytes(b"")
    with pytest.raises(EvenmixError, match=r"unused\.safetensors is damaged"):
        load_unused(tmp_path)
