"""Stage a pipeline as a Dataflow job template, to see what Dataflow would be asked to run.

DataflowRunner itself checks the pipeline, translates it and writes the template; only the service
that would run it is missing.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import apache_beam as beam
from apache_beam.io.filesystems import FileSystems
from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.portability.api import beam_runner_api_pb2


@dataclass(frozen=True)
class StagedJob:
    """A job template as it lies in the bucket.

    Attributes:
        job: the job description, the JSON object that Dataflow's `projects.templates` reads.
        pipeline: the pipeline that the job's workers run.
    """

    job: dict[str, Any]
    pipeline: beam_runner_api_pb2.Pipeline

    def resource_hints(self) -> dict[str, dict[str, bytes]]:
        """Return the resource hints of each step (by full name) that has any, by URN."""
        components = self.pipeline.components
        environments = {
            transform.unique_name: components.environments[transform.environment_id]
            for transform in components.transforms.values()
            if transform.environment_id
        }
        return {
            step: dict(environment.resource_hints)
            for step, environment in environments.items()
            if environment.resource_hints
        }


def stage_template(
    build: Callable[[beam.Pipeline], object], bucket_url: str, extra_args: tuple[str, ...] = ()
) -> StagedJob:
    """Stage the pipeline that `build` puts together as a template under `bucket_url` (gs://…).

    Args:
        build: applies the job's transforms to the pipeline it is given.
        bucket_url: an empty gs:// folder; see `tests.gcs.gcs_bucket`.
        extra_args: further Beam options, for example `("--max_num_workers=10",)`.
    """
    options = PipelineOptions(
        [
            "--runner=DataflowRunner",
            "--project=evenmix-test",
            "--region=europe-west4",
            "--job_name=evenmix-test",
            f"--staging_location={bucket_url}/staging",
            f"--temp_location={bucket_url}/temp",
            f"--template_location={bucket_url}/template.json",
            "--no_auth",
            "--sdk_location=container",
            "--no_save_main_session",
            *extra_args,
        ]
    )
    pipeline = beam.Pipeline(options=options)
    build(pipeline)
    pipeline.run()
    job = json.loads(read(f"{bucket_url}/template.json"))
    pipeline_url = job["environment"]["sdkPipelineOptions"]["options"]["pipelineUrl"]
    return StagedJob(job, beam_runner_api_pb2.Pipeline.FromString(read(pipeline_url)))


def read(url: str) -> bytes:
    with FileSystems.open(url) as file:
        return bytes(file.read())
