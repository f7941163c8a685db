"""A worker process of a local Beam job: Beam's own, but quiet.

On import Beam warns of every optional package that is missing, through the root logger, which makes
that logger print all that its workers log from then on. A handler that is there before prevents it.
"""

import logging
import sys

logging.getLogger().addHandler(logging.NullHandler())

from apache_beam.runners.worker import sdk_worker_main  # noqa: E402

if __name__ == "__main__":
    sdk_worker_main.main(sys.argv)
