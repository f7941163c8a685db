"""How long the work items of a build take, one by one: the spread that the simulation draws from.

    python -m tests.benchmarks.item_times RECIPE

builds a recipe in this process, without Beam, and prints for each stage the quantiles of an item's
time as a multiple of the mean of its dataset.
"""

import argparse
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any
from unittest.mock import patch

import numpy as np

from pipeline import beam_job, build
from pipeline.beam_job import RunnerOptions
from pipeline.publishing import publish_item
from pipeline.stage import Stage, read_work_list

QUANTILES = (0, 0.05, 0.25, 0.5, 0.75, 0.95, 1)
_FEWEST_ITEMS = 20  # of a dataset whose times are taken into account

Seconds = dict[tuple[str, str], list[float]]
"""The times of items, by stage and dataset."""


def measure(recipe_path: str) -> Seconds:
    """Build a recipe and return how long its items took."""
    seconds: Seconds = defaultdict(list)

    def run_here(
        stage: Stage,
        work_list_urls: Sequence[str],
        options: RunnerOptions,
        while_waiting: Callable[[], Any],
    ) -> None:
        for url in work_list_urls:
            for item in read_work_list(url):
                started = time.perf_counter()
                publish_item(stage, item)
                seconds[stage.name, item.dataset].append(time.perf_counter() - started)

    parser = argparse.ArgumentParser()
    build.add_arguments(parser)
    args = parser.parse_args([recipe_path])
    args.beam_options = []
    with patch.object(beam_job, "run", run_here):
        build.run(args)
    return seconds


def multiples(seconds: Seconds) -> dict[str, list[float]]:
    """Return by stage the quantiles of items' times as multiples of the mean of their dataset."""
    by_stage: dict[str, list[float]] = defaultdict(list)
    for (stage, _), times in seconds.items():
        # The first item of a dataset pays for what is loaded once.
        later = times[1:]
        if len(later) >= _FEWEST_ITEMS:
            by_stage[stage] += [one / float(np.mean(later)) for one in later]
    return {stage: np.quantile(found, QUANTILES).tolist() for stage, found in by_stage.items()}


def main() -> int:
    """Run the measurement."""
    parser = argparse.ArgumentParser(description="measure how long a build's items take")
    parser.add_argument("recipe", help="a recipe whose root is empty")
    for stage, quantiles in multiples(measure(parser.parse_args().recipe)).items():
        print(f"{stage:16}", *(f"{quantile:5.2f}" for quantile in quantiles))
    return 0


if __name__ == "__main__":
    sys.exit(main())
