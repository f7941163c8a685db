"""The process that owns one vLLM server: starts it, watches it, and leaves nothing behind.

A server must outlive the worker that started it, since others share it, and must not outlive the
last one. Whether workers live is asked of the kernel, which cannot miss a SIGKILL: every worker
holds a shared lock on the file `users`, and the keeper tries to take it alone. The keeper itself
holds `lock`, inherited from the worker that started it, so there is one keeper a folder. It keeps
one server, once: when the server dies, the keeper kills what is left of it and exits.

This file is run by its path and imports nothing of evenmix, so it starts at once anywhere.
"""

import contextlib
import ctypes
import fcntl
import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from enum import StrEnum
from pathlib import Path
from typing import NoReturn

import psutil

# An environment variable that vLLM's own children inherit: what carries it belongs to the folder.
MARK = "EVENMIX_CAPTION_SERVER"
POLL_INTERVAL_S = 0.2
SHUTDOWN_GRACE_S = 10.0
HEALTH_TIMEOUT_S = 5.0
PR_SET_PDEATHSIG = 1  # linux/prctl.h


class Phase(StrEnum):
    """What the keeper last said of its server."""

    READY = "ready"
    FAILED = "failed"


def run_path(folder: Path) -> Path:
    """Return where the sockets of a folder's server are, those between vLLM's processes too."""
    return folder / "run"


def socket_path(folder: Path) -> Path:
    """Return the Unix socket of a folder's server."""
    return run_path(folder) / "socket"


def log_path(folder: Path) -> Path:
    """Return the log of a folder's server."""
    return folder / "server.log"


def read_phase(folder: Path) -> tuple[Phase | None, str]:
    """Return the phase and, if it is FAILED, the reason; (None, "") while the server starts."""
    try:
        state = json.loads((folder / "state.json").read_text())
    except FileNotFoundError:
        return None, ""
    return Phase(state["phase"]), state["reason"]


def write_phase(folder: Path, phase: Phase, reason: str = "") -> None:
    """Say how the server is; a reader sees the whole file or none."""
    temporary = folder / "state.json.writing"
    temporary.write_text(json.dumps({"phase": phase, "reason": reason}))
    temporary.replace(folder / "state.json")


def clear(folder: Path) -> None:
    """Remove what an earlier keeper left, its server's processes included, if it was killed."""
    kill_marked(folder)
    (folder / "state.json").unlink(missing_ok=True)
    shutil.rmtree(run_path(folder), ignore_errors=True)


class _UnixConnection(http.client.HTTPConnection):
    """HTTP over the server's Unix socket."""

    def __init__(self, path: Path):
        super().__init__("localhost", timeout=HEALTH_TIMEOUT_S)
        self.path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self.path))


def is_healthy(folder: Path) -> bool:
    """Ask the server's /health, which also fails once its engine process has died."""
    connection = _UnixConnection(socket_path(folder))
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == http.HTTPStatus.OK
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def marked_processes(folder: Path) -> list[psutil.Process]:
    """Find the server of a folder and all its descendants, orphans included."""
    found = []
    for process in psutil.process_iter():
        # Processes of other users and those that end meanwhile are not ours.
        with contextlib.suppress(psutil.Error):
            if process.environ().get(MARK) == str(folder):
                found.append(process)
    return found


def kill_marked(folder: Path) -> None:
    """Kill a folder's server and wait until it is gone.

    vLLM's engine process does not notice when its API server is killed, and would hold the
    accelerator's memory for ever.
    """
    while marked := marked_processes(folder):
        for process in marked:
            with contextlib.suppress(psutil.Error):
                process.kill()
        psutil.wait_procs(marked, timeout=SHUTDOWN_GRACE_S)


def nobody_uses(users: int) -> bool:
    """Whether every worker has gone. If so, newcomers wait at `users` until the keeper exits."""
    try:
        fcntl.flock(users, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def die_with_parent(signum: int = signal.SIGKILL) -> None:
    """Have the kernel send this process a signal when the one that started it ends."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signum)


def keep(folder: Path, start_timeout_s: float, command: list[str]) -> None:
    """Run one server until it dies, its time to start is up, or nobody uses it.

    Expects `users` in `folder` to exist, `lock` to be held, and the server to listen on
    `socket_path(folder)`.
    """
    users = os.open(folder / "users", os.O_RDWR)
    run_path(folder).mkdir()
    started = time.monotonic()
    server = subprocess.Popen(
        command,
        cwd=folder,  # so that nothing of the user's working directory is imported
        stdin=subprocess.DEVNULL,
        env=os.environ | {MARK: str(folder), "VLLM_RPC_BASE_PATH": str(run_path(folder))},
        preexec_fn=die_with_parent,  # noqa: PLW1509  # the keeper has one thread
    )
    ready = False
    reason = ""
    try:
        while not nobody_uses(users):
            if server.poll() is not None:
                reason = f"it exited with status {server.returncode}"
                break
            if not ready and is_healthy(folder):
                ready = True
                write_phase(folder, Phase.READY)
            if not ready and time.monotonic() - started > start_timeout_s:
                reason = f"it did not answer within {start_timeout_s:g} s"
                break
            time.sleep(POLL_INTERVAL_S)
    finally:
        print(f"evenmix ends the server: {reason or 'nobody uses it'}", flush=True)
        if reason and not ready:
            write_phase(folder, Phase.FAILED, reason)
        server.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.wait(SHUTDOWN_GRACE_S)
        kill_marked(folder)
        shutil.rmtree(run_path(folder), ignore_errors=True)


def _exit_on_signal(signum: int, frame: object) -> NoReturn:
    sys.exit(128 + signum)


if __name__ == "__main__":
    if os.fork():
        os._exit(0)  # no worker's child, so that none has to wait for it
    signal.signal(signal.SIGTERM, _exit_on_signal)
    keep(Path(sys.argv[1]), float(sys.argv[2]), sys.argv[3:])
