"""The sides of the writer's benchmark, each on one core: `evenmix mix`, and its pictures alone.

    python -m tests.benchmarks.writer_sides bare RECIPE
    python -m tests.benchmarks.writer_sides whole|ranges RECIPE [--group-bytes N]

A line of JSON says what the work cost since the modules were there.
"""

import argparse
import json
import os
import resource
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from unittest.mock import patch

from mixing import gather, mix
from pipeline import images
from pipeline.beam_job import RunnerOptions
from pipeline.recipe import Recipe, load_recipe
from pipeline.stage import Stage, WorkItem
from pipeline.summary import Summary
from tests.benchmarks.measure import Cost
from tests.stages import run_here

_LIMITS = images.Limits(min_short_edge_px=1, max_pixels=1 << 24, max_bytes=1 << 24)


def bare(recipe: Recipe) -> None:
    """Decode, resize and encode the pictures of a mixture's dataset, and do nothing else."""
    mixture = recipe.mixture
    (dataset,) = recipe.mixture_datasets()
    for path in Path(recipe.datasets[dataset].source).glob("*.jpg"):
        pixels = images.decode(path.read_bytes(), _LIMITS)
        square, _ = images.resize_and_crop_square(pixels, mixture.resolution, mixture.resample)
        images.encode(square, mixture.image_format)


def whole(recipe: Recipe) -> None:
    """Cut a mixture as when many pictures are selected: tars are read whole."""
    _mix(recipe, share_read_whole=0.0)


def ranges(recipe: Recipe) -> None:
    """Cut a mixture as when few pictures are selected: the writer of a shard reads each one."""
    _mix(recipe, share_read_whole=1.1)


def _mix(recipe: Recipe, share_read_whole: float) -> None:
    with (
        patch.object(gather, "SHARE_READ_WHOLE", share_read_whole),
        patch.object(mix, "run_stage", _run_stage),
    ):
        mix.run_recipe(recipe, RunnerOptions(workers=1))


def _run_stage(stage: Stage, items: Sequence[WorkItem], _: RunnerOptions) -> Mapping[str, Summary]:
    """Run a stage here and without Beam, whose start would count more than so few pictures."""
    return run_here(stage, items)


SIDES: Mapping[str, Callable[[Recipe], None]] = {"bare": bare, "whole": whole, "ranges": ranges}


def main() -> None:
    """Run one side."""
    parser = argparse.ArgumentParser()
    parser.add_argument("side", choices=SIDES)
    parser.add_argument("recipe")
    parser.add_argument("--group-bytes", type=int, default=gather.GROUP_BYTES)
    options = parser.parse_args()
    recipe = load_recipe(options.recipe)
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    started, cpu_before = time.monotonic(), time.process_time()
    with patch.object(gather, "GROUP_BYTES", options.group_bytes):
        SIDES[options.side](recipe)
    wall_s, cpu_s = time.monotonic() - started, time.process_time() - cpu_before
    peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux says KiB
    print(json.dumps(asdict(Cost(wall_s, cpu_s, peak_bytes))))


if __name__ == "__main__":
    main()
