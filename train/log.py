"""The log of a run: JSON lines to compute with, TensorBoard to watch, a picture of the loss.

A line is what :mod:`train.measure` tells of the steps since the line before.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from PIL import Image
from tensorboardX import SummaryWriter

from train.config import TrainConfig
from train.evaluate import Evaluation, as_json
from train.measure import Measured, Meter
from train.output import writing_to


class RunLog:
    """What a run tells while it goes on, in its output folder.

    ``loss.jsonl``, ``validation.jsonl``, ``loss.png``, ``samples/`` and, for TensorBoard,
    ``tensorboard/``. Its ``meter`` is to be told of every step. A run that is ``resumed_at`` a step
    forgets what was after it, as those steps are done again; one that begins (None) forgets what
    another has left.
    """

    def __init__(self, config: TrainConfig, resumed_at: int | None, flop_per_picture: int | None):
        self._config = config
        self._output = Path(config.output)
        self._lines = self._output / "loss.jsonl"
        self._validation = self._output / "validation.jsonl"
        self.meter = Meter(config.batch_size, flop_per_picture)
        forgotten_from = 0 if resumed_at is None else resumed_at + 1
        with writing_to(self._output):
            for file in (self._lines, self._validation):
                kept = [line for line in _read(file) if line["step"] < forgotten_from]
                # In one step: a run that is killed here has all it had.
                part = file.with_name(f"{file.name}.part")
                part.write_text("".join(json.dumps(line) + "\n" for line in kept))
                part.replace(file)
            self._board = SummaryWriter(
                str(self._output / "tensorboard"),
                purge_step=forgotten_from,
                filename_suffix=f".{forgotten_from}",
            )

    def write(self, step: int) -> str:
        """Write a line about the steps since the last one, up to ``step``; return it in words."""
        measured = self.meter.read()
        line = {"step": step, **_rounded(measured)}
        self._append(self._lines, line)
        self._scalars(step, "train", {name: line[name] for name in line if name != "step"})
        left_s = (self._config.steps - step) * self._config.batch_size / measured.images_per_s
        return f"step {step}/{self._config.steps}  {_in_words(line)}  {left_s:.0f} s left"

    def write_evaluation(self, step: int, evaluations: dict[str, Evaluation]) -> str:
        """Write what the held-out pictures show after a step; return the losses in words.

        What a run that resumes at this step finds written is not written again.
        """
        if step not in {line["step"] for line in _read(self._validation)}:
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
        self.meter.close()
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


def _rounded(measured: Measured) -> dict[str, float]:
    """Return a line's numbers; those that this device does not tell are left out."""
    line = {
        "loss": measured.loss,
        "gradient_norm": measured.gradient_norm,
        "images_per_s": round(measured.images_per_s, 1),
        "data_wait_share": round(measured.data_wait_share, 4),
        "padding_share": round(measured.padding_share, 4),
        "replaced_samples": measured.replaced_samples,
    }
    if measured.mfu is not None:
        line["mfu"] = round(measured.mfu, 4)
    if measured.peak_memory_bytes is not None:
        line["peak_memory_bytes"] = measured.peak_memory_bytes
    return line


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
