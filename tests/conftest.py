"""What every test may ask for (an object store of its own), and the order of the test files."""

import os
import tempfile
from collections.abc import Iterator

import pytest

# XLA compiles tiny programs in a quarter of the time so, which is most of what such tests take.
# Each run of them is half as fast. Processes that a test starts inherit it.
QUICK_COMPILATION = "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {QUICK_COMPILATION}".strip()

pytest_plugins = ["tests.gcs"]

ALLOCATOR = {name: os.environ.get(name) for name in ("MALLOC_ARENA_MAX", "MALLOC_MMAP_THRESHOLD_")}
"""glibc's settings, None where there is none, before any job has changed them."""


@pytest.fixture(autouse=True)
def allocator() -> Iterator[None]:
    """Undo what a job in this process has set for its workers (pipeline/beam_job.py).

    Processes that later tests start would inherit it, and the memory that they take depends on it.
    """
    yield
    for name, value in ALLOCATOR.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def pytest_configure(config: pytest.Config) -> None:
    """Keep what is compiled for all processes of the suite: the same tiny steps come often."""
    if hasattr(config, "workerinput"):
        return  # It has inherited the folder of the process that started it.
    compiled = tempfile.TemporaryDirectory(prefix="evenmix-compiled-", ignore_cleanup_errors=True)
    config.add_cleanup(compiled.cleanup)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = compiled.name
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"


SLOWEST_FIRST = [
    "test_demo",
    "test_worker_installation",
    "test_caption_run",
    "test_train_sharding",
    "test_train_loop",
    "test_dataflow_run",
    "test_build",
    "test_vllm_engine",
]
"""Begun last, one of these would leave the other test process idle for minutes."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the slowest files first; the others stay in order."""

    def rank(item: pytest.Item) -> int:
        name = item.path.stem
        return SLOWEST_FIRST.index(name) if name in SLOWEST_FIRST else len(SLOWEST_FIRST)

    items.sort(key=rank)
