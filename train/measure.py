"""What steps come to, measured while they go on: for the log of a run and for `evenmix bench`.

Of some steps, one after the other (what waits, pads and is replaced, and memory, of this process):

    loss, gradient_norm   means
    images_per_s          of all processes together
    mfu                   share of the devices' peak in bfloat16 that the arithmetic of
                          :mod:`train.flops` comes to, on devices whose peak is known
    data_wait_share       share of the time in which the device had nothing to do and the loop
                          waited for a batch; what is loaded while the device computes costs nothing
    padding_share         text tokens that are none
    replaced_samples      those that stood in for broken ones
    peak_memory_bytes     the most that a device has held so far, where devices tell
"""

import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise

import jax
import numpy as np

from train.flops import PEAK_FLOP_PER_S


@dataclass(frozen=True)
class Measured:
    """What some steps came to; see the module.

    ``step_s`` is for each step the time since the one before was done, for the first one since it
    was begun. ``flop_per_s`` is what a device did; None for a network that is not counted.
    """

    step_s: list[float]
    loss: float
    gradient_norm: float
    images_per_s: float
    data_wait_share: float
    padding_share: float
    replaced_samples: int
    flop_per_s: float | None
    peak_flop_per_s: float | None
    peak_memory_bytes: int | None

    @property
    def mfu(self) -> float | None:
        """Model FLOPs utilisation; see the module."""
        if self.flop_per_s is None or self.peak_flop_per_s is None:
            return None
        return self.flop_per_s / self.peak_flop_per_s


@dataclass(frozen=True)
class _Step:
    """A step; times are of time.monotonic, metrics still on the device."""

    metrics: Mapping[str, jax.Array]
    asked_s: float
    got_s: float
    finished_s: Future[float]
    num_replaced: int
    padding_share: float


class Meter:
    """Measures steps of ``batch_size`` pictures, of ``flop_per_picture`` (None: not counted)."""

    def __init__(self, batch_size: int, flop_per_picture: int | None):
        self._batch_size = batch_size
        self._flop_per_picture = flop_per_picture
        self._steps: list[_Step] = []
        # Waits for one step after the other, so that the loop need not.
        self._clock = ThreadPoolExecutor(1, thread_name_prefix="clock")

    def add(
        self,
        metrics: Mapping[str, jax.Array],
        mask: np.ndarray,
        num_replaced: int,
        *,
        asked_s: float,
        got_s: float,
    ) -> None:
        """Note a step that is under way, without waiting for it.

        Args:
            metrics: ``loss`` and ``gradient_norm``, on the device.
            mask: of the batch's text tokens, (B, T) bool.
            num_replaced: samples that stand in for broken ones.
            asked_s: when the loop began to wait for the batch, by time.monotonic.
            got_s: when it had the batch.
        """
        finished_s = self._clock.submit(_finish_time, metrics["loss"])
        padding_share = 1 - float(mask.mean())
        self._steps.append(_Step(metrics, asked_s, got_s, finished_s, num_replaced, padding_share))

    def read(self) -> Measured:
        """Wait for the steps since the last reading, at least one, and return what they came to."""
        steps, self._steps = self._steps, []
        metrics = jax.device_get([step.metrics for step in steps])
        done_s = [steps[0].asked_s, *(step.finished_s.result() for step in steps)]
        elapsed_s = done_s[-1] - done_s[0]
        images_per_s = len(steps) * self._batch_size / elapsed_s
        flop_per_s = None
        if self._flop_per_picture is not None:
            flop_per_s = images_per_s * self._flop_per_picture / jax.device_count()
        memory = [stats for device in jax.local_devices() if (stats := device.memory_stats())]
        return Measured(
            step_s=[after - before for before, after in pairwise(done_s)],
            loss=float(np.mean([of_step["loss"] for of_step in metrics])),
            gradient_norm=float(np.mean([of_step["gradient_norm"] for of_step in metrics])),
            images_per_s=images_per_s,
            data_wait_share=_waited_s(steps) / elapsed_s,
            padding_share=float(np.mean([step.padding_share for step in steps])),
            replaced_samples=sum(step.num_replaced for step in steps),
            flop_per_s=flop_per_s,
            peak_flop_per_s=PEAK_FLOP_PER_S.get(jax.devices()[0].device_kind),
            peak_memory_bytes=max((of["peak_bytes_in_use"] for of in memory), default=None),
        )

    def close(self) -> None:
        """Wait for the steps that nobody has read."""
        self._clock.shutdown()


def _finish_time(metric: jax.Array) -> float:
    metric.block_until_ready()
    return time.monotonic()


def _waited_s(steps: list[_Step]) -> float:
    """Return how long the loop waited for batches while the device was done with all it had."""
    waited_s, idle_from_s = 0.0, steps[0].asked_s
    for step in steps:
        waited_s += max(0.0, step.got_s - max(step.asked_s, idle_from_s))
        idle_from_s = step.finished_s.result()
    return waited_s
