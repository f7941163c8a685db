"""Devices, processes, parts of a batch and precision: none changes what is learned.

A process cannot change how many devices it sees, so what needs eight runs in processes of its own.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec

from pipeline.errors import EvenmixError
from tests.mixtures import write_mixture
from tests.test_train_loop import (
    coloured_members,
    configuration,
    final_state,
    fresh_state,
    wait_for,
    write_config,
)
from train.checkpoint import Checkpoints, TrainState
from train.config import TrainConfig
from train.loop import NO_STEP, make_step
from train.model import Params, init_params, velocity_fn
from train.precision import at_precision
from train.sharding import (
    check_batch,
    cut,
    make_mesh,
    partition,
    place_state,
    shardings_of,
    share_rows,
)

REPOSITORY = Path(__file__).parent.parent


def test_a_tensor_is_cut_along_its_largest_dimension_that_divides() -> None:
    # 2016 = 32 * 63, the width of i1-3B.
    assert partition((2016, 10752), 64) == PartitionSpec(None, "fsdp")
    assert partition((2016, 10750), 32) == PartitionSpec("fsdp")
    assert partition((16, 16), 8) == PartitionSpec(None, "fsdp")
    assert partition((2016,), 64) == PartitionSpec()
    assert partition((), 8) == PartitionSpec()
    assert partition((16, 16), 1) == PartitionSpec()


def test_what_does_not_divide_is_a_clear_error() -> None:
    with pytest.raises(EvenmixError, match=r"mesh\.fsdp is 3, which does not divide the 1 devices"):
        make_mesh(3)
    with pytest.raises(EvenmixError, match=r"batch of 10 .* among 1 devices and 4 parts"):
        check_batch(make_mesh(1), 10, 4)


def step_of(config: TrainConfig, fsdp: int | None) -> tuple[float, Params]:
    """Return the loss and the gradients of a step on a mesh of all devices, or on one device."""
    model_config = config.model_config_for(config.latent_codec())
    params = init_params(model_config, seed=0)
    # Its state is the gradients.
    optimiser = optax.trace(decay=0.0)
    weights = (params, params, optimiser.init(params))
    mesh = make_mesh(fsdp) if fsdp else make_mesh(1, jax.devices()[:1])
    shardings = shardings_of(place_state(mesh, weights))
    step = make_step(
        config, at_precision(velocity_fn(model_config), config.precision), optimiser, shardings
    )
    rng = np.random.default_rng(0)
    rows = (
        rng.normal(size=(config.batch_size, 4, 4, 12)).astype(np.float32),
        rng.normal(size=(config.batch_size, 2, 32)).astype(np.float32),
        np.arange(2) < rng.integers(1, 3, (config.batch_size, 1)),
    )
    placed = cut(jax.tree.map(np.asarray, weights), shardings)
    broken = np.int32(NO_STEP)
    (_, _, state), _, metrics = step(placed, broken, 7, *share_rows(mesh, *rows))
    return float(metrics["loss"]), jax.tree.map(np.asarray, state.trace)


def distance(one: Params, other: Params) -> float:
    """Return the largest difference of a tensor, relative to the tensor."""
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    # A tensor that the loss does not depend on has gradients of zero.
    return max(float(np.linalg.norm(x - y)) / (float(np.linalg.norm(x)) or 1.0) for x, y in pairs)


def compare_steps(folder: Path) -> None:
    """Print how far a step on one device is from others, in loss and in gradients."""
    config = configuration("unused", folder)
    loss, gradients = step_of(config, None)
    changed = config.model_copy(update={"accumulate": 2})
    runs = {
        "fsdp 2": step_of(config, 2),
        "fsdp 8": step_of(config, 8),
        "accumulate": step_of(changed, 2),
        "bfloat16": step_of(config.model_copy(update={"precision": "bfloat16"}), None),
    }
    found = {
        name: (abs(run[0] - loss) / loss, distance(gradients, run[1])) for name, run in runs.items()
    }
    print(json.dumps(found))


def test_a_step_is_the_same_on_all_meshes_in_parts_and_nearly_in_bfloat16(tmp_path: Path) -> None:
    """Float32 within 1e-5; bfloat16 within 1 % of the loss and 10 % of each tensor's gradient."""
    found = json.loads(on_eight_devices("compare_steps", tmp_path))
    of_loss, of_gradients = found.pop("bfloat16")
    assert 0 < of_loss < 0.01
    assert 0 < of_gradients < 0.1
    assert set(found) == {"fsdp 2", "fsdp 8", "accumulate"}
    for name, (of_loss, of_gradients) in found.items():
        assert of_loss < 1e-5, name
        assert of_gradients < 1e-5, name


def on_eight_devices(function: str, folder: Path) -> str:
    """Call a function of this file in a process with eight devices; return what it prints."""
    code = f"import sys; from {__name__} import *; {function}(Path(sys.argv[1]))"
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder)],
        cwd=REPOSITORY,
        env=environment(folder, num_devices=8),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def save_on_one_mesh_restore_on_another(folder: Path) -> None:
    """Print the step of a state that was written in two parts and is read in eight."""
    config = configuration("unused", folder)
    state = fresh_state(config)
    weights = (state.params, state.ema, state.opt_state)
    placed = [place_state(make_mesh(fsdp), weights) for fsdp in (2, 8)]
    checkpoints = Checkpoints(config.output, config, "hash")
    values = jax.tree.map(np.asarray, weights)
    checkpoints.save(TrainState(5, *cut(values, shardings_of(placed[0]))))
    checkpoints.close()
    found = Checkpoints(config.output, config, "hash").resume(TrainState(0, *placed[1]))
    assert found is not None
    for one, other in zip(jax.tree.leaves(values), jax.tree.leaves(found[1:]), strict=True):
        np.testing.assert_array_equal(one, np.asarray(other))
    kernel = found.ema["mid_block"]["mlp_image"]["w12"]["kernel"]
    assert kernel.addressable_shards[0].data.size * 8 == kernel.size
    print(found.step)


def test_a_checkpoint_is_restored_on_another_mesh(tmp_path: Path) -> None:
    assert on_eight_devices("save_on_one_mesh_restore_on_another", tmp_path) == "5\n"


def environment(cache: Path, num_devices: int) -> dict[str, str]:
    """Simulated devices, and compiled programs that the processes of a test share."""
    return os.environ | {
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={num_devices} "
        "--xla_backend_optimization_level=0",
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(cache / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }


def start(path: Path, output: Path, cache: Path, *, steps: int) -> list[subprocess.Popen[bytes]]:
    """Start the two processes of a run, as on two machines, with two devices each."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        coordinator = f"localhost:{free.getsockname()[1]}"
    command = [sys.executable, "-m", "pipeline.cli", "train", str(path), "--output", str(output)]
    command += ["--steps", str(steps), "--coordinator", coordinator, "--num-processes", "2"]
    return [
        subprocess.Popen(
            [*command, "--process-id", str(number)],
            cwd=REPOSITORY,
            env=environment(cache, num_devices=2),
        )
        for number in range(2)
    ]


def test_two_processes_of_which_one_is_killed_go_on_to_the_same_bits(tmp_path: Path) -> None:
    (tmp_path / "mixture").mkdir()
    mixture = write_mixture(
        tmp_path / "mixture",
        {"a": coloured_members("a", 100), "b": coloured_members("bb", 50)},
        validation={"a": coloured_members("held", 8)},
    )
    config = configuration(
        mixture,
        tmp_path / "straight",
        steps=12,
        checkpoint_every_steps=4,
        keep_every_steps=4,
        evaluation_samples=16,
        mesh={"fsdp": 2},
    )
    path = write_config(config, tmp_path / "train.toml")
    straight = start(path, tmp_path / "straight", tmp_path, steps=12)
    assert [run.wait(timeout=200) for run in straight] == [0, 0]
    report = json.loads((tmp_path / "straight/evaluation.json").read_text())
    assert report["datasets"]["a"]["num_samples"] == 8

    killed = tmp_path / "killed"
    first, second = start(path, killed, tmp_path, steps=1_000_000)
    wait_for((killed / "checkpoints/8").exists, timeout_s=100)
    second.kill()
    assert second.wait(timeout=10) == -signal.SIGKILL
    # It cannot go on alone; JAX would end it too, but only after 100 s.
    first.kill()
    assert first.wait(timeout=10) == -signal.SIGKILL
    for later in (killed / "checkpoints").iterdir():
        if later.name not in {"4", "8"}:
            shutil.rmtree(later)
    resumed = start(path, killed, tmp_path, steps=12)
    assert [run.wait(timeout=200) for run in resumed] == [0, 0]

    # Written by two processes on a mesh of four devices, read by one process on one.
    expected = final_state(config)
    found = final_state(config.model_copy(update={"output": str(killed)}))
    assert expected.step == found.step == 12
    for one, other in zip(
        jax.tree.leaves(expected._asdict()), jax.tree.leaves(found._asdict()), strict=True
    ):
        np.testing.assert_array_equal(np.asarray(one), np.asarray(other))
    lines = [json.loads(line) for line in (killed / "loss.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4, 6, 8, 10, 12]
