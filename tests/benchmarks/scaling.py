"""The corpus of i1 on more and more machines, simulated: hours, dollars, and what ends the scaling.

    python -m tests.benchmarks.scaling [--plot FILE]

The work items are those of `evenmix plan` (pipeline/plan), each dataset's at the geometric mean of
the plan's low and high seconds, spread as items were measured to be (tests.benchmarks.item_times),
and worked through by a model of machines (tests/benchmarks/cluster_model.py). What cannot be
measured here is given below, with its source. The same seed draws the same times.
"""

import argparse
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import matplotlib

matplotlib.use("Agg")
import numpy as np
from matplotlib import pyplot as plt
from rich import box
from rich.console import Console
from rich.table import Table

from pipeline.dataflow import L4, Command
from pipeline.plan.expected import Expected, expect
from pipeline.plan.figures import Figures, load_figures
from pipeline.plan.model import StagePlan, Work, stages
from pipeline.plan.price import requests_usd
from pipeline.plan.ranges import Range, total
from pipeline.recipe import Recipe
from tests.benchmarks.cluster_model import Floats, Job, Limit, Machines, simulate, terms_s
from tests.benchmarks.item_times import QUANTILES

COUNTS = (10, 25, 50, 100, 250, 500, 1000, 2000)
"""Machines; Dataflow's own limit is 4,000 a job, and 2,000 if nobody asks for more."""

SEED = 0
_HOUR_S = 3600

SPREAD: Mapping[str, tuple[float, ...]] = {
    "ingest": (0.61, 0.64, 0.86, 1.01, 1.15, 1.35, 1.37),
    "embed": (0.87, 0.89, 0.97, 0.98, 0.99, 1.29, 1.39),
    "dedup": (0.61, 0.62, 0.69, 0.93, 1.29, 1.44, 1.86),
    "caption": (0.92, 0.93, 0.95, 0.97, 1.00, 1.12, 1.56),
    "mix": (0.85, 0.89, 0.95, 1.00, 1.04, 1.15, 1.27),
}
"""An item's time as a multiple of its dataset's mean, at QUANTILES. Measured in November 2026 on
the demo's recipe with 64 records a shard and every dataset embedded; dedup's is its last step's."""

MODEL_SPREAD_SIGMA = 0.2
"""Of the logarithm of a captioning item's time, given: an item evens out lengths of captions."""

SPEED_SIGMA = 0.1
"""Of the logarithm of machines' speeds, given: machines of one type share hosts with strangers."""

DOUBLING_S = 60
"""How long Dataflow takes to have twice as many machines, given: it looks every 30 s
(cloud.google.com/dataflow/docs/horizontal-autoscaling)."""

PREEMPTIONS_PER_HOUR = 0.02
"""Of a machine, given: mostly Dataflow's own replacements of workers that fail."""

RECEIPT_S, RECEIPTS_AT_ONCE = 0.06, 64
"""The driver reads the receipt of each item when a stage ends; two requests of 30 ms are given."""

WRITES = Limit("bucket writes", 1000, doubling_s=1200)
READS = Limit("bucket reads", 5000, doubling_s=1200)
"""What a bucket answers at first, and how fast that may grow (cloud.google.com/storage/docs/
request-rate). Each stage writes under a prefix of its own, and begins anew."""

BANDWIDTH = Limit("bandwidth", 25e9)
"""Bytes a second from a region's buckets to machines: 200 Gbit/s, a project's quota in large
regions; not verified."""

HOSTS = {
    "yfcc": Limit("host of yfcc", 5500),
    "redcaps": Limit("host of redcaps", 500),
    "megalith10m": Limit("host of megalith10m", 500),
}
"""Pictures a second that a host gives to one project. S3 answers 5,500 reads a second per prefix
(docs.aws.amazon.com/AmazonS3/latest/userguide/optimizing-performance.html); the others do not say,
and theirs are given."""


@dataclass(frozen=True)
class Stage:
    """A stage that is to be simulated: its items, and what is not shared among machines.

    ``alone_s`` are the seconds in which only one item can run, on another machine perhaps.
    """

    name: str
    job: Job
    machines: Machines
    plan: StagePlan
    alone_s: float

    @property
    def starts_s(self) -> float:
        """Seconds until the first item begins, over all jobs of the stage."""
        return self.plan.jobs * sum(self.machines.start_s) / 2

    @property
    def driver_s(self) -> float:
        """Seconds in which the driver adds up receipts."""
        return self.plan.items * RECEIPT_S / RECEIPTS_AT_ONCE


@dataclass(frozen=True)
class Run:
    """A stage on a number of machines.

    ``terms_h`` are the hours that it cannot be faster than, by name; ``lost`` is the share of the
    time of slots that preemptions took.
    """

    stage: str
    count: int
    hours: float
    usd: float
    terms_h: Mapping[str, float]
    lost: float

    @property
    def binding(self) -> str:
        """The name of the term that is the largest."""
        return max(self.terms_h, key=self.terms_h.__getitem__)


def corpus_recipe(*, by_model: bool) -> Recipe:
    """Return i1's whole corpus: 162.9 million pictures of eleven datasets, at 256 px.

    Its captions are i1's published ones, or all written anew by a model.
    """
    document: dict[str, Any] = {"root": "gs://bucket/corpus", "mixture": {"preset": "i1-256"}}
    if by_model:
        document["mixture"]["captions"] = "own"
        document["captions"] = {"own": {"engine": "vllm", "accelerator": L4}}
    return Recipe.model_validate(document)


def corpus_stages(figures: Figures, rng: np.random.Generator) -> list[Stage]:
    """Return the stages of i1's corpus with i1's captions, and captioning by a model at the end."""
    found = stages_of(corpus_recipe(by_model=False), figures, rng)
    by_model = stages_of(corpus_recipe(by_model=True), figures, rng)
    captioning = next(stage for stage in by_model if stage.name == "caption")
    return [*found, replace(captioning, name="caption by model")]


def stages_of(recipe: Recipe, figures: Figures, rng: np.random.Generator) -> list[Stage]:
    """Return what a recipe's plan says, as items of machines."""
    expected = expect(recipe, figures, {}, is_fresh=True)
    by_dataset = {
        name: {plan.name: plan.work for plan in stages(recipe, figures, {name: dataset})}
        for name, dataset in expected.items()
    }
    found = []
    for plan in stages(recipe, figures, expected):
        start = figures.machines.start_s.range
        if plan.work.gpu_s.high:
            start += figures.caption.server_start_s
        job = job_of(plan, _parts(plan, expected, by_dataset), rng)
        machines = Machines(
            plan.machine.workers,
            plan.machine.slots,
            (start.low, start.high),
            DOUBLING_S,
            SPEED_SIGMA,
            PREEMPTIONS_PER_HOUR,
        )
        found.append(Stage(plan.name, job, machines, plan, middle(plan.work.alone_s)))
    return found


def _parts(
    plan: StagePlan,
    expected: Mapping[str, Expected],
    by_dataset: Mapping[str, Mapping[Command, Work]],
) -> dict[str, tuple[Work, int]]:
    """Return the work of a stage in parts, those of datasets, and how many items it has in each."""
    if plan.name == "dedup":
        # It is no sum over datasets. Almost all of the time is the search's, whose items are those
        # that are no shard.
        num_shards = total(dataset.shards for dataset in expected.values())
        return {"all": (plan.work, plan.items - math.ceil(num_shards.high))}
    parts = {name: of_stage[plan.name] for name, of_stage in by_dataset.items()}
    return {name: (work, math.ceil(middle(work.items))) for name, work in parts.items()}


def job_of(
    plan: StagePlan,
    parts: Mapping[str, tuple[Work, int]],
    rng: np.random.Generator,
) -> Job:
    """Draw the items of a stage; a machine's GPUs work in turn at those that it has at once."""
    hosts = HOSTS.values() if plan.name == "ingest" else ()
    uses: dict[Limit, list[Floats]] = {limit: [] for limit in (WRITES, READS, BANDWIDTH, *hosts)}
    item_s = []
    in_turn = plan.machine.slots / max(1, plan.machine.gpus)
    for name, (work, num_items) in parts.items():
        if not num_items:
            continue
        seconds = max(middle(work.worker_s), middle(work.gpu_s) * in_turn) / num_items
        item_s.append(seconds * _spread(plan, num_items, rng))
        units = {
            WRITES: middle(work.class_a),
            READS: middle(work.class_b),
            BANDWIDTH: middle(work.read_bytes),
        }
        if name in HOSTS:
            units[HOSTS[name]] = middle(work.pictures)
        for limit, of_items in uses.items():
            of_items.append(np.full(num_items, units.get(limit, 0) / num_items))
    order = rng.permutation(sum(len(of_part) for of_part in item_s))  # as a Reshuffle deals them
    return Job(
        np.concatenate(item_s)[order],
        {limit: np.concatenate(of_items)[order] for limit, of_items in uses.items()},
    )


def middle(number: Range) -> float:
    """Return the geometric mean of the ends, or what is between them if the low one is zero."""
    return math.sqrt(number.low * number.high) if number.low else number.high / 2


def _spread(plan: StagePlan, num_items: int, rng: np.random.Generator) -> Floats:
    """Draw items' times as multiples of their mean, which is one."""
    if plan.work.gpu_s.high:
        sigma = MODEL_SPREAD_SIGMA
        return rng.lognormal(-(sigma**2) / 2, sigma, num_items)
    quantiles = SPREAD[plan.name]
    drawn = np.interp(rng.random(num_items), QUANTILES, quantiles)
    return drawn / np.trapezoid(quantiles, QUANTILES)


def run(stage: Stage, count: int, figures: Figures) -> Run:
    """Simulate a stage on so many machines."""
    machines = replace(stage.machines, count=count)
    outcome = simulate(stage.job, machines, np.random.default_rng(SEED))
    # The simulation has the start of one job. As in the plan, each job starts all machines.
    further_starts_s = stage.starts_s * (1 - 1 / stage.plan.jobs)
    seconds = outcome.finished_s + further_starts_s + stage.alone_s + stage.driver_s
    terms = {
        **terms_s(stage.job, machines),
        "starts of jobs": stage.starts_s,
        "alone": stage.alone_s,
        "driver": stage.driver_s,
    }
    prices = figures.prices
    usd = (
        (outcome.machine_s + further_starts_s * count) * middle(stage.plan.machine.hourly(prices))
        + stage.alone_s * middle(stage.plan.machine_alone.hourly(prices))
    ) / _HOUR_S + middle(requests_usd(stage.plan, Range.exactly(seconds / _HOUR_S), figures))
    return Run(
        stage.name,
        count,
        seconds / _HOUR_S,
        usd,
        {name: term_s / _HOUR_S for name, term_s in terms.items()},
        outcome.lost_s / (float(stage.job.item_s.sum()) + outcome.lost_s),
    )


def stops_at(runs: Sequence[Run]) -> Run:
    """Return the run from which on more machines save less than half of what they should."""
    for fewer, more in pairwise(runs):
        ideal = fewer.hours * fewer.count / more.count
        if fewer.hours - more.hours < (fewer.hours - ideal) / 2:
            return fewer
    return runs[-1]


def hours_table(runs: Mapping[str, Sequence[Run]]) -> Table:
    """Return hours by stage and number of machines, and the sums without captioning by a model."""
    table = Table(title="hours, and dollars for all", title_justify="left", box=box.SIMPLE_HEAD)
    for column in ("machines", *runs, "all", "$ all", "$ model"):
        table.add_column(column, justify="right")
    for row in zip(*runs.values(), strict=True):
        corpus, model = row[:-1], row[-1]
        table.add_row(
            f"{model.count:,}",
            *(f"{one.hours:,.1f}" for one in row),
            f"{sum(one.hours for one in corpus):,.1f}",
            f"{sum(one.usd for one in corpus):,.0f}",
            f"{model.usd:,.0f}",
        )
    return table


def ends_table(runs: Mapping[str, Sequence[Run]]) -> Table:
    """Return where each stage stops to scale, and what most of its time is on most machines."""
    table = Table(title="where it ends", title_justify="left", box=box.SIMPLE_HEAD)
    for column in (
        "stage",
        "machines",
        "hours then",
        f"hours on {COUNTS[-1]:,}",
        "of these at least",
    ):
        table.add_column(column, justify="left" if column.startswith(("stage", "of")) else "right")
    for name, of_stage in runs.items():
        end, most = stops_at(of_stage), of_stage[-1]
        terms = sorted(most.terms_h.items(), key=lambda term: -term[1])[:3]
        table.add_row(
            name,
            f"{end.count:,}",
            f"{end.hours:.1f}",
            f"{most.hours:.1f}",
            ", ".join(f"{term} {hours:.2f}" for term, hours in terms),
        )
    return table


def preemption_table(stages: Iterable[Stage], count: int, figures: Figures) -> Table:
    """Return what preemptions cost on so many machines."""
    title = f"preemptions of a machine an hour, {count} machines"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for column in ("stage", "preemptions", "hours", "work lost"):
        table.add_column(column, justify="left" if column == "stage" else "right")
    for stage in stages:
        for rate in (0.0, 0.05, 0.2, 1.0):
            machines = replace(stage.machines, preemptions_per_hour=rate)
            found = run(replace(stage, machines=machines), count, figures)
            table.add_row(stage.name, f"{rate:g}", f"{found.hours:.1f}", f"{found.lost:.1%}")
    return table


def plot(runs: Mapping[str, Sequence[Run]], path: str) -> None:
    """Draw hours against machines, and dollars."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    for name, of_stage in runs.items():
        counts = [one.count for one in of_stage]
        (line,) = left.loglog(counts, [one.hours for one in of_stage], marker=".", label=name)
        ideal = [of_stage[0].hours * counts[0] / count for count in counts]
        left.loglog(counts, ideal, color=line.get_color(), alpha=0.25, linestyle=":")
        right.loglog(counts, [one.usd for one in of_stage], marker=".", color=line.get_color())
    left.set(xlabel="machines", ylabel="hours", title="i1's corpus (dotted: as if it only scaled)")
    right.set(xlabel="machines", ylabel="dollars", title="what the stages cost")
    left.legend(fontsize="small")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


def main() -> int:
    """Run the simulation."""
    parser = argparse.ArgumentParser(description="simulate i1's corpus on many machines")
    parser.add_argument("--plot", metavar="FILE", help="draw hours and dollars (PNG)")
    args = parser.parse_args()
    figures = load_figures()
    found = corpus_stages(figures, np.random.default_rng(SEED))
    runs = {stage.name: [run(stage, count, figures) for count in COUNTS] for stage in found}
    console = Console(width=120, highlight=False)
    console.print(hours_table(runs))
    console.print(ends_table(runs))
    chosen = [stage for stage in found if stage.name in ("ingest", "caption by model")]
    console.print(preemption_table(chosen, 250, figures))
    if args.plot:
        plot(runs, args.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
