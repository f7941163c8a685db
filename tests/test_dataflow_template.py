"""What is staged for Dataflow is what the pipeline says."""

import apache_beam as beam

from tests.dataflow import stage_template

pytest_plugins = ["tests.gcs"]


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
