"""A trainer needs no Beam, a worker no JAX, and only captioning with a model needs vLLM."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

IMPORT_ALL = """
import importlib, sys
packages, forbidden = sys.argv[1].split(","), set(sys.argv[2].split(","))

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in forbidden:
            raise ImportError(f"{name} is not installed on such a machine")

sys.meta_path.insert(0, Refuse())
import pkgutil
for package in packages:
    for module in pkgutil.walk_packages(importlib.import_module(package).__path__, package + "."):
        importlib.import_module(module.name)
"""

TRAINER_ONLY = "jax,flax,optax,orbax,matplotlib"
PIPELINE_ONLY = "apache_beam,psutil,faiss,onnxruntime,torch,vllm"
CAPTIONER_ONLY = "vllm,torch"


@pytest.mark.parametrize(
    ("packages", "forbidden"),
    [
        ("train", PIPELINE_ONLY),
        ("pipeline,dedup,captioning,mixing", f"{TRAINER_ONLY},{CAPTIONER_ONLY}"),
    ],
)
def test_a_machine_needs_only_its_own_extras(packages: str, forbidden: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", IMPORT_ALL, packages, forbidden],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_the_pipeline_does_not_import_what_stands_on_it() -> None:
    """Only the table of sub-commands and the list of stages name the other packages, as strings."""
    for path in (ROOT / "pipeline").rglob("*.py"):
        for line in path.read_text(encoding="utf-8").splitlines():
            for package in ("captioning", "dedup", "mixing", "train"):
                assert not line.lstrip().startswith((f"import {package}", f"from {package}")), path
