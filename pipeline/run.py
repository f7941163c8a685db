"""Running a stage from its plan to its closing table."""

from collections.abc import Mapping, Sequence

from pipeline import beam_job, storage
from pipeline.beam_job import RunnerOptions
from pipeline.progress import Progress, console, exists_line, print_counts
from pipeline.stage import Stage, WorkItem, by_dataset, finish, make_plan, write_work_lists
from pipeline.summary import Summary, dataset_url


def run_stage(
    stage: Stage, items: Sequence[WorkItem], options: RunnerOptions
) -> Mapping[str, Summary]:
    """Bring a stage to its end, doing only what has not been published yet.

    Returns the summary of each dataset.

    Raises:
        EvenmixError: something published was made in another way, an item cannot be done, or a
            worker was lost. What has been published stays, and the next run goes on from there.
    """
    plan = make_plan(stage, items)
    if plan.is_finished:
        for dataset, _ in plan.summarised:
            # A run that was killed while this one or another was ending may have left some.
            storage.sweep(dataset_url(stage.root, stage.folder, dataset))
        console.print(exists_line(stage), soft_wrap=True)
        return by_dataset(plan.summarised)
    if plan.missing:
        if plan.finished:
            console.print(
                f"{stage.name}: {len(plan.finished)} of {len(items)} items are published already",
                soft_wrap=True,
            )
        work_lists = write_work_lists(stage, plan.missing)
        with Progress(stage, plan) as progress:
            beam_job.run(stage, work_lists, options, progress.update)
    summaries = by_dataset({**plan.summarised, **finish(stage, items)})
    counts = {dataset: summaries[dataset].counts for dataset in sorted(summaries)}
    print_counts(f"{stage.name} ({stage.folder})", counts)
    return summaries
