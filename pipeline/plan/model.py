"""The work that a recipe leaves to each stage: items, time of workers, bytes and requests.

Each stage is a sum over its datasets of what :mod:`pipeline.plan.expected` knows of them times the
figures of :mod:`pipeline.plan.figures`; only the search for duplicates is not linear. What is
finished is no work.
"""

import importlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields

from pipeline.dataflow import L4, Command, exceeds_share, resources_of
from pipeline.errors import EvenmixError
from pipeline.plan.expected import MB, Expected, caption_folders
from pipeline.plan.figures import Figures
from pipeline.plan.machines import Machine, machine_of
from pipeline.plan.ranges import NOTHING, Range, total
from pipeline.recipe import PublishedCaptions, Recipe, VllmCaptions
from pipeline.records import IMAGES, duplicates_folder, embeddings_folder, mixture_folder

_FILES_OF_ITEM = 4  # at most: tar, rejected records, observations, commit
_READS_OF_ITEM = 5  # its line, its inputs' footers, its receipt by progress and at the end
_PICTURES_PER_READ = 16  # dedup.embed.BATCH_SIZE
_MB_PER_READ = 16  # of a mirrored source: pipeline.storage's buffer
_EXCHANGE_MB_PER_READ = 1.0  # slices: 1.6 MB in mixtures, 0.5 to 1 MB in published captions
_DIMENSION = 512  # of SSCD's descriptors
_LINE_BYTES = 300  # where its work list has an item, the only thing that a shuffle carries


@dataclass(frozen=True)
class Work:
    """An amount of work.

    ``pictures`` go in. ``worker_s`` are seconds of worker processes, of which a machine has one a
    vCPU, waits for downloads included; ``gpu_s`` those of GPUs, meanwhile; ``alone_s`` those in
    which only one item can run. ``downloaded_bytes`` come from outside, ``read_bytes`` from the
    bucket; of ``written_bytes`` the ``stored_bytes`` stay. ``class_a`` and ``class_b`` are requests
    that write, and that read. Listings count as writes: of those before and after a stage, four
    pages for a thousand items, nothing is said here; those meanwhile go by time, in its price.
    """

    items: Range = NOTHING
    pictures: Range = NOTHING
    worker_s: Range = NOTHING
    gpu_s: Range = NOTHING
    alone_s: Range = NOTHING
    downloaded_bytes: Range = NOTHING
    read_bytes: Range = NOTHING
    written_bytes: Range = NOTHING
    stored_bytes: Range = NOTHING
    class_a: Range = NOTHING
    class_b: Range = NOTHING

    def __add__(self, other: "Work") -> "Work":
        return Work(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))


@dataclass(frozen=True)
class StagePlan:
    """What a stage has to do still, on which machines; items that run alone may need another.

    It takes ``jobs`` of Beam's, one after the other.
    """

    name: Command
    machine: Machine
    machine_alone: Machine
    jobs: int
    work: Work

    @property
    def items(self) -> int:
        """The number of work items, at most."""
        return math.ceil(self.work.items.high)

    @property
    def shuffled_bytes(self) -> float:
        """The bytes of references that go through a shuffle."""
        return float(self.items * _LINE_BYTES)


@dataclass(frozen=True)
class Planner:
    """What the plans of all stages are made of.

    ``measured`` are seconds of worker processes a record, by stage, of a trial on this machine;
    they stand in for the figures of CPU time. Transfers come on top, as they do to those.
    """

    recipe: Recipe
    figures: Figures
    expected: Mapping[str, Expected]
    measured: Mapping[Command, float]

    def todo(self, folder: str) -> dict[str, Expected]:
        """Return the datasets that are not finished in a folder."""
        return {
            name: dataset
            for name, dataset in self.expected.items()
            if folder not in dataset.finished
        }

    def cpu_s(self, stage: Command, records: Range, figured: Range) -> Range:
        """Return the seconds of Dataflow's vCPUs that stand for those measured."""
        if stage in self.measured:
            figured = records * self.measured[stage]
        return figured * self.figures.machines.vcpu_s_per_measured_s

    def from_bucket(self, num_bytes: Range) -> Range:
        """Return the seconds that a process reads or writes so many bytes of the bucket."""
        return num_bytes / MB * self.figures.machines.bucket_s_per_mb


def stages(
    recipe: Recipe,
    figures: Figures,
    expected: Mapping[str, Expected],
    measured: Mapping[Command, float] | None = None,
) -> list[StagePlan]:
    """Return the plans of all stages, in the order of a build.

    Raises:
        EvenmixError: the machines of a stage cannot be priced, have no GPU and need one, or need
            another than an L4.
    """
    planner = Planner(recipe, figures, expected, measured or {})
    work: dict[Command, Callable[[Planner], Work]] = {
        "ingest": ingest_work,
        "embed": embed_work,
        "dedup": dedup_work,
        "caption": caption_work,
        "mix": mix_work,
    }
    return [
        StagePlan(
            name,
            _machine(recipe, name, hints),
            _machine(recipe, name, {**hints, **_memory_alone(name, expected)}),
            _jobs(recipe)[name],
            work[name](planner),
        )
        for name, hints in _hints(recipe).items()
    ]


def _hints(recipe: Recipe) -> dict[Command, dict[str, str]]:
    """Return the accelerators of the stages that have one."""
    models = models_of(recipe)
    accelerator = next((model.accelerator for model in models if model.accelerator), L4)
    described_by = recipe.dedup.accelerator
    return {
        "ingest": {},
        "embed": {"accelerator": described_by} if described_by else {},
        "dedup": {},
        "caption": {"accelerator": accelerator} if models else {},
        "mix": {},
    }


def _jobs(recipe: Recipe) -> dict[Command, int]:
    """Return how many jobs each stage takes."""
    captions = [recipe.captions[name] for name in caption_folders(recipe)]
    return {
        "ingest": 1,
        "embed": 1,
        # Pictures, sample, clusters, truth (twice at most), vectors, pairs, graph, removals, report
        # (two steps) and outcome.
        "dedup": 12,
        # Those of the join, and before a choice of pictures that of the candidates.
        "caption": sum(
            5
            if isinstance(settings, PublishedCaptions)
            else 1 + (isinstance(settings, VllmCaptions) and settings.pictures == "selected")
            for settings in captions
        ),
        # Candidates, select, gather, regroup, write.
        "mix": 5,
    }


def _memory_alone(stage: Command, expected: Mapping[str, Expected]) -> dict[str, str]:
    """Return the memory of an item that decides about all pictures at once."""
    if stage != "dedup":
        return {}
    pictures = total(dataset.kept for dataset in expected.values()).high
    hints: dict[str, str] = importlib.import_module("dedup.corpus").memory_for(int(pictures))
    return hints


def _machine(recipe: Recipe, stage: Command, hints: Mapping[str, str]) -> Machine:
    """Return the machines of a stage, or of its items with these hints."""
    accelerator = hints.get("accelerator", L4)
    if "type:nvidia-l4" not in accelerator.split(";"):
        raise EvenmixError(
            f"the plan knows the price and the speed of no accelerator but the L4, and {stage} has "
            f'{accelerator!r}; plan a copy of the recipe that names accelerator = "{L4}" instead'
        )
    found = resources_of(stage, recipe.resources, hints)
    machine = machine_of(
        str(found.machine_type), found.disk_gb or 0, found.workers or 1, found.threads or 1
    )
    if "accelerator" in hints and not machine.gpus:
        raise EvenmixError(
            f"the plan prices L4 GPUs, of which {machine.machine_type} has none; set "
            f"resources.{stage}.machine_type to one that has, such as g2-standard-8"
        )
    return machine


def _vcpus_of_item(machine: Machine, hints: Mapping[str, str]) -> int:
    """Return how much of a machine an item has: all, if it needs more memory than its share."""
    return machine.vcpus if exceeds_share(hints, machine.machine_type) else 1


def models_of(recipe: Recipe) -> list[VllmCaptions]:
    """Return the caption sets of the mixture that a server of our own writes."""
    sets = [recipe.captions[name] for name in caption_folders(recipe)]
    return [s for s in sets if isinstance(s, VllmCaptions) and s.endpoint is None]


def ingest_work(planner: Planner) -> Work:
    """Return what is left to ingest, and to mirror before it."""
    recipe, figures, work = planner.recipe, planner.figures.ingest, Work()
    for dataset in planner.todo(IMAGES).values():
        figured = dataset.records * figures.cpu_s_per_record + (
            dataset.kept_bytes / MB * figures.cpu_s_per_mb
        )
        worker_s = planner.cpu_s("ingest", dataset.records, figured)
        mirrored = dataset.files_bytes if dataset.dataset.mirror else NOTHING
        if dataset.dataset.is_fetched:
            # Downloads overlap, with each other and with the work on those that have come.
            in_flight = figures.hosts.range * recipe.fetch.per_host
            waits_s = dataset.records * figures.download_s
            worker_s = worker_s.at_least(waits_s / in_flight)
        elif dataset.dataset.mirror:
            worker_s += planner.from_bucket(mirrored)
        else:
            worker_s += dataset.files_bytes / MB * planner.figures.machines.internet_s_per_mb
        stored = dataset.kept_bytes + dataset.kept * figures.bytes_per_picture
        work += Work(
            items=dataset.shards,
            pictures=dataset.records,
            worker_s=worker_s,
            downloaded_bytes=dataset.source_bytes,
            read_bytes=mirrored,
            written_bytes=stored + mirrored,
            stored_bytes=stored + mirrored,
            class_a=dataset.shards * _FILES_OF_ITEM,
            class_b=dataset.shards * _READS_OF_ITEM + mirrored / MB / _MB_PER_READ,
        )
    return work


def embed_work(planner: Planner) -> Work:
    """Return what is left to describe."""
    recipe, figures, work = planner.recipe, planner.figures.embed, Work()
    for dataset in planner.todo(embeddings_folder(recipe.dedup.descriptor)).values():
        if not dataset.is_near:
            continue
        cpu_s = dataset.kept * figures.cpu_s_per_picture[recipe.dedup.model] + (
            dataset.kept_bytes / MB * figures.cpu_s_per_mb
        )
        written = dataset.kept * figures.bytes_per_picture
        work += Work(
            items=dataset.shards,
            pictures=dataset.kept,
            worker_s=planner.cpu_s("embed", dataset.kept, cpu_s)
            + planner.from_bucket(dataset.kept_bytes),
            read_bytes=dataset.kept_bytes,
            written_bytes=written,
            stored_bytes=written,
            class_a=dataset.shards,
            class_b=dataset.kept / _PICTURES_PER_READ + dataset.shards * _READS_OF_ITEM,
        )
    return work


def dedup_work(planner: Planner) -> Work:
    """Return what the search for duplicates takes: all of it, unless all datasets are finished.

    N vectors in C clusters of K clusterings take N C K products to find the clusters' members, and
    N^2 / 2C K within even ones; fitting takes a sample of S vectors a cluster, S C^2 a round. One
    process fits a clustering, on a machine of its own if the sample is as large as that.
    """
    recipe, figures = planner.recipe, planner.figures.dedup
    if not planner.todo(duplicates_folder(recipe.dedup.name)):
        return Work()
    clusters = importlib.import_module("dedup.clusters")
    rows_per_group = importlib.import_module("dedup.corpus").PICTURES_PER_GROUP
    datasets = planner.expected.values()
    pictures = total(dataset.kept for dataset in datasets)
    searched = total(dataset.kept for dataset in datasets if dataset.is_near)
    shards = total(dataset.shards for dataset in datasets)

    def products(num_vectors: float) -> tuple[float, float, float]:
        """Return the products of assigning, of comparing, and of fitting one clustering."""
        num_clusters = recipe.dedup.num_clusters or clusters.default_num_clusters(num_vectors)
        if num_clusters == 1:
            return 0.0, num_vectors**2 / 2, 0.0
        fitted = clusters.SAMPLE_PER_CLUSTER * num_clusters**2 * clusters.ITERATIONS
        return num_vectors * num_clusters, num_vectors**2 / (2 * num_clusters), fitted

    low, high = products(searched.low), products(searched.high)
    assigning, comparing, fitting = (Range(*ends) for ends in zip(low, high, strict=True))
    k = recipe.dedup.clusterings if fitting.high else 1
    per_product = figures.cpu_s_per_million_products.range / 1e6
    num_clusters = recipe.dedup.num_clusters or clusters.default_num_clusters(searched.high)
    sample = clusters.fit_memory(num_clusters, int(searched.high), _DIMENSION)
    held = _vcpus_of_item(_machine(recipe, "dedup", sample), sample)
    # One of the clusterings is in alone_s: the others are fitted meanwhile.
    search = (assigning + comparing * figures.uneven_clusters) * k + fitting * (k - 1) * held
    search_s = search * per_product
    slower = planner.figures.machines.vcpu_s_per_measured_s
    parts = (searched / rows_per_group).rounded_up()
    vectors = searched * planner.figures.embed.bytes_per_picture
    stored = pictures * figures.bytes_per_picture
    return Work(
        items=shards + parts * (2 * k + 2),
        pictures=pictures,
        worker_s=(search_s + pictures * figures.cpu_s_per_picture) * slower
        + planner.from_bucket(vectors * (2 * k + 2)),
        alone_s=(fitting * per_product + pictures * figures.alone_s_per_picture) * slower,
        read_bytes=vectors * (2 * k + 2),
        written_bytes=vectors * k + stored,
        stored_bytes=stored,
        class_a=shards + parts * (2 * k + 2),
        class_b=shards * _READS_OF_ITEM + parts * parts * k,
    )


def caption_work(planner: Planner) -> Work:
    """Return what is left of the caption sets that the mixture uses."""
    recipe, figures, work = planner.recipe, planner.figures.caption, Work()
    for name, folder in caption_folders(recipe).items():
        captions = recipe.captions[name]
        wanted = recipe.datasets_of_set(name)
        for dataset_name, dataset in planner.todo(folder).items():
            if dataset_name not in wanted:
                continue
            if isinstance(captions, VllmCaptions):
                work += _model_captions(planner, captions, dataset)
                continue
            is_published = isinstance(captions, PublishedCaptions)
            per_picture = (
                figures.published_cpu_s_per_picture
                if is_published
                else figures.source_cpu_s_per_picture
            )
            text = dataset.kept * (
                figures.published_bytes_per_picture if is_published else figures.bytes_per_caption
            )
            work += Work(
                items=dataset.shards,
                pictures=dataset.kept,
                worker_s=planner.cpu_s("caption", dataset.kept, dataset.kept * per_picture)
                + planner.from_bucket(text * (8 if is_published else 2)),
                downloaded_bytes=text if is_published else NOTHING,
                # Three exchanges are written and read (captioning/published/join.py).
                read_bytes=text * (3 if is_published else 1),
                written_bytes=text * (4 if is_published else 1),
                stored_bytes=text,
                class_a=dataset.shards,
                class_b=dataset.shards * _READS_OF_ITEM
                + (text * 3 / MB / _EXCHANGE_MB_PER_READ if is_published else NOTHING),
            )
    return work


def _model_captions(planner: Planner, captions: VllmCaptions, dataset: Expected) -> Work:
    """Return the work of a model's captions of a dataset."""
    figures, mixture = planner.figures.caption, planner.recipe.mixture
    pictures = dataset.kept
    if captions.pictures == "selected":
        most = mixture.images_per_dataset
        pictures = dataset.deduplicated
        pictures = pictures.at_most(most * (1 + captions.margin)) if most else pictures
    num_captions = pictures * captions.captions_per_image
    tokens = num_captions * figures.tokens_per_caption.range.at_most(captions.max_tokens)
    gpu_s = tokens / figures.tokens_per_gpu_s
    stored = num_captions * figures.bytes_per_caption
    read = pictures * dataset.picture_bytes
    client_s = num_captions * figures.client_cpu_s_per_caption
    return Work(
        items=dataset.shards,
        pictures=pictures,
        worker_s=client_s * planner.figures.machines.vcpu_s_per_measured_s
        + planner.from_bucket(read),
        gpu_s=gpu_s if captions.endpoint is None else NOTHING,
        read_bytes=read,
        written_bytes=stored,
        stored_bytes=stored,
        class_a=dataset.shards,
        class_b=pictures + dataset.shards * _READS_OF_ITEM,
    )


def mix_work(planner: Planner) -> Work:
    """Return what is left to select and to write of the mixture."""
    recipe, figures, work = planner.recipe, planner.figures.mix, Work()
    mixture = recipe.mixture
    gather = importlib.import_module("mixing.gather")
    mpx = mixture.resolution**2 / 1e6
    for name, dataset in planner.todo(mixture_folder(mixture.name)).items():
        if name not in recipe.mixture_datasets():
            continue
        taken = taken_of(planner, dataset)
        is_read_whole = taken.high >= gather.SHARE_READ_WHOLE * dataset.kept.low
        samples = taken * (figures.bytes_per_pixel[mixture.image_format].range * (mpx * 1e6))
        samples += taken * figures.bytes_per_sample
        read = dataset.kept_bytes if is_read_whole else taken * dataset.picture_bytes
        exchanged = samples if is_read_whole else NOTHING
        cpu_s = (
            dataset.kept * figures.cpu_s_per_candidate
            + taken * figures.cpu_s_per_sample
            + taken * figures.cpu_s_per_mpx * mpx
            + taken * dataset.picture_bytes / MB * figures.cpu_s_per_mb
        )
        shards = (taken / mixture.samples_per_shard).rounded_up()
        work += Work(
            items=shards + dataset.shards / gather.SHARDS_PER_GROUP,
            pictures=taken,
            worker_s=planner.cpu_s("mix", taken, cpu_s)
            + planner.from_bucket(read + exchanged * 2 + samples),
            read_bytes=read + exchanged,
            written_bytes=samples + exchanged,
            stored_bytes=samples,
            class_a=shards * 2,
            class_b=(read / MB / _MB_PER_READ if is_read_whole else taken)
            + exchanged / MB / _EXCHANGE_MB_PER_READ
            + (shards + dataset.shards * 3) * _READS_OF_ITEM,
        )
    return work


def taken_of(planner: Planner, dataset: Expected) -> Range:
    """Return how many pictures of a dataset the mixture takes."""
    mixture = planner.recipe.mixture
    taken = dataset.deduplicated
    if mixture.resolution > planner.recipe.images.min_short_edge_px:
        taken = taken * planner.figures.mix.large_enough
    most = mixture.images_per_dataset
    return taken.at_most(most) if most else taken
