"""Stage a pipeline as a Dataflow job template, to see what Dataflow would be asked to run.

DataflowRunner itself checks the pipeline, translates it and writes the template; only the service
that would run it is missing.
"""

import base64
import bz2
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import apache_beam as beam
from apache_beam.io.filesystems import FileSystems
from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.portability import common_urns
from apache_beam.portability.api import beam_runner_api_pb2

from pipeline import dataflow_job
from pipeline.beam_job import RunnerOptions
from pipeline.dataflow import Command, Dataflow, Resources, job_args
from pipeline.stage import Stage

PROJECT = "evenmix-test"
REGION = "europe-west4"


@dataclass(frozen=True)
class StagedJob:
    """A job template as it lies in the bucket.

    Attributes:
        job: the job description, the JSON object that Dataflow's `projects.templates` reads.
        pipeline: the pipeline that the job's workers run.
    """

    job: dict[str, Any]
    pipeline: beam_runner_api_pb2.Pipeline

    @property
    def workers(self) -> dict[str, Any]:
        """The workers that are asked for."""
        (pool,) = self.job["environment"]["workerPools"]
        return dict(pool)

    @property
    def options(self) -> dict[str, Any]:
        """Beam's options, as workers see them."""
        return dict(self.job["environment"]["sdkPipelineOptions"]["options"])

    @property
    def steps(self) -> set[str]:
        """The full names of all steps."""
        return {step.unique_name for step in self.pipeline.components.transforms.values()}

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

    def pickles(self) -> dict[str, bytes]:
        """Return what is pickled in each step's function; in the pipeline it is compressed."""
        par_do = common_urns.primitives.PAR_DO.urn
        return {
            step.unique_name: bz2.decompress(
                base64.b64decode(
                    beam_runner_api_pb2.ParDoPayload.FromString(step.spec.payload).do_fn.payload
                )
            )
            for step in self.pipeline.components.transforms.values()
            if step.spec.urn == par_do
        }


def stage_job(
    stage: Stage,
    work_list_urls: Sequence[str],
    bucket_url: str,
    dataflow: Dataflow,
    resources: Mapping[Command, Resources],
    *beam_args: str,
) -> StagedJob:
    """Stage a stage's job as `evenmix` submits it, as a template under `bucket_url`."""
    template_url = f"{bucket_url}/template.json"
    given = ("--runner=DataflowRunner", f"--template_location={template_url}", "--no_auth")
    args = job_args(stage, dataflow, resources, (*given, *beam_args))
    options = RunnerOptions(beam_args=tuple(args), dataflow=dataflow, resources=resources)
    assert dataflow_job.submit(stage, work_list_urls, options) is None
    return read_staged(template_url)


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
            f"--project={PROJECT}",
            f"--region={REGION}",
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
    return read_staged(f"{bucket_url}/template.json")


def read_staged(template_url: str) -> StagedJob:
    job = json.loads(read(template_url))
    pipeline_url = job["environment"]["sdkPipelineOptions"]["options"]["pipelineUrl"]
    return StagedJob(job, beam_runner_api_pb2.Pipeline.FromString(read(pipeline_url)))


def read(url: str) -> bytes:
    with FileSystems.open(url) as file:
        return bytes(file.read())
