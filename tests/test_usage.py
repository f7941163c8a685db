"""Notes of what runs used: one for each that did something, and never an obstacle."""

import json
from datetime import UTC, datetime
from pathlib import Path

import pytest

from pipeline.beam_job import RunnerOptions
from pipeline.dataflow import Command, Dataflow, Resources
from pipeline.run import run_stage
from pipeline.usage import Run, note_run, read_runs
from pipeline.verify import verify
from tests.stages import Words, items

ONE_WORKER = RunnerOptions(workers=1)
STARTED = datetime(2019, 11, 23, 7, 55, 48, 123456, UTC)


def test_a_run_leaves_a_note_and_one_with_nothing_to_do_leaves_none(tmp_path: Path) -> None:
    stage = Words(str(tmp_path), min_length=2)
    begun = datetime.now(UTC)
    run_stage(stage, items("a", "b"), ONE_WORKER)
    run_stage(stage, items("a", "b"), ONE_WORKER)
    (run,) = read_runs(str(tmp_path))
    assert (run.stage, run.folder, run.datasets) == ("words", "words", ["d"])
    assert (run.items, run.records_in) == (2, 6)
    assert (run.runner, run.workers, run.machine_type) == ("local", 1, None)
    started, ended = datetime.fromisoformat(run.started), datetime.fromisoformat(run.ended)
    assert begun <= started <= ended <= datetime.now(UTC)
    assert run.hours == (ended - started).total_seconds() / 3600


def test_only_what_a_run_had_to_do_is_counted(tmp_path: Path) -> None:
    stage = Words(str(tmp_path), min_length=2)
    summaries = run_stage(stage, items("a", "b", "c"), ONE_WORKER)
    note_run(stage, items("b"), summaries, RunnerOptions(workers=8), STARTED)
    run = read_runs(str(tmp_path))[0]
    assert (run.started, run.items, run.records_in) == (STARTED.isoformat(), 1, 3)
    assert run.workers == 1  # there was one item
    assert (tmp_path / "notes/runs/words-20191123T075548.123456Z.json").is_file()


def test_on_dataflow_the_machines_are_noted(tmp_path: Path) -> None:
    stage = Words(str(tmp_path), min_length=2)
    summaries = run_stage(stage, items("a"), ONE_WORKER)
    recipe: dict[Command, Resources] = {"mix": Resources(machine_type="n2-standard-16", workers=7)}
    runner = RunnerOptions(beam_args=("--runner=DataflowRunner",), resources=recipe)
    note_run(stage, items("a"), summaries, runner, STARTED)
    run = read_runs(str(tmp_path))[0]
    assert (run.runner, run.workers, run.machine_type) == ("dataflow", 7, "n2-standard-16")
    assert run.threads == 1
    options = ("--runner=DataflowRunner", "--max_num_workers=3", "--machine_type=e2-standard-4")
    changed = RunnerOptions(beam_args=options, resources=recipe)
    note_run(stage, items("a"), summaries, changed, STARTED.replace(year=2018))
    run = read_runs(str(tmp_path))[0]
    assert (run.workers, run.machine_type) == (3, "e2-standard-4")
    prime = ("--runner=DataflowRunner", "--dataflow_service_options=enable_prime")
    chosen = RunnerOptions(beam_args=prime, resources=recipe)
    note_run(stage, items("a"), summaries, chosen, STARTED.replace(year=2017))
    run = read_runs(str(tmp_path))[0]
    assert (run.workers, run.machine_type) == (7, None)
    l4 = Words(str(tmp_path), resource_hints={"accelerator": "type:nvidia-l4;count:1"})
    on_gpus = RunnerOptions(beam_args=prime[:1], dataflow=Dataflow(gpu_image="i"))
    note_run(l4, items("a"), summaries, on_gpus, STARTED.replace(year=2016))
    run = read_runs(str(tmp_path))[0]
    assert (run.machine_type, run.threads) == ("g2-standard-8", 4)


def test_elsewhere_nobody_knows_the_workers(tmp_path: Path) -> None:
    stage = Words(str(tmp_path), min_length=2)
    summaries = run_stage(stage, items("a"), ONE_WORKER)
    runner = RunnerOptions(beam_args=("--runner", "PortableRunner"))
    note_run(stage, items("a"), summaries, runner, STARTED)
    run = read_runs(str(tmp_path))[0]
    assert (run.runner, run.workers, run.machine_type) == ("other", None, None)


def test_a_note_that_cannot_be_written_fails_no_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "notes").write_text("in the way")
    run_stage(Words(str(tmp_path), min_length=2), items("a"), ONE_WORKER)
    assert (tmp_path / "words/d/stage.json").is_file()
    assert "words: what the run used is not noted" in capsys.readouterr().err


def test_notes_that_cannot_be_understood_are_left_out(tmp_path: Path) -> None:
    run_stage(Words(str(tmp_path), min_length=2), items("a"), ONE_WORKER)
    folder = tmp_path / "notes/runs"
    (note,) = folder.iterdir()
    known = json.loads(note.read_text())
    (folder / "words-later.json").write_text(json.dumps(known | {"power_kwh": 3}))
    (folder / "words-cut.json").write_text(note.read_text()[:40])
    assert read_runs(str(tmp_path)) == [Run(**known)]


def test_verify_does_not_mind_notes(tmp_path: Path) -> None:
    run_stage(Words(str(tmp_path), min_length=2), items("a"), ONE_WORKER)
    assert len(read_runs(str(tmp_path))) == 1
    findings = verify(str(tmp_path), deep=False)[1]
    assert not [finding for finding in findings if "notes" in finding]
