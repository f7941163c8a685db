"""Checkpoints of i1's, as PyTorch writes them, and ours: the same weights, nothing run."""

import os
import pickle
import zipfile
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch

from pipeline.errors import EvenmixError
from tests import golden_i1
from train.i1_checkpoint import read_i1_checkpoint, write_i1_checkpoint
from train.model import velocity_fn
from train.torch_file import TorchFile, write_torch_file
from train.weights import load_weights, write_safetensors

GOLDEN = golden_i1.load("i1_dit_512")
CONFIG = golden_i1.model_config(GOLDEN)
STATED = {name.removeprefix("config/"): int(x) for name, x in GOLDEN.items() if "config/" in name}


def state() -> dict[str, torch.Tensor]:
    """The model's whole state as i1's trainer saves it."""
    prefix = "state/"
    return {
        name.removeprefix(prefix): torch.from_numpy(array)
        for name, array in GOLDEN.items()
        if name.startswith(prefix)
    }


def checkpoint(**changes: Any) -> dict[str, Any]:
    return {"config": STATED | {"mlp_ratio": 4.0}, "model": state()} | changes


def saved(path: Path, content: Any) -> str:
    torch.save(content, path)
    return str(path)


def assert_equal_weights(found: Any, expected: Any) -> None:
    leaves = dict(jax.tree_util.tree_leaves_with_path(expected))
    assert dict(jax.tree_util.tree_leaves_with_path(found)).keys() == leaves.keys()
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_a_checkpoint_gives_i1s_velocity(tmp_path: Path) -> None:
    path = saved(tmp_path / "512_resolution_checkpoint_torch.pt", checkpoint())
    config, params = read_i1_checkpoint(path)
    assert config == CONFIG
    inputs = GOLDEN["in/caption"], GOLDEN["in/mask"], np.zeros(3, bool)
    with jax.default_matmul_precision("highest"):
        velocity = jax.jit(velocity_fn(config))(
            params, golden_i1.channels_last(GOLDEN["in/x"]), *inputs
        )
    np.testing.assert_allclose(velocity, golden_i1.channels_last(GOLDEN["out/velocity"]), atol=2e-5)


def test_all_forms_in_which_pytorch_saves_are_read(tmp_path: Path) -> None:
    """A module's own state dict, views, other types, and a training state beside it."""
    model = OrderedDict(state())
    model._metadata = OrderedDict()  # type: ignore[attr-defined]  # as nn.Module.state_dict has it
    name = "final_layer.linear.weight"
    model[name] = model[name].t().contiguous().t()
    model["final_layer.linear.bias"] = torch.cat([torch.ones(5), model["final_layer.linear.bias"]])[
        5:
    ]
    model["x_embedder.proj.bias"] = model["x_embedder.proj.bias"].bfloat16()
    content = checkpoint(model=model, train_state={"step": 7, "opt": {"mu": {name: torch.ones(3)}}})
    _, params = read_i1_checkpoint(saved(tmp_path / "a.pt", content))
    expected = golden_i1.weights(GOLDEN, "state/")
    bias = expected["x_embedder"]["proj"]
    bias["bias"] = torch.from_numpy(bias["bias"]).bfloat16().float().numpy()
    assert_equal_weights(params, expected)


def test_an_export_is_what_i1_loads_strictly(tmp_path: Path) -> None:
    path = str(tmp_path / "export.pt")
    write_i1_checkpoint(path, CONFIG, golden_i1.weights(GOLDEN, "state/"))
    content = torch.load(path, weights_only=True)
    assert content["config"] == {
        **STATED,
        "patch_size": 2,
        "mlp_ratio": 4.0,
        "rope_theta": 10_000.0,
    }
    expected = state()
    assert content["model"].keys() == expected.keys()
    for name, tensor in content["model"].items():
        assert tensor.dtype == torch.float32
        if name.startswith("t_embedder."):
            assert tensor.shape == expected[name].shape and not tensor.any()
        elif name.startswith(("pos_embed", "rope_embedder.")):
            torch.testing.assert_close(tensor, expected[name], atol=1e-5, rtol=0)
        else:
            assert torch.equal(tensor, expected[name]), name
    assert_equal_weights(read_i1_checkpoint(path)[1], golden_i1.weights(GOLDEN, "state/"))


def test_plain_values_and_types_come_back(tmp_path: Path) -> None:
    path = str(tmp_path / "values.pt")
    arrays = {kind: np.arange(6).astype(kind).reshape(2, 3) for kind in ("float64", "int64")}
    value = {"a": [], "b": {"c": (1, -2.5, None, True, 1 << 40)}, "arrays": arrays}
    write_torch_file(path, value | {"a": "text é"})
    loaded = torch.load(path, weights_only=True)
    assert (loaded["a"], loaded["b"]) == ("text é", value["b"])
    for kind, array in arrays.items():
        np.testing.assert_array_equal(loaded["arrays"][kind].numpy(), array)
    with TorchFile(path) as file:
        assert file.value["b"] == value["b"]
        np.testing.assert_array_equal(file.read(file.value["arrays"]["int64"]), arrays["int64"])


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_a_model_goes_on_at_another_resolution(tmp_path: Path, suffix: str) -> None:
    path = str(tmp_path / f"512.{suffix}")
    params = golden_i1.weights(GOLDEN, "state/")
    (write_i1_checkpoint if suffix == "pt" else write_safetensors)(path, CONFIG, params)
    larger = replace(CONFIG, input_size=32, image_resolution=1024)
    assert_equal_weights(load_weights(path, larger), params)

    wider = replace(larger, hidden_size=96, num_heads=8)
    with pytest.raises(EvenmixError, match="hidden_size is 48, not 96; num_heads is 4, not 8"):
        load_weights(path, wider)


class Hostile:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("made-by-a-pickle",)


def archive(path: Path, data: bytes, **members: bytes) -> str:
    """A file whose pickle is ``data``."""
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("x/data.pkl", data)
        for key, member in members.items():
            file.writestr(f"x/data/{key.removeprefix('_')}", member)
    return str(path)


def tensor(size: int, offset: int, shape: tuple[int, ...], strides: tuple[int, ...]) -> bytes:
    """The pickle of one tensor of storage 0, by opcodes."""
    storage = (
        b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpu"
    )
    count, *layout = (pickle.dumps(value, 2)[2:-1] for value in (size, offset, shape, strides))
    arguments = storage + count + b"tQ" + b"".join(layout)
    return b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(" + arguments + b"tR."


@pytest.mark.parametrize(
    "data",
    [
        pickle.dumps({"model": Hostile()}, 2),
        pickle.dumps({"model": Hostile()}, 4),
        b"\x80\x02cbuiltins\neval\nX\x01\x00\x00\x001\x85R.",
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n}X\x01\x00\x00\x00aK\x01sb.",
        b"\x80\x02ccollections\nOrderedDict\nN}X\x01\x00\x00\x00aK\x01s\x86b.",
        b"\x80\x02K\x01r\xff\xff\xff\x7f.",
        b"\x80\x02}",
        tensor(4, -1, (2,), (1,)),
        tensor(4, 0, (2,), (1, 1)),
    ],
    ids=["call", "newer", "eval", "set", "class", "memo", "cut", "before", "axes"],
)
def test_a_hostile_pickle_is_refused(
    data: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(EvenmixError, match="holds more than weights and plain values"):
        TorchFile(archive(tmp_path / "hostile.pt", data))
    assert not Path("made-by-a-pickle").exists()


@pytest.mark.parametrize(
    ("size", "offset", "shape", "strides"),
    [
        (4, 0, (5,), (1,)),
        (4, 0, (2, 2), (3, 1)),
        (4, 3, (2,), (1,)),
        (4, 0, (1 << 40, 1 << 40), (0, 0)),
        (1 << 40, 0, (4,), (1,)),
    ],
)
def test_a_tensor_stays_in_its_storage(
    tmp_path: Path, size: int, offset: int, shape: tuple[int, ...], strides: tuple[int, ...]
) -> None:
    path = archive(tmp_path / "a.pt", tensor(size, offset, shape, strides), _0=bytes(16))
    with TorchFile(path) as file, pytest.raises(EvenmixError, match="larger than its storage"):
        file.read(file.value)


def test_what_is_no_checkpoint_of_i1s_is_an_error(tmp_path: Path) -> None:
    whole = saved(tmp_path / "whole.pt", checkpoint())
    data = Path(whole).read_bytes()

    def refused(message: str, content: Any) -> None:
        path = tmp_path / "wrong.pt"
        path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
        with pytest.raises(EvenmixError, match=message):
            read_i1_checkpoint(str(path))

    refused("no whole PyTorch checkpoint", data[: len(data) // 2])
    refused("no whole PyTorch checkpoint", b"")
    place = data.index(GOLDEN["state/final_layer.linear.weight"].tobytes())
    refused("is damaged: data/.*Bad CRC-32", data[:place] + b"\xff" + data[place + 1 :])
    refused("no checkpoint of i1's: config: ", [1])
    refused(r"config\.depth: .*config\.text_num_tokens: Field required", {"config": {"depth": -1}})
    refused("it has no model", {"config": STATED})
    refused("model has x, no tensor", checkpoint(model={"x": 1}))
    refused("it lacks ", checkpoint(model=dict(list(state().items())[:-1])))
    refused("it has unknown ", checkpoint(config=STATED | {"depth": 1}))
    with pytest.raises(EvenmixError, match="no whole PyTorch checkpoint"):
        read_i1_checkpoint(str(tmp_path / "absent.pt"))
    with pytest.raises(EvenmixError, match="cannot read the weights"):
        load_weights(str(tmp_path / "absent.safetensors"), CONFIG)
