"""A trace of a few steps, to be looked at with XProf or in TensorBoard's profile tab."""

from pathlib import Path

import jax

from pipeline.errors import EvenmixError
from train.config import TrainConfig

# The first steps of a process are slower: memory is asked for, batches are not ahead yet.
WARM_UP_STEPS = 3


class Profiler:
    """Traces ``steps`` steps into ``profile/`` of the run's folder, not the first ones.

    A process traces its own devices, and writes a file of its own.

    Raises:
        EvenmixError: the run ends before those steps.
    """

    def __init__(self, config: TrainConfig, from_step: int, steps: int):
        self._folder = Path(config.output) / "profile"
        self._first = from_step + WARM_UP_STEPS
        if steps and self._first >= config.steps:
            raise EvenmixError(
                f"--profile traces steps after step {self._first}, but the run ends at step "
                f"{config.steps}; set --steps higher"
            )
        self._end = self._first + steps
        self._tracing = False

    def before(self, step: int) -> None:
        """Begin, if this is the first step that is traced."""
        if step == self._first < self._end:
            jax.profiler.start_trace(self._folder)
            self._tracing = True

    def after(self, step: int, result: jax.Array) -> None:
        """Wait for the step's result, if it is the last one that is traced, and write the trace."""
        if self._tracing and step == self._end:
            result.block_until_ready()
            self.close()

    def close(self) -> None:
        """Write what is traced so far."""
        if self._tracing:
            self._tracing = False
            jax.profiler.stop_trace()
