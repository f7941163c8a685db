"""How much memory a process has had at most."""

import re
from pathlib import Path


def peak_bytes() -> int:
    """Return the most memory that this process has had, and not the one that has started it.

    getrusage counts that one, too: what a program grows by is then hidden by a large parent.
    """
    status = Path("/proc/self/status").read_text()
    match = re.search(r"^VmHWM:\s+(\d+) kB$", status, re.MULTILINE)
    assert match is not None
    return int(match[1]) * 1024
