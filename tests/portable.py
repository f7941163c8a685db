"""Beam's portable runners without a cluster: a job service, and a pool of workers.

The job service is Beam's own. It is sent what one of Flink or Spark would be sent, over the same
protocol: the pipeline, its options and its files. It then runs the job on Beam's local engine, with
workers that it asks for over the same protocol too.
"""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_HOST = "127.0.0.1"
_STARTUP_TIMEOUT_S = 60


@contextmanager
def job_service() -> Iterator[str]:
    """Run a job service; yield its address, for ``--job_endpoint``."""
    with _service("apache_beam.runners.portability.local_job_service_main", "--port") as address:
        yield address


@contextmanager
def worker_pool() -> Iterator[str]:
    """Run a pool that starts workers on demand; yield its address, for ``--environment_config``."""
    with _service("apache_beam.runners.worker.worker_pool_main", "--service_port") as address:
        yield address


@contextmanager
def _service(module: str, port_option: str) -> Iterator[str]:
    """Run one of Beam's services, and at the end kill it with all that it has started."""
    with socket.create_server((_HOST, 0)) as probe:
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", module, f"{port_option}={port}"]
    # The pool starts its workers as `python`.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    service = subprocess.Popen(
        command,
        env={**os.environ, "PATH": path},
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        deadline = time.monotonic() + _STARTUP_TIMEOUT_S
        while True:
            try:
                socket.create_connection((_HOST, port)).close()
                break
            except ConnectionRefusedError:
                if service.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"the service did not start: {command}") from None
                time.sleep(0.05)
        # As Beam's services name themselves to their workers.
        yield f"localhost:{port}"
    finally:
        os.killpg(service.pid, signal.SIGKILL)
        service.wait()
