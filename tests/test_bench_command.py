"""`evenmix bench train`: what a step costs, on drawn data and on a mixture."""

import json
import re
import threading
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from pipeline.cli import main
from pipeline.errors import EvenmixError
from tests.mixtures import Member, png, write_mixture
from train.bench import bench, draw_encoders
from train.bench_command import describe
from train.config import TrainConfig, load_config
from train.flops import PEAK_FLOP_PER_S, network_flop
from train.flux2_vae import VaeConfig
from train.loop import train
from train.model import abstract_params
from train.profiler import WARM_UP_STEPS
from train.t5gemma import T5GEMMA_2B

CONFIG = """
mixture = "mixture"
output = "run"
resolution = 8
steps = {steps}
batch_size = 4
log_every_steps = 1
evaluation_samples = 0
[model]
hidden_size = 16
depth = 3
num_heads = 2
[text]
encoder = "bytes"
num_tokens = 4
embed_dim = 16
[latent]
encoder = "pixels"
downsampling = 2
"""
STEPS = 2


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to work in, with train.toml."""
    monkeypatch.chdir(tmp_path)
    Path("train.toml").write_text(CONFIG.format(steps=WARM_UP_STEPS + STEPS))
    return tmp_path


def draw_mixture(resolution: int = 8) -> None:
    """Write pictures of noise whose caption is one token."""
    rng = np.random.default_rng(0)
    pictures = rng.integers(0, 256, (10, resolution, resolution, 3), np.uint8)
    members = [
        Member(f"a{number}", png(picture), [f"word{number}"])
        for number, picture in enumerate(pictures)
    ]
    Path("mixture").mkdir()
    write_mixture(Path("mixture"), {"a": members}, resolution=resolution)


def bench_train(*arguments: str) -> int:
    return main(["bench", "train", "train.toml", f"--steps={STEPS}", *arguments])


def test_the_table_is_of_a_real_step_and_nothing_is_written(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(PEAK_FLOP_PER_S, jax.devices()[0].device_kind, 1e12)
    monkeypatch.setenv("COLUMNS", "120")
    assert bench_train("--synthetic-data") == 0
    lines = capsys.readouterr().out.splitlines()
    table = dict(re.split(r" {2,}", line.strip(), maxsplit=1) for line in lines)
    config = load_config("train.toml")
    model = config.model_config_for(config.latent_codec())
    count = sum(weight.size for weight in jax.tree.leaves(abstract_params(model)))
    number = r"\d+(\.\d+)?(e-?\d+)?"
    size = r"\d+ MiB"
    expected = {
        "parameters": f"{count:,}",
        "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "batch": "4 pictures of 8 px",
        "compile time": rf"{number} s",
        "first step": rf"{number} s, with the encoders' compile time",
        "step time": rf"{number} s, median of 2 \({number} to {number}\)",
        "images/s": number,
        "model FLOPs": rf"{number} TFLOP/s a device, {number}% of its peak \(1, bfloat16\)",
        "waiting for data": rf"{number}% of the time",
        # Every caption is longer than four tokens.
        "padding": "0.0% of text tokens",
        "memory planned": rf"{size} a device \(state {size}, encoders 0 MiB, work {size}\)",
        "loss": rf"{number} at the last step",
        "gradient norm": number,
    }
    assert list(table) == list(expected)
    for label, pattern in expected.items():
        assert re.fullmatch(pattern, table[label]), (label, table[label])
    assert [path.name for path in folder.iterdir()] == ["train.toml"]


@pytest.mark.usefixtures("folder")
def test_on_a_mixture_the_steps_are_those_of_a_run() -> None:
    draw_mixture()
    config = load_config("train.toml")
    found = bench(config, STEPS)
    assert not Path("run").exists()

    measured = found.measured
    assert (measured.padding_share, measured.replaced_samples) == (0.75, 0)
    assert len(measured.step_s) == STEPS
    num_pictures = STEPS * config.batch_size
    assert sum(measured.step_s) == pytest.approx(num_pictures / measured.images_per_s)
    assert found.first_step_s > min(measured.step_s)
    flop = 3 * network_flop(config.model_config_for(config.latent_codec()))
    devices = jax.device_count()
    assert measured.flop_per_s == pytest.approx(measured.images_per_s * flop / devices)
    # A CPU tells neither its peak nor its memory.
    assert (measured.mfu, measured.peak_memory_bytes) == (None, None)
    shown = dict(describe(config, found))
    assert shown["model FLOPs"].endswith(" TFLOP/s a device; its peak is not known")
    assert "memory used" not in shown

    train(config, threading.Event())
    lines = [json.loads(line) for line in Path("run/loss.jsonl").read_text().splitlines()]
    last = {name: lines[-1][name] for name in ("step", "loss", "gradient_norm")}
    assert last == {
        "step": WARM_UP_STEPS + STEPS,
        "loss": found.loss,
        "gradient_norm": found.gradient_norm,
    }
    means = [np.mean([line[name] for line in lines[-STEPS:]]) for name in ("loss", "gradient_norm")]
    assert [measured.loss, measured.gradient_norm] == pytest.approx(means)


def configured(**changes: Any) -> TrainConfig:
    settings: dict[str, Any] = {
        "mixture": "mixture",
        "output": "run",
        "resolution": 16,
        "steps": 1,
        "batch_size": 4,
        "model": {"hidden_size": 16, "depth": 3, "num_heads": 2},
        "text": {"encoder": "t5gemma", "num_tokens": 4, "embed_dim": 16},
        "latent": {"encoder": "flux2"},
    }
    return TrainConfig.model_validate(settings | changes)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_encoders_are_drawn_as_they_are_configured(
    dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = {"vocab_size": 8, "hidden_size": 16, "intermediate_size": 16}
    few = {"num_hidden_layers": 1, "layer_types": ("full_attention",)}
    monkeypatch.setattr("train.bench.T5GEMMA_2B", T5GEMMA_2B.model_copy(update=small | few))
    narrow = VaeConfig((32,) * 4, (32,) * 4, "float32")
    monkeypatch.setattr("train.bench.FLUX2_VAE", narrow)
    config = configured(
        text={"encoder": "t5gemma", "num_tokens": 4, "embed_dim": 16, "dtype": dtype},
        latent={"encoder": "flux2", "dtype": dtype},
    )
    text, codec = draw_encoders(config)
    layers = text.params["layers"]
    assert layers["mlp.up_proj"].dtype == dtype
    assert layers["post_feedforward_layernorm"].dtype == np.float32
    tokens, mask = text.tokenise(["one two", "one two three four five six"])
    assert mask.sum(axis=1).tolist() == [2, 4]
    caption = jax.eval_shape(text.encode, text.params, tokens, mask)
    assert (caption.shape, caption.dtype) == ((2, 4, 16), np.float32)

    pictures = jax.ShapeDtypeStruct((2, 16, 16, 3), np.uint8)
    program = jax.make_jaxpr(codec.encode)(codec.params, pictures)
    (latents,) = program.out_avals
    assert (latents.shape, latents.dtype) == ((2, 2, 2, 32), np.float32)
    assert ("bf16[2,16,16,32]" in str(program)) == (dtype == "bfloat16")


def test_encoders_without_weights_are_not_drawn() -> None:
    config = configured(
        text={"encoder": "bytes", "num_tokens": 4, "embed_dim": 16},
        latent={"encoder": "pixels", "downsampling": 2},
    )
    text, codec = draw_encoders(config)
    assert (text, codec) == (config.text_encoder(), config.latent_codec())


def test_a_drawn_text_encoder_of_another_width_is_refused() -> None:
    with pytest.raises(EvenmixError, match=r"text.embed_dim is 16, but T5Gemma is 2304 wide"):
        draw_encoders(configured())


@pytest.mark.usefixtures("folder")
def test_mistakes_are_told_before_anything_is_compiled(capsys: pytest.CaptureFixture[str]) -> None:
    def error(*arguments: str) -> str:
        assert bench_train(*arguments) == 1
        return capsys.readouterr().err

    assert error("--steps=0") == "error: --steps is 0; measure at least 1\n"
    assert error("--mixture=nowhere").startswith("error: nowhere/mixture.json")
    draw_mixture(resolution=16)
    assert error() == (
        "error: mixture/mixture.json: its pictures have 16 px, the training configuration says "
        "8 px; change `resolution` or mix again\n"
    )
    Path("train.toml").write_text("accumulate = 3" + Path("train.toml").read_text())
    assert "cannot be divided evenly among 1 devices and 3 parts" in error("--synthetic-data")
    with pytest.raises(SystemExit) as both:
        bench_train("--synthetic-data", "--mixture=mixture")
    assert both.value.code == 2
    assert "not allowed with argument" in capsys.readouterr().err
