"""What is in each dataset of a recipe: counted where a stage has finished, else expected.

The catalogue knows how many records a dataset has and how many pictures i1 got of it. What of the
root is finished already is read from its ``stage.json``; nothing else is looked at.
"""

import importlib
from collections.abc import Mapping
from dataclasses import dataclass

from pipeline.catalog import CATALOG, Entry
from pipeline.dataset import Dataset
from pipeline.errors import EvenmixError
from pipeline.plan.figures import Figures
from pipeline.plan.ranges import Range
from pipeline.recipe import Recipe
from pipeline.records import (
    IMAGES,
    captions_folder,
    duplicates_folder,
    embeddings_folder,
    mixture_folder,
)
from pipeline.summary import Summary, read_summary

MB = 1e6


@dataclass(frozen=True)
class Expected:
    """A dataset: its records, and the pictures that are kept of them and after dedup.

    ``files_bytes`` are those of the source's files, pictures that are downloaded by themselves not
    among them; ``picture_bytes`` what a kept picture has; ``shards`` is the number of image shards.
    ``is_near`` tells whether it is embedded. ``finished`` are the folders below R in which it is
    finished.
    """

    dataset: Dataset
    records: Range
    kept: Range
    deduplicated: Range
    files_bytes: Range
    picture_bytes: Range
    shards: Range
    is_near: bool
    finished: frozenset[str]

    @property
    def kept_bytes(self) -> Range:
        """The bytes of all kept pictures."""
        return self.kept * self.picture_bytes

    @property
    def source_bytes(self) -> Range:
        """All bytes that are read of the source."""
        return self.files_bytes + self.kept_bytes if self.dataset.is_fetched else self.files_bytes


def caption_folders(recipe: Recipe) -> dict[str, str]:
    """Return the folders of the caption sets that a build makes, by set."""
    sets = recipe.mixture.all_caption_sets(recipe.mixture_datasets())
    return {name: captions_folder(name) for name in sets}


def folders(recipe: Recipe) -> list[str]:
    """Return the folders below R that a recipe's stages finish, in the order of a build."""
    return [
        IMAGES,
        embeddings_folder(recipe.dedup.descriptor),
        duplicates_folder(recipe.dedup.name),
        *caption_folders(recipe).values(),
        mixture_folder(recipe.mixture.name),
    ]


def expect(
    recipe: Recipe, figures: Figures, records: Mapping[str, int], *, is_fresh: bool = False
) -> dict[str, Expected]:
    """Return what is expected of each dataset of a recipe.

    ``records`` are the numbers of records of datasets that the catalogue lacks; with ``is_fresh``
    the root is not looked at.

    Raises:
        EvenmixError: it is not known how many records some datasets have (all are named).
    """
    # No import: nothing in pipeline stands on dedup.
    near = importlib.import_module("dedup.rules").rules_of(recipe).near_datasets()
    finished: dict[str, dict[str, Summary]] = {name: {} for name in recipe.datasets}
    for name in recipe.datasets if not is_fresh else ():
        found = {folder: read_summary(recipe.root, folder, name) for folder in folders(recipe)}
        finished[name] = {folder: summary for folder, summary in found.items() if summary}
    unknown = [
        name
        for name, dataset in sorted(recipe.datasets.items())
        if name not in records and IMAGES not in finished[name] and _entry_of(dataset) is None
    ]
    if unknown:
        wanted = " ".join(f"--records {name}=N" for name in unknown)
        raise EvenmixError(
            f"the catalogue does not know how many records {', '.join(unknown)} have; say so: "
            f"{wanted}"
        )
    return {
        name: _expect(recipe, figures, name, records.get(name), name in near, finished[name])
        for name in sorted(recipe.datasets)
    }


def _entry_of(dataset: Dataset) -> Entry | None:
    """Return what the catalogue knows of a dataset, if all of it is read from where that says."""
    entry = CATALOG.get(dataset.caption_subset or "")
    return entry if entry and entry.dataset.source == dataset.source else None


def _expect(
    recipe: Recipe,
    figures: Figures,
    name: str,
    given: int | None,
    is_near: bool,
    finished: Mapping[str, Summary],
) -> Expected:
    dataset = recipe.datasets[name]
    entry = _entry_of(dataset)
    ingest, dedup = figures.ingest, figures.dedup
    if IMAGES in finished:
        counts = finished[IMAGES].counts
        records, kept = Range.exactly(counts.records_in), Range.exactly(counts.records_out)
    elif entry and given is None:
        records = Range.exactly(entry.num_records or entry.in_i1.pictures)
        share = ingest.kept_of_downloads if dataset.is_fetched else ingest.kept_in_files
        kept = share.range * entry.in_i1.pictures
    else:
        records = Range.exactly(given or 0)
        kept = records * ingest.kept_of_own

    of_catalogue = entry.num_bytes if entry and given is None else None
    key = next(k for k in (name, dataset.caption_subset, "other") if k in figures.picture_mb)
    picture_bytes = figures.picture_mb[str(key)].range * MB
    if of_catalogue and key == "other" and not dataset.is_fetched:
        picture_bytes = Range.exactly(of_catalogue) / records.low
    if of_catalogue or dataset.is_fetched:
        files_bytes = Range.exactly(of_catalogue or 0)
    else:
        files_bytes = records * picture_bytes

    removal = duplicates_folder(recipe.dedup.name)
    if removal in finished:
        deduplicated = Range.exactly(finished[removal].counts.records_out)
    elif is_near:
        deduplicated = kept * dedup.kept_near
    elif dataset.duplicates == "exact":
        deduplicated = kept * dedup.kept_exact
    else:
        deduplicated = kept
    if IMAGES in finished:
        shards = Range.exactly(len(finished[IMAGES].items))
    else:
        shards = _shards(recipe, dataset, records, files_bytes)
    return Expected(
        dataset,
        records,
        kept,
        deduplicated,
        files_bytes,
        picture_bytes,
        shards,
        is_near,
        frozenset(finished),
    )


def _shards(recipe: Recipe, dataset: Dataset, records: Range, files_bytes: Range) -> Range:
    """Return how many shards a source is cut into (:class:`pipeline.recipe.Images`)."""
    by_records = records / recipe.images.records_per_shard
    by_bytes = files_bytes / recipe.images.bytes_per_shard
    if dataset.is_fetched:
        return by_records.rounded_up()
    if dataset.layout in ("tar", "webdataset"):
        return by_bytes.rounded_up()
    return by_records.at_least(by_bytes).rounded_up()
