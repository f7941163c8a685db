"""The Flex Template: what a launch stages, and the build that its one step runs."""

import json
import logging
import sys
import threading
from pathlib import Path

import pytest
from apache_beam.internal import pickler
from apache_beam.portability.api import beam_runner_api_pb2

from pipeline import flex_template, storage
from pipeline.flex_template import RunBuild
from tests import corpora
from tests.dataflow import StagedJob, read

IMAGE = "europe-west4-docker.pkg.dev/evenmix-test/evenmix/cpu:1"
SECRET = "projects/evenmix-test/secrets/hf-token/versions/latest"
DATAFLOW = f"""
[dataflow]
project = "evenmix-test"
region = "europe-west4"
temp = "gs://evenmix-test/temp"
image = "{IMAGE}"
hf_token_secret = "{SECRET}"
"""


def write_recipe(bucket_url: str, dataflow: str = DATAFLOW) -> str:
    """Write a recipe into the bucket, as a launch finds it."""
    recipe = corpora.RECIPE.format(root=f"{bucket_url}/R", sources=f"{bucket_url}/sources")
    url = f"{bucket_url}/recipe.toml"
    storage.publish(url, (recipe + dataflow).encode())
    return url


def launch(bucket_url: str, recipe: str, *parameters: str) -> int:
    """Run the template as Dataflow's launcher does."""
    return flex_template.main(
        [
            f"--recipe={recipe}",
            "--runner=DataflowRunner",
            "--project=evenmix-test",
            "--region=europe-west4",
            "--job_name=evenmix-build",
            f"--staging_location={bucket_url}/staging",
            f"--temp_location={bucket_url}/temp",
            f"--template_location={bucket_url}/template.json",
            "--no_auth",
            *parameters,
        ]
    )


def staged(bucket_url: str) -> StagedJob:
    job = json.loads(read(f"{bucket_url}/template.json"))
    pipeline_url = job["environment"]["sdkPipelineOptions"]["options"]["pipelineUrl"]
    return StagedJob(job, beam_runner_api_pb2.Pipeline.FromString(read(pipeline_url)))


def staged_step(pipeline: beam_runner_api_pb2.Pipeline) -> RunBuild:
    """Return the step as a worker unpickles it."""
    (step,) = (
        each
        for each in pipeline.components.transforms.values()
        if each.unique_name == "RunBuild" and each.spec.urn == "beam:transform:pardo:v1"
    )
    payload = beam_runner_api_pb2.ParDoPayload.FromString(step.spec.payload)
    build, *_ = pickler.loads(payload.do_fn.payload)
    assert isinstance(build, RunBuild)
    return build


def test_a_launch_stages_one_small_worker_with_the_build(gcs_bucket: str) -> None:
    recipe = write_recipe(gcs_bucket)
    options = "--max_num_workers=7 --labels='team=image corpora'"
    assert (
        launch(gcs_bucket, recipe, f"--root={gcs_bucket}/other", f"--build_options={options}") == 0
    )

    job = staged(gcs_bucket)
    (workers,) = job.job["environment"]["workerPools"]
    assert workers["machineType"] == "n2-standard-2"
    assert workers["numWorkers"] == 1
    assert workers["autoscalingSettings"] == {
        "algorithm": "AUTOSCALING_ALGORITHM_NONE",
        "maxNumWorkers": 1,
    }
    assert [each["containerImage"] for each in workers["sdkHarnessContainerImages"]] == [IMAGE]
    assert len(job.pipeline.SerializeToString()) < 20_000
    step = staged_step(job.pipeline)
    assert step.hf_token_secret == SECRET
    assert step.arguments == [
        "build",
        recipe,
        f"--root={gcs_bucket}/other",
        "--runner=DataflowRunner",
        "--max_num_workers=7",
        "--labels=team=image corpora",
    ]


def test_a_launch_may_ask_for_a_larger_machine(gcs_bucket: str) -> None:
    assert launch(gcs_bucket, write_recipe(gcs_bucket), "--machine_type=n2-standard-8") == 0
    (workers,) = staged(gcs_bucket).job["environment"]["workerPools"]
    assert workers["machineType"] == "n2-standard-8"


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ("image", "gpu_image", "dataflow.image is missing"),
        ("image", "package", "dataflow.image is missing, in which the build runs"),
        ("region", "subnetwork", "dataflow.region is missing"),
        ("image", "imag", "imag"),
    ],
)
def test_a_wrong_recipe_is_refused_before_any_job(
    before: str, after: str, message: str, gcs_bucket: str, capsys: pytest.CaptureFixture[str]
) -> None:
    dataflow = DATAFLOW.replace(f"{before} =", f"{after} =")
    weights = "[dedup]\nweights = 'gs://evenmix-test/sscd.onnx'\n"
    assert launch(gcs_bucket, write_recipe(gcs_bucket, weights + dataflow)) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert not storage.exists(f"{gcs_bucket}/template.json")


def test_options_that_no_shell_would_read_are_refused(
    gcs_bucket: str, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write_recipe(gcs_bucket, DATAFLOW)
    assert launch(gcs_bucket, recipe, "--build_options=--labels='team=a") == 1
    error = capsys.readouterr().err
    assert error == "error: build_options=--labels='team=a: No closing quotation; correct it\n"


def test_the_step_runs_a_build_and_logs_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    corpora.write_sources(tmp_path / "sources")
    recipe = corpora.write_recipe(tmp_path, tmp_path / "sources")
    build = RunBuild(["build", str(recipe), "--workers=1"])
    with caplog.at_level(logging.INFO, logger=flex_template.__name__):
        build.process(b"")
    assert (tmp_path / "corpus/mixtures/small/mixture.json").is_file()
    assert f"mix: {tmp_path}/corpus/mixtures/small/mixture.json" in caplog.messages


def test_a_build_that_fails_fails_the_step_with_its_message(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError) as caught:
        RunBuild(["build", str(tmp_path / "absent.toml")]).process(b"")
    assert "ended with status 1:\nerror: " in str(caught.value)
    assert "absent.toml does not exist" in str(caught.value)


def test_a_worker_that_is_given_up_ends_the_build_and_what_it_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A program that starts another stands for the build: both hold the pipe that is read."""
    program = tmp_path / "python"
    program.write_text("#!/bin/sh\necho begun\nsleep 600 &\nsleep 600\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    build, failures = RunBuild([]), list[RuntimeError]()

    def process() -> None:
        try:
            build.process(b"")
        except RuntimeError as error:
            failures.append(error)

    step = threading.Thread(target=process)
    step.start()
    while step.is_alive():
        build.teardown()
        step.join(timeout=0.05)
    (failure,) = failures
    assert "ended with status -15" in str(failure)
