"""`evenmix caption` with the real vLLM on a CPU: two families of models through one command."""

import contextlib
import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
import pytest

from captioning.engine import keeper, server
from captioning.slices import SLICE_CAPTIONS
from tests import corpora
from tests.real_vllm import ARGUMENTS, make_model, vllm_environment

MAX_TOKENS = 24
KEPT = {name: read - sum(bad.values()) for name, (read, bad) in corpora.COUNTS.items()}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Path]]:
    """Two tiny models of different families, and vLLM's environment."""
    folders = {family: tmp_path_factory.mktemp(family) for family in ("qwen3_vl", "llava")}
    with vllm_environment():
        yield {
            family: make_model(folder, f"--family={family}") for family, folder in folders.items()
        }


@pytest.fixture(scope="module")
def recipe(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe with a caption set for each model, whose corpus of 64 pictures is ingested."""
    folder = tmp_path_factory.mktemp("run")
    corpora.write_sources(folder / "sources")
    path = corpora.write_recipe(folder, folder / "sources")
    arguments = json.dumps(ARGUMENTS).replace(":", " =")  # as TOML has it
    for family, model in models.items():
        with path.open("a", encoding="utf-8") as file:
            file.write(
                f"""
[captions.{family}]
engine = "vllm"
model = "{model}"
max_tokens = {MAX_TOKENS}
arguments = {arguments}
"""
            )
    corpora.finish(corpora.evenmix("ingest", str(path)))
    return path


def captions_of(recipe: Path, name: str) -> dict[str, list[list[dict[str, Any]]]]:
    """Return the captions of a set's pictures by dataset."""
    found = {}
    for dataset in KEPT:
        folder = recipe.parent / "corpus" / "captions" / name / dataset
        tables = [pq.read_table(path) for path in sorted(folder.glob("[!.]*.parquet"))]
        found[dataset] = [row for table in tables for row in table["captions"].to_pylist()]
    return found


def eventually(condition: Callable[[], object], timeout_s: float = 120) -> bool:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.02)
    return False


def kill_all(process: subprocess.Popen[str]) -> None:
    """Kill a command that leads a session of its own, and all that it has started."""
    with contextlib.suppress(psutil.NoSuchProcess):
        for child in psutil.Process(process.pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def test_the_command_captions_a_corpus_at_a_rate_it_compares_with_the_engine_alone(
    recipe: Path, models: dict[str, Path]
) -> None:
    caption = ("caption", str(recipe), "--captions=qwen3_vl", "--captions-per-image=2")
    # The server stays for all three commands, as it would for other workers.
    lease = server.ServerLease(str(models["qwen3_vl"]), ARGUMENTS, start_timeout_s=900)
    lease.wait_until_ready()
    too_long = recipe.with_name("too_long.toml")
    too_long.write_text(recipe.read_text().replace("max_tokens = 24", "max_tokens = 900"))
    process = corpora.evenmix("caption", str(too_long), *caption[2:], "--workers=1")
    printed, _ = process.communicate(timeout=300)
    assert process.returncode == 1
    assert re.search(r"context of the model .* is too short: a picture of 512 x 512 px", printed)
    assert "max_model_len" in printed
    assert not captions_of(recipe, "qwen3_vl")["shapes"]

    printed = corpora.finish(corpora.evenmix(*caption, "--workers=2"))
    num_captions = 2 * sum(KEPT.values())
    assert re.search(rf"{num_captions} captions with [\d,]+ output tokens in .* tokens/s", printed)
    assert "with --bare-engine 512 the engine alone is measured" in printed
    assert "nothing to do" in corpora.finish(corpora.evenmix(*caption))
    lease.release()

    found = captions_of(recipe, "qwen3_vl")
    assert {name: len(pictures) for name, pictures in found.items()} == KEPT
    captions = [each for pictures in found.values() for picture in pictures for each in picture]
    assert len(captions) == num_captions
    assert len({each["seed"] for each in captions}) == num_captions
    for each in captions:
        assert each["outcome"] in ("ok", "truncated", "empty", "repeating", "wrong_script")
        assert 1 <= each["completion_tokens"] <= MAX_TOKENS
        assert each["prompt"] == "Describe the image in detail using one paragraph."
        assert each["model"] == models["qwen3_vl"].name


def test_a_run_that_is_killed_goes_on_with_another_family_and_is_measured(
    recipe: Path, models: dict[str, Path]
) -> None:
    # 320 captions in each shard of the shapes, and 160 in one of photographs: more than a slice.
    caption = ("caption", str(recipe), "--captions=llava", "--captions-per-image=20", "--workers=1")
    folder = recipe.parent / "corpus" / "captions" / "llava"

    def slices() -> list[Path]:
        return list(folder.glob("*/.temporary-slice-*"))

    process = corpora.evenmix(*caption, start_new_session=True)
    try:
        # Before the first slice vLLM has to start, which takes minutes on a busy machine.
        eventually(lambda: slices() or process.poll() is not None, timeout_s=800)
        assert slices()
    finally:
        kill_all(process)
    killed = datetime.now(UTC)
    meeting = server.meeting_folder(str(models["llava"]), ARGUMENTS, None)
    assert eventually(lambda: not keeper.marked_processes(meeting))
    left = slices()
    published = {path for path in folder.glob("*/[!.]*.parquet")}

    printed = corpora.finish(corpora.evenmix(*caption, "--bare-engine=32"))
    found = captions_of(recipe, "llava")
    assert {name: len(pictures) for name, pictures in found.items()} == KEPT
    captions = [each for pictures in found.values() for picture in pictures for each in picture]
    assert len(captions) == 20 * sum(KEPT.values())
    # What the killed run had kept is in the set; slices of shards it had published are no use.
    before = sum(each["asked"] < killed for each in captions)
    rows = sum(pq.read_metadata(path).num_rows for path in published) * 20
    kept = [path for path in left if path.parent / path.name.split("-", 4)[-1] not in published]
    assert before == rows + SLICE_CAPTIONS * len(kept) > 0
    assert not list(folder.glob("*/.temporary-*"))
    bare = re.search(r"the bare engine: ([\d,]+) tokens/s \(vLLM's LLM.chat, 32 captions", printed)
    run = re.search(r"caption: [\d,]+ captions with .*: ([\d,]+) tokens/s", printed)
    share = re.search(r"efficiency: (\d+\.\d\d) of the bare engine's", printed)
    assert bare and run and share, printed
    # How fast either is depends on what else the machine does; that the share is theirs does not.
    rates = [int(found[1].replace(",", "")) for found in (run, bare)]
    assert float(share[1]) == pytest.approx(rates[0] / rates[1], rel=0.05, abs=0.01)
