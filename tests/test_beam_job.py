"""A job ends: with its work done, or with a message, and without a process left behind."""

import contextlib
import logging
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil
import pytest
from apache_beam.runners.portability.fn_api_runner import FnApiRunner

from pipeline import beam_job, storage
from pipeline.beam_job import RunnerOptions
from pipeline.beam_pipeline import PublishItems, beam_option_names, empty_pipeline
from pipeline.errors import EvenmixError
from pipeline.stage import Line, Output, WorkItem, lines_of_work_list, write_work_lists
from tests.stages import Words, items

THREE_WORKERS = RunnerOptions(workers=3)
"""One more than most of the jobs here have items, and so need."""

ENDLESS_S = 90.0


def nothing() -> None:
    pass


def workers_of(process: psutil.Process) -> list[psutil.Process]:
    """Return the workers: children of a job, which is one of the fork server's."""
    servers = [child for child in process.children() if "forkserver" in " ".join(cmdline(child))]
    with contextlib.suppress(psutil.NoSuchProcess):
        jobs = [job for server in servers for job in server.children()]
        return [worker for job in jobs for worker in job.children()]
    return []


def cmdline(process: psutil.Process) -> list[str]:
    try:
        return list(process.cmdline())
    except psutil.NoSuchProcess:
        return []


def run(
    stage: Words, shards: Sequence[str] = "ab", while_waiting: Callable[[], None] = nothing
) -> None:
    work_lists = write_work_lists(stage, items(*shards))
    beam_job.run(stage, work_lists, THREE_WORKERS, while_waiting)


@pytest.mark.parametrize(("store", "shards"), [("tmp_path", "a"), ("gcs_bucket", "abcde")])
def test_all_items_are_published(store: str, shards: str, request: pytest.FixtureRequest) -> None:
    """One item alone runs in the job's process, several in worker processes."""
    root = str(request.getfixturevalue(store))
    run(Words(root), shards)
    published = {file.name for file in storage.list_files(f"{root}/words/d")}
    assert published >= {f"{shard}.parquet" for shard in shards}
    assert workers_of(psutil.Process()) == []


def test_an_obstacle_on_a_worker_arrives_with_its_exact_message(tmp_path: Path) -> None:
    """Several lines, words that look like what Beam adds, and more bytes than a pipe holds."""
    message = "a:\n  'quoted' \"b\", é\\n\n  EvenmixError: x [while running 'y']" + " long" * 40_000
    with pytest.raises(EvenmixError) as caught:
        run(Words(str(tmp_path), obstacle=message))
    assert str(caught.value) == message
    assert workers_of(psutil.Process()) == []


def test_a_defect_arrives_with_its_trace(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="ValueError: odd") as caught:
        run(Words(str(tmp_path), defect="odd"))
    assert "in process" in str(caught.value)


@pytest.mark.parametrize("victim", ["worker", "job"])
def test_a_killed_process_ends_the_job_within_a_minute(tmp_path: Path, victim: str) -> None:
    killed_at = 0.0
    family: list[psutil.Process] = []

    def kill_one() -> None:
        nonlocal killed_at
        workers = workers_of(psutil.Process())
        if len(workers) == 2 and not killed_at:
            job = workers[0].parent()
            assert job is not None
            family.extend([job, *workers])
            os.kill(workers[0].pid if victim == "worker" else job.pid, signal.SIGKILL)
            killed_at = time.monotonic()

    with pytest.raises(
        EvenmixError, match="start the same command again, with a smaller --workers"
    ):
        run(Words(str(tmp_path), pause_s=ENDLESS_S), while_waiting=kill_one)
    assert killed_at
    assert time.monotonic() - killed_at < 60
    assert psutil.wait_procs(family, timeout=10)[1] == []

    # What was not done can be done now.
    run(Words(str(tmp_path)))
    assert storage.exists(f"{tmp_path}/words/d/b.parquet")


def test_a_worker_that_was_killed_is_told_from_one_that_has_ended() -> None:
    """Beam may find the connection to one closed before the watchdog finds it gone."""
    context = multiprocessing.get_context("spawn")
    ended = context.Process(target=nothing)
    killed = context.Process(target=time.sleep, args=(ENDLESS_S,))
    for worker in (ended, killed):
        worker.start()
    killed.kill()
    ended.join()
    assert beam_job._has_lost_one([killed])
    assert not beam_job._has_lost_one([ended])


class Watched(Words):
    """Words that tell how many items are under way in this process."""

    running = 0
    most_running = 0

    def process(self, item: WorkItem) -> Output:
        Watched.running += 1
        Watched.most_running = max(Watched.most_running, Watched.running)
        try:
            return super().process(item)
        finally:
            Watched.running -= 1


def lines_of(stage: Words, shards: str) -> list[Line]:
    (work_list,) = write_work_lists(stage, items(*shards))
    return lines_of_work_list(work_list)


@pytest.mark.parametrize("at_once", [1, 3])
def test_a_bundle_does_as_many_items_at_once_as_the_stage_wants(
    tmp_path: Path, at_once: int
) -> None:
    Watched.most_running = 0
    stage = Watched(str(tmp_path), pause_s=0.05, items_at_once=at_once)
    bundle = PublishItems(stage)
    bundle.start_bundle()
    for line in lines_of(stage, "abcdefg"):
        bundle.process(line)
    bundle.finish_bundle()
    assert Watched.most_running == at_once
    for shard in "abcdefg":
        assert storage.exists(f"{tmp_path}/words/d/{shard}.parquet")


@pytest.mark.parametrize("num_items", [2, 3])
def test_an_error_of_an_item_ends_its_bundle_and_leaves_nothing_running(
    tmp_path: Path, num_items: int
) -> None:
    """It is raised where a place is waited for, or at the end."""
    threads = set(threading.enumerate())
    stage = Watched(str(tmp_path), pause_s=0.1, defect="odd", items_at_once=2)
    bundle = PublishItems(stage)
    bundle.start_bundle()
    first, second, *others = lines_of(stage, "abc"[:num_items])
    bundle.process(first)
    bundle.process(second)
    with pytest.raises(ValueError, match="odd"):
        if others:
            bundle.process(*others)
        bundle.finish_bundle()
    # Threads of others, such as a server's, may have ended meanwhile.
    assert set(threading.enumerate()) <= threads
    assert Watched.running == 0


PARENT = """
import signal
import sys
from pipeline import beam_job
from pipeline.stage import write_work_lists
from tests.stages import Words, items
# Python ignores Ctrl-C where its parent was started in the background.
signal.signal(signal.SIGINT, signal.default_int_handler)
stage = Words(sys.argv[1], pause_s=90)
lists = write_work_lists(stage, items("a", "b"))
beam_job.run(stage, lists, beam_job.RunnerOptions(workers=2), lambda: None)
"""


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGINT])
def test_a_job_whose_command_ended_ends_too(tmp_path: Path, end: signal.Signals) -> None:
    command = subprocess.Popen(
        [sys.executable, "-c", PARENT, str(tmp_path)], stderr=subprocess.DEVNULL
    )
    parent = psutil.Process(command.pid)
    deadline = time.monotonic() + 150  # both have Beam to import first
    while len(workers_of(parent)) < 2:
        assert time.monotonic() < deadline
        assert command.poll() is None
        time.sleep(0.1)
    family = parent.children(recursive=True)
    command.send_signal(end)
    command.wait(timeout=60)
    assert psutil.wait_procs(family, timeout=60)[1] == []


ALONE = """
import sys
from pipeline import beam_job, command_options, ingest
from pipeline.stage import write_work_lists
from tests.stages import Words, items
stage = Words(sys.argv[1])
beam_job.run(stage, write_work_lists(stage, items("a")), beam_job.RunnerOptions(), lambda: None)
assert "apache_beam" not in sys.modules
"""


def test_the_command_itself_does_without_beam(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-c", ALONE, str(tmp_path)], check=True)
    assert storage.exists(f"{tmp_path}/words/d/a.parquet")


class Telling(Words):
    """Words whose workers have something to tell, then more for nobody, and then fail."""

    def process(self, item: WorkItem) -> Output:
        log = logging.getLogger("captioning.engine")
        log.warning("[red]the server of %s\x1b[2J does not work now", item.shard)
        log.info("starting another for %s", item.shard)
        log.debug("details")
        logging.getLogger("pipeline.fetch").error("nobody is told")
        logging.error("neither this")
        return super().process(item)


TELLING = """
import sys
from pipeline import beam_job
from pipeline.stage import write_work_lists
from tests.stages import items
from tests.test_beam_job import Telling
stage = Telling(sys.argv[1], defect="odd")
try:
    beam_job.run(stage, write_work_lists(stage, items(*sys.argv[2])), beam_job.RunnerOptions(2),
                 lambda: None)
except Exception:  # on a busy machine, a worker that is ended may count as lost
    print("failed", file=sys.stderr)
"""


@pytest.mark.parametrize("shards", ["a", "ab"])
def test_workers_may_tell_a_few_things_and_nothing_else_is_printed(
    tmp_path: Path, shards: str
) -> None:
    """One item alone runs in the job's process, several in worker processes."""
    command = [sys.executable, "-c", TELLING, str(tmp_path), shards]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    *told, last = done.stderr.splitlines()
    possible = [
        line
        for shard in shards
        for line in (
            f"[red]the server of {shard}\ufffd[2J does not work now",
            f"starting another for {shard}",
        )
    ]
    assert told  # the other worker may have been ended before
    assert set(told) <= set(possible)
    assert (last, done.stdout) == ("failed", "")


def test_beam_options_are_known_by_name() -> None:
    names = beam_option_names()
    assert {"--runner", "--project", "--max_num_workers", "--direct_num_workers"} <= set(names)
    assert "--min-short-edge" not in names


def test_a_runner_among_beams_options_is_taken() -> None:
    assert RunnerOptions(2).is_local
    for args in [("--runner", "DataflowRunner"), ("--runner=DataflowRunner",)]:
        assert not RunnerOptions(2, args).is_local
        with pytest.raises(EvenmixError, match="Missing required option: project"):
            empty_pipeline(RunnerOptions(2, args))
    local = empty_pipeline(RunnerOptions(3))
    assert type(local.runner) is FnApiRunner
    assert local.options.get_all_options()["direct_num_workers"] == 3
