"""What is staged for Dataflow, of every stage of a build, is what the recipe says."""

import importlib
import json
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import apache_beam as beam
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from captioning.from_model import VllmCaptioning
from dedup.embed import Embed
from mixing import export, gather
from pipeline import beam_job, build
from pipeline.beam_job import RunnerOptions
from pipeline.config_file import load_toml
from pipeline.errors import EvenmixError
from pipeline.publishing import publish_item
from pipeline.recipe import Recipe
from pipeline.stage import (
    Line,
    Stage,
    WorkItem,
    lines_of_work_list,
    read_work_list,
    write_work_lists,
)
from tests import corpora
from tests.chat_server import ChatServer, Reply
from tests.dataflow import PROJECT, REGION, StagedJob, stage_job, stage_template
from tests.gcs import BUCKET, Proxy
from tests.tiny_onnx import mean_colour_onnx

L4 = "type:nvidia-l4;count:1;install-nvidia-driver"
T4 = "type:nvidia-tesla-t4;count:1;install-nvidia-driver"
TOKEN = "hf_NobodyMaySeeThis"
SECRET = "projects/p/secrets/hf-token/versions/latest"
NUM_ITEMS = 10_000


def graph(pipeline: beam.Pipeline) -> None:
    lengths = pipeline | beam.Create(["a", "bc"]) | "measure" >> beam.Map(len)
    accelerated = beam.Map(str).with_resource_hints(accelerator=L4, min_ram="24GB")
    lengths | "caption" >> accelerated


def test_template_names_the_job_and_carries_hints_on_one_step(gcs_bucket: str) -> None:
    staged = stage_template(graph, gcs_bucket, ("--max_num_workers=7",))

    environment = staged.job["environment"]
    assert staged.job["type"] == "JOB_TYPE_BATCH"
    assert staged.workers["autoscalingSettings"]["maxNumWorkers"] == 7
    assert environment["tempStoragePrefix"].startswith(
        gcs_bucket.replace("gs://", "storage.googleapis.com/")
    )
    assert staged.resource_hints() == {
        "caption": {
            "beam:resources:accelerator:v1": L4.encode(),
            "beam:resources:min_ram_bytes:v1": b"24000000000",
        }
    }
    assert {"measure", "caption"} <= staged.steps


@dataclass(frozen=True)
class Step:
    """A stage of a build as it ran: its work, and the job that Dataflow would have been given."""

    stage: Stage
    lines: Sequence[Line]
    job: StagedJob


def write_recipe(folder: Path, endpoint: str) -> Path:
    """Write a recipe with all kinds of captions, for Dataflow, whose steps take seconds here."""
    recipe = corpora.write_recipe(folder, folder / "sources")
    (folder / "mean.onnx").write_bytes(mean_colour_onnx())
    (folder / "published" / "shapes").mkdir(parents=True)
    rows = pa.table({"key": ["1", "2"], "caption1": ["A published caption.", "And another one."]})
    pq.write_table(rows, folder / "published" / "shapes" / "train-0.parquet")
    document = recipe.read_text().replace(
        'captions = "source"', "captions = { source = 1, vlm = 2 }"
    )
    document = document.replace("samples_per_shard = 16", "samples_per_shard = 4")
    document = document.replace(
        "[datasets.shapes]", '[datasets.shapes]\ncaption_subset = "shapes"\njoin_rule = "{id}"'
    )
    recipe.write_text(
        f"""
        {document}
        captions_of = {{ shapes = "theirs" }}
        [captions.vlm]
        engine = "vllm"
        model = "tiny"
        endpoint = "{endpoint}"
        accelerator = "{L4}"
        pictures = "selected"
        [captions.theirs]
        engine = "published"
        source = "{folder}/published"
        [dedup]
        weights = "{folder}/mean.onnx"
        accelerator = "{T4}"
        against = "{folder}/sources/photographs"
        contamination = "report"
        [dataflow]
        project = "{PROJECT}"
        region = "{REGION}"
        temp = "gs://{BUCKET}/staged"
        service_account = "workers@{PROJECT}.iam.gserviceaccount.com"
        subnetwork = "regions/{REGION}/subnetworks/private"
        image = "{REGION}-docker.pkg.dev/{PROJECT}/evenmix/cpu:1"
        gpu_image = "{REGION}-docker.pkg.dev/{PROJECT}/evenmix/gpu:1"
        hf_token_secret = "{SECRET}"
        [resources.ingest]
        machine_type = "n2-standard-16"
        disk_gb = 77
        workers = 123
        threads = 3
        """
    )
    return recipe


@pytest.fixture(scope="module")
def steps(gcs_server: Proxy, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Step]]:
    """Every stage of a build, by its name."""
    folder = tmp_path_factory.mktemp("templates")
    corpora.write_sources(folder / "sources")
    found: dict[str, Step] = {}

    def stage_and_run(
        stage: Stage, urls: Sequence[str], options: RunnerOptions, _: Callable[[], Any]
    ) -> None:
        items = [item for url in urls for item in read_work_list(url)]
        # A caption set's stage is named like those of others.
        name = f"caption {Path(stage.folder).name}" if stage.name == "caption" else stage.name
        if name not in found:
            many = [
                WorkItem("d", f"shard-{number:09d}", inputs={"file": f"{number:064d}"})
                for number in range(NUM_ITEMS)
            ]
            bucket_url = f"gs://{BUCKET}/{uuid.uuid4().hex}"
            lists = write_work_lists(stage, many)
            job = stage_job(stage, lists, bucket_url, options.dataflow, options.resources)
            lines = [line for url in urls for line in lines_of_work_list(url)]
            found[name] = Step(stage, lines, job)
        # No machine with an accelerator is here.
        here = replace(stage, must_have_gpu=False) if isinstance(stage, Embed) else stage
        for item in items:
            publish_item(here, item)

    with (
        ChatServer(lambda _: Reply("A plain shape.")) as server,
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setattr(beam_job, "run", stage_and_run)
        patch.setenv("HF_TOKEN", TOKEN)
        # So few samples are regrouped, too.
        patch.setattr(gather, "FEW_FILES", 0)
        recipe = load_toml(str(write_recipe(folder, server.url)), Recipe, {})
        dataflow = ("--runner=DataflowRunner",)
        runner = RunnerOptions(1, dataflow, recipe.dataflow, recipe.resources)
        for module in build.STAGES:
            importlib.import_module(module).run_recipe(recipe, runner)
        export.run_recipe(recipe, runner)
    yield found


CPU_STAGES = {
    "ingest": "n2-standard-16",
    **dict.fromkeys(
        (
            "dedup",
            "dedup-against",
            "dedup-clusters",
            "dedup-graph",
            "dedup-pairs",
            "dedup-pictures",
            "dedup-removals",
            "dedup-report",
            "dedup-sample",
            "dedup-truth",
            "dedup-vectors",
        ),
        "n2-highmem-8",
    ),
    **dict.fromkeys(
        (
            "caption-gathered",
            "caption-joined",
            "caption-pictures",
            "caption-published",
            "caption source",
            "caption theirs",
            "candidates",
            "mix",
            "mix-gather",
            "mix-regroup",
            "select",
            "tfrecords",
        ),
        "n2-standard-4",
    ),
}
"""The machines of each stage's workers, as the recipe or what suits the stage says."""

GPU_STAGES = {
    "embed": "type:nvidia-tesla-t4;count:1;machine_type:n1-standard-8;install-nvidia-driver",
    "caption vlm": "type:nvidia-l4;count:1;machine_type:g2-standard-8;install-nvidia-driver",
}
"""The accelerators that the recipe asks for, with their machines."""


def test_every_stage_of_a_build_is_staged(steps: dict[str, Step]) -> None:
    assert steps.keys() == CPU_STAGES.keys() | GPU_STAGES.keys()


def test_the_accelerator_is_asked_for_where_it_works_and_nowhere_else(
    steps: dict[str, Step],
) -> None:
    hints = {
        (stage, place): {urn.split(":")[2]: value for urn, value in wanted.items()}
        for stage, step in steps.items()
        for place, wanted in step.job.resource_hints().items()
    }
    accelerated = {
        (stage, "PublishItems"): {"accelerator": accelerator.encode()}
        for stage, accelerator in GPU_STAGES.items()
    }
    assert {
        place: wanted for place, wanted in hints.items() if "accelerator" in wanted
    } == accelerated
    # The others are of memory: what holds all pictures, or trains on a sample of them.
    assert hints.keys() - accelerated.keys() == {
        (stage, "PublishItems")
        for stage in ("dedup-clusters", "dedup-pictures", "dedup-removals", "dedup-report")
    }


def test_each_job_gets_the_machines_that_suit_it(steps: dict[str, Step]) -> None:
    machines = {stage: step.job.workers["machineType"] for stage, step in steps.items()}
    # Of a stage with an accelerator these are the workers that read the work lists.
    assert machines == CPU_STAGES | dict.fromkeys(GPU_STAGES, "n2-standard-4")
    for stage, step in steps.items():
        kind = "gpu" if stage in GPU_STAGES else "cpu"
        image = f"{REGION}-docker.pkg.dev/{PROJECT}/evenmix/{kind}:1"
        containers = step.job.workers["sdkHarnessContainerImages"]
        assert {container["containerImage"] for container in containers} == {image}
        is_single = "no_use_multiple_sdk_containers" in step.job.job["environment"]["experiments"]
        assert is_single == (stage in GPU_STAGES)
        disk_gb = 77 if stage == "ingest" else 200 if stage in GPU_STAGES else 50
        assert step.job.workers["diskSizeGb"] == disk_gb
        threads = 3 if stage == "ingest" else 4 if stage in GPU_STAGES else 1
        assert step.job.workers["numThreadsPerWorker"] == threads
    assert steps["ingest"].job.workers["autoscalingSettings"]["maxNumWorkers"] == 123


def test_the_one_process_of_a_machine_keeps_its_engine_busy(steps: dict[str, Step]) -> None:
    stage = steps["caption vlm"].stage
    assert isinstance(stage, VllmCaptioning)
    assert stage.engine_config.max_in_flight == stage.settings.in_flight


def test_nothing_is_embedded_on_the_cpu_beside_an_accelerator(steps: dict[str, Step]) -> None:
    item = WorkItem("shapes", "shard", inputs={})
    with pytest.raises(
        EvenmixError, match=r"has dedup\.accelerator, but the worker cannot use one"
    ):
        steps["embed"].stage.process(item)


def test_the_project_and_its_accounts_arrive(steps: dict[str, Step]) -> None:
    for step in steps.values():
        environment = step.job.job["environment"]
        assert environment["serviceAccountEmail"] == f"workers@{PROJECT}.iam.gserviceaccount.com"
        assert step.job.workers["subnetwork"] == f"regions/{REGION}/subnetworks/private"
        assert step.job.options["project"] == PROJECT
        assert step.job.options["region"] == REGION
        assert step.job.options["temp_location"].startswith(f"gs://{BUCKET}/staged/temp/")
        assert step.job.options["pipelineUrl"].startswith(f"gs://{BUCKET}/staged/staging/")


def test_no_description_grows_with_the_work_or_has_a_secret(steps: dict[str, Step]) -> None:
    for step in steps.values():
        description = json.dumps(step.job.job)
        serialized = step.job.pipeline.SerializeToString()
        assert len(description) < 100_000
        assert len(serialized) < 100_000
        pickled = b"".join(step.job.pickles().values())
        assert SECRET.encode() in step.job.pickles()["PublishItems"]
        for text in (description.encode(), serialized, pickled):
            assert TOKEN.encode() not in text
            assert f"shard-{NUM_ITEMS // 2:09d}".encode() not in text


def test_between_two_steps_only_references_travel(steps: dict[str, Step]) -> None:
    """Work lists' URLs, then where items are in them; nothing leaves the last step."""
    for step in steps.values():
        components = step.job.pipeline.components.transforms.values()
        read_by = {name for transform in components for name in transform.inputs.values()}
        (publishing,) = [each for each in components if each.unique_name == "PublishItems"]
        assert not read_by & set(publishing.outputs.values())
        roots = set(step.job.pipeline.root_transform_ids)
        assert {name.partition("/")[0] for name in step.job.steps - roots} == {
            "WorkLists",
            "ReadWorkList",
            "SpreadOverWorkers",
            "PublishItems",
        }
        # The stage, which alone can read pictures, is nowhere but in the last step.
        knowing = {name for name, data in step.job.pickles().items() if b"PublishItems" in data}
        assert knowing == {"PublishItems"}
        assert max(len(json.dumps(line)) for line in step.lines) < 300
