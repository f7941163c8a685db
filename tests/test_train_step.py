"""One training step: on any mesh, in parts, in bfloat16, with a broken sample; and its memory."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh
from jax.typing import ArrayLike

from pipeline.errors import EvenmixError
from tests.eight_devices import on_eight_devices
from train import memory as memory_module
from train import step as step_module
from train.config import TrainConfig
from train.frozen import FrozenEncoders
from train.memory import StepMemory, check_memory
from train.model import Params, Velocity
from train.sharding import cut, make_mesh, shardings_of
from train.step import NO_STEP, Inputs, TrainingStep, Weights

SETTINGS: dict[str, Any] = {
    "mixture": "",
    "output": "run",
    "resolution": 8,
    "steps": 1,
    "batch_size": 16,
    "model": {"hidden_size": 16, "depth": 3, "num_heads": 2},
    "text": {"encoder": "bytes", "num_tokens": 6, "embed_dim": 8, "dropout": 0.3},
    "latent": {"encoder": "pixels", "downsampling": 2},
    # So its first moment is the gradients.
    "optimiser": {"b1": 0, "clip_norm": 1e9, "mu_dtype": "float32", "ema_decay": 0.5},
}
# Latents, captions and masks, beside which a step is given two whole numbers.
BATCH_BYTES = 16 * (4 * 4 * 4 * 12 + 4 * 6 * 8 + 6)
LossAndGradients = tuple[float, Params]


def step_on(mesh: Mesh, **changes: Any) -> TrainingStep:
    """Return a step of a tiny network; ``text`` changes are added to the others."""
    text = SETTINGS["text"] | changes.pop("text", {})
    config = TrainConfig.model_validate(SETTINGS | changes | {"text": text})
    return TrainingStep(config, FrozenEncoders(config.text_encoder(), config.latent_codec(), mesh))


def inputs(longest: Sequence[int]) -> Inputs:
    """Return a batch of noise; texts of rows i, i + 2, … have up to ``longest[i]`` tokens."""
    rng = np.random.default_rng(0)
    lengths = np.array([max(longest[i % 2] - i // 2, 0) for i in range(16)])
    return Inputs(
        rng.integers(0, 256, (16, 8, 8, 3), np.uint8),
        rng.normal(size=(16, 6, 8)).astype(np.float32),
        np.arange(6) < lengths[:, None],
    )


def placed(step: TrainingStep, weights: Weights) -> Weights:
    """Put weights that are numpy arrays where the step has its own."""
    return cut(weights, shardings_of(step.like))


def loss_and_gradients(step: TrainingStep, weights: Weights, batch: Inputs) -> LossAndGradients:
    """Return the loss of a step, and what Adam's first moment holds after it."""
    after, broken, metrics = step(placed(step, weights), step.not_broken(), 7, batch)
    assert int(broken) == NO_STEP
    gradients = jax.tree.map(np.asarray, optax.tree.get(after[2], "mu"))
    norm = np.sqrt(sum(np.sum(leaf**2) for leaf in jax.tree.leaves(gradients)))
    assert float(metrics["gradient_norm"]) == pytest.approx(norm, rel=1e-5)
    return float(metrics["loss"]), gradients


def assert_near(
    found: LossAndGradients, expected: LossAndGradients, tolerance: float, of_tensor: float
) -> None:
    """Compare losses, gradients as a whole, and those of each tensor; relative to their size."""
    assert found[0] == pytest.approx(expected[0], rel=tolerance)
    pairs = list(zip(jax.tree.leaves(found[1]), jax.tree.leaves(expected[1]), strict=True))
    errors, sizes = (
        np.array([np.linalg.norm(x) for x in of_each])
        for of_each in ([x - y for x, y in pairs], [y for _, y in pairs])
    )
    assert np.linalg.norm(errors) < tolerance * np.linalg.norm(sizes)
    assert np.all(errors < of_tensor * sizes)


def num_bytes(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


@pytest.fixture(scope="module")
def mesh() -> Iterator[Mesh]:
    mesh = make_mesh(1, jax.devices()[:1])
    with jax.set_mesh(mesh):
        yield mesh


@pytest.fixture(scope="module")
def step(mesh: Mesh) -> TrainingStep:
    step = step_on(mesh)
    step.compile()
    return step


@pytest.fixture(scope="module")
def weights(step: TrainingStep) -> Weights:
    whole: Weights = jax.tree.map(np.asarray, step.fresh())
    return whole


def test_parts_of_a_batch_and_shorter_texts_give_the_same_gradients(
    mesh: Mesh, step: TrainingStep, weights: Weights
) -> None:
    """Also where one part is computed with less text than the other."""
    other = step_on(mesh, accumulate=2, text={"trim_to": [3]})
    other.compile()
    for lengths in ([1, 6], [2, 3], [3, 3], [4, 4], [6, 6]):
        batch = inputs(lengths)
        expected = loss_and_gradients(step, weights, batch)
        assert_near(loss_and_gradients(other, weights, batch), expected, 1e-5, of_tensor=5e-5)


def test_bfloat16_is_near(mesh: Mesh, step: TrainingStep, weights: Weights) -> None:
    """Loss and gradients within 5 %, each tensor's within 15 %; all that is kept is float32."""
    other = step_on(mesh, precision="bfloat16")
    other.compile()
    assert jax.tree.map(lambda x: x.dtype, other.like) == jax.tree.map(lambda x: x.dtype, weights)
    batch = inputs([1, 6])
    found, expected = (loss_and_gradients(each, weights, batch) for each in (other, step))
    assert found[0] != expected[0]
    assert_near(found, expected, 0.05, of_tensor=0.15)


def test_no_more_text_is_computed_than_the_longest_asks_for(
    mesh: Mesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The network here is one whose velocity is the length that it is given."""

    def velocity_fn(*_: Any, text_length: int | None, **__: Any) -> Velocity:
        def velocity(params: Params, latents: ArrayLike, *_: ArrayLike) -> jax.Array:
            return jnp.full_like(latents, 1000.0 * (text_length or 6))

        return velocity

    monkeypatch.setattr(step_module, "velocity_fn", velocity_fn)
    step = step_on(mesh, text={"trim_to": [2, 4]})
    step.compile()
    now, found = step.fresh(), []
    for longest in range(7):
        now, _, metrics = step(now, step.not_broken(), 0, inputs([longest, longest // 2]))
        found.append(round(float(metrics["loss"]) ** 0.5 / 1000))
    assert found == [2, 2, 2, 4, 4, 6, 6]


def test_no_update_is_made_from_the_first_step_that_is_not_finite(
    step: TrainingStep, weights: Weights
) -> None:
    whole = inputs([1, 6])
    holed = replace(whole, tokens=np.where(np.arange(8) == 3, np.inf, whole.tokens))
    seen, found = [jax.tree.leaves(weights)], []
    broken, now = step.not_broken(), placed(step, weights)
    # Step 7 has a broken picture; the one after is whole again.
    for number, batch in ((6, whole), (7, holed), (8, whole)):
        now, broken, metrics = step(now, broken, number, batch)
        seen.append([np.array(leaf) for leaf in jax.tree.leaves(now)])
        found.append((int(broken), bool(jnp.isfinite(metrics["loss"]))))
    assert found == [(NO_STEP, True), (7, False), (7, True)]
    before, first, second, third = seen
    assert not any(map(np.array_equal, before[:3], first[:3]))
    assert all(map(np.array_equal, first, second))
    assert all(map(np.array_equal, first, third))


def test_the_memory_of_a_step_is_told_before_it(step: TrainingStep, weights: Weights) -> None:
    _, memory = step.compile()
    assert memory.state == num_bytes(weights) + BATCH_BYTES + 8
    # Gradients at least, of as many numbers as the weights.
    assert memory.work > num_bytes(weights[0])
    assert (memory.encoders, memory.available) == (0, None)
    assert memory.total == memory.state + memory.work


def test_a_step_that_needs_more_than_there_is_is_refused() -> None:
    memory = StepMemory(3 << 30, 1 << 29, 1 << 30, available=9 << 29)
    check_memory(memory)
    check_memory(replace(memory, available=None))
    told = (
        r"needs 4\.5 GiB of 4\.4 GiB a device \(state 3\.0 GiB, encoders 512 MiB, work 1\.0 GiB\)"
    )
    with pytest.raises(EvenmixError, match=f"{told}: set `rematerialise`"):
        check_memory(replace(memory, available=(9 << 29) - (100 << 20)))


def test_a_state_for_which_there_is_no_room_is_refused_before_it_is_made(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    mesh = make_mesh(1, jax.devices()[:1])
    with jax.set_mesh(mesh):
        state = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(step_on(mesh).like))
        monkeypatch.setattr(memory_module, "available_memory", lambda: state)
        step_on(mesh)
        monkeypatch.setattr(memory_module, "available_memory", lambda: state - 1)
        with pytest.raises(EvenmixError, match=r"needs .* for the state and the encoders alone"):
            step_on(mesh)


# So deep and wide that weights are most of what a step of it has in memory.
DEEP = {"hidden_size": 64, "depth": 29, "num_heads": 2}
MESHES: dict[int, dict[str, Any]] = {
    1: {},
    4: {"accumulate": 2, "text": {"trim_to": [3]}},
    8: {"rematerialise": "full"},
}


def compare_meshes() -> None:
    """Check steps on eight devices against one on one; print the bytes that each device needs."""
    batch = inputs([3, 6])
    mesh = make_mesh(1, jax.devices()[:1])
    with jax.set_mesh(mesh):
        step = step_on(mesh, model=DEEP)
        step.compile()
        weights = jax.tree.map(np.asarray, step.fresh())
        expected = loss_and_gradients(step, weights, batch)
    needed = {}
    for fsdp, changes in MESHES.items():
        mesh = make_mesh(fsdp)
        with jax.set_mesh(mesh):
            step = step_on(mesh, model=DEEP, **changes)
            _, memory = step.compile()
            assert_near(loss_and_gradients(step, weights, batch), expected, 1e-5, of_tensor=1e-4)
        needed[fsdp] = {"state": memory.state, "work": memory.work}
    print(json.dumps({"whole": num_bytes(weights), "params": num_bytes(weights[0]), **needed}))


def test_eight_devices_compute_what_one_does_and_gather_one_block_at_a_time() -> None:
    """Loss and gradients within 1e-5; of a deep network's weights most stay cut at any time."""
    found = json.loads(on_eight_devices(compare_meshes))
    batch = BATCH_BYTES // 8 + 8
    assert found["1"]["state"] == found["whole"] + batch
    # Scales and other small tensors are not cut.
    for fsdp in (4, 8):
        assert found["whole"] / fsdp < found[f"{fsdp}"]["state"] < 1.1 * found["whole"] / fsdp
    assert found["8"]["work"] < 0.6 * found["params"]
