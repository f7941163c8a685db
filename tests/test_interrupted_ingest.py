"""Downloads that are cut short: the next run ends with the files of one that was not."""

import hashlib
import io
import os
import shlex
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import ingest, stores
from pipeline.errors import EvenmixError
from pipeline.recipe import Corpus
from tests.corpora import evenmix, finish
from tests.http_files import serve_files
from tests.pictures import save, smooth
from tests.site import Site, serve
from tests.stages import run_here

RECIPE = """
root = "{root}"
[images]
min_short_edge_px = 32
records_per_shard = 24
[fetch]
timeout_s = 60
attempts = 1
per_host = 4
allow_private_addresses = true
[datasets.web]
layout = "url_list"
source = "{source}"
licence = "CC0 1.0"
id_rule = "{{id}}"
image_url = "{{url}}"
[captions.own]
engine = "source"
[mixture]
name = "m"
resolution = 32
captions = "own"
"""
NUM_PICTURES = 240


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    """A site with many pictures; every seventh is gone."""
    with serve() as site:
        for number in range(NUM_PICTURES):
            if number % 7:
                picture = save(smooth(40, 40 + number), "PNG")
                site.answers[f"/{number}"] = (200, picture, {})
        yield site


@pytest.fixture(scope="module")
def source(site: Site, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("source") / "urls.parquet"
    rows = [{"id": n, "url": f"{site.url}/{n}"} for n in range(NUM_PICTURES)]
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def write_recipe(folder: Path, source: Path) -> Path:
    path = folder / "recipe.toml"
    text = RECIPE.format(root=folder / "corpus", source=source)
    path.write_text(text, encoding="utf-8")
    return path


def hashes(root: Path) -> dict[str, str]:
    """Hash what must be equal: everything but the times of the downloads and of the runs."""
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in root.rglob("*")
        if path.is_file()
        and not path.name.endswith(".fetch.parquet")
        and path.parent.name != "runs"
    }


@pytest.fixture(scope="module")
def undisturbed(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("undisturbed")
    printed = finish(evenmix("ingest", str(write_recipe(folder, source)), "--workers=2"))
    assert "240 in, 205 out http_error 35" in printed
    return hashes(folder / "corpus")


def test_a_run_killed_at_any_moment_ends_with_the_same_files(
    source: Path, site: Site, undisturbed: dict[str, str], tmp_path: Path
) -> None:
    recipe = write_recipe(tmp_path, source)
    seen = [0]
    site.delay_s = 0.02  # so that a kill comes in the middle of something
    try:
        for num_answers in np.random.default_rng(0).integers(40, 80, 3):
            run = evenmix("ingest", str(recipe), "--workers=2", start_new_session=True)
            wanted = len(site.asked) + num_answers
            while len(site.asked) < wanted:
                assert run.poll() is None
                time.sleep(0.01)
            # Everything at once, as when a machine goes down.
            os.killpg(run.pid, signal.SIGKILL)
            run.communicate()
            seen.append(len(list((tmp_path / "corpus").rglob("*.tar"))))
    finally:
        site.delay_s = 0.0
    # Some shards were there by then, others were lost on their way, and none has gone since.
    assert seen == sorted(seen)
    assert 0 < seen[-1] < NUM_PICTURES // 24
    assert not list((tmp_path / "corpus").rglob("stage.json"))
    finish(evenmix("ingest", str(recipe), "--workers=2"))
    assert hashes(tmp_path / "corpus") == undisturbed


def test_a_full_disk_stops_the_run_and_the_next_goes_on(
    source: Path, undisturbed: dict[str, str], tmp_path: Path
) -> None:
    """The kernel refuses files above 20 kB, as a full disk does."""
    recipe = write_recipe(tmp_path, source)
    limited = f"ulimit -f 20; exec {shlex.quote(sys.executable)} -m pipeline.cli ingest"
    command = ["bash", "-c", f"{limited} {shlex.quote(str(recipe))} --workers=2"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: cannot write {tmp_path}/corpus/images/web/urls-")
    finish(evenmix("ingest", str(recipe), "--workers=2"))
    assert hashes(tmp_path / "corpus") == undisturbed


def test_a_network_that_is_down_stops_the_run_and_the_next_goes_on(
    source: Path, site: Site, undisturbed: dict[str, str], tmp_path: Path
) -> None:
    recipe = write_recipe(tmp_path, source)
    site.is_down = True
    try:
        run = evenmix("ingest", str(recipe), "--workers=1")
        printed, _ = run.communicate(timeout=60)
    finally:
        site.is_down = False
    assert run.returncode == 1
    (line,) = printed.splitlines()
    assert "of 24 downloads not one reached a server (connection_failed 24; such as " in line
    finish(evenmix("ingest", str(recipe), "--workers=2"))
    assert hashes(tmp_path / "corpus") == undisturbed


def test_a_source_that_disappears_half_way_stops_the_run_and_the_next_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tar on a server far away, read in parts; after some of them it is not there."""
    monkeypatch.setattr(stores, "RETRY_WAITS_S", (0, 0, 0))
    (tmp_path / "web").mkdir()
    with tarfile.open(tmp_path / "web/pictures.tar", "w") as tar:
        for number in range(30):
            data = save(smooth(40, 40 + number), "PNG")
            info = tarfile.TarInfo(f"{number:04d}.png")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))

    def ingested(name: str) -> dict[str, str]:
        document = {
            "root": str(tmp_path / name),
            "datasets": {"d": {"layout": "webdataset", "source": url, "licence": "CC0 1.0"}},
            "images": {"min_short_edge_px": 32, "bytes_per_shard": 10_000},
        }
        run_here(*ingest.plan(Corpus.model_validate(document)))
        return hashes(tmp_path / name)

    with serve_files(tmp_path / "web") as server:
        url = server.url("pictures.tar")
        undisturbed = ingested("undisturbed")
        server.gone_after = len(server.ranges) + len(server.ranges) // 2
        with pytest.raises(EvenmixError, match=r"pictures\.tar cannot be read .*again later"):
            ingested("disturbed")
        published = list((tmp_path / "disturbed").rglob("*.tar"))
        assert 0 < len(published) < len([name for name in undisturbed if name.endswith(".tar")])
        server.gone_after = sys.maxsize
        assert ingested("disturbed") == undisturbed
