"""What every test may ask for (an object store of its own), and the order of the test files."""

import pytest

pytest_plugins = ["tests.gcs"]

SLOWEST_FIRST = [
    "test_demo",
    "test_caption_run",
    "test_train_sharding",
    "test_train_loop",
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
