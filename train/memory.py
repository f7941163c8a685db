"""How much memory a step needs on each device, known before the first one.

Of the state it is known before anything is computed, of the step itself when XLA has planned it.
"""

import math
from dataclasses import dataclass
from typing import Any

import jax

from pipeline.errors import EvenmixError
from train.frozen import FrozenEncoders


@dataclass(frozen=True)
class StepMemory:
    """Bytes on the device that has most.

    ``state`` is what the step is given (weights, average, optimiser, and its batch), ``encoders``
    the weights of the frozen ones, ``work`` what it needs besides while it runs. The encoders' own
    work, which is done before it, is not counted. ``available`` is what a device has,
    None where it does not tell.
    """

    state: int
    encoders: int
    work: int
    available: int | None

    @property
    def total(self) -> int:
        """All of it."""
        return self.state + self.encoders + self.work

    def __str__(self) -> str:
        parts = ", ".join(
            f"{name} {_size(getattr(self, name))}" for name in ("state", "encoders", "work")
        )
        of = "" if self.available is None else f" of {_size(self.available)}"
        return f"{_size(self.total)}{of} a device ({parts})"


def step_memory(compiled: Any, encoders: FrozenEncoders) -> StepMemory:
    """Return what a compiled step needs beside its encoders.

    Raises:
        EvenmixError: that is more than there is.
    """
    planned = compiled.memory_analysis()
    # New weights are written over the old ones: those are the aliases.
    work = planned.temp_size_in_bytes + planned.output_size_in_bytes - planned.alias_size_in_bytes
    memory = StepMemory(
        planned.argument_size_in_bytes, encoders.bytes_per_device, work, available_memory()
    )
    check_memory(memory)
    return memory


def check_state(placed: Any, encoders: FrozenEncoders) -> None:
    """Check that a device has room for the state, given as placed shapes, and its encoders.

    Raises:
        EvenmixError: it has less, whatever a step needs besides.
    """
    state = sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
        for x in jax.tree.leaves(placed)
    )
    check_memory(StepMemory(state, encoders.bytes_per_device, 0, available_memory()))


def available_memory() -> int | None:
    """Return the bytes that JAX may take of a device, None where it does not tell."""
    limit: int | None = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
    return limit


def check_memory(memory: StepMemory) -> None:
    """Check that a device has what a step needs, where it tells.

    Raises:
        EvenmixError: it has less; the message has what helps.
    """
    if memory.available is None or memory.total <= memory.available:
        return
    kept = memory.state + memory.encoders
    if kept > memory.available:
        room = f"{_size(kept)} of {_size(memory.available)}"
        needs = f"{room} a device for the state and the encoders alone"
        remedies = "set `mesh.fsdp` to more devices"
    else:
        needs = str(memory)
        remedies = (
            'set `rematerialise` to "full", `accumulate` to more parts, `mesh.fsdp` to more '
            "devices, or lower `batch_size`"
        )
    raise EvenmixError(
        f"a step needs {needs}: {remedies}; on a GPU, JAX takes three quarters of the memory "
        "unless XLA_PYTHON_CLIENT_MEM_FRACTION says more, such as 0.95"
    )


def _size(number: int) -> str:
    return f"{number / 2**30:.1f} GiB" if number >= 2**30 else f"{number / 2**20:.0f} MiB"
