"""Checkpoints of i1's, as PyTorch writes them, and ours: the same weights, nothing run."""

import os
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import pytest
import torch

from pipeline.errors import EvenmixError
from tests import golden_i1
from train.checkpoint import TrainState
from train.config import OptimiserConfig
from train.i1_checkpoint import open_i1_checkpoint, write_i1_checkpoint
from train.model import abstract_params
from train.optimiser import make_optimiser
from train.sharding import make_mesh, place_state
from train.start import begin_from
from train.tensors import all_tensors, read_params
from train.torch_file import TorchFile, write_torch_file
from train.weights import load_weights, open_weights, write_safetensors

GOLDEN = golden_i1.load("i1_dit_512")
DEPTH = 7
CONFIG = replace(golden_i1.model_config(GOLDEN), depth=DEPTH)
STATED = {name.removeprefix("config/"): int(x) for name, x in GOLDEN.items() if "config/" in name}
STATED["depth"] = DEPTH
BUFFERS = ("rope_embedder.",)
TABLES = ("pos_embed", *BUFFERS)

State = dict[str, torch.Tensor]


def names() -> Iterator[tuple[str, str]]:
    """Names of a deeper network's state, each with that of the reference which has its shape."""
    for golden in GOLDEN:
        if golden.startswith("state/"):
            for number in range(DEPTH // 2 if "_blocks.0." in golden else 1):
                name = golden.removeprefix("state/")
                yield name.replace("_blocks.0.", f"_blocks.{number}."), golden


def state(seed: int = 0, *, without: tuple[str, ...] = ()) -> State:
    """The model's whole state as i1's trainer saves it: random numbers, and its tables."""
    rng = np.random.default_rng(seed)
    return {
        name: torch.from_numpy(
            GOLDEN[golden]
            if name.startswith(TABLES)
            else rng.normal(size=GOLDEN[golden].shape).astype(np.float32)
        )
        for name, golden in names()
        if not name.startswith(without)
    }


def checkpoint(**changes: Any) -> dict[str, Any]:
    return {"config": STATED | {"mlp_ratio": 4.0}, "model": state()} | changes


def saved(path: Path, content: Any) -> str:
    torch.save(content, path)
    return str(path)


def tensors(path: str) -> State:
    """What a file of ours or of i1's has, through this trainer's own layout and back."""
    with open_weights(path) as file:
        params = read_params(file.like, file.read)
        found = all_tensors(params, file.unused())
    return {name: torch.from_numpy(np.ascontiguousarray(x)) for name, x in found.items()}


def assert_same_tensors(found: State, expected: State) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == torch.float32
        assert torch.equal(found[name], tensor), name


def test_the_weights_are_those_that_give_i1s_velocity(tmp_path: Path) -> None:
    """See test_train_model for the velocity."""
    prefix = "state/"
    model = {n.removeprefix(prefix): torch.from_numpy(x) for n, x in GOLDEN.items() if prefix in n}
    content = checkpoint(config=STATED | {"depth": 3}, model=model)
    path = saved(tmp_path / "512_resolution_checkpoint_torch.pt", content)
    with open_i1_checkpoint(path) as file:
        assert file.config == golden_i1.model_config(GOLDEN)
        params, unused = read_params(file.like, file.read), file.unused()
    expected = golden_i1.weights(GOLDEN, prefix), golden_i1.unused(GOLDEN)
    assert unused.keys() == expected[1].keys()
    jax.tree.map(np.testing.assert_array_equal, (params, unused), expected)


def test_blocks_are_stacked_in_their_order(tmp_path: Path) -> None:
    model = state()
    params = load_weights(saved(tmp_path / "a.pt", checkpoint(model=model)), CONFIG)
    kernels = {part: params[part]["attn"]["qkv_image"]["kernel"] for part in params if "_b" in part}
    assert {part: kernel.shape for part, kernel in kernels.items()} == {
        "in_blocks": (3, 48, 144),
        "mid_block": (48, 144),
        "out_blocks": (2, 48, 144),
        "last_block": (48, 144),
    }
    for name, kernel in {
        "in_blocks.1": kernels["in_blocks"][1],
        "out_blocks.0": kernels["out_blocks"][0],
        "out_blocks.1": kernels["out_blocks"][1],
        "out_blocks.2": kernels["last_block"],
    }.items():
        np.testing.assert_array_equal(kernel.T, model[f"{name}.attn.qkv_image.weight"])
    keys_and_values = model["out_blocks.2.attn.qkv_text.weight"][48:]
    np.testing.assert_array_equal(
        params["last_block"]["attn"]["kv_text"]["kernel"].T, keys_and_values
    )


def test_all_forms_in_which_pytorch_saves_are_read(tmp_path: Path) -> None:
    """A module's own state dict, views, and other types."""
    expected = state(without=TABLES)
    bias = "x_embedder.proj.bias"
    expected[bias] = expected[bias].bfloat16().float()
    model = OrderedDict(state())
    model._metadata = OrderedDict()  # type: ignore[attr-defined]  # as nn.Module.state_dict has it
    name = "final_layer.linear.weight"
    model[name] = model[name].t().contiguous().t()
    view = "final_layer.linear.bias"
    model[view] = torch.cat([torch.ones(5), model[view]])[5:]
    model[bias] = model[bias].bfloat16()
    assert_same_tensors(tensors(saved(tmp_path / "a.pt", checkpoint(model=model))), expected)


def test_an_export_is_what_i1_loads_strictly(tmp_path: Path) -> None:
    """Equal tensor by tensor, those included that its network does not use."""
    source, path = saved(tmp_path / "a.pt", checkpoint()), str(tmp_path / "export.pt")
    with open_i1_checkpoint(source) as file:
        params = read_params(file.like, file.read)
        write_i1_checkpoint(path, CONFIG, params, file.unused())
    content = torch.load(path, weights_only=True)
    rest = {"patch_size": 2, "mlp_ratio": 4.0, "rope_theta": 10_000.0}
    assert content["config"] == STATED | rest
    found, expected = content["model"], state()
    for name in [name for name in expected if name.startswith(TABLES)]:
        torch.testing.assert_close(found.pop(name), expected.pop(name), atol=1e-5, rtol=0)
    assert_same_tensors(found, expected)

    write_i1_checkpoint(path, CONFIG, params)
    found = torch.load(path, weights_only=True)["model"]
    zero = {name: tensor for name, tensor in found.items() if not tensor.any()}
    assert {name: tensor.shape for name, tensor in zero.items() if "rope" not in name} == {
        name: tensor.shape
        for name, tensor in expected.items()
        if name.startswith(
            ("t_embedder.", "out_blocks.2.attn.proj_text.", "out_blocks.2.mlp_text.")
        )
    }
    queries, _, _ = found["out_blocks.2.attn.qkv_text.weight"].chunk(3)
    assert not queries.any()


def training(**changes: Any) -> dict[str, Any]:
    """What i1's trainer adds: it averages parameters, not buffers, and leaves one out of Adam."""
    moments = {name: state(seed, without=TABLES) for seed, name in enumerate(("mu", "nu"), 2)}
    moments["mu"] = {name: tensor.bfloat16() for name, tensor in moments["mu"].items()}
    train_state = {"step": 70, "opt": {"count": 60, **moments}, "model_raw": state(1)}
    return checkpoint(model=state(without=BUFFERS), train_state=train_state | changes)


def blank_state(mu_dtype: Any) -> TrainState:
    """Shapes of the state of a run with this network, each placed on the devices."""
    params = abstract_params(CONFIG)
    optimiser = make_optimiser(OptimiserConfig(mu_dtype=mu_dtype))
    opt_state = jax.eval_shape(optimiser.init, params)
    return TrainState(0, *place_state(make_mesh(1), (params, params, opt_state)))


def no_beginning(_: Any) -> Any:
    raise AssertionError("it was to go on, not to begin")


@pytest.mark.parametrize("mu_dtype", ["bfloat16", "float32"])
def test_a_training_of_i1s_goes_on(tmp_path: Path, mu_dtype: str) -> None:
    """At another resolution, as its next stage does."""
    path = saved(tmp_path / "a.pt", training())
    like = blank_state(mu_dtype)
    larger = replace(CONFIG, input_size=32, image_resolution=1024)
    found = begin_from(path, larger, like, no_beginning)
    assert found.step == 70
    (adam,) = (part for part in found.opt_state if isinstance(part, optax.ScaleByAdamState))
    assert adam.count == 60
    for (name, params), expected in zip(
        {"params": found.params, "ema": found.ema, "mu": adam.mu, "nu": adam.nu}.items(),
        (state(1), state(0), state(2), state(3)),
        strict=True,
    ):
        by_name = all_tensors(jax.tree.map(lambda x: np.asarray(x, np.float32), params), {})
        compared = [
            "in_blocks.2.mlp_text.w3.weight",
            "out_blocks.2.attn.proj_image.weight",
            "x_embedder.proj.weight",
        ]
        for tensor in compared:
            wanted = expected[tensor].bfloat16() if name == "mu" else expected[tensor]
            np.testing.assert_array_equal(by_name[tensor], wanted.float())
    placed, wanted = (jax.tree.map(lambda x: (x.dtype, x.sharding), s[1:]) for s in (found, like))
    assert placed == wanted


def test_without_an_average_the_weights_are_the_model(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.pt", training(model_raw=None))
    found = begin_from(path, CONFIG, blank_state("bfloat16"), no_beginning)
    jax.tree.map(np.testing.assert_array_equal, found.params, found.ema)


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


def test_a_model_goes_on_at_another_resolution(tmp_path: Path) -> None:
    """Our own files have the same tensors, but for the tables."""
    source, path = saved(tmp_path / "a.pt", checkpoint()), str(tmp_path / "512.safetensors")
    with open_i1_checkpoint(source) as file:
        params = read_params(file.like, file.read)
        write_safetensors(path, CONFIG, params, file.unused())
    assert_same_tensors(tensors(path), state(without=TABLES))
    larger = replace(CONFIG, input_size=32, image_resolution=1024, dtype="bfloat16")
    jax.tree.map(np.testing.assert_array_equal, load_weights(path, larger), params)

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
            load_weights(str(path), CONFIG)

    refused("no whole PyTorch checkpoint", data[: len(data) // 2])
    refused("no whole PyTorch checkpoint", b"")
    place = data.index(state()["final_layer.linear.weight"].numpy().tobytes())
    refused("is damaged: data/.*Bad CRC-32", data[:place] + b"\xff" + data[place + 1 :])
    refused("no checkpoint of i1's: config: ", [1])
    refused(r"config\.depth: .*config\.text_num_tokens: Field required", {"config": {"depth": -1}})
    refused("it has no model", {"config": STATED})
    refused("model has x, no tensor", checkpoint(model={"x": 1}))
    refused("it lacks ", checkpoint(model=dict(list(state().items())[:-1])))
    refused("it has unknown ", checkpoint(config=STATED | {"depth": 3}))
    refused(r"train_state\.step: .*greater than or equal to 0", training(step=-1))
    refused(r"train_state\.opt\.count: Field required; ", training(opt={"mu": {}}))
    moments = {"mu": state(without=TABLES), "nu": state(without=(*TABLES, "mid_block."))}
    refused(
        r"\(nu\) is of another model: it lacks mid_block", training(opt={"count": 1, **moments})
    )
    with pytest.raises(EvenmixError, match="no whole PyTorch checkpoint"):
        load_weights(str(tmp_path / "absent.pt"), CONFIG)
    with pytest.raises(EvenmixError, match="cannot read the weights"):
        load_weights(str(tmp_path / "absent.safetensors"), CONFIG)
