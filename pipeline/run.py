"""Running a stage from its plan to its closing table."""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime

from pipeline import beam_job
from pipeline.beam_job import RunnerOptions
from pipeline.progress import Progress, console, exists_line, print_counts
from pipeline.publishing import remove_leftovers
from pipeline.stage import Stage, WorkItem, finish, make_plan, sweep_temporaries, write_work_lists
from pipeline.summary import Summary, dataset_url, read_summary
from pipeline.usage import note_run


def run_stage(
    stage: Stage, items: Sequence[WorkItem], options: RunnerOptions
) -> Mapping[str, Summary]:
    """Bring a stage to its end, doing only what has not been published yet.

    Returns the summary of each dataset, of all its generations.

    Raises:
        EvenmixError: something published was made in another way, an item cannot be done, or a
            worker was lost. What has been published stays, and the next run goes on from there.
    """
    started = datetime.now(UTC)
    plan = make_plan(stage, items)
    datasets = sorted({item.dataset for item in items})
    if plan.is_finished:
        for dataset, generation in plan.summarised:
            # A run that was killed while this one or another was ending may have left some.
            sweep_temporaries(dataset_url(stage.root, stage.folder, dataset), generation)
        console.print(exists_line(stage), soft_wrap=True)
        return _summaries(stage, datasets)
    if plan.missing:
        if plan.finished:
            console.print(
                f"{stage.name}: {len(plan.finished)} of {len(items)} items are published already",
                soft_wrap=True,
            )
        remove_leftovers(stage, plan)
        work_lists = write_work_lists(stage, plan.missing)
        with Progress(stage, plan) as progress:
            beam_job.run(stage, work_lists, options, progress.update)
    finish(stage, items)
    summaries = _summaries(stage, datasets)
    if plan.missing:
        note_run(stage, plan.missing, summaries, options, started)
    counts = {dataset: summary.counts for dataset, summary in summaries.items()}
    print_counts(f"{stage.name} ({stage.folder})", counts)
    return summaries


def _summaries(stage: Stage, datasets: Sequence[str]) -> dict[str, Summary]:
    """Read the summaries of datasets that are finished, each of all its generations."""
    found = {name: read_summary(stage.root, stage.folder, name) for name in datasets}
    return {name: summary for name, summary in found.items() if summary}
