"""The keeper and its lease, on ordinary processes: what must hold for any server command."""

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from captioning.engine import keeper, server
from captioning.engine.keeper import Phase
from pipeline.errors import EvenmixError

# A stand-in for the command only: it listens on the socket, and has a child that would outlive it.
HEALTHY_SERVER = """
import http.server, os, socketserver, subprocess, sys
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
    def log_message(self, *args):
        pass
    def address_string(self):
        return "unix"
socketserver.UnixStreamServer("run/socket", Handler).serve_forever()
"""


@pytest.fixture
def short_tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A temporary folder with a path short enough for sockets.

    `tmp_path` comes before, or else pytest would make the folder of all tests in this one.
    """
    with tempfile.TemporaryDirectory(prefix="ev") as folder:
        monkeypatch.setenv("TMPDIR", folder)
        monkeypatch.setattr(tempfile, "tempdir", None)
        yield Path(folder)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A folder that looks like a checkpoint to evenmix; no vLLM opens it in this file."""
    (tmp_path / "config.json").write_text("{}")
    return tmp_path


def _lease(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, code: str, start_timeout_s: float = 30
) -> server.ServerLease:
    """A lease whose server is a small Python program instead of vLLM."""
    monkeypatch.setattr(server, "server_command", lambda *_: [sys.executable, "-c", code])
    return server.ServerLease(str(checkpoint), {}, start_timeout_s=start_timeout_s)


def _eventually(condition: Callable[[], bool], timeout_s: float = 20) -> bool:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.05)
    return False


def _pids(folder: Path) -> set[int]:
    return {process.pid for process in keeper.marked_processes(folder)}


def _keeper_pid(folder: Path) -> int:
    """The parent of the server, which carries no mark itself."""
    marked = keeper.marked_processes(folder)
    parents: set[int] = {process.ppid() for process in marked}
    (pid,) = parents - {process.pid for process in marked}
    return pid


def test_the_command_line_holds_the_arguments() -> None:
    arguments = {
        "max_model_len": 1024,
        "enforce_eager": True,
        "enable_prefix_caching": False,
        "limit_mm_per_prompt": {"image": 1},
    }
    command = server.server_command("org/model", arguments, Path("/run/socket"))
    assert command == [
        *(sys.executable, "-m", "vllm.entrypoints.openai.api_server"),
        *("--model", "org/model", "--served-model-name", "captioner", "--uds", "/run/socket"),
        *(
            "--disable-uvicorn-access-log",
            "--generation-config=vllm",
            "--disable-log-stats",
            "--max-model-len=1024",
            "--enforce-eager",
        ),
        *("--no-enable-prefix-caching", '--limit-mm-per-prompt={"image": 1}'),
    ]


def test_a_value_is_never_taken_for_a_flag() -> None:
    arguments = {"enforce_eager": "--trust-remote-code", "reasoning_parser": "qwen3"}
    command = server.server_command("org/model", arguments, Path("/run/socket"))
    assert command[-2:] == ["--enforce-eager=--trust-remote-code", "--reasoning-parser=qwen3"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("port", "port is not allowed: it would change how the server is reached"),
        ("revision", "revision is not allowed: evenmix sets it itself"),
        ("served_model_name", "served_model_name is not allowed: evenmix sets it itself"),
        ("trust-remote-code", "trust_remote_code is not allowed: it would run code"),
        ("--trust_remote-c", "trust_remote_c, short for trust_remote_code, is not allowed"),
        ("t", "t, short for trust_remote_code, is not allowed"),
        ("allowed_local_media", "short for allowed_local_media_path, .* read files"),
        ("hf_token", "hf_token is not allowed: .*; set HF_TOKEN in the environment"),
        ("api_key", "api_key is not allowed: a secret would be seen"),
        ("config", "config is not allowed: it would hide arguments"),
        ("ssl_k", "ssl_k, short for ssl_keyfile, is not allowed"),
        ("middleware", "middleware is not allowed: it would run code"),
        ("reasoning_parser_p", "short for reasoning_parser_plugin, is not allowed"),
        ("trust_remote_code=true", "'trust_remote_code=true' is no name such as max_model_len"),
        ("hf_overrides.auto_map", "is no name such as"),
        ("max_model_len --port", "is no name such as"),
        ("", "is no name such as"),
    ],
)
def test_forbidden_arguments_are_errors(name: str, message: str) -> None:
    with pytest.raises(EvenmixError, match=message):
        server.server_command("org/model", {"max_model_len": 9, name: True}, Path("/run/socket"))


def test_a_revision_is_asked_for_and_tells_servers_apart(short_tmp: Path) -> None:
    commit = "ab" * 20
    command = server.server_command("org/model", {}, Path("/run/socket"), commit)
    assert command[3:7] == ["--model", "org/model", "--revision", commit]
    folders = {server.meeting_folder("org/model", {}, each) for each in (None, commit, "cd" * 20)}
    assert len(folders) == 3


def test_a_folder_that_others_can_enter_is_refused(short_tmp: Path, checkpoint: Path) -> None:
    (short_tmp / f"evenmix-{os.getuid()}").mkdir(mode=0o755)
    with pytest.raises(EvenmixError, match="not a folder of yours alone"):
        server.ServerLease(str(checkpoint), {}, start_timeout_s=1)


def test_a_temporary_folder_too_deep_for_sockets_is_an_error(
    short_tmp: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deep = short_tmp / ("d" * 60)
    deep.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(deep))
    with pytest.raises(EvenmixError, match="set TMPDIR to a shorter path"):
        server.ServerLease(str(checkpoint), {}, start_timeout_s=1)


def test_leases_share_one_server_until_the_last_is_released(
    short_tmp: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = _lease(checkpoint, monkeypatch, HEALTHY_SERVER)
    second = _lease(checkpoint, monkeypatch, HEALTHY_SERVER)
    assert first.folder.is_relative_to(short_tmp)
    first.wait_until_ready()
    pids = _pids(first.folder)
    second.wait_until_ready()
    assert len(pids) == 2
    first.release()
    time.sleep(3 * keeper.POLL_INTERVAL_S)
    assert _pids(first.folder) == pids
    assert keeper.is_healthy(first.folder)
    second.release()
    assert _eventually(lambda: not _pids(first.folder))


def test_a_killed_server_is_replaced_and_its_children_are_killed(
    short_tmp: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lease = _lease(checkpoint, monkeypatch, HEALTHY_SERVER)
    lease.wait_until_ready()
    before = _pids(lease.folder)
    server_pid = next(p for p in before if psutil.Process(p).ppid() not in before)
    os.kill(server_pid, signal.SIGKILL)
    lease.wait_until_ready()
    assert _eventually(lambda: len(_pids(lease.folder)) == 2)
    assert not before & _pids(lease.folder)
    lease.release()
    assert _eventually(lambda: not _pids(lease.folder))


@pytest.mark.parametrize("use_again", [True, False])
def test_a_killed_keeper_leaves_nothing(
    use_again: bool, short_tmp: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lease = _lease(checkpoint, monkeypatch, HEALTHY_SERVER)
    lease.wait_until_ready()
    before = _pids(lease.folder)
    os.kill(_keeper_pid(lease.folder), signal.SIGKILL)
    assert _eventually(lambda: not keeper.is_healthy(lease.folder))
    assert _pids(lease.folder)  # the server's child, which no one has told
    if use_again:
        lease.wait_until_ready()
        assert not before & _pids(lease.folder)
    lease.release()
    assert _eventually(lambda: not _pids(lease.folder))


def test_a_killed_worker_loses_its_lease(
    short_tmp: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lease = _lease(checkpoint, monkeypatch, HEALTHY_SERVER)
    lease.wait_until_ready()
    worker = subprocess.Popen(
        [sys.executable, "-c", _HOLD_LEASE, str(lease.folder / "users")], stdout=subprocess.PIPE
    )
    assert worker.stdout is not None
    assert worker.stdout.readline() == b"held\n"
    lease.release()
    time.sleep(3 * keeper.POLL_INTERVAL_S)
    assert keeper.is_healthy(lease.folder)
    worker.kill()
    worker.communicate()
    assert _eventually(lambda: not _pids(lease.folder))


_HOLD_LEASE = """
import fcntl, os, sys, time
fcntl.flock(os.open(sys.argv[1], os.O_RDWR), fcntl.LOCK_SH)
print("held", flush=True)
time.sleep(600)
"""


def test_a_server_that_exits_is_an_error_with_its_last_words(
    short_tmp: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lease = _lease(checkpoint, monkeypatch, "import sys; print('no memory'); sys.exit(3)")
    with pytest.raises(EvenmixError, match=r"exited with status 3(?s:.*)no memory(?s:.*)whole log"):
        lease.wait_until_ready()
    lease.release()


def test_a_server_that_hangs_is_an_error_and_is_killed(
    short_tmp: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lease = _lease(checkpoint, monkeypatch, "import time; time.sleep(600)", start_timeout_s=2)
    with pytest.raises(EvenmixError, match="did not answer within 2 s"):
        lease.wait_until_ready()
    assert keeper.read_phase(lease.folder)[0] is Phase.FAILED
    assert _eventually(lambda: not _pids(lease.folder))
    lease.release()


def test_all_who_wait_for_a_server_share_its_failure(
    short_tmp: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = "import sys, time; print('up', file=open('starts', 'a')); time.sleep(1); sys.exit(3)"
    leases = [_lease(checkpoint, monkeypatch, code) for _ in range(4)]

    def start(lease: server.ServerLease) -> str:
        try:
            lease.wait_until_ready()
        except EvenmixError as error:
            return str(error)
        finally:
            lease.release()
        return ""

    with ThreadPoolExecutor() as pool:
        errors = list(pool.map(start, leases))
    assert all("exited with status 3" in error for error in errors)
    assert (leases[0].folder / "starts").read_text() == "up\n"
