"""The whole build, as its user runs it: `evenmix build` in processes of its own."""

import hashlib
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image

from mixing.manifest import load_manifest
from pipeline import storage
from tests import corpora
from tests.corpora import evenmix, finish
from tests.gcs import Proxy
from tests.gcs_faults import PASSING, trouble


def hashes(root: str) -> dict[str, str]:
    """Return the sha256 of every file below a root, hidden ones included, but notes of times."""
    return {
        file.name: hashlib.sha256(storage.read_bytes(file.url)).hexdigest()
        for file in storage.list_files(root)
        if not file.name.startswith("notes/runs/")
    }


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sources")
    corpora.write_sources(folder)
    return folder


@pytest.fixture(scope="module")
def built(sources: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A finished build with two workers: its recipe, and what the command printed."""
    recipe = corpora.write_recipe(tmp_path_factory.mktemp("built"), sources)
    return recipe, finish(evenmix("build", str(recipe), "--workers=2"))


def test_every_record_is_accounted_for(built: tuple[Path, str]) -> None:
    root = built[0].parent / "corpus"
    for stage in ["images", "duplicates/sscd", "captions/source", "selections/small"]:
        for dataset, (read, rejected) in corpora.COUNTS.items():
            counts = json.loads((root / stage / dataset / "stage.json").read_text())["counts"]
            assert counts["records_in"] == counts["records_out"] + sum(counts["rejected"].values())
            if stage == "images":
                assert counts["records_in"] == read
                assert counts["rejected"] == rejected
            if stage == "duplicates/sscd":
                assert counts["rejected"] == corpora.DUPLICATES[dataset]


def test_the_funnel_is_shown(built: tuple[Path, str]) -> None:
    funnel = built[1][built[1].index("the funnel") :]
    for words in ["near_duplicate 5", "exact_copy 1", "too_small 1", "photographs", "13"]:
        assert words in funnel


def test_a_second_build_does_nothing_and_says_so(built: tuple[Path, str]) -> None:
    root = built[0].parent / "corpus"
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    printed = finish(evenmix("build", str(built[0])))
    assert printed.count("nothing to do") == 7
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*")} == before


def test_the_same_files_come_out_of_one_worker_and_another_order(
    built: tuple[Path, str], sources: Path, tmp_path: Path
) -> None:
    reordered = tmp_path / "sources"
    for path in sorted((p for p in sources.rglob("*") if p.is_file()), reverse=True):
        copy = reordered / path.relative_to(sources)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(path.read_bytes())
    recipe = corpora.write_recipe(tmp_path, reordered)
    # The order of datasets in the recipe must not matter either.
    head, *datasets = recipe.read_text().split("[datasets.")
    *datasets, last = datasets
    last, captions, tail = last.partition("[captions.")
    order = [last, *reversed(datasets)]
    recipe.write_text(head + "".join(f"[datasets.{text}" for text in order) + captions + tail)
    finish(evenmix("build", str(recipe), "--workers=1"))
    assert hashes(str(tmp_path / "corpus")) == hashes(str(built[0].parent / "corpus"))


def test_a_build_killed_at_any_moment_ends_with_the_same_files(
    built: tuple[Path, str], sources: Path, tmp_path: Path
) -> None:
    recipe = corpora.write_recipe(tmp_path, sources)
    kills = 0
    for seconds in np.random.default_rng(0).uniform(2, 6, 5):
        build = evenmix("build", str(recipe), "--workers=2", start_new_session=True)
        try:
            build.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            # Everything at once, as when a machine goes down.
            os.killpg(build.pid, signal.SIGKILL)
            build.communicate()
            kills += 1
        else:
            break
    assert kills >= 2
    finish(evenmix("build", str(recipe), "--workers=2"))
    assert hashes(str(tmp_path / "corpus")) == hashes(str(built[0].parent / "corpus"))


def test_two_builds_at_once_end_with_the_files_of_one(
    built: tuple[Path, str], sources: Path, tmp_path: Path
) -> None:
    recipe = corpora.write_recipe(tmp_path, sources)
    first = evenmix("build", str(recipe), "--workers=1")
    time.sleep(1)
    second = evenmix("build", str(recipe), "--workers=1")
    finish(first)
    finish(second)
    assert hashes(str(tmp_path / "corpus")) == hashes(str(built[0].parent / "corpus"))


def test_two_builds_at_once_on_gcs_where_requests_go_wrong_end_with_the_files_of_one(
    built: tuple[Path, str], sources: Path, tmp_path: Path, gcs_server: Proxy, gcs_bucket: str
) -> None:
    recipe = corpora.write_recipe(tmp_path, sources, root=f"{gcs_bucket}/corpus")
    with trouble(gcs_server, every=41) as chosen:
        first = evenmix("build", str(recipe), "--workers=1")
        time.sleep(1)
        second = evenmix("build", str(recipe), "--workers=1")
        finish(first)
        finish(second)
    assert chosen.keys() == set(PASSING)
    assert hashes(f"{gcs_bucket}/corpus") == hashes(str(built[0].parent / "corpus"))
    finish(evenmix("verify", f"{gcs_bucket}/corpus"))


def test_verify_passes_and_names_a_tampered_shard(built: tuple[Path, str], tmp_path: Path) -> None:
    root = built[0].parent / "corpus"
    assert "as they were published" in finish(evenmix("verify", str(root), "--deep"))
    shard = root / "mixtures" / "small" / "shapes" / "train-00000.tar"
    original = shard.read_bytes()
    try:
        # One byte inside the first picture's data.
        shard.write_bytes(original[:700] + bytes([original[700] ^ 1]) + original[701:])
        process = evenmix("verify", str(root))
        printed, _ = process.communicate(timeout=60)
        assert process.returncode == 1
        assert f"{shard}: its bytes are not those that were published" in printed
        assert "Traceback" not in printed
    finally:
        shard.write_bytes(original)


def test_verify_holds_the_manifest_against_the_shards(built: tuple[Path, str]) -> None:
    path = built[0].parent / "corpus" / "mixtures" / "small" / "mixture.json"
    original = path.read_text()
    manifest = json.loads(original)
    manifest["datasets"][0]["train"]["shards"][0]["sha256"] = "0" * 64
    try:
        path.write_text(json.dumps(manifest))
        process = evenmix("verify", str(path.parent.parent.parent))
        printed, _ = process.communicate(timeout=60)
        assert process.returncode == 1
        assert f"{path}: lines/train-00000.tar is not the shard that was published" in printed
    finally:
        path.write_text(original)


def test_webdataset_reads_the_shards(built: tuple[Path, str]) -> None:
    mixture = built[0].parent / "corpus" / "mixtures" / "small"
    manifest = load_manifest(str(mixture))
    seen = 0
    for dataset in manifest.datasets:
        assert Fraction(dataset.weight) == Fraction(1, 3)
        for shard in [*dataset.train.shards, *dataset.validation.shards]:
            path = mixture / shard.name
            assert hashlib.sha256(path.read_bytes()).hexdigest() == shard.sha256
            samples = list(webdataset.WebDataset(str(path), shardshuffle=False).decode("pil"))
            assert len(samples) == shard.num_samples
            for sample in samples:
                assert isinstance(sample["png"], Image.Image)
                assert sample["png"].size == (32, 32)
                assert sample["json"]["dataset"] == dataset.name
                assert sample["json"]["captions"][0]["text"]
                assert sample["json"]["key"] == sample["__key__"]
            seen += len(samples)
    assert seen == 22 + 4 + 31


def test_the_offset_index_finds_every_sample(built: tuple[Path, str]) -> None:
    shard = built[0].parent / "corpus" / "mixtures" / "small" / "lines" / "train-00000"
    for row in storage.read_parquet(f"{shard}.parquet").to_pylist():
        picture = storage.read_bytes(f"{shard}.tar", row["image_offset"], row["image_bytes"])
        sample = json.loads(
            storage.read_bytes(f"{shard}.tar", row["json_offset"], row["json_bytes"])
        )
        assert picture.startswith(b"\x89PNG")
        assert sample["key"] == row["key"]
        assert sample["fields"]["colour"] in sample["captions"][0]["text"]


def test_another_configuration_is_refused_and_says_what_differs(
    built: tuple[Path, str], sources: Path
) -> None:
    before = hashes(str(built[0].parent / "corpus"))
    process = evenmix("ingest", str(built[0]), "--min-short-edge=48")
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "config.min_short_edge_px: 32 -> 48" in printed
    assert "Traceback" not in printed
    assert hashes(str(built[0].parent / "corpus")) == before


def test_a_full_disk_is_one_clear_error_and_the_ingest_goes_on_from_there(
    built: tuple[Path, str], sources: Path, tmp_path: Path
) -> None:
    """The kernel refuses files above 400 kB, as a full disk does, on whichever worker."""
    recipe = corpora.write_recipe(tmp_path, sources)
    limited = f"ulimit -f 400; exec {shlex.quote(sys.executable)} -m pipeline.cli build"
    done = subprocess.run(
        ["bash", "-c", f"{limited} {shlex.quote(str(recipe))} --workers=2"],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: cannot write {tmp_path}/corpus/images/photographs/folder-")
    assert line.endswith("and start the same command again.")
    finish(evenmix("ingest", str(recipe), "--workers=2"))
    assert hashes(str(tmp_path / "corpus/images")) == hashes(str(built[0].parent / "corpus/images"))
