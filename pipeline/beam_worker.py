"""The worker processes of a local Beam job: Beam's own, but forked and quiet.

A new interpreter takes seconds to import Beam and the stage, in every worker of every job. So a
job's process, which has imported both, forks its workers before it starts threads; they wait until
Beam's runner wants them.
"""

import contextlib
import logging
import multiprocessing
import os
from collections.abc import Iterator
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

# On import Beam warns of every optional package that is missing, through the root logger, which
# makes that logger print all that its workers log from then on. A handler that is there before
# prevents it.
logging.getLogger().addHandler(logging.NullHandler())

from apache_beam.portability import python_urns  # noqa: E402
from apache_beam.portability.api import endpoints_pb2  # noqa: E402
from apache_beam.runners.portability.fn_api_runner.worker_handlers import (  # noqa: E402
    GrpcWorkerHandler,
    WorkerHandler,
)
from apache_beam.runners.worker import sdk_worker_main  # noqa: E402
from apache_beam.transforms.environments import SubprocessSDKEnvironment  # noqa: E402
from google.protobuf import json_format, text_format  # noqa: E402

FORKED = SubprocessSDKEnvironment.from_command_string("")
"""The environment of steps that run in forked workers."""


class Worker:
    """A process that waits to become a worker, and ends if nobody is left who could ask it to."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("fork")
        receiver, self._sender = context.Pipe(duplex=False)
        self.process = context.Process(target=_wait_and_work, args=(receiver, self._sender))
        self.process.start()
        receiver.close()

    def begin(self, environment: dict[str, str]) -> None:
        """Have it work for the runner that the variables of Beam's SDK tell of."""
        # The job's watchdog reports a worker that is gone.
        with contextlib.suppress(BrokenPipeError):
            self._sender.send(environment)


def _wait_and_work(receiver: Connection, sender: Connection) -> None:
    sender.close()
    try:
        os.environ.update(receiver.recv())
    except EOFError:
        return
    # Beam prints the trace of an item that fails, which reaches the job anyway. What ends this
    # process is still printed: it passes this block on its way out.
    with Path(os.devnull).open("w") as nowhere, contextlib.redirect_stderr(nowhere):
        sdk_worker_main.main([])


def give_to_beam(workers: Iterator[Worker]) -> None:
    """Let Beam's local runner take these workers, where it would start commands."""
    register = WorkerHandler.register_environment(python_urns.SUBPROCESS_SDK, bytes)
    register(partial(_Handler, workers))


class _Handler(GrpcWorkerHandler):  # type: ignore[misc]
    """Beam's end of a worker."""

    def __init__(self, workers: Iterator[Worker], _command: bytes, *runner: Any) -> None:
        super().__init__(*runner)
        self._worker = next(workers)

    def start_worker(self) -> None:
        control = endpoints_pb2.ApiServiceDescriptor(url=self.control_address)
        options = self.provision_info.provision_info.pipeline_options
        self._worker.begin(
            {
                "WORKER_ID": self.worker_id,
                "CONTROL_API_SERVICE_DESCRIPTOR": text_format.MessageToString(control),
                "PIPELINE_OPTIONS": json_format.MessageToJson(options),
            }
        )

    def stop_worker(self) -> None:
        """The worker ends by itself as its connection closes."""
