"""A job ends: with its work done, or with a message, and without a process left behind."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil
import pytest
from apache_beam.runners.portability.fn_api_runner import FnApiRunner

from pipeline import beam_job, storage
from pipeline.beam_job import RunnerOptions, beam_option_names
from pipeline.errors import EvenmixError
from pipeline.stage import write_work_lists
from tests.stages import Words, items

TWO_WORKERS = RunnerOptions(workers=2)
WORKER_MODULE = "pipeline.beam_worker"
ENDLESS_S = 90.0


def nothing() -> None:
    pass


def workers_of(process: psutil.Process) -> list[psutil.Process]:
    return [
        child
        for child in process.children(recursive=True)
        if WORKER_MODULE in cmdline(child)  # not its shell, where it is a part of a word
    ]


def cmdline(process: psutil.Process) -> list[str]:
    try:
        return list(process.cmdline())
    except psutil.NoSuchProcess:
        return []


def run(
    stage: Words, shards: Sequence[str] = "ab", while_waiting: Callable[[], None] = nothing
) -> None:
    work_lists = write_work_lists(stage, items(*shards))
    beam_job.run(stage, work_lists, TWO_WORKERS, while_waiting)


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
            job = next(p for p in workers[0].parents() if "forkserver" in " ".join(cmdline(p)))
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
    deadline = time.monotonic() + 30
    while len(workers_of(parent)) < 2:
        assert time.monotonic() < deadline
        assert command.poll() is None
        time.sleep(0.1)
    family = parent.children(recursive=True)
    command.send_signal(end)
    command.wait(timeout=15)
    assert psutil.wait_procs(family, timeout=15)[1] == []


def test_beam_options_are_known_by_name() -> None:
    names = beam_option_names()
    assert {"--runner", "--project", "--max_num_workers", "--direct_num_workers"} <= set(names)
    assert "--min-short-edge" not in names


def test_a_runner_among_beams_options_is_taken() -> None:
    assert RunnerOptions(2).is_local
    for args in [("--runner", "DataflowRunner"), ("--runner=DataflowRunner",)]:
        assert not RunnerOptions(2, args).is_local
        with pytest.raises(EvenmixError, match="Missing required option: project"):
            RunnerOptions(2, args).pipeline(5)
    local = RunnerOptions(4).pipeline(3)
    assert type(local.runner) is FnApiRunner
    assert local.options.get_all_options()["direct_num_workers"] == 3
