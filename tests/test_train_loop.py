"""A run from first to last: it learns its captions, stops, resumes bit by bit, and samples."""

import argparse
import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from PIL import Image

from pipeline.errors import EvenmixError
from tests.mixtures import Member, png, write_mixture
from train import sample_command
from train.checkpoint import Checkpoints, TrainState, load_averaged
from train.config import TrainConfig
from train.loop import train
from train.model import init_params
from train.optimiser import make_optimiser

COLOURS = {"red": (220, 20, 20), "green": (20, 180, 20), "blue": (20, 20, 220)}
SHAPES = ("plain", "striped")


def coloured_members(prefix: str, count: int) -> list[Member]:
    """Pictures of a ground colour, plain or striped, that only the caption tells beforehand."""
    rng = np.random.default_rng(len(prefix))
    members = []
    for number in range(count):
        colour, shape = rng.choice(list(COLOURS)), rng.choice(SHAPES)
        picture = np.empty((8, 8, 3))
        picture[:] = COLOURS[colour]
        if shape == "striped":
            picture[::2] = 255
        picture = np.clip(picture + rng.normal(0, 5, picture.shape), 0, 255).astype(np.uint8)
        members.append(Member(f"{prefix}{number:03d}", png(picture), [f"{shape} {colour}"]))
    return members


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_mixture(
        tmp_path_factory.mktemp("mixture"),
        {"a": coloured_members("a", 200), "b": coloured_members("bb", 90)},
        validation={"a": coloured_members("held", 48)},
    )


def configuration(mixture: str, output: Path, **changes: Any) -> TrainConfig:
    settings = {
        "mixture": mixture,
        "output": str(output),
        "resolution": 8,
        "steps": 6,
        "batch_size": 16,
        "log_every_steps": 2,
        "checkpoint_every_steps": 100,
        "evaluation_samples": 0,
        "model": {"hidden_size": 32, "depth": 1, "num_heads": 2},
        "text": {"encoder": "bytes", "num_tokens": 2, "embed_dim": 32},
        "latent": {"encoder": "pixels", "downsampling": 2},
        "optimiser": {"learning_rate": 5e-3, "ema_decay": 0.95},
    }
    return TrainConfig.model_validate(settings | changes)


def fresh_state(config: TrainConfig) -> TrainState:
    params = init_params(config.model_config_for(config.latent_codec()), config.seed)
    return TrainState(0, params, params, make_optimiser(config.optimiser).init(params))


def resumed(config: TrainConfig, mixture_sha256: str = "hash") -> TrainState:
    state = Checkpoints(config.output, config, mixture_sha256).resume(fresh_state(config))
    assert state is not None
    return state


def final_state(config: TrainConfig) -> TrainState:
    """Return the state of a run's newest checkpoint."""
    sha256 = json.loads(next(Path(config.output).glob("checkpoints/*/run/metadata")).read_text())[
        "identity"
    ]["mixture_sha256"]
    return resumed(config, sha256)


def stop_after(config: TrainConfig, step: int) -> None:
    """Run until ``step`` is logged, then ask the run to stop as a signal does."""
    stop = threading.Event()
    log = Path(config.output) / "loss.jsonl"

    def watch() -> None:
        while not (log.exists() and f'"step": {step},' in log.read_text()):
            time.sleep(0.001)
        stop.set()

    watcher = threading.Thread(target=watch)
    watcher.start()
    assert train(config, stop) is None
    watcher.join()


def test_the_caption_margin_shows_that_captions_are_used(mixture: str, tmp_path: Path) -> None:
    config = configuration(
        mixture, tmp_path / "run", steps=300, log_every_steps=50, evaluation_samples=96
    )
    evaluations = train(config, threading.Event())
    assert evaluations is not None
    assert evaluations["all"].num_samples == 48
    assert evaluations["all"].caption_margin > 0.5
    report = json.loads((tmp_path / "run/evaluation.json").read_text())
    assert report["step"] == 300
    assert report["datasets"]["a"]["caption_margin"] == evaluations["a"].caption_margin

    lines = [json.loads(line) for line in (tmp_path / "run/loss.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [50, 100, 150, 200, 250, 300]
    assert lines[-1]["loss"] < lines[0]["loss"] / 2
    with Image.open(tmp_path / "run/loss.png") as picture:
        assert picture.size[0] > 500

    parser = argparse.ArgumentParser()
    sample_command.add_arguments(parser)
    prompts = [f"plain {colour}" for colour in COLOURS]
    output = tmp_path / "samples"
    arguments = ["--checkpoint", str(tmp_path / "run"), "--output", str(output), "--steps", "20"]
    assert sample_command.run(parser.parse_args([*arguments, "--prompt", *prompts])) == 0
    for number, colour in enumerate(COLOURS):
        with Image.open(output / f"{number:04d}.png") as picture:
            metadata = picture.text  # type: ignore[attr-defined]
            mean = np.asarray(picture).mean(axis=(0, 1))
        assert metadata["prompt"] == f"plain {colour}"
        assert (metadata["guidance"], metadata["steps"], metadata["seed"]) == ("4.0", "20", "0")
        assert np.argmax(mean) == np.argmax(COLOURS[colour])
        np.testing.assert_allclose(mean, COLOURS[colour], atol=75)
    assert (output / "grid.png").exists()


def test_a_resumed_run_ends_with_the_same_bits(mixture: str, tmp_path: Path) -> None:
    straight = configuration(mixture, tmp_path / "straight", steps=40)
    train(straight, threading.Event())
    halved = configuration(mixture, tmp_path / "halved", steps=40)
    stop_after(halved, step=4)
    stopped_at = final_state(halved).step
    assert 4 <= stopped_at < 40
    train(halved, threading.Event())

    expected, found = final_state(straight), final_state(halved)
    assert expected.step == found.step == 40
    for one, other in zip(
        jax.tree.leaves(expected._asdict()), jax.tree.leaves(found._asdict()), strict=True
    ):
        np.testing.assert_array_equal(np.asarray(one), np.asarray(other))
    lines = [json.loads(line) for line in (tmp_path / "halved/loss.jsonl").read_text().splitlines()]
    steps = [line["step"] for line in lines]
    assert steps == sorted(set(steps))
    assert steps[-1] == 40


def test_a_finished_run_is_not_trained_again(mixture: str, tmp_path: Path) -> None:
    config = configuration(mixture, tmp_path / "run")
    train(config, threading.Event())
    log = (tmp_path / "run/loss.jsonl").read_bytes()
    train(config, threading.Event())
    assert (tmp_path / "run/loss.jsonl").read_bytes() == log


def test_other_settings_do_not_resume(mixture: str, tmp_path: Path) -> None:
    train(configuration(mixture, tmp_path / "run"), threading.Event())
    other = configuration(mixture, tmp_path / "run", seed=1, batch_size=8)
    with pytest.raises(EvenmixError, match=r"batch_size was 16, is 8; seed was 0, is 1"):
        train(other, threading.Event())


def test_a_half_written_checkpoint_is_never_taken(mixture: str, tmp_path: Path) -> None:
    config = configuration(mixture, tmp_path / "run")
    state = fresh_state(config)
    checkpoints = Checkpoints(config.output, config, "hash")
    checkpoints.save(state._replace(step=3))
    checkpoints.close()
    # What a killed writer leaves: orbax's temporary folder for the next step.
    leftover = checkpoints.folder / "5.orbax-checkpoint-tmp"
    (leftover / "params").mkdir(parents=True)
    assert resumed(config).step == 3


def test_only_the_newest_checkpoints_are_kept(mixture: str, tmp_path: Path) -> None:
    config = configuration(mixture, tmp_path / "run")
    checkpoints = Checkpoints(config.output, config, "hash")
    for step in (1, 2, 3):
        checkpoints.save(fresh_state(config)._replace(step=step))
    checkpoints.close()
    assert sorted(path.name for path in checkpoints.folder.iterdir()) == ["2", "3"]
    step, stored, _ = load_averaged(config.output)
    assert (step, stored) == (3, config)


def test_an_output_that_is_a_file_is_a_clear_error(mixture: str, tmp_path: Path) -> None:
    (tmp_path / "run").write_text("taken")
    with pytest.raises(EvenmixError, match=r"cannot write to .*/run/checkpoints"):
        train(configuration(mixture, tmp_path / "run"), threading.Event())


def test_a_checkpoint_that_does_not_fit_on_the_disk_is_a_clear_error(
    mixture: str, tmp_path: Path
) -> None:
    """No file may exceed 4,000 bytes, which stops orbax's writers as a full disk would."""
    config = configuration(mixture, tmp_path / "run")
    before = Checkpoints(config.output, config, "hash")
    before.save(fresh_state(config)._replace(step=1))
    before.close()
    code = (
        "import resource, signal; from tests.test_train_loop import *\n"
        f"config = TrainConfig.model_validate({config.model_dump()!r})\n"
        "checkpoints, state = Checkpoints(config.output, config, 'hash'), fresh_state(config)\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4000, resource.RLIM_INFINITY))\n"
        "try:\n    checkpoints.save(state._replace(step=2))\n    checkpoints.close()\n"
        "except EvenmixError as error:\n    print('told:', error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert f"told: cannot write to {tmp_path}/run/checkpoints: " in done.stdout, done.stderr
    assert resumed(config).step == 1


def test_sampling_without_a_checkpoint_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(EvenmixError, match="holds no checkpoint"):
        load_averaged(str(tmp_path / "nothing"))


def wait_for(condition: Callable[[], bool], timeout_s: float = 60) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


def write_config(config: TrainConfig, path: Path) -> Path:
    """Write a configuration as TOML, whose tables are one deep."""
    settings = config.model_dump(exclude_none=True)
    path.write_text(
        "\n".join(
            f"{name} = {json.dumps(value)}"
            for name, value in settings.items()
            if not isinstance(value, dict)
        )
        + "".join(
            f"\n[{name}]\n" + "\n".join(f"{key} = {json.dumps(entry)}" for key, entry in v.items())
            for name, v in settings.items()
            if isinstance(v, dict)
        )
    )
    return path


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_writes_a_checkpoint_and_ends(
    mixture: str, tmp_path: Path, number: signal.Signals
) -> None:
    config = configuration(mixture, tmp_path / "run", steps=1_000_000)
    path = write_config(config, tmp_path / "train.toml")
    code = (
        "import argparse; from train import train_command as c; p = argparse.ArgumentParser();"
        f"c.add_arguments(p); raise SystemExit(c.run(p.parse_args([{str(path)!r}])))"
    )
    run = subprocess.Popen([sys.executable, "-c", code], cwd=Path(__file__).parent.parent)
    log = tmp_path / "run/loss.jsonl"
    wait_for(lambda: log.exists() and log.stat().st_size > 0)
    run.send_signal(number)
    assert run.wait(timeout=60) == 128 + number
    step, _, _ = load_averaged(config.output)
    assert step > 0
