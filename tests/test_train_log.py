"""What a run tells: its lines, TensorBoard, samples, and of a loss that is not finite.

TensorBoard's files are read back here by their frames: a length, its CRC, the event, its CRC.
"""

import json
import struct
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from tensorboardX.proto.event_pb2 import Event, SessionLog

from mixing.manifest import load_manifest
from mixing.tfrecord import frame
from pipeline.errors import EvenmixError
from tests.mixtures import Member, png, write_mixture
from tests.train_states import drawn, model_of, state_shapes
from train.config import TrainConfig
from train.data import TrainingData
from train.flops import PEAK_FLOP_PER_S
from train.log import RunLog
from train.loop import train
from train.weights import write_safetensors

PROMPTS = ["one prompt", "another"]


def members(prefix: str, count: int) -> list[Member]:
    """Pictures of noise, whose caption is their key."""
    rng = np.random.default_rng(count)
    pictures = rng.integers(0, 256, (count, 8, 8, 3), np.uint8)
    keys = [f"{prefix}{number:03d}" for number in range(count)]
    return [Member(key, png(picture), [key]) for key, picture in zip(keys, pictures, strict=True)]


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_mixture(
        tmp_path_factory.mktemp("mixture"),
        {"a": members("a", 40), "b": members("b", 30)},
        validation={"a": members("held-a", 4), "b": members("held-b", 3)},
    )


def configuration(mixture: str, output: Path, **changes: Any) -> TrainConfig:
    settings = {
        "mixture": mixture,
        "output": str(output),
        "resolution": 8,
        "steps": 4,
        "batch_size": 8,
        "log_every_steps": 2,
        "evaluation_samples": 8,
        "model": {"hidden_size": 16, "depth": 3, "num_heads": 2},
        "text": {"encoder": "bytes", "num_tokens": 4, "embed_dim": 16},
        "latent": {"encoder": "pixels", "downsampling": 2},
    }
    return TrainConfig.model_validate(settings | changes)


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def read_events(output: Path) -> Iterator[Event]:
    """Read all events of a run, file after file."""
    for path in sorted((output / "tensorboard").iterdir()):
        data = path.read_bytes()
        while data:
            (num_bytes,) = struct.unpack("<Q", data[:8])
            event = data[12 : 12 + num_bytes]
            assert data.startswith(frame(event))
            yield Event.FromString(event)
            data = data[16 + num_bytes :]


def add_step(log: RunLog, loss: jax.Array, *, asked_s: float, got_s: float) -> None:
    mask = np.array([[True, True, False, False], [True, True, True, False]])
    metrics = {"loss": loss, "gradient_norm": jnp.float32(2)}
    log.meter.add(metrics, mask, 1, asked_s=asked_s, got_s=got_s)


def test_a_run_is_shown_as_lines_samples_and_in_tensorboard(mixture: str, tmp_path: Path) -> None:
    output = tmp_path / "run"
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    config = configuration(
        mixture,
        output,
        validate_every_steps=4,
        samples={"every_steps": 4, "prompts": str(tmp_path / "prompts.txt"), "steps": 2},
    )
    evaluations = train(config, threading.Event())

    lines = read_lines(output / "loss.jsonl")
    assert [line["step"] for line in lines] == [2, 4]
    for line in lines:
        # The CPU tells neither its peak nor its memory; a caption is one token of four.
        assert set(line) == {
            "step",
            "loss",
            "gradient_norm",
            "images_per_s",
            "data_wait_share",
            "padding_share",
            "replaced_samples",
        }
        assert line["padding_share"] == 0.75
        assert line["replaced_samples"] == 0
        assert line["gradient_norm"] > 0
        assert line["images_per_s"] > 0
        assert 0 <= line["data_wait_share"] <= 1

    at_first, validation = read_lines(output / "validation.jsonl")
    assert (at_first["step"], validation["step"]) == (0, 4)
    assert evaluations is not None
    assert validation["datasets"].keys() == evaluations.keys() == {"a", "b", "all"}
    for name, shown in validation["datasets"].items():
        assert list(shown["loss_at_time"]) == ["0.24", "0.42", "0.58", "0.76"]
        assert np.mean(list(shown["loss_at_time"].values())) == pytest.approx(shown["loss"])
        assert shown["loss"] == evaluations[name].loss
    weighted = 4 * evaluations["a"].loss + 3 * evaluations["b"].loss
    assert evaluations["all"].loss == pytest.approx(weighted / 7)

    scalars = {}
    images = []
    for event in read_events(output):
        for value in event.summary.value:
            if value.HasField("image"):
                images.append((event.step, value.tag, value.image))
            else:
                scalars[event.step, value.tag] = value.simple_value
    for line in lines:
        for name in set(line) - {"step"}:
            assert scalars[line["step"], f"train/{name}"] == np.float32(line[name])
    for name, shown in validation["datasets"].items():
        assert scalars[4, f"validation/{name}/loss"] == np.float32(shown["loss"])
        by_time = scalars[4, f"validation/{name}/loss_at_0.42"]
        assert by_time == np.float32(shown["loss_at_time"]["0.42"])
    (first_step, _, _), (step, tag, image) = images
    assert first_step == 0
    with Image.open(output / "samples/0000004.png") as grid:
        assert (step, tag, image.width, image.height) == (4, "samples", *grid.size)
        # Two tiles of 8 px, magnified to 128 px, and the margins.
        assert grid.width == 2 * (128 + 8) + 8


def test_the_run_stops_at_a_loss_that_is_not_finite(mixture: str, tmp_path: Path) -> None:
    """It has weights of infinity; the run is told so at its first line, of five steps."""
    weights = tmp_path / "weights.safetensors"
    config = configuration(mixture, tmp_path / "run", steps=8, log_every_steps=5, init=str(weights))
    params, *_ = drawn(state_shapes(config), seed=0)
    params["final_layer"]["linear"]["bias"][0] = np.inf
    write_safetensors(str(weights), model_of(config), params)
    data = TrainingData(mixture, load_manifest(mixture), config.seed, config.batch_size)
    keys = data.batch(0).captions
    assert data.keys(0) == keys
    with pytest.raises(EvenmixError, match=r"step 1: the loss or its gradients are") as caught:
        train(config, threading.Event())
    assert f"({', '.join(keys)})" in str(caught.value)
    assert read_lines(tmp_path / "run/loss.jsonl") == []
    assert not [path for path in (tmp_path / "run/checkpoints").iterdir() if path.is_dir()]


def test_a_line_has_means_sums_and_the_share_of_the_peak(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(PEAK_FLOP_PER_S, jax.devices()[0].device_kind, 5e6)
    log = RunLog(configuration("mixture", tmp_path), None, flop_per_picture=1000)
    now_s = time.monotonic()
    for loss in (1.0, 4.0):
        add_step(log, jnp.float32(loss), asked_s=now_s, got_s=now_s)
    words = log.write(2)
    log.close()
    (line,) = read_lines(tmp_path / "loss.jsonl")
    assert (line["loss"], line["gradient_norm"]) == (2.5, 2)
    assert (line["replaced_samples"], line["padding_share"]) == (2, 0.375)
    peak = 5e6 * jax.device_count()
    assert line["mfu"] == pytest.approx(line["images_per_s"] * 1000 / peak, abs=1e-4)
    assert words.startswith("step 2/4  loss 2.5000  gradient 2.000  ")
    assert "  2 replaced  " in words


def test_only_what_the_device_waits_for_counts_as_waiting(tmp_path: Path) -> None:
    @jax.jit
    def busy(x: jax.Array) -> jax.Array:
        result: jax.Array = jax.lax.fori_loop(0, 200, lambda _, y: jnp.tanh(y @ x), x)
        return result.sum()

    x = jnp.eye(700)
    busy(x).block_until_ready()
    log = RunLog(configuration("mixture", tmp_path), None, None)

    def wait(loss: jax.Array) -> None:
        asked_s = time.monotonic()
        time.sleep(0.1)
        add_step(log, loss, asked_s=asked_s, got_s=time.monotonic())

    idle = jnp.float32(1)
    wait(idle)
    wait(idle)
    log.write(2)
    now_s = time.monotonic()
    add_step(log, busy(x), asked_s=now_s, got_s=now_s)
    wait(idle)
    log.write(4)
    log.close()
    nothing_to_do, much_to_do = read_lines(tmp_path / "loss.jsonl")
    assert nothing_to_do["data_wait_share"] > 0.5
    assert much_to_do["data_wait_share"] == 0


def test_a_resumed_run_forgets_what_is_done_again(tmp_path: Path) -> None:
    for resumed_at, steps in ((None, (1, 3)), (None, (2, 4)), (2, (4,))):
        from_step = resumed_at or 0
        log = RunLog(configuration("mixture", tmp_path), resumed_at, None)
        log.write_evaluation(from_step, {})
        for step in steps:
            add_step(log, jnp.float32(from_step + step), asked_s=0, got_s=0)
            log.write(step)
            log.write_evaluation(step, {})
        log.close()
    assert [(line["step"], line["loss"]) for line in read_lines(tmp_path / "loss.jsonl")] == [
        (2, 2),
        (4, 6),
    ]
    assert [line["step"] for line in read_lines(tmp_path / "validation.jsonl")] == [0, 2, 4]
    # TensorBoard leaves out what an earlier session wrote from the step at which a later one began.
    starts = {
        event.step
        for event in read_events(tmp_path)
        if event.session_log.status == SessionLog.START
    }
    assert starts == {0, 3}


@pytest.mark.parametrize(
    "samples", [{"every_steps": 0, "prompts": ["a"]}, {"every_steps": 1, "prompts": []}]
)
def test_samples_without_steps_or_prompts_are_refused(
    samples: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="samples"):
        configuration("mixture", tmp_path, samples=samples)
