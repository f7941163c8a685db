"""A worker process of a local Beam job: Beam's own, but quiet.

On import Beam warns of every optional package that is missing, through the root logger, which makes
that logger print all that its workers log from then on. A handler that is there before prevents it.
Beam also prints the trace of an item that fails, which reaches the job anyway.
"""

import contextlib
import logging
import os
import sys
from pathlib import Path

logging.getLogger().addHandler(logging.NullHandler())

from apache_beam.runners.worker import sdk_worker_main  # noqa: E402

from pipeline.notices import send_notices  # noqa: E402

if __name__ == "__main__":
    send_notices()
    # What ends this process is still printed: it passes this block on its way out.
    with Path(os.devnull).open("w") as nowhere, contextlib.redirect_stderr(nowhere):
        sdk_worker_main.main(sys.argv)
