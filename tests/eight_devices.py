"""A process with eight devices, which one that runs already cannot come to have."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parent.parent


def simulated_devices(number: int) -> dict[str, str]:
    """Return the environment of a process with so many devices."""
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={number}"
    return os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}


def on_eight_devices(function: Callable[[], Any]) -> str:
    """Call a function of a test file in a process with eight simulated devices.

    Returns what it prints. XLA must not have told of arrays that it can only bring from one
    sharding to another by having the whole of them on each device.
    """
    done = subprocess.run(
        [sys.executable, "-c", f"import {function.__module__} as m; m.{function.__name__}()"],
        cwd=REPOSITORY,
        env=simulated_devices(8),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "Involuntary full rematerialization" not in done.stderr, done.stderr
    return done.stdout
