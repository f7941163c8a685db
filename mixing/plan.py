"""`evenmix mix --plan`: what a mixture would be, counted, without writing it.

Which pictures could be taken is found as for the mixture itself (:mod:`pipeline.candidates`), and
what is published of that serves the mixture later. Only the bytes are an estimate: they are those
of a few samples of each dataset, which are really made.
"""

import math
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from statistics import fmean
from tarfile import BLOCKSIZE
from typing import Any

import pyarrow as pa
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from mixing.corpus_check import check_corpus
from mixing.gather import route_of, tar_url
from mixing.sample import sample_json, sample_picture
from mixing.select import Selection, choose
from mixing.weights import dataset_weights
from pipeline import storage
from pipeline.beam_job import RunnerOptions
from pipeline.candidates import Candidates, candidate_counts
from pipeline.eligible import filtered_reason, judge_shard, min_short_edge_px
from pipeline.errors import EvenmixError
from pipeline.exclusions import stored_exclusions
from pipeline.originals import read_original
from pipeline.reasons import RejectReason
from pipeline.receipts import Counts, total
from pipeline.recipe import Recipe
from pipeline.records import IMAGES, captions_folder
from pipeline.run import run_stage
from pipeline.summary import finished_shards, read_shard

SAMPLES_MADE = 16
"""By so many samples of a dataset its bytes are estimated."""

_SHARDS_TRIED = 16
_CONCURRENT_READS = 16
_ANY_WIDTH = 1000
"""A table is as wide as its numbers, however narrow the terminal."""


@dataclass(frozen=True)
class Part:
    """What a mixture would have of one dataset.

    ``sample_bytes`` is the estimated size of a sample in its tar; ``reads_whole`` tells whether the
    dataset's tars are read whole (:func:`mixing.gather.route_of`).
    """

    selection: Selection
    sample_bytes: float
    reads_whole: bool

    @property
    def num_bytes(self) -> float:
        """The estimated size of all samples."""
        return self.sample_bytes * (self.selection.num_train + self.selection.num_validation)

    @property
    def num_shards(self) -> int:
        """The number of shards, for training and validation."""
        return self.selection.num_shards("train") + self.selection.num_shards("validation")


def print_plan(recipe: Recipe, runner: RunnerOptions) -> None:
    """Print the plan of a recipe's mixture to standard output.

    Raises:
        EvenmixError: the corpus lacks what the recipe needs, or a dataset would come out empty.
    """
    check_corpus(recipe)
    exclusions = stored_exclusions(recipe.root, recipe.exclusions)
    recipe = recipe.model_copy(update={"exclusions": exclusions})
    candidates = Candidates(recipe, with_captions=True)
    run_stage(candidates, candidates.plan(), runner)
    datasets = recipe.mixture_datasets()
    selections = {name: choose(recipe, name) for name in datasets}
    empty = [name for name, chosen in selections.items() if chosen.num_train == 0]
    console = Console(highlight=False, width=_ANY_WIDTH)
    console.print(funnel_table(recipe, {name: candidate_counts(recipe, name) for name in datasets}))
    if not empty:
        parts = {
            name: Part(chosen, _sample_bytes(recipe, name), route_of(recipe, chosen).reads_whole)
            for name, chosen in selections.items()
        }
        console.print(mixture_table(recipe, parts))
    written = [storage.join(recipe.root, candidates.folder), *([exclusions] if exclusions else [])]
    console.print(f"Nothing was written but {' and '.join(written)}, for the mixture to use.")
    if empty:
        raise EvenmixError(
            f"no picture is left to train on in: {', '.join(empty)}. Relax the recipe, or name the "
            "datasets in mixture.without"
        )


@dataclass(frozen=True)
class _Step:
    """A column of the funnel: what is left when the pictures with these reasons are gone."""

    heading: str
    reasons: Sequence[str]


def _steps(recipe: Recipe) -> list[_Step]:
    """Return the steps in which pictures are judged, in their order."""
    copies = [RejectReason.EXACT_COPY, RejectReason.NEAR_DUPLICATE, RejectReason.CONTAMINATION]
    return [
        _Step("allowed", [RejectReason.EXCLUDED]),
        _Step("unique", copies),
        _Step(f">= {min_short_edge_px(recipe)} px", [RejectReason.TOO_SMALL]),
        *(
            _Step(f"filter {number}", [reason])
            for number, reason in enumerate(_filtered_reasons(recipe), start=1)
        ),
        _Step("captioned", [RejectReason.NOT_ASKED, RejectReason.NO_CAPTION]),
    ]


def _filtered_reasons(recipe: Recipe) -> list[str]:
    return list(dict.fromkeys(map(filtered_reason, recipe.mixture.filters)))


def funnel_table(recipe: Recipe, counts: Mapping[str, Counts]) -> Table:
    """Return how many pictures are left after each step, from the candidates' counts."""
    steps = _steps(recipe)
    table = _table("pictures that are left after each step")
    for heading in ("in corpus", *(step.heading for step in steps)):
        table.add_column(heading, justify="right")
    for dataset, of_dataset in {**counts, "all": total(counts.values())}.items():
        left = [of_dataset.records_in]
        for step in steps:
            left.append(left[-1] - sum(of_dataset.rejected.get(r, 0) for r in step.reasons))
        if left[-1] != of_dataset.records_out:
            raise AssertionError(f"{dataset}: {left[-1]} left after all steps of {of_dataset}")
        table.add_row(dataset, *(f"{number:,}" for number in left))
    table.caption = Text("\n").join(
        Text(f"filter {number}: {reason.partition(': ')[2]}")
        for number, reason in enumerate(_filtered_reasons(recipe), start=1)
    )
    return table


def mixture_table(recipe: Recipe, parts: Mapping[str, Part]) -> Table:
    """Return what would be written of each dataset, and how often a trainer would see it.

    An epoch of the mixture ends when every picture of every dataset was seen at least once.
    """
    sizes = {name: part.selection.num_train for name, part in parts.items()}
    weights = dataset_weights(recipe, sizes)
    epoch = max(size / weights[name].share for name, size in sizes.items())
    table = _table(f"the mixture {recipe.mixture.name}")
    for heading in ("train", "valid.", "weight", "", "repeated", "size", "shards", "resized"):
        table.add_column(heading, justify="right")
    for dataset, part in parts.items():
        share = weights[dataset].share
        table.add_row(
            dataset,
            f"{part.selection.num_train:,}",
            f"{part.selection.num_validation:,}",
            str(share),
            f"{float(share):.2%}",
            f"{float(epoch * share / sizes[dataset]):,.2f}",
            _size(part.num_bytes),
            f"{part.num_shards:,}",
            "source" if part.reads_whole else "shard",
        )
    table.add_row(
        "all",
        f"{sum(sizes.values()):,}",
        f"{sum(part.selection.num_validation for part in parts.values()):,}",
        "1",
        "100.00%",
        "",
        _size(sum(part.num_bytes for part in parts.values())),
        f"{sum(part.num_shards for part in parts.values()):,}",
    )
    table.caption = (
        f"An epoch of the mixture is {math.ceil(epoch):,} draws, in which every picture is seen at "
        "least once, and as often as stands under `repeated`. Sizes are estimates, by "
        f"{SAMPLES_MADE} samples of each dataset that were made. Resized at the source: tars are "
        "read whole; at the shard: pictures are read singly."
    )
    return table


def _sample_bytes(recipe: Recipe, dataset: str) -> float:
    """Return the mean bytes of a sample in its tar, by the first pictures that could be taken.

    It is NaN if the first shards have none.
    """
    sizes: list[int] = []
    shards = sorted(finished_shards(recipe.root, IMAGES, dataset, "ingest"))
    for shard in shards[:_SHARDS_TRIED]:
        sizes += _sizes_of_first(recipe, dataset, shard, SAMPLES_MADE - len(sizes))
        if len(sizes) == SAMPLES_MADE:
            break
    return fmean(sizes) if sizes else math.nan


def _sizes_of_first(recipe: Recipe, dataset: str, shard: str, number: int) -> list[int]:
    """Make the first samples of a shard, at most ``number``, and return their bytes in a tar."""
    judged = judge_shard(recipe, dataset, shard, with_captions=True)
    rows = [row for row, (_, reason) in enumerate(judged) if reason is None][:number]

    def read(folder: str) -> list[dict[str, Any]]:
        table = read_shard(recipe.root, folder, dataset, shard)
        read_rows: list[dict[str, Any]] = table.take(pa.array(rows, pa.int64())).to_pylist()
        return read_rows

    pictures = read(IMAGES)
    captions = {name: read(captions_folder(name)) for name in recipe.mixture.caption_sets(dataset)}
    url = tar_url(recipe.root, dataset, shard)

    def size(place: int) -> int:
        picture = pictures[place]
        own = {name: of_set[place]["captions"] for name, of_set in captions.items()}
        members = (
            sample_picture(recipe.mixture, read_original(url, picture)),
            sample_json(recipe.mixture, dataset, picture, own),
        )
        return sum(1 + math.ceil(len(member) / BLOCKSIZE) for member in members) * BLOCKSIZE

    with ThreadPoolExecutor(_CONCURRENT_READS) as pool:
        return list(pool.map(size, range(len(rows))))


def _size(num_bytes: float) -> str:
    if math.isnan(num_bytes):
        return "?"
    for unit, factor in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if num_bytes >= factor:
            return f"{num_bytes / factor:.1f} {unit}"
    return f"{num_bytes / 1e3:.1f} kB"


def _table(title: str) -> Table:
    table = Table(
        title=title,
        title_justify="left",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        padding=0,
        pad_edge=False,
    )
    table.add_column("dataset")
    return table
