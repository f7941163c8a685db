"""The real vLLM on this machine's CPU, with tiny models: where its processes run, and for whom."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

SHIM = Path(__file__).parent / "vllm_shim"

ARGUMENTS: dict[str, Any] = {
    "dtype": "float32",  # what else is in flight must not tip a draw between two tokens
    "enable_chunked_prefill": False,  # on a CPU, vLLM 0.32 dies of a part of a prompt with a seed
    "enforce_eager": True,
    "limit_mm_per_prompt": {"image": 1, "video": 0},
    "max_model_len": 1024,
    "max_num_seqs": 16,
    "skip_mm_profiling": True,
}


@contextmanager
def vllm_environment() -> Iterator[None]:
    """Set up where vLLM's processes run: offline, on one core, with a short path for sockets."""
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory(prefix="ev") as folder:
        patch.setenv("TMPDIR", folder)
        patch.setattr(tempfile, "tempdir", None)
        patch.setenv("PYTHONPATH", str(SHIM), prepend=os.pathsep)
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
        yield


def make_model(folder: Path, *options: str) -> Path:
    """Write a tiny checkpoint (tests/tiny_vlm.py) in a process with vLLM's environment."""
    command = [sys.executable, "-m", "tests.tiny_vlm", str(folder), *options]
    subprocess.run(command, cwd=SHIM.parent.parent, check=True)
    return folder
