"""A build on Dataflow ends with the same files as one here, whatever becomes of the command.

The jobs are submitted, staged and waited for as on Google's service (tests/dataflow_service.py).
"""

import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.runners.dataflow.internal.apiclient import DataflowApplicationClient

from pipeline import beam_job, dataflow_job, storage
from pipeline.beam_job import RemoteJob, RunnerOptions
from pipeline.beam_pipeline import failure_of
from pipeline.dataflow import Dataflow, job_args, job_name
from pipeline.errors import EvenmixError
from pipeline.stage import committed_shards, write_work_lists
from tests import corpora
from tests.corpora import evenmix, finish
from tests.dataflow import PROJECT, REGION
from tests.dataflow_service import DataflowService, ServedJob, run_service
from tests.stages import Words, items
from tests.test_build import hashes


@pytest.fixture(scope="module")
def service() -> Iterator[DataflowService]:
    with run_service() as service:
        yield service


@pytest.fixture(autouse=True)
def _no_jobs_of_others(service: DataflowService) -> Iterator[None]:
    service.jobs.clear()
    service.num_answered = 0
    yield
    service.may_begin.set()


def arguments(service: DataflowService) -> tuple[str, ...]:
    return ("--runner=DataflowRunner", f"--dataflow_endpoint={service.url}", "--no_auth")


def url_of(job: ServedJob) -> str:
    console = "https://console.cloud.google.com/dataflow/jobs"
    return f"{console}/{REGION}/{job.id}?project={PROJECT}"


def until_it_waits(process: subprocess.Popen[str]) -> str:
    """Return what a command says when it begins to wait for a job."""
    assert process.stdout is not None
    return next(line for line in process.stdout if "waiting for the Dataflow job" in line)


def write_recipe(folder: Path, bucket: str) -> Path:
    """Write a recipe of the small corpus in a bucket, with all that Dataflow needs."""
    corpora.write_sources(folder / "sources")
    for file in storage.list_files(str(folder / "sources")):
        storage.publish(f"{bucket}/sources/{file.name}", storage.read_bytes(file.url))
    recipe = folder / "recipe.toml"
    text = corpora.RECIPE.format(root=f"{bucket}/corpus", sources=f"{bucket}/sources")
    recipe.write_text(
        f"""{text}
        [dataflow]
        project = "{PROJECT}"
        region = "{REGION}"
        temp = "{bucket}/temp"
        image = "gcr.io/{PROJECT}/evenmix"
        """
    )
    return recipe


def test_a_build_goes_on_after_anything_and_ends_with_the_files_of_a_local_one(
    service: DataflowService, gcs_bucket: str, tmp_path: Path
) -> None:
    recipe = write_recipe(tmp_path, gcs_bucket)
    command = ("build", str(recipe), *arguments(service))

    # The first job does not begin until the third command looks after it.
    service.may_begin.clear()
    first = evenmix(*command)
    said = until_it_waits(first)
    (job,) = service.jobs
    assert said == f"ingest: waiting for the Dataflow job {job.id}: {url_of(job)}\n"
    first.send_signal(signal.SIGINT)
    told, _ = first.communicate(timeout=60)
    assert first.returncode == 130
    assert told.splitlines()[-2:] == [
        f"the Dataflow job {job.id} goes on in the cloud: the same command waits for it again, and "
        f"it can be cancelled at {url_of(job)}",
        "stopped; start the same command again to go on",
    ]

    second = evenmix(*command, start_new_session=True)
    assert until_it_waits(second) == said
    os.killpg(second.pid, signal.SIGKILL)
    second.communicate()

    third = evenmix(*command)
    assert until_it_waits(third) == said
    service.may_begin.set()
    printed = finish(third)
    assert "the funnel" in printed
    assert {job.state for job in service.jobs} == {"JOB_STATE_DONE"}
    names = [job.name for job in service.jobs]
    # The report of duplicates has two parts, one after the other.
    assert {name for name in names if names.count(name) > 1} == {
        name for name in names if name.startswith("evenmix-dedup-report-")
    }

    local = tmp_path / "corpus"
    finish(evenmix("build", str(recipe), f"--root={local}", "--workers=2"))
    assert hashes(f"{gcs_bucket}/corpus") == hashes(str(local))


def options_for(service: DataflowService, stage: Words) -> RunnerOptions:
    temp, image = f"{stage.root}/temp", f"gcr.io/{PROJECT}/evenmix"
    dataflow = Dataflow(project=PROJECT, region=REGION, temp=temp, image=image)
    return RunnerOptions(1, arguments(service), dataflow)


def run(
    service: DataflowService,
    stage: Words,
    shards: str = "ab",
    while_waiting: Callable[[], object] = lambda: None,
) -> None:
    work_lists = write_work_lists(stage, items(*shards))
    beam_job.run(stage, work_lists, options_for(service, stage), while_waiting)


def begun_earlier(service: DataflowService, stage: Words) -> ServedJob:
    """Submit a job with one item, as an earlier command did; it is to begin later."""
    options = options_for(service, stage)
    args = job_args(stage, options.dataflow, {}, options.beam_args)
    work_lists = write_work_lists(stage, items("a"))
    service.may_begin.clear()
    dataflow_job.submit(stage, work_lists, replace(options, beam_args=tuple(args)))
    service.num_answered = 0
    return service.jobs[-1]


def begin_once_asked(service: DataflowService) -> Callable[[], None]:
    """Return what lets jobs begin as soon as a command has found one and asks after it."""

    def begin() -> None:
        if service.num_answered:
            service.may_begin.set()

    return begin


def test_an_obstacle_on_a_worker_arrives_with_its_job(
    service: DataflowService, gcs_bucket: str
) -> None:
    stage = Words(gcs_bucket, obstacle="the disk is full;\nmake place")
    with pytest.raises(EvenmixError) as caught:
        run(service, stage)
    (job,) = service.jobs
    assert job.name == job_name(stage)
    assert str(caught.value) == (
        f"the disk is full;\nmake place\nthe Dataflow job {job.id} has failed: {url_of(job)}"
    )


def test_a_defect_arrives_with_its_trace(service: DataflowService, gcs_bucket: str) -> None:
    with pytest.raises(RuntimeError, match=r"(?s)in process.*ValueError: odd.*has failed: https:"):
        run(service, Words(gcs_bucket, defect="odd"))


@pytest.mark.parametrize("is_ours", [True, False])
def test_a_job_that_is_cancelled_ends_the_command_that_waits_for_it(
    service: DataflowService, gcs_bucket: str, is_ours: bool
) -> None:
    stage = Words(gcs_bucket)
    options = options_for(service, stage)
    args = job_args(stage, options.dataflow, {}, options.beam_args)
    client = DataflowApplicationClient(PipelineOptions(args))

    def cancel() -> None:
        # Once the command knows that it runs.
        if service.num_answered and not service.may_begin.is_set():
            client.modify_job_state(service.jobs[0].id, "JOB_STATE_CANCELLED")
            service.may_begin.set()

    service.may_begin.clear()
    if not is_ours:
        begun_earlier(service, stage)
    with pytest.raises(EvenmixError) as caught:
        run(service, stage, while_waiting=cancel)
    (job,) = service.jobs
    assert str(caught.value) == (
        f"the Dataflow job {job.id} was cancelled; start the same command again to go on\n"
        f"{url_of(job)}"
    )
    run(service, stage)
    assert committed_shards(f"{gcs_bucket}/words/d") == ["a", "b"]


def test_a_job_that_was_being_cancelled_is_followed_by_one_of_this_command(
    service: DataflowService, gcs_bucket: str
) -> None:
    stage = Words(gcs_bucket)
    job = begun_earlier(service, stage)
    job.state = "JOB_STATE_CANCELLING"
    job.cancelled.set()
    run(service, stage, while_waiting=begin_once_asked(service))
    assert [job.state for job in service.jobs] == ["JOB_STATE_CANCELLED", "JOB_STATE_DONE"]
    assert committed_shards(f"{gcs_bucket}/words/d") == ["a", "b"]


def test_a_job_that_cannot_be_asked_after_goes_on(
    service: DataflowService, gcs_bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = Words(gcs_bucket)
    monkeypatch.setattr(service, "is_closed", True)
    with pytest.raises(EvenmixError) as caught:
        run(service, stage)
    (job,) = service.jobs
    told = str(caught.value)
    assert told.startswith(f"Dataflow does not say how its job {job.id} is doing: 403 ")
    assert told.endswith(f"start the same command again to wait for it\n{url_of(job)}")


def test_a_question_that_gets_no_answer_is_asked_again(
    service: DataflowService, gcs_bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dataflow_job, "_ANSWER_S", 3.0)
    monkeypatch.setattr(service, "num_unanswered", 1)
    stage = Words(gcs_bucket)
    work_lists = write_work_lists(stage, items("a"))
    dataflow_job.run_to_end(stage, work_lists, options_for(service, stage), lambda _: None)
    assert service.num_unanswered == 0
    assert committed_shards(f"{gcs_bucket}/words/d") == ["a"]


def test_a_command_that_ends_says_that_its_job_goes_on(
    service: DataflowService, gcs_bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    printed = list[str]()
    monkeypatch.setattr(beam_job, "_print", printed.append)

    def refuse() -> None:
        if printed:
            raise EvenmixError("made in another way")

    service.may_begin.clear()
    with pytest.raises(EvenmixError, match="made in another way"):
        run(service, Words(gcs_bucket), while_waiting=refuse)
    (job,) = service.jobs
    assert printed[-1].startswith(f"the Dataflow job {job.id} goes on in the cloud: ")
    assert printed[-1].endswith(f"it can be cancelled at {url_of(job)}")


def test_what_a_job_that_was_found_did_not_do_is_done_after_it(
    service: DataflowService, gcs_bucket: str
) -> None:
    stage = Words(gcs_bucket)
    job = begun_earlier(service, stage)
    run(service, stage, "ab", while_waiting=begin_once_asked(service))
    assert [other.name for other in service.jobs] == [job.name, job.name]
    assert committed_shards(f"{gcs_bucket}/words/d") == ["a", "b"]

    # All that a third one finds was done, so it runs nothing.
    begun_earlier(service, stage)
    run(service, stage, "ab", while_waiting=begin_once_asked(service))
    assert len(service.jobs) == 3


def test_of_two_commands_at_once_the_slower_waits_for_the_job_of_the_faster(
    service: DataflowService, gcs_bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = Words(gcs_bucket)
    faster = begun_earlier(service, stage).id
    look, looks = dataflow_job._find_active, list[str | None]()

    def look_too_early(*arguments: Any) -> str | None:
        looks.append(look(*arguments) if looks else None)
        return looks[-1]

    monkeypatch.setattr(dataflow_job, "_find_active", look_too_early)
    told = []

    def begin(job: RemoteJob | str) -> None:
        assert isinstance(job, RemoteJob)
        told.append(job.id)
        service.may_begin.set()

    work_lists = write_work_lists(stage, items("a"))
    dataflow_job.run_to_end(stage, work_lists, options_for(service, stage), begin)
    assert looks == [None, faster]
    assert told == [faster]
    assert len(service.jobs) == 1


def test_a_job_that_was_found_and_fails_is_followed_by_one_of_this_command(
    service: DataflowService, gcs_bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    older, stage = Words(gcs_bucket, obstacle="an older recipe"), Words(gcs_bucket)
    begun_earlier(service, older)
    printed = list[str]()
    monkeypatch.setattr(beam_job, "_print", printed.append)
    run(service, stage, "a", while_waiting=begin_once_asked(service))
    first, second = service.jobs
    assert (first.state, second.state) == ("JOB_STATE_FAILED", "JOB_STATE_DONE")
    assert printed == [
        f"words: waiting for the Dataflow job {first.id}: {url_of(first)}",
        f"words: the Dataflow job {first.id}, which an earlier command began, has not succeeded "
        f"({url_of(first)}); going on with another",
        f"words: waiting for the Dataflow job {second.id}: {url_of(second)}",
    ]
    assert committed_shards(f"{gcs_bucket}/words/d") == ["a"]


def test_a_conflict_with_a_job_that_is_not_listed_does_not_last_for_ever(
    service: DataflowService, gcs_bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = Words(gcs_bucket)
    other = begun_earlier(service, stage).id
    monkeypatch.setattr(dataflow_job, "_find_active", lambda *_: None)
    monkeypatch.setattr(dataflow_job, "_CONFLICT_S", 0.0)
    told = list[RemoteJob | str]()
    refusal = rf"words: Dataflow refuses the job for another one, .*{job_name(stage)}.*{other}"
    with pytest.raises(EvenmixError, match=refusal):
        work_lists = write_work_lists(stage, items("a"))
        dataflow_job.run_to_end(stage, work_lists, options_for(service, stage), told.append)
    assert told == []


REMEDY = r"gcloud services enable dataflow\.googleapis\.com.*gcloud auth application-default login"


def test_a_project_without_the_service_says_how_to_enable_it(
    service: DataflowService, gcs_bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service, "is_disabled", True)
    with pytest.raises(EvenmixError, match=rf"words: .* 403 .*API not enabled\n.*{REMEDY}"):
        run(service, Words(gcs_bucket))


def test_without_credentials_nothing_is_tried(
    service: DataflowService, gcs_bucket: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    stage = Words(gcs_bucket)
    monkeypatch.setenv("CLOUDSDK_CONFIG", str(tmp_path))
    monkeypatch.setenv("NO_GCE_CHECK", "true")
    monkeypatch.delenv("GOOGLE_APPLICATION_CREDENTIALS", raising=False)
    options = options_for(service, stage)
    options = replace(options, beam_args=options.beam_args[:-1])  # without --no_auth
    work_lists = write_work_lists(stage, items("a"))
    with pytest.raises(EvenmixError, match=rf"(?s)words: .*default credentials.*{REMEDY}"):
        dataflow_job.run_to_end(stage, work_lists, options, print)
    assert service.jobs == []


def test_a_message_that_the_service_has_cut_is_still_told() -> None:
    failure = failure_of(RuntimeError('RuntimeError: evenmix could not go on: "the disk is'))
    assert isinstance(failure, EvenmixError)
    assert str(failure) == '"the disk is'
