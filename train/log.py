"""The log of a run: JSON lines to compute with, a picture of the loss to look at."""

import json
import time
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from train.config import TrainConfig
from train.output import writing_to


class LossLog:
    """``loss.jsonl`` and ``loss.png`` in the output folder.

    A run that resumes at ``from_step`` forgets the lines after it: those steps are done again.
    """

    def __init__(self, output: Path, from_step: int):
        self._output = output
        self._lines = output / "loss.jsonl"
        self._picture = output / "loss.png"
        kept = [line for line in self._read() if line["step"] <= from_step]
        with writing_to(output):
            self._lines.write_text("".join(json.dumps(line) + "\n" for line in kept))

    def write(
        self, step: int, window: list[dict[str, Any]], started: float, config: TrainConfig
    ) -> str:
        """Append the means over a window of steps; return it in words.

        Reading the metrics waits for the device, so the time since ``started`` (of time.monotonic)
        is taken after that.
        """
        means = {
            name: float(np.mean([float(metrics[name]) for metrics in window]))
            for name in ("loss", "gradient_norm")
        }
        elapsed_s = time.monotonic() - started
        line = {
            "step": step,
            **means,
            "replaced_samples": sum(metrics["replaced_samples"] for metrics in window),
            "samples_per_s": round(len(window) * config.batch_size / elapsed_s, 1),
        }
        with writing_to(self._output), self._lines.open("a") as file:
            file.write(json.dumps(line) + "\n")
        left_s = (config.steps - step) * elapsed_s / len(window)
        return (
            f"step {step}/{config.steps}  loss {line['loss']:.4f}  "
            f"{line['samples_per_s']:.0f} samples/s  {left_s:.0f} s left"
        )

    def draw(self) -> None:
        """Draw the loss so far."""
        lines = self._read()
        figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
        axes.plot([line["step"] for line in lines], [line["loss"] for line in lines])
        axes.set(xlabel="step", ylabel="loss (mean squared error of the velocity)", yscale="log")
        axes.grid(alpha=0.3, which="both")
        with writing_to(self._output):
            figure.savefig(self._picture, dpi=120)
        plt.close(figure)

    def _read(self) -> list[dict[str, Any]]:
        if not self._lines.exists():
            return []
        lines = self._lines.read_text().split("\n")
        # What follows the last newline is a line that a killed run did not finish.
        return [json.loads(line) for line in lines[:-1]]
