"""A Dataflow service for the tests: it runs the jobs that DataflowRunner submits to it.

A job is translated, staged in the bucket, submitted and waited for as on Google's service, over the
REST API that Beam's client speaks to an endpoint on localhost. The service reads the pipeline that
was staged and runs it with Beam's local runner, in a process of its own, which has nothing else
from the command. Machines, images and packages of workers are what it has not.
"""

import json
import multiprocessing
import os
import threading
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing.connection import Connection
from typing import Any
from urllib.parse import parse_qs, urlsplit

FORKS = multiprocessing.get_context("forkserver")
PRELOADED = ["pipeline.beam_worker", "pipeline.beam_pipeline"]
# As Beam's client writes ListJobsRequest.Filter.ACTIVE and JobState.JOB_STATE_CANCELLED.
ACTIVE, CANCELLED = "3", 5
ENDED = ("JOB_STATE_DONE", "JOB_STATE_FAILED", "JOB_STATE_CANCELLED")


@dataclass
class ServedJob:
    """A job as it was submitted, and what became of it."""

    description: dict[str, Any]
    state: str = "JOB_STATE_RUNNING"
    error: str | None = None
    cancelled: threading.Event = field(default_factory=threading.Event)

    @property
    def id(self) -> str:
        return str(self.description["id"])

    @property
    def name(self) -> str:
        return str(self.description["name"])

    @property
    def pipeline_url(self) -> str:
        options = self.description["environment"]["sdkPipelineOptions"]["options"]
        return str(options["pipelineUrl"])

    def answer(self) -> dict[str, Any]:
        """Return what the service says of it."""
        told = ("id", "name", "projectId", "location", "clientRequestId")
        return {key: self.description[key] for key in told} | {"currentState": self.state}

    def messages(self) -> dict[str, Any]:
        """Return its messages: of a failure, what Dataflow says of a work item and then of all."""
        texts = [] if self.error is None else [self.error, "Workflow failed."]
        return {
            "jobMessages": [
                {"id": str(i), "messageText": text, "messageImportance": "JOB_MESSAGE_ERROR"}
                for i, text in enumerate(texts)
            ]
        }


class DataflowService(ThreadingHTTPServer):
    """Jobs in the order in which they were submitted; they begin while ``may_begin`` is set.

    Nobody may ask how one is doing while the service ``is_closed``, nor anything else while it
    ``is_disabled``; the next ``num_unanswered`` questions of how one is doing get no answer, and
    ``num_answered`` got one.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("localhost", 0), Handler)
        self.jobs: list[ServedJob] = []
        self.may_begin = threading.Event()
        self.may_begin.set()
        self.is_closed = False
        self.is_disabled = False
        self.num_unanswered = 0
        self.num_answered = 0
        self.has_ended = threading.Event()
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://localhost:{self.server_port}"

    def active(self) -> list[ServedJob]:
        return [job for job in self.jobs if job.state not in ENDED]

    def create(self, description: dict[str, Any]) -> ServedJob:
        """Begin a job, or return the active one of its name, as Dataflow does."""
        with self.lock:
            for job in self.active():
                if job.name == description["name"]:
                    return job
            job = ServedJob(description | {"id": f"job-{len(self.jobs)}"})
            self.jobs.append(job)
        threading.Thread(target=self._run, args=(job,), daemon=True).start()
        return job

    def _run(self, job: ServedJob) -> None:
        self.may_begin.wait()
        if not job.cancelled.is_set():
            receiver, sender = FORKS.Pipe(duplex=False)
            worker = FORKS.Process(
                target=run_staged, args=(job.pipeline_url, dict(os.environ), sender)
            )
            worker.start()
            sender.close()
            try:
                job.error = receiver.recv()
            except EOFError:
                job.error = "the worker was lost"
            worker.join()
        if job.cancelled.is_set():
            job.state = "JOB_STATE_CANCELLED"
        else:
            job.state = "JOB_STATE_FAILED" if job.error else "JOB_STATE_DONE"


def run_staged(pipeline_url: str, environment: Mapping[str, str], sender: Connection) -> None:
    """Run a staged pipeline, as workers would; send None, or the trace of its failure."""
    os.environ.update(environment)
    from apache_beam.options.pipeline_options import PipelineOptions
    from apache_beam.portability.api import beam_runner_api_pb2
    from apache_beam.runners.portability.fn_api_runner import FnApiRunner
    from apache_beam.transforms.environments import EmbeddedPythonEnvironment

    from pipeline import storage

    try:
        pipeline = beam_runner_api_pb2.Pipeline.FromString(storage.read_bytes(pipeline_url))
        here = EmbeddedPythonEnvironment.default().to_runner_api(None)
        for staged in pipeline.components.environments.values():
            staged.CopyFrom(here)
        FnApiRunner().run_via_runner_api(pipeline, PipelineOptions([])).wait_until_finish()
    except Exception:
        sender.send(traceback.format_exc())
    else:
        sender.send(None)
    # Threads of Beam's may linger.
    os._exit(0)


class Handler(BaseHTTPRequestHandler):
    """One request, as https://cloud.google.com/dataflow/docs/reference/rest has them."""

    server: DataflowService
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_GET(self) -> None:
        address = urlsplit(self.path)
        place, _, rest = address.path.partition("/jobs")
        _, _, _, project, _, location = place.split("/")
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        match self.command, rest.strip("/").split("/"):
            case _ if self.server.is_disabled:
                self._reply({"error": {"code": 403, "message": "API not enabled"}}, status=403)
            case "POST", [""]:
                of = {"projectId": project, "location": location}
                self._reply(self.server.create(json.loads(body) | of).answer())
            case "GET", [""]:
                wanted = {name: values[0] for name, values in parse_qs(address.query).items()}
                jobs = self.server.active() if wanted["filter"] == ACTIVE else self.server.jobs
                self._reply({"jobs": [j.answer() for j in jobs if j.name == wanted["name"]]})
            case "GET", [_] if self.server.is_closed:
                self._reply({"error": {"code": 403, "message": "not open to you"}}, status=403)
            case "GET", [_] if self.server.num_unanswered:
                self.server.num_unanswered -= 1
                self.server.has_ended.wait()
            case "GET", [job_id]:
                self.server.num_answered += 1
                self._reply(self._job(job_id).answer())
            case "PUT", [job_id]:
                assert json.loads(body)["requestedState"] == CANCELLED
                self._job(job_id).cancelled.set()
                self._reply(self._job(job_id).answer())
            case "GET", [job_id, "messages"]:
                self._reply(self._job(job_id).messages())

    do_POST = do_PUT = do_GET

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing: a test's output is the test's."""

    def _job(self, job_id: str) -> ServedJob:
        return next(job for job in self.server.jobs if job.id == job_id)

    def _reply(self, content: dict[str, Any], status: int = 200) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@contextmanager
def run_service() -> Iterator[DataflowService]:
    """Run the service in threads of this process, and its jobs in processes that this one forks."""
    FORKS.set_forkserver_preload(PRELOADED)
    with DataflowService() as service:
        thread = threading.Thread(target=service.serve_forever, daemon=True)
        thread.start()
        try:
            yield service
        finally:
            service.has_ended.set()
            service.shutdown()
            thread.join()
