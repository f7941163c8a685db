"""What is staged for Dataflow is what the pipeline says."""

import json

import apache_beam as beam
import pytest

from captioning.engine.models import ModelIdentity
from captioning.from_model import VllmCaptioning
from pipeline import beam_pipeline
from pipeline.dataset import Dataset
from pipeline.images import Limits
from pipeline.ingest_stage import Ingest
from pipeline.recipe import Fetch, VllmCaptions
from pipeline.stage import Stage, WorkItem, write_work_lists
from tests.dataflow import StagedJob, stage_template


def build(pipeline: beam.Pipeline) -> None:
    lengths = pipeline | beam.Create(["a", "bc"]) | "measure" >> beam.Map(len)
    accelerated = beam.Map(str).with_resource_hints(
        accelerator="type:nvidia-l4;count:1;install-nvidia-driver", min_ram="24GB"
    )
    lengths | "caption" >> accelerated


def test_template_names_the_job_and_carries_hints_on_one_step(gcs_bucket: str) -> None:
    staged = stage_template(build, gcs_bucket, ("--max_num_workers=7",))

    environment = staged.job["environment"]
    (workers,) = environment["workerPools"]
    assert staged.job["type"] == "JOB_TYPE_BATCH"
    assert workers["autoscalingSettings"]["maxNumWorkers"] == 7
    assert environment["tempStoragePrefix"].startswith(
        gcs_bucket.replace("gs://", "storage.googleapis.com/")
    )
    assert staged.resource_hints() == {
        "caption": {
            "beam:resources:accelerator:v1": b"type:nvidia-l4;count:1;install-nvidia-driver",
            "beam:resources:min_ram_bytes:v1": b"24000000000",
        }
    }
    steps = {step.unique_name for step in staged.pipeline.components.transforms.values()}
    assert {"measure", "caption"} <= steps


NUM_ITEMS = 10_000


def stage_job(stage: Stage, bucket_url: str) -> StagedJob:
    """Stage a stage's job, as it is built for every runner, with many items to do."""
    items = [
        WorkItem("d", f"shard-{number:09d}", inputs={"file": f"{number:064d}"})
        for number in range(NUM_ITEMS)
    ]
    work_lists = write_work_lists(stage, items)
    return stage_template(
        lambda pipeline: beam_pipeline.build(pipeline, stage, work_lists),
        f"{bucket_url}/job",
        ("--max_num_workers=7", "--number_of_worker_harness_threads=3"),
    )


def test_ingest_is_a_small_job_without_accelerators_or_secrets(
    gcs_bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_NobodyMaySeeThis")
    dataset = Dataset(layout="folder", source=f"{gcs_bucket}/in", licence="CC0 1.0")
    limits = Limits(256, 10**8, 10**8)
    stage = Ingest(f"{gcs_bucket}/R", {"d": dataset}, {"d": None}, limits, Fetch())
    staged = stage_job(stage, gcs_bucket)

    job, pipeline = json.dumps(staged.job), staged.pipeline.SerializeToString()
    assert len(job) < 100_000
    assert len(pipeline) < 100_000
    assert "NobodyMaySeeThis" not in job
    assert b"NobodyMaySeeThis" not in pipeline
    environment = staged.job["environment"]
    assert environment["workerPools"][0]["autoscalingSettings"]["maxNumWorkers"] == 7
    assert environment["sdkPipelineOptions"]["options"]["number_of_worker_harness_threads"] == 3
    assert staged.resource_hints() == {}
    steps = {step.unique_name for step in staged.pipeline.components.transforms.values()}
    assert {"WorkLists", "ReadWorkList", "SpreadOverWorkers", "PublishItems"} <= steps


def test_captioning_asks_for_an_accelerator_where_it_captions(gcs_bucket: str) -> None:
    accelerator = "type:nvidia-l4;count:1;install-nvidia-driver"
    settings = VllmCaptions(engine="vllm", accelerator=accelerator)
    model = ModelIdentity(settings.model, "0" * 40, settings.model)
    stage = VllmCaptioning(f"{gcs_bucket}/R", "own", settings, model, {}, seed=0)
    staged = stage_job(stage, gcs_bucket)

    assert staged.resource_hints() == {
        "PublishItems": {"beam:resources:accelerator:v1": accelerator.encode()}
    }
