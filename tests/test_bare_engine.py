"""When the bare engine cannot be measured; tests/test_caption_run.py measures it."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import psutil
import pytest

from captioning import bare_engine
from captioning.engine import keeper
from captioning.engine.questions import EngineConfig
from captioning.engine.server import meeting_folder
from pipeline.errors import EvenmixError


def test_of_an_endpoint_only_its_owner_has_the_engine() -> None:
    config = EngineConfig("some/model", endpoint="http://127.0.0.1:8000/v1")
    with pytest.raises(EvenmixError, match=r"bare engine of http://127\.0\.0\.1:8000/v1 cannot"):
        bare_engine.measure(config, [])


def test_it_waits_for_the_memory_of_a_server_that_still_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setattr(bare_engine, "SERVER_END_TIMEOUT_S", 0.1)
    environment = os.environ | {keeper.MARK: str(meeting_folder(str(tmp_path), {}))}
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=-1, env=environment) as server:
        with pytest.raises(EvenmixError, match="to another run on this machine"):
            bare_engine.measure(EngineConfig(str(tmp_path)), [])
        server.communicate(b"\n")


def test_a_killed_command_leaves_nothing_on_the_accelerator() -> None:
    engine = """
        import subprocess, sys, time
        from captioning import bare_engine
        bare_engine.end_with_parent()
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        print(child.pid, flush=True)
        time.sleep(600)
    """
    command = "import subprocess, sys; subprocess.run([sys.executable, '-c', sys.argv[1]])"
    with subprocess.Popen(
        [sys.executable, "-c", command, textwrap.dedent(engine)], stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        child = psutil.Process(int(process.stdout.readline()))
        family = [child, *child.parents()[:1]]
        process.kill()
        assert psutil.wait_procs(family, timeout=10)[1] == []
