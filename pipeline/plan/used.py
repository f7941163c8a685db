"""What runs have used: of the recipe's own root beside the plan, of a trial's to plan by.

Both from the notes of runs (:mod:`pipeline.usage`) and from what lies in the root.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from pipeline import storage
from pipeline.dataflow import Command, command_of
from pipeline.errors import EvenmixError
from pipeline.plan.expected import MB, caption_folders
from pipeline.plan.figures import Figure, Figures
from pipeline.plan.machines import machine_of
from pipeline.plan.model import StagePlan
from pipeline.plan.price import stored_usd
from pipeline.plan.ranges import Range
from pipeline.recipe import Recipe
from pipeline.records import IMAGES, SOURCES, duplicates_folder, embeddings_folder, mixture_folder
from pipeline.stage import walk_shards
from pipeline.storage import FileInfo
from pipeline.summary import read_summary
from pipeline.usage import Run, read_runs

_LINEAR: tuple[Command, ...] = ("ingest", "embed", "caption", "mix")
"""Stages whose time a record does not depend on the number of records."""


@dataclass(frozen=True)
class Used:
    """What the runs of a stage have used.

    ``pictures`` are records that went in; ``usd`` is for ``vcpu_hours`` of the plan's machines, so
    that local runs have a price, too. Dataflow's are those of all machines that a job could have
    and had items for. Both are None if it is not known of a run on which machines it was.
    ``was_local`` if one of the runs was, for which no machine had to start.
    """

    pictures: int
    vcpu_hours: float | None
    stored_bytes: int
    usd: Range | None
    usd_month: Range
    was_local: bool


def used(recipe: Recipe, plans: Sequence[StagePlan], figures: Figures) -> dict[Command, Used]:
    """Return what the runs in the recipe's root have used, by stage; without runs there is none."""
    runs = read_runs(recipe.root)
    found = {}
    for plan in plans:
        own = [run for run in runs if command_of(run.stage) == plan.name]
        if not own:
            continue
        vcpu_hours = _vcpu_hours(own)
        vcpu_usd = plan.machine.hourly(figures.prices) / plan.machine.vcpus
        stored_bytes = sum(
            file.num_bytes
            for folder in _stored_folders(recipe, plan.name)
            for file in _files(recipe.root, folder, recipe.datasets)
        )
        found[plan.name] = Used(
            pictures=sum(run.records_in for run in own if run.stage == plan.name),
            vcpu_hours=vcpu_hours,
            stored_bytes=stored_bytes,
            usd=None if vcpu_hours is None else vcpu_usd * vcpu_hours,
            usd_month=stored_usd(Range.exactly(stored_bytes), figures),
            was_local=any(run.runner == "local" for run in own),
        )
    return found


def _files(root: str, folder: str, datasets: Iterable[str]) -> Iterator[FileInfo]:
    """Yield the files of a folder; where shards are known, a long listing is split."""
    planned: list[str] = []
    for dataset in datasets:
        summary = read_summary(root, folder, dataset)
        planned += [f"{dataset}/{shard}" for shard in (summary.items if summary else ())]
    return walk_shards(storage.join(root, folder), planned)


def _vcpu_hours(runs: Iterable[Run]) -> float | None:
    """Return the hours of vCPUs, of which a local process has one; None if a run's are unknown."""
    hours = 0.0
    for run in runs:
        vcpus = _vcpus(run)
        if vcpus is None:
            return None
        hours += run.hours * vcpus
    return hours


def _vcpus(run: Run) -> int | None:
    if run.runner == "local":
        return run.workers
    if run.machine_type is None or run.workers is None:
        return None
    try:
        machine = machine_of(run.machine_type, 0, run.workers, run.threads or 1)
    except EvenmixError:
        return None  # Jobs may have machines that the plan does not know.
    return machine.used_by(run.items) * machine.vcpus


def _stored_folders(recipe: Recipe, stage: Command) -> list[str]:
    return {
        "ingest": [IMAGES, SOURCES],
        "embed": [embeddings_folder(recipe.dedup.descriptor)],
        "dedup": [duplicates_folder(recipe.dedup.name)],
        "caption": list(caption_folders(recipe).values()),
        "mix": [mixture_folder(recipe.mixture.name)],
    }[stage]


def seconds_of_trial(root: str) -> dict[Command, float]:
    """Return the seconds of worker processes a record, by stage, of the local runs in a root.

    Raises:
        EvenmixError: there are no such runs.
    """
    runs = [run for run in read_runs(root) if run.runner == "local"]
    if not runs:
        raise EvenmixError(
            f"{root} has no notes of runs on this machine; try a part of the recipe there first, "
            "such as `evenmix ingest RECIPE --limit 1000`"
        )
    seconds: dict[Command, float] = {}
    for stage in _LINEAR:
        own = [run for run in runs if command_of(run.stage) == stage]
        records = sum(run.records_in for run in own if run.stage == stage)
        if records:
            seconds[stage] = sum(run.hours * (run.workers or 0) for run in own) * 3600 / records
    return seconds


def with_pictures_of_trial(figures: Figures, root: str, datasets: Sequence[str]) -> Figures:
    """Return figures in which pictures are as large as those that a trial has kept."""
    sizes: dict[str, Figure] = {}
    for name in datasets:
        summary = read_summary(root, IMAGES, name)
        if summary is None or not summary.counts.records_out:
            continue
        files = storage.list_files(storage.join(root, IMAGES, name))
        tars = sum(file.num_bytes for file in files if file.name.endswith(".tar"))
        size = tars / summary.counts.records_out / MB
        sizes[name] = Figure(low=size, high=size, source=f"the tars of {root}, headers included")
    return figures.model_copy(update={"picture_mb": {**figures.picture_mb, **sizes}})
