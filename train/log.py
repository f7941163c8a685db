"""The log of a run: JSON lines to compute with, TensorBoard to watch, a picture of the loss.

What is measured, over the steps since the line before:

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

import json
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from PIL import Image
from tensorboardX import SummaryWriter

from train.config import TrainConfig
from train.evaluate import Evaluation, as_json
from train.flops import PEAK_FLOP_PER_S
from train.output import writing_to


@dataclass(frozen=True)
class _Step:
    """A step since the last line; times are of time.monotonic, metrics still on the device."""

    metrics: Mapping[str, jax.Array]
    asked_s: float
    got_s: float
    finished_s: Future[float]
    num_replaced: int
    padding_share: float


class RunLog:
    """What a run tells while it goes on, in its output folder.

    ``loss.jsonl``, ``validation.jsonl``, ``loss.png``, ``samples/`` and, for TensorBoard,
    ``tensorboard/``. A run that resumes at ``from_step`` forgets what was after it: those steps are
    done again.
    """

    def __init__(self, config: TrainConfig, from_step: int, flop_per_picture: int | None):
        self._config = config
        self._output = Path(config.output)
        self._lines = self._output / "loss.jsonl"
        self._validation = self._output / "validation.jsonl"
        self._flop_per_picture = flop_per_picture
        self._steps: list[_Step] = []
        # Waits for one step after the other, so that the loop need not.
        self._clock = ThreadPoolExecutor(1, thread_name_prefix="clock")
        with writing_to(self._output):
            for file in (self._lines, self._validation):
                kept = [line for line in _read(file) if line["step"] <= from_step]
                file.write_text("".join(json.dumps(line) + "\n" for line in kept))
            self._board = SummaryWriter(
                str(self._output / "tensorboard"),
                purge_step=from_step + 1,
                filename_suffix=f".{from_step}",
            )

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

    def write(self, step: int) -> str:
        """Write a line about the steps since the last one, up to ``step``; return it in words."""
        steps, self._steps = self._steps, []
        metrics = jax.device_get([step.metrics for step in steps])
        elapsed_s = time.monotonic() - steps[0].asked_s
        images_per_s = len(steps) * self._config.batch_size / elapsed_s
        line = {
            "step": step,
            "loss": float(np.mean([of_step["loss"] for of_step in metrics])),
            "gradient_norm": float(np.mean([of_step["gradient_norm"] for of_step in metrics])),
            "images_per_s": round(images_per_s, 1),
            "data_wait_share": round(_waited_s(steps) / elapsed_s, 4),
            "padding_share": round(float(np.mean([step.padding_share for step in steps])), 4),
            "replaced_samples": sum(step.num_replaced for step in steps),
        }
        peak = PEAK_FLOP_PER_S.get(jax.devices()[0].device_kind)
        if peak is not None and self._flop_per_picture is not None:
            flop_per_s = images_per_s * self._flop_per_picture
            line["mfu"] = round(flop_per_s / (peak * jax.device_count()), 4)
        if memory := [stats for device in jax.local_devices() if (stats := device.memory_stats())]:
            line["peak_memory_bytes"] = max(stats["peak_bytes_in_use"] for stats in memory)
        self._append(self._lines, line)
        self._scalars(step, "train", {name: line[name] for name in line if name != "step"})
        left_s = (self._config.steps - step) * elapsed_s / len(steps)
        return f"step {step}/{self._config.steps}  {_in_words(line)}  {left_s:.0f} s left"

    def write_evaluation(self, step: int, evaluations: dict[str, Evaluation]) -> str:
        """Write what the held-out pictures show after a step; return the losses in words."""
        self._append(self._validation, {"step": step, "datasets": as_json(evaluations)})
        for name, evaluation in evaluations.items():
            values = {"loss": evaluation.loss, "caption_margin": evaluation.caption_margin}
            values |= {f"loss_at_{t}": loss for t, loss in evaluation.loss_at_time.items()}
            self._scalars(step, f"validation/{name}", values)
        losses = (f"{name} {evaluation.loss:.4f}" for name, evaluation in evaluations.items())
        return f"step {step}/{self._config.steps}  held out: {', '.join(losses)}"

    def write_samples(self, step: int, grid: Image.Image) -> None:
        """Write a picture of what the model draws after a step: ``samples/STEP.png``."""
        with writing_to(self._output / "samples"):
            grid.save(self._output / f"samples/{step:07d}.png")
            self._board.add_image("samples", np.asarray(grid), step, dataformats="HWC")
            self._board.flush()

    def draw(self) -> None:
        """Draw the loss so far."""
        lines = _read(self._lines)
        figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
        axes.plot([line["step"] for line in lines], [line["loss"] for line in lines])
        axes.set(xlabel="step", ylabel="loss (mean squared error of the velocity)", yscale="log")
        axes.grid(alpha=0.3, which="both")
        with writing_to(self._output):
            figure.savefig(self._output / "loss.png", dpi=120)
        plt.close(figure)

    def close(self) -> None:
        """Finish TensorBoard's file."""
        self._clock.shutdown()
        self._board.close()

    def _append(self, file: Path, line: dict[str, Any]) -> None:
        with writing_to(self._output), file.open("a") as lines:
            lines.write(json.dumps(line) + "\n")

    def _scalars(self, step: int, group: str, values: Mapping[str, float]) -> None:
        with writing_to(self._output):
            for name, value in values.items():
                self._board.add_scalar(f"{group}/{name}", value, step)
            self._board.flush()


def _read(file: Path) -> list[dict[str, Any]]:
    if not file.exists():
        return []
    lines = file.read_text().split("\n")
    # What follows the last newline is a line that a killed run did not finish.
    return [json.loads(line) for line in lines[:-1]]


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


def _in_words(line: Mapping[str, float]) -> str:
    words = [
        f"loss {line['loss']:.4f}",
        f"gradient {line['gradient_norm']:.3f}",
        f"{line['images_per_s']:.0f} images/s",
        f"waiting {line['data_wait_share']:.1%}",
        f"padding {line['padding_share']:.0%}",
    ]
    if "mfu" in line:
        words.append(f"MFU {line['mfu']:.1%}")
    if "peak_memory_bytes" in line:
        words.append(f"{line['peak_memory_bytes'] / 2**30:.1f} GiB")
    if line["replaced_samples"]:
        words.append(f"{line['replaced_samples']} replaced")
    return "  ".join(words)
