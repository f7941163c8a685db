"""Notes of what runs of stages used, for `evenmix plan` to compare with and to learn from.

Each run of a stage that had something to do leaves one below R/notes, which is no part of the
corpus: nothing depends on it, and a run does not fail for a note that cannot be written.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any, Literal

from pipeline import storage
from pipeline.beam_job import RunnerOptions
from pipeline.dataflow import given_options, job_args, resources_of
from pipeline.errors import EvenmixError
from pipeline.progress import console
from pipeline.records import NOTES
from pipeline.stage import Stage, WorkItem
from pipeline.summary import Summary

RUNS = f"{NOTES}/runs"
"""The folder below R with the notes."""


@dataclass(frozen=True)
class Run:
    """A run of a stage that ended well.

    ``started`` and ``ended`` are in ISO 8601, UTC. ``items`` are those that it had to do, with
    ``records_in`` records. On this machine ``workers`` are processes; on Dataflow they are the most
    machines that the job could have, of ``machine_type`` (None if the service chose), with
    ``threads`` a process; elsewhere nobody knows.
    """

    stage: str
    folder: str
    datasets: list[str]
    started: str
    ended: str
    items: int
    records_in: int
    runner: Literal["local", "dataflow", "other"]
    workers: int | None
    machine_type: str | None
    threads: int | None

    @property
    def hours(self) -> float:
        """How long it took."""
        took = datetime.fromisoformat(self.ended) - datetime.fromisoformat(self.started)
        return took.total_seconds() / 3600


def note_run(
    stage: Stage,
    items: Sequence[WorkItem],
    summaries: Mapping[str, Summary],
    options: RunnerOptions,
    started: datetime,
) -> None:
    """Note a run that has done ``items``; ``summaries`` are the datasets', after it."""
    job = _options_of_job(stage, options)
    processes = min(options.workers, len(items))
    run = Run(
        stage=stage.name,
        folder=stage.folder,
        datasets=sorted({item.dataset for item in items}),
        started=started.isoformat(),
        ended=datetime.now(UTC).isoformat(),
        items=len(items),
        records_in=sum(
            summaries[item.dataset].items[item.shard]["counts"]["records_in"] for item in items
        ),
        runner="local" if options.is_local else "dataflow" if options.is_dataflow else "other",
        workers=processes if options.is_local else job.get("max_num_workers"),
        machine_type=job.get("machine_type"),
        threads=job.get("number_of_worker_harness_threads"),
    )
    name = f"{stage.name}-{started:%Y%m%dT%H%M%S.%fZ}.json"
    data = (json.dumps(asdict(run), indent=1) + "\n").encode()
    try:
        storage.publish(storage.join(stage.root, RUNS, name), data)
    except EvenmixError as error:
        console.print(f"{stage.name}: what the run used is not noted: {error}", markup=False)


def _options_of_job(stage: Stage, options: RunnerOptions) -> dict[str, Any]:
    """Return Beam's options of a job on Dataflow, with the machines that work at its items.

    Elsewhere they tell nothing; nor does it name machines that the service chooses (Prime).
    """
    if not options.is_dataflow:
        return {}
    args = job_args(stage, options.dataflow, options.resources, options.beam_args)
    job, hints = given_options(args), stage.resource_hints
    if "machine_type" in job and "accelerator" in hints:
        # That of the option is beside those with the accelerator.
        job["machine_type"] = resources_of(stage.name, options.resources, hints).machine_type
    return job


def read_runs(root: str) -> list[Run]:
    """Return the notes of a root, the earliest first; those that cannot be understood are left out.

    A later version may write others.
    """
    runs = []
    for file in storage.list_files(storage.join(root, RUNS)):
        try:
            runs.append(Run(**json.loads(storage.read_bytes(file.url))))
        except (ValueError, TypeError):
            continue
    return sorted(runs, key=lambda run: run.started)
