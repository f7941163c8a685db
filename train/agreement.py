"""What the processes of a run must have in common, checked before they begin.

Each reads the configuration, the mixture and the output folder by itself. A process that has read
something else would compute something else, or wait for ever for what the others do not do.
"""

import hashlib
import secrets
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils

from pipeline.errors import EvenmixError
from train.output import writing_to


def check_agreement(**found: object) -> None:
    """Check that all processes have found the same; each value is compared by its ``repr``.

    Raises:
        EvenmixError: they differ, which all of them say; the message has the names of what differs.
    """
    if jax.process_count() == 1:
        return
    digests = [hashlib.sha256(repr(value).encode()).digest() for value in found.values()]
    own = np.stack([np.frombuffer(digest, np.uint8) for digest in digests])
    of_all = multihost_utils.process_allgather(own)
    differing = [name for place, name in enumerate(found) if np.ptp(of_all[:, place], axis=0).any()]
    if differing:
        raise EvenmixError(
            f"the processes of the run do not have the same {', nor the same '.join(differing)}; "
            "give each the same configuration and mixture, and an output folder that they share"
        )


def check_shared(folder: Path) -> None:
    """Check that all processes see in a folder what process 0 writes there.

    Raises:
        EvenmixError: they do not, or process 0 cannot write.
    """
    if jax.process_count() == 1:
        return
    # A name that no file system can have remembered as missing.
    number = secrets.randbits(31)
    if jax.process_index() == 0:
        with writing_to(folder):
            _mark(folder, number).touch()
    number = int(multihost_utils.broadcast_one_to_all(np.int32(number)))
    is_seen = multihost_utils.process_allgather(np.array(_mark(folder, number).exists()))
    if jax.process_index() == 0:
        _mark(folder, number).unlink()
    if not is_seen.all():
        raise EvenmixError(
            f"the processes of the run do not share the folder {folder}, into which each writes "
            "its part of a checkpoint; choose an output on a file system that all of them have"
        )


def _mark(folder: Path, number: int) -> Path:
    return folder / f".shared-{number}"
