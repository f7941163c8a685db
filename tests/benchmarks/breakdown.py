"""Where the CPU time of one work item goes: network, decode check, pixel hash, writing, the rest.

The item is done in this process, with a clock around the functions of each part. The clocks count
a thread's own CPU time: what waits costs nothing, and the parts of all threads add up.
"""

import asyncio
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch

from rich.console import Console
from rich.table import Table

from pipeline import images, ingest, publishing, storage
from pipeline.judge import Judge
from pipeline.recipe import load_recipe
from pipeline.tars import TarWriter

_PARTS: list[tuple[str, Any, str]] = [
    ("network (the event loop)", asyncio.BaseEventLoop, "run_forever"),
    ("decode check", images, "read"),
    ("hash of the pixels", images, "sha256_of_pixels"),
    ("the rest", Judge, "of_download"),
    ("write", TarWriter, "add"),
    ("write", TarWriter, "close"),
    ("write", publishing, "checksum"),
    ("write", storage, "parquet_bytes"),
    ("write", storage, "publish"),
]
"""Functions, and the part that each belongs to but for what it calls of the others."""


def print_breakdown(recipe: Path, console: Console) -> None:
    """Ingest the first two work items of a recipe and print the parts of the second.

    The first pays for what a worker pays for once: imports, and memory that is warm afterwards.
    """
    job, (first, second, *_) = ingest.plan(load_recipe(str(recipe)))
    publishing.publish_item(job, first)
    cpu_s = defaultdict[str, float](float)
    with ExitStack() as clocks:
        for part, owner, name in _PARTS:
            timed = _timed(getattr(owner, name), part, cpu_s)
            clocks.enter_context(patch.object(owner, name, timed))
        started, cpu_before = time.monotonic(), time.process_time()
        publishing.publish_item(job, second)
        total_s, wall_s = time.process_time() - cpu_before, time.monotonic() - started
    cpu_s["the rest"] += total_s - sum(cpu_s.values())
    begin, end = second.inputs["rows"]
    table = Table(title=f"CPU time of a work item of {end - begin} pictures ({wall_s:.2f} s long)")
    for heading in ("", "ms/picture", "share"):
        table.add_column(heading, justify="right" if heading else "left")
    for part, seconds in cpu_s.items():
        table.add_row(part, f"{1e3 * seconds / (end - begin):.3f}", f"{seconds / total_s:.0%}")
    console.print(table)


def _timed(function: Callable[..., Any], part: str, cpu_s: dict[str, float]) -> Callable[..., Any]:
    def timed(*args: Any, **kwargs: Any) -> Any:
        caller_s = getattr(_called, "cpu_s", 0.0)
        _called.cpu_s = 0.0
        before = time.thread_time()
        try:
            return function(*args, **kwargs)
        finally:
            taken_s = time.thread_time() - before
            cpu_s[part] += taken_s - _called.cpu_s
            _called.cpu_s = caller_s + taken_s

    return timed


_called = threading.local()
"""Of each thread: the CPU time of what the function that runs now has called so far."""
