"""What Beam's portable runners make of a build, with Beam's own job service in their place."""

import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import corpora
from tests.corpora import evenmix, finish
from tests.portable import job_service, worker_pool
from tests.test_build import hashes

# Workers are threads of the process that asks for the job.
LOOPBACK = "--environment_type=LOOPBACK"


@pytest.fixture(scope="module")
def portable() -> Iterator[list[str]]:
    """The options that name the runner, without those that say where its workers come from."""
    with job_service() as address:
        yield ["--runner=PortableRunner", f"--job_endpoint={address}"]


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sources")
    corpora.write_sources(folder)
    return folder


@pytest.fixture(scope="module")
def built(sources: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The corpus as this machine builds it with one worker."""
    folder = tmp_path_factory.mktemp("built")
    finish(evenmix("build", str(corpora.write_recipe(folder, sources)), "--workers=1"))
    return folder / "corpus"


def test_a_portable_build_has_the_same_files(
    built: Path, sources: Path, tmp_path: Path, portable: list[str]
) -> None:
    recipe = corpora.write_recipe(tmp_path, sources)
    printed = finish(evenmix("build", str(recipe), *portable, LOOPBACK))
    assert "the funnel" in printed
    assert hashes(str(tmp_path / "corpus")) == hashes(str(built))


def test_workers_may_be_processes_that_somebody_else_starts(
    built: Path, sources: Path, tmp_path: Path, portable: list[str]
) -> None:
    recipe = corpora.write_recipe(tmp_path, sources)
    with worker_pool() as address:
        pool = ["--environment_type=EXTERNAL", f"--environment_config={address}"]
        finish(evenmix("ingest", str(recipe), *portable, *pool))
    assert hashes(str(tmp_path / "corpus/images")) == hashes(str(built / "images"))


def test_what_stands_in_the_way_is_said_in_a_line(
    sources: Path, tmp_path: Path, portable: list[str]
) -> None:
    recipe = corpora.write_recipe(tmp_path, sources)
    command = [sys.executable, "-m", "pipeline.cli", "ingest", str(recipe), *portable, LOOPBACK]
    done = subprocess.run(
        ["bash", "-c", f"ulimit -f 400; exec {shlex.join(command)}"],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith(f"error: cannot write {tmp_path}/corpus/images/photographs/folder-")
    assert last.endswith("and start the same command again.")


def test_a_runner_that_lacks_something_says_what(sources: Path, tmp_path: Path) -> None:
    recipe = corpora.write_recipe(tmp_path, sources)
    process = evenmix("build", str(recipe), "--runner=PortableRunner")
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "\nerror: Beam's runner cannot start the job: You must specify a --job_endpoint" in (
        f"\n{printed}"
    )
    assert "Traceback" not in printed
