"""A stage's job on Google Cloud Dataflow: found if it runs already, else submitted; and waited for.

A job goes on without the command that has submitted it. Its name follows from the folder that it
fills (:func:`pipeline.dataflow.job_name`), and Dataflow has at most one active job of a name. So
the same command, started again, waits for the job that runs; what was not among that job's items it
then runs itself.
"""

import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import google.auth
from apache_beam.options.pipeline_options import (
    GoogleCloudOptions,
    PipelineOptions,
    SetupOptions,
)
from apache_beam.runners.dataflow.internal.apiclient import (
    DataflowApplicationClient,
    DataflowJobAlreadyExistsError,
)
from apache_beam.utils.retry import retry_on_server_errors_and_notfound_filter
from google.api_core.exceptions import Conflict, GoogleAPIError
from google.api_core.retry import Retry
from google.auth.exceptions import GoogleAuthError
from google.cloud.dataflow import (
    GetJobRequest,
    JobMessageImportance,
    JobState,
    ListJobMessagesRequest,
    ListJobsRequest,
)

from pipeline.beam_job import RemoteJob, RunnerOptions
from pipeline.beam_pipeline import build, empty_pipeline, failure_of
from pipeline.dataflow import job_args, job_hints
from pipeline.errors import EvenmixError
from pipeline.requirements import requirements
from pipeline.stage import Stage, committed_items, read_work_list
from pipeline.stores import OUTAGE_S

_ENDS = {
    JobState.JOB_STATE_DONE,
    JobState.JOB_STATE_FAILED,
    JobState.JOB_STATE_CANCELLED,
    JobState.JOB_STATE_DRAINED,
    JobState.JOB_STATE_UPDATED,
}
_STOPPING = {JobState.JOB_STATE_CANCELLING, JobState.JOB_STATE_DRAINING}
_OUT_OF_REACH = (GoogleAPIError, GoogleAuthError, OSError)
_FIRST_POLL_S = 0.25
_LONGEST_POLL_S = 10.0
_ANSWER_S = 60.0
"""So long an answer of the service may take. Its client waits for ever, also where a connection was
lost on the way and nobody says so."""

_patiently = Retry(predicate=retry_on_server_errors_and_notfound_filter, timeout=OUTAGE_S)
"""Calls again while the service is out of reach, as Beam does; it may not know a new job yet."""

_CONFLICT_S = 300.0
"""So long the service may refuse a job for one of its name without saying which that is."""

_LAST_MESSAGES_S = 60.0
"""A failed job's messages come up to half a minute after its end; Beam's own runner waits 50 s."""

_TRACE = "Traceback"


def run_to_end(
    stage: Stage,
    work_list_urls: Sequence[str],
    options: RunnerOptions,
    tell: Callable[[RemoteJob | str], object],
) -> None:
    """Run a stage's work lists; ``tell`` hears of each job that is waited for, and other news.

    Raises:
        EvenmixError: a job was refused, has failed or was cancelled; the text has the worker's
            own message, and where the job can be looked at.
        RuntimeError: an item failed in a way that evenmix does not know; the text has its trace.
    """
    args = job_args(stage, options.dataflow, options.resources, options.beam_args)
    options = replace(options, beam_args=tuple(args))
    try:
        client = _client(args)
    except _OUT_OF_REACH as error:
        raise _refused(stage, error) from error
    ended = set[str]()
    while True:
        try:
            job_id, is_ours = _find_or_submit(client, ended, stage, work_list_urls, options)
        except _OUT_OF_REACH as error:
            raise _refused(stage, error) from error
        job = _remote_job(client, job_id)
        tell(job)
        try:
            failure = _wait_for(client, job)
        except _OUT_OF_REACH as error:
            raise EvenmixError(
                f"Dataflow does not say how its job {job.id} is doing: {error}. It goes on without "
                f"this command; start the same command again to wait for it\n{job.url}"
            ) from error
        if is_ours and failure is not None:
            raise failure
        # A job that was found may have begun with other items, and an older recipe. One that was
        # cancelled meanwhile ends this command, too.
        if is_ours or _are_published(stage, work_list_urls):
            return
        if failure is not None:
            tell(
                f"the Dataflow job {job.id}, which an earlier command began, has not succeeded "
                f"({job.url}); going on with another"
            )
        ended.add(job.id)


def _client(args: Sequence[str]) -> DataflowApplicationClient:
    options = PipelineOptions(list(args))
    if not options.view_as(GoogleCloudOptions).no_auth:
        # Beam looks for credentials for most of a minute, and then goes on without.
        google.auth.default()
    return DataflowApplicationClient(options)


def _refused(stage: Stage, error: Exception) -> EvenmixError:
    remedy = (
        "\nIs the API enabled (gcloud services enable dataflow.googleapis.com), are there "
        "credentials (gcloud auth application-default login), and has their account the role "
        "roles/dataflow.developer?"
    )
    return EvenmixError(f"{stage.name}: the job cannot be submitted: {error}{remedy}")


def _find_or_submit(
    client: DataflowApplicationClient,
    ended: Collection[str],
    stage: Stage,
    work_list_urls: Sequence[str],
    options: RunnerOptions,
) -> tuple[str, bool]:
    """Return the id of a stage's job, and whether it has been submitted here and now."""
    deadline = time.monotonic() + _CONFLICT_S
    pauses = _pauses()
    while True:
        if (found := _find_active(client, ended)) is not None:
            return found, False
        try:
            return str(submit(stage, work_list_urls, options)), True
        except (Conflict, DataflowJobAlreadyExistsError) as error:
            # Another command was faster, or a job that has ended still counts.
            if time.monotonic() > deadline:
                raise EvenmixError(
                    f"{stage.name}: Dataflow refuses the job for another one, which it does not "
                    f"list: {error}"
                ) from error
        time.sleep(next(pauses))


def _pauses() -> Iterator[float]:
    """Yield how many seconds to wait before each next look."""
    pause_s = _FIRST_POLL_S
    while True:
        yield pause_s
        pause_s = min(1.5 * pause_s, _LONGEST_POLL_S)


def submit(stage: Stage, work_list_urls: Sequence[str], options: RunnerOptions) -> str | None:
    """Submit a job with the options of :func:`pipeline.dataflow.job_args`; return its id.

    There is none where Beam's options say that the job is only to be staged, as a template.

    Raises:
        EvenmixError: Beam or Dataflow refuses it.
    """
    pipeline = empty_pipeline(options)
    hints = job_hints(stage, options.resources, options.beam_args)
    build(pipeline, stage, work_list_urls, options.dataflow.hf_token_secret, hints)
    setup = pipeline.options.view_as(SetupOptions)
    with tempfile.TemporaryDirectory(prefix="evenmix-job-") as folder:
        if setup.extra_packages and not setup.requirements_file:
            setup.requirements_file = str(Path(folder) / "requirements.txt")
            Path(setup.requirements_file).write_text(requirements(stage.name), encoding="utf-8")
        result = pipeline.run()
    return str(result.job_id()) if result.has_job else None


def _find_active(client: DataflowApplicationClient, ended: Collection[str]) -> str | None:
    """Return the id of the active job of the client's name, None if there is none.

    The service may list one for a while that is known to have ``ended``.
    """
    settings = client.google_cloud_options
    request = ListJobsRequest(
        project_id=settings.project,
        location=settings.region,
        filter=ListJobsRequest.Filter.ACTIVE,
        name=settings.job_name,
    )
    for job in client._jobs_client.list_jobs(request, retry=Retry(), timeout=_ANSWER_S):
        if job.name == settings.job_name and job.current_state not in _ENDS and job.id not in ended:
            return str(job.id)
    return None


def _remote_job(client: DataflowApplicationClient, job_id: str) -> RemoteJob:
    settings = client.google_cloud_options
    console = "https://console.cloud.google.com/dataflow/jobs"
    url = f"{console}/{settings.region}/{job_id}?project={settings.project}"
    return RemoteJob(job_id, url)


def _wait_for(client: DataflowApplicationClient, job: RemoteJob) -> Exception | None:
    """Wait until a job has ended; return its failure, if it is one.

    Raises:
        EvenmixError: somebody stops it meanwhile, who will not want another in its place.
    """
    settings, pauses = client.google_cloud_options, _pauses()
    request = GetJobRequest(project_id=settings.project, location=settings.region, job_id=job.id)
    get_job = _patiently(client._jobs_client.get_job)
    state = get_job(request, timeout=_ANSWER_S).current_state
    was_running = state not in _STOPPING | _ENDS
    is_stopped = False
    while state not in _ENDS:
        time.sleep(next(pauses))
        state = get_job(request, timeout=_ANSWER_S).current_state
        # One that is being cancelled may still fail.
        is_stopped |= was_running and state in _STOPPING
    if state == JobState.JOB_STATE_DONE:
        return None
    if state == JobState.JOB_STATE_FAILED:
        failure = _failure(_last_error(client, job.id), job)
    else:
        is_stopped |= was_running
        how = JobState(state).name.removeprefix("JOB_STATE_").lower()
        failure = EvenmixError(
            f"the Dataflow job {job.id} was {how}; start the same command again to go on\n{job.url}"
        )
    if is_stopped:
        raise failure
    return failure


def _failure(text: str, job: RemoteJob) -> Exception:
    place = f"\nthe Dataflow job {job.id} has failed: {job.url}"
    failure = failure_of(RuntimeError(text))
    is_defect = not isinstance(failure, EvenmixError) and _TRACE in text
    return RuntimeError(f"{text}{place}") if is_defect else EvenmixError(f"{failure}{place}")


def _last_error(client: DataflowApplicationClient, job_id: str) -> str:
    """Return the message of a failed job that says most: a worker's, else the service's last."""
    deadline = time.monotonic() + _LAST_MESSAGES_S
    while not (errors := list(_errors(client, job_id))) and time.monotonic() < deadline:
        time.sleep(_LONGEST_POLL_S)
    of_workers = [text for text in errors if _TRACE in text]
    return ["Dataflow gives no reason", *errors, *of_workers][-1]


def _errors(client: DataflowApplicationClient, job_id: str) -> Iterator[str]:
    settings = client.google_cloud_options
    request = ListJobMessagesRequest(
        project_id=settings.project,
        location=settings.region,
        job_id=job_id,
        minimum_importance=JobMessageImportance.JOB_MESSAGE_ERROR,
    )
    list_messages = _patiently(client._messages_client.list_job_messages)
    for message in list_messages(request, timeout=_ANSWER_S):
        yield str(message.message_text)


def _are_published(stage: Stage, work_list_urls: Sequence[str]) -> bool:
    """Tell whether all items of work lists have a commit."""
    items = [item for url in work_list_urls for item in read_work_list(url)]
    published = committed_items(stage, items)
    return all((item.dataset, item.shard) in published for item in items)
