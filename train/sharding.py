"""How a run is spread over devices and processes: the batch over all of them, the state over some.

The devices are a mesh of two axes, ``data`` and ``fsdp``. Every device has its own rows of the
batch. A tensor of the state (weights, their average, the optimiser's moments) is cut along the
``fsdp`` axis and equal along ``data``; where it is used, XLA gathers it. Nothing that is drawn
depends on the mesh, so two meshes differ in no more than the order of sums, and in bfloat16 where
these are rounded.

With several processes the rows of process p are the p-th part of the batch.
"""

import threading
from collections.abc import Sequence
from typing import TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from pipeline.errors import EvenmixError

Tree = TypeVar("Tree")

# Seconds at scale; who is told to stop has often half a minute.
ASK_EVERY_STEPS = 5


def start_processes(coordinator: str, num_processes: int | None, process_id: int | None) -> None:
    """Join the other processes of the run, before anything else is asked of JAX.

    ``coordinator`` is the HOST:PORT at which process 0 is reached, or ``auto``: then Slurm, Open
    MPI, Kubernetes or Cloud TPU tells JAX all three. When a process dies, JAX ends the others
    within 100 seconds (one that ends with an error waits for them for five minutes first); all are
    to be started again.

    Raises:
        EvenmixError: the processes do not find one another, or their numbers are wrong.
    """
    try:
        if coordinator == "auto":
            jax.distributed.initialize()
        else:
            # If JAX saw that Slurm or Open MPI is there too, it would give each process one device.
            jax.distributed.initialize(
                coordinator, num_processes, process_id, cluster_detection_method="deactivate"
            )
    except (RuntimeError, ValueError) as error:
        raise EvenmixError(
            f"the processes of the run do not come together: {error}; give each process the same "
            "--coordinator and --num-processes, and its own --process-id"
        ) from error


def make_mesh(fsdp: int, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Return the mesh of all devices of all processes (or of ``devices``).

    ``fsdp`` neighbours share one state.

    Raises:
        EvenmixError: ``fsdp`` does not divide the number of devices.
    """
    # Those of a process are neighbours, so that its rows of the batch are too.
    devices = sorted(devices or jax.devices(), key=lambda device: (device.process_index, device.id))
    if len(devices) % fsdp:
        raise EvenmixError(
            f"mesh.fsdp is {fsdp}, which does not divide the {len(devices)} devices; change it"
        )
    grid = np.array(devices).reshape(-1, fsdp)
    return Mesh(grid, ("data", "fsdp"), axis_types=(AxisType.Auto, AxisType.Auto))


def check_batch(mesh: Mesh, batch_size: int, accumulate: int) -> None:
    """Check that each device gets as many rows of the batch, in each of its ``accumulate`` parts.

    Raises:
        EvenmixError: it does not divide.
    """
    if batch_size % (mesh.size * accumulate):
        parts = f" and {accumulate} parts" if accumulate > 1 else ""
        raise EvenmixError(
            f"a batch of {batch_size} samples cannot be divided evenly among {mesh.size} devices"
            f"{parts}; change `batch_size`"
        )


def partition(shape: tuple[int, ...], fsdp: int) -> PartitionSpec:
    """Return how a tensor is cut in ``fsdp`` parts: along its largest dimension that divides.

    Of equal ones it is the last; a tensor without one stays whole.
    """
    dividing = [(size, axis) for axis, size in enumerate(shape) if size and size % fsdp == 0]
    if fsdp == 1 or not dividing:
        return PartitionSpec()
    _, axis = max(dividing)
    return PartitionSpec(*[None] * axis, "fsdp")


def place_state(mesh: Mesh, state: Tree) -> Tree:
    """Return the shapes of a state (arrays, or shapes), each with the sharding it is to have."""

    def place(x: jax.Array | jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        sharding = NamedSharding(mesh, partition(x.shape, mesh.shape["fsdp"]))
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    placed: Tree = jax.tree.map(place, state)
    return placed


def shardings_of(placed: Tree) -> Tree:
    """Return the shardings of what :func:`place_state` has placed."""
    shardings: Tree = jax.tree.map(lambda x: x.sharding, placed)
    return shardings


def cut(tensors: Tree, shardings: Tree) -> Tree:
    """Put tensors that each process has whole, numpy arrays, where they are to be."""

    def place(x: np.ndarray, sharding: NamedSharding) -> jax.Array:
        return jax.make_array_from_callback(x.shape, sharding, lambda where: x[where])

    placed: Tree = jax.tree.map(place, tensors, shardings)
    return placed


def keep_rows(x: jax.Array) -> jax.Array:
    """Say to XLA that each sample of ``x`` (B, …) stays where it is; without a mesh it does anyway.

    Otherwise it might cut activations like the weights that they are multiplied by, instead of
    gathering the weights.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or x.shape[0] % mesh.size:
        return x
    kept: jax.Array = jax.lax.with_sharding_constraint(x, PartitionSpec(("data", "fsdp")))
    return kept


def share_rows(mesh: Mesh, *rows: np.ndarray) -> list[jax.Array]:
    """Put the arrays of a batch together, of which each process gives its own rows.

    Each device has its own rows of them.
    """
    by_rows = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
    return [jax.make_array_from_process_local_data(by_rows, of_process) for of_process in rows]


def split_rows(mesh: Mesh, rows: Tree, parts: int) -> Tree:
    """Cut arrays of a batch, each (B, …), into parts: (parts, B / parts, …).

    Part i has the rows i, i + parts, …, so that each device has its share of every part and no row
    moves to another. The number of devices times ``parts`` divides B.
    """
    by_rows = NamedSharding(mesh, PartitionSpec(None, ("data", "fsdp")))

    def split(x: jax.Array) -> jax.Array:
        part_of_each_device = x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1)
        placed: jax.Array = jax.lax.with_sharding_constraint(part_of_each_device, by_rows)
        return placed

    in_parts: Tree = jax.tree.map(split, rows)
    return in_parts


def join_rows(mesh: Mesh, parts: Tree) -> Tree:
    """Undo :func:`split_rows`."""
    by_rows = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))

    def join(x: jax.Array) -> jax.Array:
        joined = x.swapaxes(0, 1).reshape(-1, *x.shape[2:])
        placed: jax.Array = jax.lax.with_sharding_constraint(joined, by_rows)
        return placed

    whole: Tree = jax.tree.map(join, parts)
    return whole


def stop_asked(stop: threading.Event, step: int) -> bool:
    """Return whether to stop after this step: the same answer in all processes.

    A signal reaches each process at another step, or only one of them, so several ask one another.
    As they wait for the devices then, they do so only every ASK_EVERY_STEPS steps.
    """
    if jax.process_count() == 1:
        return stop.is_set()
    if step % ASK_EVERY_STEPS:
        return False
    return bool(multihost_utils.process_allgather(np.array(stop.is_set())).any())
