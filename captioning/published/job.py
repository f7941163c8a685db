"""Engine `published`: captions that others have published, joined by the pictures' identifiers.

How they are joined is told in :mod:`captioning.published.join`. What that leaves below R/exchange
may be removed as soon as the caption set is finished; a retry of ingest makes it anew.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from captioning.outcomes import CaptionOutcome
from captioning.published.files import Subset, find_subset
from captioning.published.join import (
    GATHERED,
    JOINED,
    PART_BYTES,
    PICTURES,
    PUBLISHED,
    GatherGroups,
    JoinParts,
    NotJoined,
    PartPictures,
    PartPublished,
    Source,
    exchange_folder,
    read_gathered,
)
from captioning.tables import caption_output
from pipeline import storage
from pipeline.beam_job import RunnerOptions
from pipeline.errors import EvenmixError
from pipeline.printable import printable
from pipeline.progress import console, reasons_text
from pipeline.readers.items import identities, states
from pipeline.readers.rows import item_rows
from pipeline.receipts import Counts, fingerprint, read_receipt
from pipeline.recipe import Images, PublishedCaptions, Recipe
from pipeline.records import IMAGES, captions_folder
from pipeline.run import run_stage
from pipeline.stage import Output, WorkItem, a_committed_shard, make_plan
from pipeline.summary import (
    Summary,
    dataset_url,
    finished_shards,
    generation_of,
    read_shard,
    read_summary,
)

_SHARDS_PER_GROUP = 512
"""The indexes of so many shards are read by one work item."""


@dataclass(frozen=True)
class PublishedCaptioning:
    """The stage that makes a caption set from what was joined; ``sources`` are by dataset.

    An item's inputs are the index and all published files, not what lies between them, which has
    no say in the captions and may be gone by then.
    """

    root: str
    captions: str
    sources: Mapping[str, Source]
    name: str = "caption"
    version: int = 1
    resource_hints: Mapping[str, str] = field(default_factory=dict)
    items_at_once: int = 1

    @property
    def folder(self) -> str:
        """The folder below R."""
        return captions_folder(self.captions)

    def config(self, dataset: str) -> Mapping[str, Any]:
        """Return what decides the captions."""
        return {"engine": "published"} | self.sources[dataset].identity()

    def process(self, item: WorkItem) -> Output:
        """Write the captions of one image shard."""
        columns = ["key", "join_id", "join_ambiguous"]
        index = read_shard(self.root, IMAGES, item.dataset, item.shard, columns)
        published = dict[str, list[str | None]]()
        if index["join_id"].null_count < index.num_rows:  # else nothing was brought here
            folder = dataset_url(self.root, exchange_folder(self.captions, GATHERED), item.dataset)
            url = storage.join(folder, f"{item.payload['group']}.parquet")
            published = read_gathered(url, item.payload["place"])
        model = self.sources[item.dataset].origin
        return caption_output(
            [
                {
                    "key": picture["key"],
                    "captions": [
                        caption | {"model": model} for caption in _captions(picture, published)
                    ],
                }
                for picture in index.to_pylist()
            ]
        )


def _captions(
    picture: Mapping[str, Any], published: Mapping[str, Sequence[str | None]]
) -> Iterator[dict[str, Any]]:
    """Yield the captions of a picture: those published, each with its outcome, or what is missing.

    ``published`` are by identifier.
    """
    join_id = picture["join_id"]
    missing = {"text": None, "outcome": CaptionOutcome.SOURCE_MISSING}
    if join_id is None:
        yield missing | {"detail": "its identifier in the published captions is not known"}
    elif picture["join_ambiguous"]:
        yield missing | {"detail": f"identifier {join_id} stands for several pictures"}
    elif join_id not in published:
        yield missing | {"detail": f"none is published for identifier {join_id}"}
    else:
        for number, text in enumerate(published[join_id], start=1):
            if text is None or not text.strip():
                yield missing | {
                    "detail": f"published caption {number} is empty, no UTF-8, or too long"
                }
            else:
                yield {"text": text, "outcome": CaptionOutcome.OK}


def check(recipe: Recipe, captions: str, settings: PublishedCaptions) -> None:
    """Check that each dataset has published captions, in files as they should be.

    Raises:
        EvenmixError: with all that stands in the way.
    """
    _find_subsets(recipe, captions, settings)


def write(
    recipe: Recipe, captions: str, settings: PublishedCaptions, runner: RunnerOptions
) -> None:
    """Write a caption set.

    Raises:
        EvenmixError: the published captions are not there, or images are not ingested yet.
    """
    sources, ranges, groups = dict[str, Source](), list[WorkItem](), list[_Group]()
    for dataset, (name, subset) in _find_subsets(recipe, captions, settings).items():
        files = identities([file.info for file in subset.files])
        num_parts = max(1, -(-subset.num_bytes // PART_BYTES))
        digest = fingerprint({"files": files})
        sources[dataset] = Source(name, subset.origin, subset.revision, digest, num_parts)
        ranges += _ranges(dataset, subset, files)
        groups += _groups(recipe.root, dataset, num_parts)
    stage = PublishedCaptioning(recipe.root, captions, sources)
    items = [
        WorkItem(
            group.dataset,
            shard,
            inputs={"images": digest, "published": sources[group.dataset].files},
            payload={"group": group.name, "place": place},
        )
        for group in groups
        for place, (shard, digest) in enumerate(group.shards, group.first_place)
    ]
    if not make_plan(stage, items).is_finished:
        _run_exchange(stage, ranges, groups, runner)
    run_stage(stage, items, runner)
    _print_report(recipe.root, captions, list(sources))


def _find_subsets(
    recipe: Recipe, captions: str, settings: PublishedCaptions
) -> dict[str, tuple[str, Subset]]:
    """Return the published captions of each dataset, and the name of their folder."""
    names = {
        dataset: settings.subsets.get(dataset, recipe.datasets[dataset].caption_subset)
        for dataset in recipe.datasets_of_set(captions)
    }
    found, obstacles = dict[str, tuple[str, Subset]](), list[str]()
    for dataset, name in names.items():
        try:
            if name is None:
                raise EvenmixError(
                    "no published captions of it are known; name their folder in "
                    f"captions.{captions}.subsets.{dataset}"
                )
            revision = settings.revision or _revision_begun(recipe.root, captions, dataset)
            found[dataset] = (name, find_subset(settings.source, name, revision))
        except EvenmixError as error:
            obstacles.append(f"dataset {dataset}: {error}")
    if obstacles:
        raise EvenmixError("\n  ".join([f"captions.{captions} cannot be made:", *obstacles]))
    return found


def _revision_begun(root: str, captions: str, dataset: str) -> str | None:
    """Return the revision of what is there already, so that a set ends as it began.

    The head of a repository may have moved on since.
    """
    for family in (captions_folder(captions), exchange_folder(captions, PICTURES)):
        folder = dataset_url(root, family, dataset)
        shard = a_committed_shard(folder)
        if shard is not None:
            identity = read_receipt(storage.join(folder, f"{shard}.parquet")).identity
            revision: str | None = identity["config"].get("revision")
            return revision
    return None


def _ranges(dataset: str, subset: Subset, files: Sequence[Mapping[str, Any]]) -> Iterator[WorkItem]:
    """Cut published files into ranges of rows, in order; ``files`` are their identities."""
    # Each row has some bytes, so no more than so many rows.
    limits = Images(records_per_shard=PART_BYTES, bytes_per_shard=PART_BYTES)
    cut = [
        (file, identity, rows)
        for file, identity in zip(subset.files, files, strict=True)
        for rows in item_rows(file.row_groups, limits)
    ]
    for number, (file, identity, rows) in enumerate(cut):
        yield WorkItem(
            dataset,
            f"{number:05d}",
            inputs={**identity, "rows": list(rows)},
            payload={
                "url": file.info.url,
                "columns": list(file.captions),
                "states": states([file.info]),
            },
        )


@dataclass(frozen=True)
class _Group:
    """Image shards of one generation of a dataset, side by side in the order of their names.

    ``number`` is that of the group and ``first_place`` that of its first shard in the generation;
    ``shards`` are names with digests.
    """

    dataset: str
    generation: int
    number: int
    first_place: int
    shards: Sequence[tuple[str, str]]

    @property
    def name(self) -> str:
        """The group's name as an item."""
        return _item_name(self.number, self.generation)

    def pictures_item(self) -> WorkItem:
        """Return the item that reads the identifiers of the group's pictures."""
        places = range(self.first_place, self.first_place + len(self.shards))
        return WorkItem(
            self.dataset,
            self.name,
            inputs={"images": fingerprint(dict(self.shards)), "first_place": self.first_place},
            payload={
                "group": self.number,
                "shards": list(zip(places, dict(self.shards), strict=True)),
            },
        )


def _item_name(number: int, generation: int) -> str:
    return f"{number:05d}" + (f".r{generation}" if generation else "")


def _groups(root: str, dataset: str, num_parts: int) -> Iterator[_Group]:
    """Put a dataset's image shards into groups, about as many as there are parts."""
    generations = defaultdict[int, list[tuple[str, str]]](list)
    for shard, digest in sorted(finished_shards(root, IMAGES, dataset, "ingest").items()):
        generations[generation_of(shard)].append((shard, digest))
    for generation, shards in sorted(generations.items()):
        num_groups = min(len(shards), max(num_parts, -(-len(shards) // _SHARDS_PER_GROUP)))
        for number in range(num_groups):
            first, last = (n * len(shards) // num_groups for n in (number, number + 1))
            yield _Group(dataset, generation, number, first, shards[first:last])


def _run_exchange(
    stage: PublishedCaptioning,
    ranges: Sequence[WorkItem],
    groups: Sequence[_Group],
    runner: RunnerOptions,
) -> None:
    """Bring each published caption to the group of its picture's shard.

    Of a dataset none of whose pictures has an identifier, nothing is read.
    """
    root, captions, sources = stage.root, stage.captions, stage.sources
    parted = [group.pictures_item() for group in groups]
    pictures = run_stage(PartPictures(root, captions, sources), parted, runner)
    known = {dataset for dataset, summary in pictures.items() if summary.counts.records_out}
    if not known:
        return
    groups = [group for group in groups if group.dataset in known]
    ranges = [item for item in ranges if item.dataset in known]
    published = run_stage(PartPublished(root, captions, sources), ranges, runner)
    parts = [
        WorkItem(
            dataset,
            _item_name(part, generation),
            inputs={
                "published": _digest(published[dataset]),
                "pictures": [_digest(pictures[dataset], n) for n in range(generation + 1)],
            },
            payload={"part": part},
        )
        for dataset, generation in sorted({(group.dataset, group.generation) for group in groups})
        for part in range(sources[dataset].num_parts)
    ]
    joined = run_stage(JoinParts(root, captions, sources), parts, runner)
    gathered = [
        WorkItem(
            group.dataset,
            group.name,
            inputs={"joined": _digest(joined[group.dataset], group.generation)},
            payload={"group": group.number},
        )
        for group in groups
    ]
    run_stage(GatherGroups(root, captions, sources), gathered, runner)


def _digest(summary: Summary, generation: int = 0) -> str:
    """Return what identifies all items of a generation."""
    return fingerprint(
        {
            item: made["digest"]
            for item, made in summary.items.items()
            if generation_of(item) == generation
        }
    )


def _print_report(root: str, captions: str, datasets: Sequence[str]) -> None:
    """Print what had no counterpart on either side, from what the stages have published."""
    table = Table(
        title=f"published captions joined in captions/{captions}",
        title_justify="left",
        box=box.SIMPLE_HEAD,
    )
    table.add_column("dataset", overflow="fold")
    table.add_column("published", justify="right")
    table.add_column("not joined", overflow="fold")
    table.add_column("pictures", justify="right")
    table.add_column("without captions", overflow="fold")
    for dataset in datasets:
        rows, pictures, joined = (
            read_summary(root, exchange_folder(captions, step), dataset)
            for step in (PUBLISHED, PICTURES, JOINED)
        )
        written = read_summary(root, captions_folder(captions), dataset)
        if pictures is None or written is None:
            # The exchange was removed when the set was finished, as it may be.
            return
        if not pictures.counts.records_out:
            num_rows, not_joined = "not read", "no picture has an identifier"
        elif rows and joined:
            num_rows = f"{rows.counts.records_in:,}"
            rejected = rows.counts.rejected | joined.counts.rejected
            not_joined = reasons_text(Counts(rejected=rejected), "\n")
        else:
            return
        table.add_row(
            dataset,
            num_rows,
            Text(printable(not_joined)),
            f"{written.counts.records_in:,}",
            Text(printable(_without_captions(written.counts, pictures.counts))),
        )
    console.print(table)


def _without_captions(written: Counts, pictures: Counts) -> str:
    text = reasons_text(written, ", ")
    unknown = pictures.rejected.get(NotJoined.NO_JOIN_ID)
    return f"{text} (of them {NotJoined.NO_JOIN_ID} {unknown:,})" if unknown else text
