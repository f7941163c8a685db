"""Beam's portable runners without a cluster: a job service, and a pool of workers.

The job service is Beam's own. It is sent what one of Flink or Spark would be sent, over the same
protocol: the pipeline, its options and its files. It then runs the job on Beam's local engine, with
workers that it asks for over the same protocol too.
"""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.gcs import start_on_free_port

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
    # The pool starts its workers as `python`.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    service, port = start_on_free_port(
        [sys.executable, "-m", module, f"{port_option}=0"],
        _STARTUP_TIMEOUT_S,
        env={**os.environ, "PATH": path},
        start_new_session=True,
        stderr=subprocess.DEVNULL,
    )
    try:
        # As Beam's services name themselves to their workers.
        yield f"localhost:{port}"
    finally:
        os.killpg(service.pid, signal.SIGKILL)
        service.wait()
