"""What a command costs is counted with all that it starts, also when that outlives its parent."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.benchmarks.measure import run

BUSY = """
import time
held = bytearray(64 << 20)
while time.process_time() < 1.5:
    pass
"""
# A process that ends at once, and leaves the work to another that it does not wait for.
ORPHANED = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {BUSY!r}])"


def test_a_command_is_measured(tmp_path: Path) -> None:
    cost = run([sys.executable, "-c", BUSY], tmp_path / "log")
    assert 1.5 <= cost.cpu_s < 2.5
    assert 64 << 20 <= cost.peak_bytes < 128 << 20
    assert cost.wall_s >= 1.4


def test_what_outlives_its_parent_is_counted(tmp_path: Path) -> None:
    cost = run([sys.executable, "-c", ORPHANED], tmp_path / "log")
    assert 1.5 <= cost.cpu_s < 2.5


def test_a_failure_is_an_error_and_its_words_are_kept(tmp_path: Path) -> None:
    with pytest.raises(subprocess.CalledProcessError, match="exit status 3"):
        run([sys.executable, "-c", "print('why'); raise SystemExit(3)"], tmp_path / "log")
    assert (tmp_path / "log").read_text() == "why\n"
