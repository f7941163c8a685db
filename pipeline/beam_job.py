"""Running a stage's work items with Beam, in a process of its own and under a watchdog.

Beam's local runner waits for ever when one of its worker processes is killed, for instance by the
kernel when memory runs out. So a local job runs in a child process that watches its workers: a
lost worker ends the job with a message within seconds, and a job whose parent is gone ends itself
and its workers.
"""

import argparse
import contextlib
import json
import logging
import multiprocessing
import os
import shlex
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

import apache_beam as beam
import psutil
from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.runners.portability.fn_api_runner import FnApiRunner
from apache_beam.transforms.environments import (
    EmbeddedPythonEnvironment,
    SubprocessSDKEnvironment,
)

from pipeline.errors import EvenmixError
from pipeline.stage import Stage, WorkItem, publish_item, read_work_list

_WORKER_MODULE = "pipeline.beam_worker"
_CARRIED = "evenmix could not go on: "
_LOST_WORKER_GRACE_S = 5.0
_POLL_S = 0.5


@dataclass(frozen=True)
class RunnerOptions:
    """Where a job runs.

    ``beam_args`` are Beam's own options; without ``--runner`` among them the job runs on this
    machine with ``workers`` processes.
    """

    workers: int = field(default_factory=lambda: os.cpu_count() or 1)
    beam_args: tuple[str, ...] = ()

    @property
    def is_local(self) -> bool:
        """Tell whether the job runs on this machine."""
        return not any(arg.split("=")[0] == "--runner" for arg in self.beam_args)

    def pipeline(self, num_items: int) -> beam.Pipeline:
        """Return an empty pipeline for so many items; one alone runs in the job's own process.

        Raises:
            EvenmixError: Beam's runner lacks an option that it needs.
        """
        # Beam would pickle the main module by default; nothing of ours lives there.
        args = [*self.beam_args, "--no_save_main_session"]
        if not self.is_local:
            try:
                return beam.Pipeline(options=PipelineOptions(args))
            except ValueError as error:
                raise EvenmixError(f"Beam refuses its options: {error}") from error
        workers = max(1, min(self.workers, num_items))
        command = f"{shlex.quote(sys.executable)} -m {_WORKER_MODULE}"
        environment = (
            SubprocessSDKEnvironment.from_command_string(command)
            if workers > 1
            else EmbeddedPythonEnvironment.default()
        )
        return beam.Pipeline(
            runner=FnApiRunner(default_environment=environment),
            options=PipelineOptions([*args, f"--direct_num_workers={workers}"]),
        )


class PublishItems(beam.DoFn):  # type: ignore[misc]
    """Publishes work items of one stage."""

    def __init__(self, stage: Stage) -> None:
        self._stage = stage

    def process(self, element: WorkItem) -> None:
        """Publish one item."""
        with _carry_message():
            publish_item(self._stage, element)


def _read_items(work_list_url: str) -> list[WorkItem]:
    with _carry_message():
        return read_work_list(work_list_url)


@contextlib.contextmanager
def _carry_message() -> Iterator[None]:
    """Put the message of an EvenmixError in a form that :func:`_failure` finds again.

    Beam turns exceptions into tracebacks, in which the end of a message of several lines cannot be
    told from what follows it: as JSON it is one line with an end.
    """
    try:
        yield
    except EvenmixError as error:
        raise RuntimeError(_CARRIED + json.dumps(str(error))) from None


def build(pipeline: beam.Pipeline, stage: Stage, work_list_urls: Sequence[str]) -> beam.PCollection:
    """Add a stage to a pipeline. Only references travel between its steps, never pictures."""
    publish = beam.ParDo(PublishItems(stage))
    if stage.resource_hints:
        publish = publish.with_resource_hints(**stage.resource_hints)
    return (
        pipeline
        | "WorkLists" >> beam.Create(work_list_urls)
        | "ReadWorkList" >> beam.FlatMap(_read_items)
        | "SpreadOverWorkers" >> beam.Reshuffle()
        | "PublishItems" >> publish
    )


def run(
    stage: Stage,
    work_list_urls: Sequence[str],
    options: RunnerOptions,
    while_waiting: Callable[[], Any],
) -> None:
    """Run a stage's work lists to their end, calling ``while_waiting`` about every second.

    Raises:
        EvenmixError: an item cannot be done, or a worker process was lost.
        RuntimeError: an item failed in a way that evenmix does not know; the text has Beam's trace.
    """
    # A fork server has imported Beam once and has no threads, so each job starts at once.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([_WORKER_MODULE, __name__])
    receiver, sender = context.Pipe(duplex=False)
    job = context.Process(
        target=_job_main, args=(stage, work_list_urls, options, dict(os.environ), sender)
    )
    job.start()
    sender.close()
    family: list[psutil.Process] = []
    try:
        # The job sends its failure, or its end of the pipe closes.
        while job.is_alive() and not receiver.poll(timeout=1.0):
            family = _family(job.pid) or family
            while_waiting()
        failure = _receive(receiver)
        job.join(_LOST_WORKER_GRACE_S)
    finally:
        # If the job was killed, its workers are orphans that would go on.
        _kill([*family, *_family(job.pid)] if job.is_alive() else family)
        job.join()
    if failure is not None:
        raise failure
    if job.exitcode:
        raise _lost(f"the job's process ended with exit code {job.exitcode}")


def _receive(receiver: Connection) -> Exception | None:
    with contextlib.suppress(EOFError):
        failure: Exception = receiver.recv()
        return failure
    return None


def _lost(what: str) -> EvenmixError:
    return EvenmixError(
        f"{what}; most likely it was killed because memory ran out. What was published is kept: "
        "start the same command again, with a smaller --workers if it happens again."
    )


def _job_main(
    stage: Stage,
    work_list_urls: Sequence[str],
    options: RunnerOptions,
    environment: Mapping[str, str],
    sender: Connection,
) -> None:
    """Run the pipeline; the body of the job's process."""
    # The fork server has kept the environment of the moment when it was started.
    os.environ.update(environment)
    # The parent handles Ctrl-C for both.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if options.is_local:
        # Beam logs every worker's traceback several times; the failure below has it once.
        logging.disable(logging.CRITICAL)
        threading.Thread(target=_watch_family, args=(sender,), daemon=True).start()
    else:
        logging.basicConfig(level=logging.INFO, force=True)
    try:
        num_items = sum(len(read_work_list(url)) for url in work_list_urls)
        pipeline = options.pipeline(num_items)
        build(pipeline, stage, work_list_urls)
        pipeline.run().wait_until_finish()
    except Exception as error:
        sender.send(_failure(error))
    # Threads of Beam's may linger; all work is published or reported.
    _kill(_family(os.getpid())[:-1])
    os._exit(0)


def _failure(error: Exception) -> Exception:
    """Recover the message of an EvenmixError that Beam has wrapped into a worker's traceback."""
    if isinstance(error, EvenmixError):
        return error
    text = str(error)
    start = text.rfind(_CARRIED)
    if start < 0:
        return RuntimeError(text)
    message, _ = json.JSONDecoder().raw_decode(text, start + len(_CARRIED))
    return EvenmixError(message)


def _watch_family(sender: Connection) -> None:
    """End this job when a worker has been lost, or when the parent has gone."""
    me = psutil.Process()
    parent = multiprocessing.parent_process()
    workers: dict[int, float] = {}
    while True:
        time.sleep(_POLL_S)
        if parent is not None and not parent.is_alive():
            _kill(_family(me.pid))
        alive = _worker_pids(me)
        now = time.monotonic()
        workers = {pid: workers.get(pid, now) for pid in workers} | dict.fromkeys(alive, now)
        lost = [pid for pid, seen in workers.items() if now - seen > _LOST_WORKER_GRACE_S]
        if lost:
            sender.send(_lost(f"worker process {lost[0]} is gone"))
            _kill(_family(me.pid))


def _worker_pids(job: psutil.Process) -> list[int]:
    pids = []
    for child in job.children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if child.status() != psutil.STATUS_ZOMBIE and any(
                _WORKER_MODULE in word for word in child.cmdline()
            ):
                pids.append(child.pid)
    return pids


def _family(pid: int | None) -> list[psutil.Process]:
    """Return all processes that a process has started, and it last; nothing if it is gone."""
    with contextlib.suppress(psutil.NoSuchProcess):
        root = psutil.Process(pid)
        return [*root.children(recursive=True), root]
    return []


def _kill(processes: Sequence[psutil.Process]) -> None:
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def beam_option_names() -> list[str]:
    """Return the names of all options that Beam knows, such as ``--runner``."""
    parser = argparse.ArgumentParser(add_help=False, conflict_handler="resolve")
    for options in (PipelineOptions, *PipelineOptions.__subclasses__()):
        if "_add_argparse_args" in vars(options):
            options._add_argparse_args(parser)
    return [name for action in parser._actions for name in action.option_strings]
