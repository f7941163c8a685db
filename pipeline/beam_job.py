"""Running a stage's work items with Beam, in a process of its own and under a watchdog.

Beam's local runner waits for ever when one of its worker processes is killed, for instance by the
kernel when memory runs out. So a job runs in a child process, which watches the workers of a local
one: a lost worker ends the job with a message within half a minute, and a job whose parent is gone
ends itself and its workers.
"""

import contextlib
import logging
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

import psutil

from pipeline.dataflow import Command, Dataflow, Resources
from pipeline.errors import EvenmixError
from pipeline.notices import notices, send_notices
from pipeline.stage import Stage, read_work_list

_ALLOCATOR = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": str(4 << 20)}
"""glibc's settings in workers. By default each thread has a heap of its own, and all of them keep
what pictures and shards have left free; with these it goes back to the system. They are read when
a program starts: the fork server's, which workers are forked from in the end."""

_PRELOADED = ["pipeline.beam_worker", "pipeline.beam_pipeline"]
_LOST_WORKER_GRACE_S = 15.0
"""How long a job may take to tell what became of it after it has let its workers go. Beam's runner
waits up to 5 s for its connections to them, and only then raises the failure of an item; the
watchdog must not tell of a lost worker before. A job that has told all has as long to exit."""
_POLL_S = 0.5


@dataclass(frozen=True)
class RunnerOptions:
    """Where a job runs.

    ``beam_args`` are Beam's own options; without ``--runner`` among them the job runs on this
    machine with ``workers`` processes. ``dataflow`` and ``resources`` are the recipe's, for the
    runner of that name.
    """

    workers: int = field(default_factory=lambda: os.cpu_count() or 1)
    beam_args: tuple[str, ...] = ()
    dataflow: Dataflow = field(default_factory=Dataflow)
    resources: Mapping[Command, Resources] = field(default_factory=dict)

    @property
    def is_local(self) -> bool:
        """Tell whether the job runs on this machine."""
        return self._runner is None

    @property
    def is_dataflow(self) -> bool:
        """Tell whether the job runs on Google Cloud Dataflow."""
        return self._runner in ("dataflow", "dataflowrunner")

    @property
    def _runner(self) -> str | None:
        for word, following in pairwise([*self.beam_args, ""]):
            name, equals, value = word.partition("=")
            if name == "--runner":
                return (value if equals else following).lower()
        return None


@dataclass(frozen=True)
class RemoteJob:
    """A job in the cloud, which goes on without the command that waits for it."""

    id: str
    url: str


def run(
    stage: Stage,
    work_list_urls: Sequence[str],
    options: RunnerOptions,
    while_waiting: Callable[[], Any],
) -> None:
    """Run a stage's work lists to their end, calling ``while_waiting`` about every second.

    What the workers of a local job have to tell is printed meanwhile (pipeline/notices.py). A job
    on Dataflow outlives this process: the same call finds it again and waits for it.

    Raises:
        EvenmixError: an item cannot be done, or a worker process was lost.
        RuntimeError: an item failed in a way that evenmix does not know; the text has Beam's trace.
    """
    if options.is_local:
        num_items = sum(len(read_work_list(url)) for url in work_list_urls)
        options = replace(options, workers=max(1, min(options.workers, num_items)))
    # A fork server has imported Beam once and has no threads, so each job starts at once.
    os.environ.update(_ALLOCATOR)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    receiver, sender = context.Pipe(duplex=False)
    with notices() as news:
        environment = os.environ | news.environment
        job = context.Process(
            target=_job_main, args=(stage, work_list_urls, options, environment, sender)
        )
        job.start()
        sender.close()
        family: list[psutil.Process] = []
        remote: RemoteJob | None = None
        try:
            # The job sends where it runs if that is elsewhere, news, and its failure, or ends.
            while True:
                if wait([receiver, job.sentinel], timeout=1.0):
                    match _receive(receiver):
                        case RemoteJob() as remote:
                            place = f"{remote.id}: {remote.url}"
                            _print(f"{stage.name}: waiting for the Dataflow job {place}")
                        case str() as text:
                            _print(f"{stage.name}: {text}")
                        case failure:
                            break
                family = _family(job.pid) or family
                while_waiting()
                news.show()
            job.join(_LOST_WORKER_GRACE_S)
        except (KeyboardInterrupt, EvenmixError):
            if remote is not None:
                _print(
                    f"the Dataflow job {remote.id} goes on in the cloud: the same command waits "
                    f"for it again, and it can be cancelled at {remote.url}"
                )
            raise
        finally:
            # If the job was killed, its workers are orphans that would go on.
            _kill([*family, *_family(job.pid)] if job.is_alive() else family)
            job.join()
    if failure is not None:
        raise failure
    if job.exitcode:
        raise _lost(f"the job's process ended with exit code {job.exitcode}")


def _receive(receiver: Connection) -> RemoteJob | str | Exception | None:
    # A killed job's workers may still hold its end of the pipe.
    with contextlib.suppress(EOFError):
        if receiver.poll():
            message: RemoteJob | str | Exception = receiver.recv()
            return message
    return None


def _print(line: str) -> None:
    from pipeline.progress import console  # noqa: PLC0415  # workers do without rich

    console.print(line, markup=False, soft_wrap=True)


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
    # Only here, so that the command does without Beam.
    from pipeline import beam_pipeline  # noqa: PLC0415

    # The fork server has kept the environment of the moment when it was started.
    os.environ.update(environment)
    # The parent handles Ctrl-C for both.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if options.is_local:
        # Beam logs every worker's traceback several times; the failure below has it once. What has
        # a handler of its own is still logged.
        logging.getLogger().handlers = [logging.NullHandler()]
        send_notices()
        workers = beam_pipeline.fork_workers(options)
    else:
        logging.basicConfig(level=logging.WARNING, force=True)
        workers = []
    threading.Thread(target=_watch, args=(workers, sender), daemon=True).start()
    try:
        if options.is_dataflow:
            # It takes Google's clients a second to import.
            from pipeline import dataflow_job  # noqa: PLC0415

            dataflow_job.run_to_end(stage, work_list_urls, options, sender.send)
        else:
            beam_pipeline.run_to_end(stage, work_list_urls, options)
    except Exception as error:
        failure = beam_pipeline.failure_of(error)
        if not beam_pipeline.is_of_step(error) and _has_lost_one(workers):
            # Beam found its connection closed before the watchdog found that it is gone.
            failure = _lost("a worker process is gone")
        sender.send(failure)
    # Threads of Beam's may linger; all work is published or reported.
    _kill(_family(os.getpid())[:-1])
    os._exit(0)


def _has_lost_one(workers: Sequence[BaseProcess]) -> bool:
    """Tell whether a worker has not ended by itself, which may take a moment to show."""
    wait([worker.sentinel for worker in workers], timeout=_POLL_S)
    return any(worker.exitcode for worker in workers)


def _watch(workers: Sequence[BaseProcess], sender: Connection) -> None:
    """End this job when a worker has been lost, or when the parent has gone."""
    parent = multiprocessing.parent_process()
    while parent is None or parent.is_alive():
        lost = [worker.pid for worker in workers if not worker.is_alive()]
        if lost:
            # A job that is about to end has let its workers go.
            time.sleep(_LOST_WORKER_GRACE_S)
            with contextlib.suppress(OSError):  # the parent may have gone meanwhile
                sender.send(_lost(f"worker process {lost[0]} is gone"))
            break
        time.sleep(_POLL_S)
    _kill(_family(os.getpid()))


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
