"""Where Google Cloud Dataflow runs a build, and on which machines: recipe tables `[dataflow]` and
`[resources.STAGE]`, and what of them reaches a job as Beam's options.

What is given on the command line, as an option of Beam's, comes before the recipe, and the recipe
before what suits the stage. Untried on the service itself; the sources are Google's pages "Pipeline
options", "Right fitting" and "Use NVIDIA L4 GPUs", and Beam's own code.
"""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field

from pipeline import storage
from pipeline.config_file import Section
from pipeline.dataset import without_secrets
from pipeline.errors import EvenmixError
from pipeline.machine_types import vcpus_and_memory_gb
from pipeline.receipts import fingerprint
from pipeline.stage import Stage

Stored = Annotated[str, AfterValidator(without_secrets)]
SecretVersion = Annotated[str, Field(pattern=r"^projects/[^/]+/secrets/[^/]+/versions/[^/]+$")]
Bucket = Annotated[str, Field(pattern=r"^gs://[^/]+(/.*)?$")]


class Dataflow(Section):
    """The project that pays, and what its workers run.

    ``temp`` is a folder in a bucket for what jobs stage; ``service_account`` is that of the workers
    (absent: the project's default one), ``subnetwork`` as Beam's option of that name. ``image`` is
    the container of workers, ``gpu_image`` that of workers with an accelerator; without ``image``
    workers install ``package``, an sdist of evenmix, when they start. ``hf_token_secret`` names the
    version of a secret in Secret Manager (``projects/P/secrets/S/versions/latest``) that workers
    read HF_TOKEN from; the token itself is in no job.
    """

    project: str | None = None
    region: str | None = None
    temp: Bucket | None = None
    service_account: str | None = None
    subnetwork: str | None = None
    image: Stored | None = None
    gpu_image: Stored | None = None
    package: Stored | None = None
    hf_token_secret: SecretVersion | None = None


class Resources(Section):
    """The machines of a stage; what is absent is as suits the stage.

    A ``machine_type`` that always has accelerators is for the jobs with one. ``workers`` is the
    most that a job may have; each of a machine's processes works at ``threads`` items at a time.
    """

    machine_type: str | None = None
    disk_gb: Annotated[int, Field(ge=10)] | None = None
    workers: Annotated[int, Field(ge=1)] | None = None
    threads: Annotated[int, Field(ge=1)] | None = None


Command = Literal["ingest", "embed", "dedup", "caption", "mix"]
"""The stages of a build as their user knows them; each is one or several of Beam's jobs."""

_SUITABLE: Mapping[str, Resources] = {
    "ingest": Resources(machine_type="n2-standard-4", disk_gb=50, workers=50, threads=1),
    "embed": Resources(machine_type="n2-standard-8", disk_gb=50, workers=50, threads=1),
    "dedup": Resources(machine_type="n2-highmem-8", disk_gb=50, workers=20, threads=1),
    "caption": Resources(machine_type="n2-standard-4", disk_gb=50, workers=16, threads=1),
    "mix": Resources(machine_type="n2-standard-4", disk_gb=50, workers=50, threads=1),
}
"""Without an accelerator. There is one process a vCPU, which downloads with threads of its own."""

L4 = "type:nvidia-l4;count:1;install-nvidia-driver"
"""The accelerator that is proposed, and planned, where a model's captions name none."""

_ACCELERATED = {
    ("nvidia-l4", "1"): "g2-standard-8",
    ("nvidia-l4", "2"): "g2-standard-24",
    ("nvidia-l4", "4"): "g2-standard-48",
    ("nvidia-l4", "8"): "g2-standard-96",
    ("nvidia-tesla-t4", "1"): "n1-standard-8",
    ("nvidia-tesla-a100", "1"): "a2-highgpu-1g",
    ("nvidia-a100-80gb", "1"): "a2-ultragpu-1g",
}
"""By type and number of accelerators: the smallest machine with RAM enough to load a model."""

_WITH_GPUS = ("a2-", "a3-", "a4-", "g2-", "g4-")
"""Machines that always have accelerators, and so are for nothing else."""

_GPU_THREADS = 4
_GPU_DISK_GB = 200  # an image with CUDA and a model's weights, as it came and unpacked

_BESIDE_ACCELERATED = "n2-standard-4"
"""For the steps without the accelerator of a job with one, which only read work lists."""

_HIGHMEM_GB = 8  # that n2-highmem machines have for each vCPU
_HIGHMEM_VCPUS = (8, 16, 32, 48, 64, 80, 96)


def command_of(stage_name: str) -> Command:
    """Return the sub-command that a stage belongs to, whose name begins that of most."""
    for command in ("ingest", "embed", "dedup", "caption"):
        if stage_name.partition("-")[0] == command:
            return command
    return "mix"


def resources_of(
    stage_name: str,
    resources: Mapping[Command, Resources],
    hints: Mapping[str, str] = MappingProxyType({}),
) -> Resources:
    """Return the machines that a stage runs on, with nothing absent.

    ``hints`` are the stage's resource hints: an ``accelerator``, such as
    ``type:nvidia-l4;count:1;install-nvidia-driver``, which may name its ``machine_type`` as well,
    or ``min_ram``, such as ``40GB``.

    Raises:
        EvenmixError: it is not known which machine has such an accelerator or so much memory, nor
            is it given.
    """
    command = command_of(stage_name)
    given = resources.get(command, Resources()).model_dump(exclude_none=True)
    suitable = _SUITABLE[command].model_dump()
    if (accelerator := hints.get("accelerator")) is not None:
        suitable |= {"disk_gb": _GPU_DISK_GB, "threads": _GPU_THREADS}
        if (named := _parts(accelerator).get("machine_type")) is not None:
            given["machine_type"] = named
        elif "machine_type" not in given:
            suitable["machine_type"] = _accelerated_machine(accelerator, command)
    else:
        if given.get("machine_type", "").startswith(_WITH_GPUS):
            del given["machine_type"]
        if "machine_type" not in given and exceeds_share(hints, suitable["machine_type"]):
            suitable["machine_type"] = _highmem_machine(_memory_gb(hints), command)
    return Resources(**suitable | given)


def _parts(accelerator: str) -> dict[str, str]:
    return dict(part.partition(":")[::2] for part in accelerator.split(";"))


def _accelerated_machine(accelerator: str, command: Command) -> str:
    parts = _parts(accelerator)
    machine = _ACCELERATED.get((parts.get("type", ""), parts.get("count", "1")))
    if machine is None:
        raise EvenmixError(
            f"which machine has the accelerator {accelerator!r} is not known; name it as "
            f"resources.{command}.machine_type"
        )
    return machine


def _highmem_machine(memory_gb: int, command: Command) -> str:
    """Return the smallest machine for an item of so much memory, with a vCPU's share to spare."""
    for num_vcpus in _HIGHMEM_VCPUS:
        if _HIGHMEM_GB * (num_vcpus - 1) >= memory_gb:
            return f"n2-highmem-{num_vcpus}"
    raise EvenmixError(
        f"an item needs {memory_gb} GB of memory, which no n2-highmem machine has; name one that "
        f"does as resources.{command}.machine_type"
    )


def _memory_gb(hints: Mapping[str, str]) -> int:
    return int(hints.get("min_ram", "0GB").removesuffix("GB"))


def exceeds_share(hints: Mapping[str, str], machine_type: str) -> bool:
    """Tell whether an item takes more memory than a vCPU's share of a machine.

    Of a machine whose memory is not known, an item that asks for memory gets all.
    """
    vcpus, memory_gb = vcpus_and_memory_gb(machine_type) or (1, 0)
    return _memory_gb(hints) > memory_gb / vcpus


def job_hints(
    stage: Stage, resources: Mapping[Command, Resources], beam_args: Sequence[str]
) -> Mapping[str, str]:
    """Return a stage's resource hints as its job has them: an accelerator with its machine.

    A step with such a hint has workers of its own, and the job's other steps have none that wait
    beside an accelerator ("Right fitting").

    Raises:
        EvenmixError: as :func:`resources_of`.
    """
    hints = stage.resource_hints
    accelerator = hints.get("accelerator")
    if accelerator is None or "machine_type" in _parts(accelerator):
        return hints
    if _is_prime(given_options(beam_args)):
        return hints
    machine = f"machine_type:{resources_of(stage.name, resources, hints).machine_type}"
    # What is named stands before what is only switched on.
    parts = sorted([*accelerator.split(";"), machine], key=lambda part: ":" not in part)
    return {**hints, "accelerator": ";".join(parts)}


def job_name(stage: Stage) -> str:
    """Return the name of a stage's job, the same whenever the command is started again.

    Dataflow has at most one active job of a name. So all commands that fill one folder have one
    job at a time, whatever their datasets: what was published meanwhile does not change the name.
    """
    place = {"root": stage.root.rstrip("/"), "folder": stage.folder}
    return f"evenmix-{stage.name}-{fingerprint(place)[:12]}"


def given_options(beam_args: Sequence[str]) -> dict[str, Any]:
    """Return the options of Beam's that a command line has, by the names that Beam has for them."""
    # It takes a second to import.
    from apache_beam.options.pipeline_options import PipelineOptions  # noqa: PLC0415

    options = PipelineOptions(list(beam_args)).get_all_options(drop_default=True)
    return dict(options)


def job_args(
    stage: Stage,
    dataflow: Dataflow,
    resources: Mapping[Command, Resources],
    beam_args: Sequence[str],
) -> list[str]:
    """Return all options of the job of a stage: the recipe's, then those of the command line.

    The machine of an accelerator is not among them: it is in :func:`job_hints`.

    Raises:
        EvenmixError: as :func:`resources_of`; there is no image for workers with an accelerator.
    """
    given = given_options(beam_args)
    machine = resources_of(stage.name, resources, stage.resource_hints)
    is_accelerated = "accelerator" in stage.resource_hints
    machine_type = _BESIDE_ACCELERATED if is_accelerated else str(machine.machine_type)
    values = {
        "project": dataflow.project,
        "region": dataflow.region,
        "temp_location": dataflow.temp and storage.join(dataflow.temp, "temp"),
        "staging_location": dataflow.temp and storage.join(dataflow.temp, "staging"),
        "service_account_email": dataflow.service_account,
        "subnetwork": dataflow.subnetwork,
        "job_name": job_name(stage),
        "labels": f"evenmix-stage={stage.name}",
        # Prime chooses machines by itself, from the hints, and refuses their names.
        "worker_machine_type": None if _is_prime(given) else machine_type,
        "disk_size_gb": machine.disk_gb,
        "max_num_workers": machine.workers,
        "number_of_worker_harness_threads": machine.threads,
        # Beam would stage the list of all packages here, and pip may know URLs with passwords.
        "experiments": "disable_logging_submission_environment",
    }
    if image := dataflow.gpu_image if is_accelerated else dataflow.image:
        values |= {"sdk_container_image": image, "sdk_location": "container"}
    elif "sdk_container_image" not in given:
        if is_accelerated:
            raise EvenmixError(f"dataflow.gpu_image is missing, which {stage.name} needs")
        values |= {"extra_package": dataflow.package, "requirements_cache": "skip"}
    args = [f"--{name}={value}" for name, value in values.items() if value is not None]
    has_wish = "use_multiple_sdk_containers" in given.get("experiments", [])
    machine_type = given.get("machine_type", machine_type)
    takes_machine = is_accelerated or exceeds_share(stage.resource_hints, machine_type)
    if takes_machine and not has_wish:
        # One process a machine: its model's server is found through the container's own files, and
        # the memory is for one item.
        args.append("--experiments=no_use_multiple_sdk_containers")
    args += beam_args
    most = given.get("max_num_workers", machine.workers)
    if given.get("num_workers", 0) > most:
        # The option is one for all stages, and Beam refuses more than a stage may have.
        args.append(f"--num_workers={most}")
    return args


def _is_prime(given: Mapping[str, Any]) -> bool:
    wishes = [*given.get("experiments", []), *given.get("dataflow_service_options", [])]
    return "enable_prime" in wishes
