"""Devices and processes: how a state is cut, read on another mesh, and survives a process's end.

That they do not change what is learned, tests.test_train_step shows. A process cannot change how
many devices it sees, so what needs several runs in processes of its own.
"""

import json
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from pipeline.errors import EvenmixError
from tests.eight_devices import REPOSITORY, on_eight_devices, simulated_devices
from tests.mixtures import write_mixture
from tests.test_train_loop import (
    assert_equal_states,
    coloured_members,
    configuration,
    wait_for,
    write_config,
)
from tests.train_states import drawn, model_of, state_shapes
from train.checkpoint import Checkpoints, TrainState, newest_checkpoint
from train.config import TrainConfig
from train.sharding import check_batch, cut, make_mesh, partition, place_state, shardings_of


def test_a_tensor_is_cut_along_its_largest_dimension_that_divides() -> None:
    # 2016 = 32 * 63, the width of i1-3B.
    assert partition((2016, 10752), 64) == PartitionSpec(None, "fsdp")
    assert partition((2016, 10750), 32) == PartitionSpec("fsdp")
    assert partition((14, 2016, 10752), 64) == PartitionSpec(None, None, "fsdp")
    assert partition((16, 16), 8) == PartitionSpec(None, "fsdp")
    assert partition((2016,), 64) == PartitionSpec()
    assert partition((), 8) == PartitionSpec()
    assert partition((16, 16), 1) == PartitionSpec()


def test_what_does_not_divide_is_a_clear_error() -> None:
    with pytest.raises(EvenmixError, match=r"mesh\.fsdp is 3, which does not divide the 1 devices"):
        make_mesh(3)
    with pytest.raises(EvenmixError, match=r"batch of 10 .* among 1 devices and 4 parts"):
        check_batch(make_mesh(1), 10, 4)


def save_on_one_mesh_restore_on_another() -> None:
    """Print the step of a state that was written in two parts and is read in eight."""
    shapes = state_shapes(configuration("", Path()))
    in_two, in_eight = (place_state(make_mesh(fsdp), shapes) for fsdp in (2, 8))
    written = TrainState(5, *drawn(shapes, seed=0))
    with tempfile.TemporaryDirectory() as folder:
        config = configuration("", Path(folder))
        with closing(Checkpoints(folder, config, model_of(config), "hash")) as checkpoints:
            checkpoints.save(TrainState(5, *cut(written[1:], shardings_of(in_two))))
        with closing(Checkpoints(folder, config, model_of(config), "hash")) as checkpoints:
            found = checkpoints.resume(TrainState(0, *in_eight))
    assert found is not None
    assert_equal_states(found, written)
    kernel = found.ema["in_blocks"]["mlp_image"]["w12"]["kernel"]
    assert kernel.addressable_shards[0].data.size * 8 == kernel.size
    print(found.step)


def test_a_checkpoint_is_restored_on_another_mesh() -> None:
    assert on_eight_devices(save_on_one_mesh_restore_on_another) == "5\n"


@contextmanager
def started(path: str, *arguments: tuple[object, ...]) -> Iterator[list[subprocess.Popen[str]]]:
    """Start the processes of a run, as on several machines, with two devices each; end them."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        coordinator = f"localhost:{free.getsockname()[1]}"
    command = [sys.executable, "-m", "pipeline.cli", "train", path, "--coordinator", coordinator]
    processes = [
        subprocess.Popen(
            [*command, f"--num-processes={len(arguments)}", f"--process-id={number}"]
            + [str(argument) for argument in of_process],
            cwd=REPOSITORY,
            env=simulated_devices(2),
            stderr=subprocess.PIPE,
            text=True,
        )
        for number, of_process in enumerate(arguments)
    ]
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def run_to_end(path: str, *arguments: tuple[object, ...]) -> list[tuple[int, str]]:
    """Return the exit status of each process of a run, and what it wrote about errors."""
    with started(path, *arguments) as processes:
        ends = []
        for process in processes:
            _, errors = process.communicate(timeout=600)
            ends.append((process.returncode, errors))
        return ends


def last_state(output: Path, config: TrainConfig) -> TrainState:
    """Return what two processes have written on a mesh of four devices, read on one device."""
    with newest_checkpoint(str(output)) as checkpoint:
        like = place_state(make_mesh(1), state_shapes(config))
        state = checkpoint.restore(TrainState(0, *like))
        averaged = checkpoint.weights(state_shapes(config)[1])
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(averaged))
    jax.tree.map(np.testing.assert_array_equal, averaged, state.ema)
    return state


def test_two_processes_of_which_one_is_killed_go_on_to_the_same_bits(tmp_path: Path) -> None:
    (tmp_path / "mixture").mkdir()
    mixture = write_mixture(
        tmp_path / "mixture",
        {"a": coloured_members("a", 100), "b": coloured_members("bb", 50)},
        validation={"a": coloured_members("held", 8)},
    )
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    config = configuration(
        mixture,
        straight,
        steps=12,
        log_every_steps=2,
        checkpoint_every_steps=4,
        keep_every_steps=4,
        evaluation_samples=16,
        validate_every_steps=4,
        mesh={"fsdp": 2},
        samples={"every_steps": 4, "prompts": ["plain red", "striped blue"], "steps": 2},
    )
    path = write_config(config, tmp_path / "train.toml")
    in_twelve_steps = ("--output", straight, "--steps", 12)
    assert [status for status, _ in run_to_end(path, in_twelve_steps, in_twelve_steps)] == [0, 0]
    report = json.loads((straight / "evaluation.json").read_text())
    assert report["datasets"]["a"]["num_samples"] == 8

    without_end = ("--output", killed, "--steps", 1_000_000)
    with started(path, without_end, without_end) as (first, second):
        wait_for(
            lambda: first.poll() is not None or (killed / "checkpoints/8").exists(), timeout_s=600
        )
        second.kill()
        assert second.wait(timeout=10) == -signal.SIGKILL
        # It cannot go on alone; JAX would end it too, but only after 100 s.
        first.kill()
        assert first.wait(timeout=10) == -signal.SIGKILL
    for later in (killed / "checkpoints").iterdir():
        if later.name not in {"4", "8"}:
            shutil.rmtree(later)
    to_the_same = ("--output", killed, "--steps", 12)
    assert [status for status, _ in run_to_end(path, to_the_same, to_the_same)] == [0, 0]

    found = last_state(killed, config)
    assert found.step == 12
    assert_equal_states(found, last_state(straight, config))
    validated = (straight / "validation.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in validated] == [0, 4, 8, 12]
    for name in ("validation.jsonl", "evaluation.json", "samples/0000004.png"):
        assert (killed / name).read_bytes() == (straight / name).read_bytes(), name
    for output in (straight, killed):
        lines = [json.loads(line) for line in (output / "loss.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines] == [2, 4, 6, 8, 10, 12]


def test_processes_that_do_not_belong_together_are_told_so(tmp_path: Path) -> None:
    mixture = write_mixture(tmp_path, {"a": coloured_members("a", 40)})
    path = write_config(configuration(mixture, tmp_path / "run"), tmp_path / "train.toml")
    ends = run_to_end(path, (), ("--steps", 299))
    differ = "error: the processes of the run do not have the same configuration; give each"
    assert [(status, differ in errors) for status, errors in ends] == [(1, True)] * 2, ends

    ends = run_to_end(path, (), ("--output", tmp_path / "elsewhere"))
    assert [status for status, _ in ends] == [1, 1]
    for (_, errors), folder in zip(ends, ("run", "elsewhere"), strict=True):
        assert f"do not share the folder {tmp_path / folder}, into which" in errors
        assert not list((tmp_path / folder).glob(".shared-*"))
