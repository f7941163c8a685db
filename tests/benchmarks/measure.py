"""What a command costs with all processes that it starts: time, CPU, memory."""

import contextlib
import ctypes
import os
import resource
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

_PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h
_SAMPLE_S = 0.5


@dataclass(frozen=True)
class Cost:
    """The cost of one run; ``peak_bytes`` is the largest sum of PSS over its processes.

    PSS counts a page that n processes share as 1/n of a page in each of them.
    """

    wall_s: float
    cpu_s: float
    peak_bytes: int


def run(command: Sequence[str], log: Path) -> Cost:
    """Run a command to its end and measure it; what it prints goes to ``log``.

    This process must have no other child that ends meanwhile. Linux only.

    Raises:
        subprocess.CalledProcessError: the command failed.
    """
    others = _descendants()
    cpu_before, started, peak = _children_cpu_s(), time.monotonic(), 0
    with log.open("wb") as output, _adopting_orphans():
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        while process.poll() is None:
            peak = max(peak, sum(map(_pss, _descendants() - others)))
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_SAMPLE_S)
        wall_s = time.monotonic() - started
        while orphans := _descendants() - others:
            for orphan in orphans & set(psutil.Process().children()):
                os.waitpid(orphan.pid, 0)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, list(command))
    return Cost(wall_s, _children_cpu_s() - cpu_before, peak)


@contextlib.contextmanager
def _adopting_orphans() -> Iterator[None]:
    """Become the parent of whoever loses its own, so that nobody's CPU time goes uncounted."""
    prctl = ctypes.CDLL(None).prctl
    prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    try:
        yield
    finally:
        prctl(_PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)


def _children_cpu_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def _descendants() -> set[psutil.Process]:
    return set(psutil.Process().children(recursive=True))


def _pss(process: psutil.Process) -> int:
    with contextlib.suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
        return int(process.memory_full_info().pss)
    return 0
