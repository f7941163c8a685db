"""A run from first to last: it learns its captions, stops, resumes bit by bit, and samples."""

import json
import shutil
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

from pipeline.cli import main
from pipeline.errors import EvenmixError
from tests.corpora import evenmix
from tests.mixtures import Member, png, write_mixture
from tests.train_states import drawn, model_of, state_shapes
from train.checkpoint import Checkpoints, TrainState, load_averaged, newest_checkpoint
from train.config import TrainConfig
from train.loop import train
from train.sharding import make_mesh

COLOURS = {"red": (220, 20, 20), "green": (20, 180, 20), "blue": (20, 20, 220)}
SHAPES = ("plain", "striped")
# Guidance that suits a model of three colours.
SAMPLING = ("--steps", "20", "--guidance", "4")


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
    """A run of the same compiled step as all others here, if ``changes`` change no shape."""
    settings = {
        "mixture": mixture,
        "output": str(output),
        "resolution": 8,
        "steps": 300,
        "batch_size": 16,
        "log_every_steps": 50,
        "checkpoint_every_steps": 100,
        "evaluation_samples": 96,
        "model": {"hidden_size": 32, "depth": 3, "num_heads": 2},
        "text": {"encoder": "bytes", "num_tokens": 2, "embed_dim": 32},
        "latent": {"encoder": "pixels", "downsampling": 2},
        "optimiser": {"learning_rate": 5e-3, "ema_decay": 0.95},
    }
    return TrainConfig.model_validate(settings | changes)


def write_config(config: TrainConfig, path: Path, **changes: Any) -> str:
    """Write a configuration as TOML, whose tables are one deep; return its path."""
    settings = config.model_dump(exclude_none=True) | changes
    tables = {name: table for name, table in settings.items() if isinstance(table, dict)}
    lines = [f"{name} = {json.dumps(settings[name])}" for name in settings.keys() - tables.keys()]
    for name, table in tables.items():
        lines += [f"[{name}]", *(f"{key} = {json.dumps(value)}" for key, value in table.items())]
    path.write_text("\n".join(lines))
    return str(path)


def drawn_state(config: TrainConfig, step: int) -> TrainState:
    return TrainState(step, *drawn(state_shapes(config), seed=step))


def checkpoints_of(config: TrainConfig) -> Checkpoints:
    return Checkpoints(config.output, config, model_of(config), "hash")


def last_state(config: TrainConfig) -> TrainState:
    """Return the state of a run's newest checkpoint."""
    with newest_checkpoint(config.output) as checkpoint:
        return checkpoint.restore(TrainState(0, *state_shapes(config)))


def assert_equal_states(one: TrainState, other: TrainState) -> None:
    jax.tree.map(np.testing.assert_array_equal, one, other)


def logged_steps(config: TrainConfig) -> list[int]:
    lines = (Path(config.output) / "loss.jsonl").read_text().splitlines()
    return [json.loads(line)["step"] for line in lines]


class StopAfter(threading.Event):
    """What a signal does, at a step that is known: each step asks once."""

    def __init__(self, steps: int):
        super().__init__()
        self._left = steps

    def is_set(self) -> bool:
        self._left -= 1
        return self._left <= 0


@pytest.fixture(scope="module")
def finished(mixture: str, tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    """A run that has come to its end."""
    output = tmp_path_factory.mktemp("finished") / "run"
    config = configuration(mixture, output)
    assert train(config, threading.Event(), profile_steps=2) is not None
    return config


def test_the_caption_margin_shows_that_captions_are_used(finished: TrainConfig) -> None:
    run = Path(finished.output)
    report = json.loads((run / "evaluation.json").read_text())
    assert report["step"] == 300
    assert report["datasets"]["all"]["num_samples"] == 48
    assert report["datasets"]["all"] == report["datasets"]["a"]
    assert report["datasets"]["all"]["caption_margin"] > 0.5

    losses = [json.loads(line)["loss"] for line in (run / "loss.jsonl").read_text().splitlines()]
    assert logged_steps(finished) == [50, 100, 150, 200, 250, 300]
    assert losses[-1] < losses[0] / 2
    with Image.open(run / "loss.png") as picture:
        assert picture.size[0] > 500


def test_steps_are_traced(finished: TrainConfig) -> None:
    (trace,) = Path(finished.output).glob("profile/**/*.xplane.pb")
    assert b"jit__update_weights" in trace.read_bytes()


def test_pictures_are_those_of_their_prompts(finished: TrainConfig, tmp_path: Path) -> None:
    prompts = [f"plain {colour}" for colour in COLOURS]
    output = tmp_path / "samples"
    arguments = ["--checkpoint", finished.output, "--output", str(output), *SAMPLING]
    assert main(["sample", *arguments, "--prompt", *prompts]) == 0
    for number, colour in enumerate(COLOURS):
        with Image.open(output / f"{number:04d}.png") as picture:
            text = picture.text  # type: ignore[attr-defined]
            mean = np.asarray(picture).mean(axis=(0, 1))
        assert text == {
            "prompt": f"plain {colour}",
            "index": str(number),
            "step": "300",
            "guidance": "4.0",
            "rescale": "1.0",
            "steps": "20",
            "shift": "0.3",
            "seed": "0",
        }
        assert np.argmax(mean) == np.argmax(COLOURS[colour])
        np.testing.assert_allclose(mean, COLOURS[colour], atol=75)
    assert (output / "grid.png").exists()


def test_a_finished_run_is_not_trained_again(finished: TrainConfig) -> None:
    log, state = (Path(finished.output) / "loss.jsonl").read_bytes(), last_state(finished)
    assert train(finished, threading.Event()) is not None
    assert (Path(finished.output) / "loss.jsonl").read_bytes() == log
    assert_equal_states(last_state(finished), state)


def test_a_run_that_is_stopped_twice_ends_with_the_same_bits(
    finished: TrainConfig, tmp_path: Path
) -> None:
    """Once as by a power cut after its checkpoint of step 200, and once as it is told to."""
    config = finished.model_copy(update={"output": str(tmp_path / "run")})
    shutil.copytree(finished.output, config.output)
    shutil.rmtree(tmp_path / "run/checkpoints/300")
    (tmp_path / "run/evaluation.json").unlink()
    assert train(config, StopAfter(40)) is None
    assert (last_state(config).step, logged_steps(config)) == (240, [50, 100, 150, 200])
    assert not (tmp_path / "run/evaluation.json").exists()

    assert train(config, threading.Event()) is not None
    assert_equal_states(last_state(config), last_state(finished))
    assert logged_steps(config) == logged_steps(finished)
    found, expected = (
        json.loads((Path(run.output) / "evaluation.json").read_text()) for run in (config, finished)
    )
    assert found == expected


def test_what_a_run_was_stopped_before_is_made_up_for(mixture: str, tmp_path: Path) -> None:
    samples = {"every_steps": 10, "prompts": ["plain red"], "steps": 2}
    config = configuration(
        mixture, tmp_path / "run", steps=12, validate_every_steps=5, samples=samples
    )

    def shown() -> tuple[list[int], list[str]]:
        lines = (tmp_path / "run/validation.jsonl").read_text().splitlines()
        grids = sorted(path.name for path in (tmp_path / "run/samples").iterdir())
        return [json.loads(line)["step"] for line in lines], grids

    assert train(config, StopAfter(10)) is None
    assert shown() == ([0, 5], ["0000000.png"])
    config = config.model_copy(update={"steps": 10})
    evaluations = train(config, threading.Event())
    assert shown() == ([0, 5, 10], ["0000000.png", "0000010.png"])
    last = json.loads((tmp_path / "run/validation.jsonl").read_text().splitlines()[-1])
    assert evaluations is not None
    assert last["datasets"]["a"]["loss"] == evaluations["a"].loss


def test_a_half_written_checkpoint_is_never_taken(mixture: str, tmp_path: Path) -> None:
    config = configuration(mixture, tmp_path / "run")
    state = drawn_state(config, step=3)
    checkpoints = checkpoints_of(config)
    checkpoints.save(state)
    checkpoints.close()
    # What a killed writer leaves: orbax's temporary folder for the next step.
    (checkpoints.folder / "5.orbax-checkpoint-tmp/params").mkdir(parents=True)
    resumed = checkpoints_of(config).resume(state._replace(step=0))
    assert resumed is not None
    assert_equal_states(resumed, state)


def test_only_the_newest_checkpoints_are_kept(mixture: str, tmp_path: Path) -> None:
    config = configuration(mixture, tmp_path / "run")
    checkpoints = checkpoints_of(config)
    for step in (1, 2, 3):
        checkpoints.save(drawn_state(config, step))
    checkpoints.close()
    assert sorted(path.name for path in checkpoints.folder.iterdir()) == ["2", "3"]
    step, stored, ema = load_averaged(config.output, make_mesh(1))
    assert (step, stored) == (3, config)
    jax.tree.map(np.testing.assert_array_equal, ema, drawn_state(config, 3).ema)


def test_an_output_that_is_a_file_is_a_clear_error(mixture: str, tmp_path: Path) -> None:
    (tmp_path / "run").write_text("taken")
    with pytest.raises(EvenmixError, match=r"cannot write to .*/run/checkpoints"):
        train(configuration(mixture, tmp_path / "run"), threading.Event())


def test_a_checkpoint_that_does_not_fit_on_the_disk_is_a_clear_error(
    mixture: str, tmp_path: Path
) -> None:
    """No file may exceed 4,000 bytes, which stops orbax's writers as a full disk would."""
    config = configuration(mixture, tmp_path / "run")
    before = checkpoints_of(config)
    before.save(drawn_state(config, step=1))
    before.close()
    code = (
        "import resource, signal; from tests.test_train_loop import *\n"
        f"config = TrainConfig.model_validate({config.model_dump()!r})\n"
        "checkpoints, state = checkpoints_of(config), drawn_state(config, step=2)\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4000, resource.RLIM_INFINITY))\n"
        "checkpoints.save(state)\n"
        "try:\n    wait_for(checkpoints.check)\n"
        "except EvenmixError as error:\n    print('told:', error)\n"
        "checkpoints = checkpoints_of(config)\n"
        "try:\n    checkpoints.save(state)\n    checkpoints.close()\n"
        "except EvenmixError as error:\n    print('told at the end:', error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    for told in ("told", "told at the end"):
        assert f"{told}: cannot write to {tmp_path}/run/checkpoints: " in done.stdout, done.stderr
    assert_equal_states(last_state(config), drawn_state(config, step=1))


def wait_for(condition: Callable[[], Any], timeout_s: float = 300) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


def test_a_signal_writes_a_checkpoint_and_the_same_command_goes_on(
    mixture: str, tmp_path: Path
) -> None:
    config = configuration(mixture, tmp_path / "run", steps=1_000_000, log_every_steps=2)
    path = write_config(config, tmp_path / "train.toml")

    def stopped_by(number: signal.Signals, from_step: int) -> int:
        process = evenmix("train", path, cwd=tmp_path)
        log = tmp_path / "run/loss.jsonl"
        wait_for(
            lambda: (
                process.poll() is not None
                or (log.exists() and logged_steps(config)[-1:] > [from_step])
            )
        )
        process.send_signal(number)
        printed, _ = process.communicate(timeout=300)
        assert process.returncode == 128 + number, printed
        stopped_at = last_state(config).step
        assert f"from step {from_step} of 1000000\n" in printed
        assert f"stopped after step {stopped_at}; the same command goes on from there" in printed
        return stopped_at

    first = stopped_by(signal.SIGTERM, from_step=0)
    assert first > 0
    assert stopped_by(signal.SIGINT, from_step=first) > first


def refused(config: str, *arguments: str, capsys: pytest.CaptureFixture[str]) -> str:
    """Return the one line that says why a run does not begin, before anything is compiled."""
    assert main(["train", config, *arguments]) == 1
    printed = capsys.readouterr()
    assert "compiled" not in printed.out
    (line,) = printed.err.splitlines()
    return line.removeprefix("error: ")


def test_what_does_not_fit_is_told_before_the_first_step(
    mixture: str,
    finished: TrainConfig,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def told(*arguments: str, **changes: Any) -> str:
        path = write_config(
            configuration(mixture, tmp_path / "run"), tmp_path / "a.toml", **changes
        )
        return refused(path, *arguments, capsys=capsys)

    run = finished.output
    assert told(resolution=4) == (
        f"{mixture}/mixture.json: its pictures have 8 px, the training configuration says 4 px; "
        "change `resolution` or mix again"
    )
    assert told(init=run, model={"hidden_size": 16, "depth": 5, "num_heads": 2}) == (
        f"{run} is of another model than the configured one: hidden_size is 32, not 16; "
        "depth is 3, not 5"
    )
    assert told(init=run) == (
        f"{run} has done 300 steps, from which this run counts on, but `steps` is 300; "
        "set it higher"
    )
    assert told("--output", run, seed=1, batch_size=8) == (
        f"{run}/checkpoints/300 was trained with other settings (batch_size was 16, is 8; "
        "seed was 0, is 1). Set them back, or choose another output for a new run."
    )
    assert not (tmp_path / "run/loss.jsonl").exists()


def test_pictures_without_captions_are_told_before_the_first_step(
    mixture: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = json.loads((Path(mixture) / "mixture.json").read_text())
    shutil.copytree(mixture, tmp_path / "mixture")
    config = configuration(str(tmp_path / "mixture"), tmp_path / "run")
    path = write_config(config, tmp_path / "a.toml")

    def told(caption_sets: dict[str, str]) -> str:
        manifest["datasets"][1]["caption_sets"] = caption_sets
        (tmp_path / "mixture/mixture.json").write_text(json.dumps(manifest))
        return refused(path, capsys=capsys)

    assert told({}) == (
        f"{tmp_path}/mixture/mixture.json: dataset b has no caption set; mix again with captions "
        "for it"
    )
    found = told({"qwen": "1"})
    assert found.startswith(f"{tmp_path}/mixture/b/train-00000.tar, the JSON of sample bb")
    assert "(ValueError: no caption of the mixture's caption sets) cannot be used, nor can" in found


def test_weights_that_are_missing_are_told_before_pictures_are_read(
    mixture: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(mixture, tmp_path / "mixture")
    (tmp_path / "mixture/a/validation-00000.parquet").write_text("damaged")
    config = configuration(str(tmp_path / "mixture"), tmp_path / "run")
    text = {"encoder": "t5gemma", "num_tokens": 2, "embed_dim": 32, "weights": "a/b"}
    path = write_config(config, tmp_path / "a.toml", text=text)
    assert refused(path, capsys=capsys) == (
        "a/b is no folder here; if it is a model on the Hugging Face Hub, set revision to a commit "
        "of it, all 40 digits, so that its weights never change"
    )
