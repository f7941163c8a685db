"""The funnel of a build: what became of every record of every dataset, from source to mixture."""

from collections.abc import Mapping

from rich import box
from rich.table import Table

from pipeline.progress import reasons_text
from pipeline.receipts import Counts
from pipeline.recipe import Recipe
from pipeline.records import IMAGES, captions_folder, duplicates_folder, mixture_folder
from pipeline.summary import read_summary


def funnel_table(recipe: Recipe) -> Table:
    """Return the table of a finished build, counted from the summaries of its stages."""
    title = f"the funnel of {recipe.root}, from source to mixture"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, collapse_padding=True)
    table.add_column("dataset", no_wrap=True)
    table.add_column("read", justify="right")
    table.add_column("rejected", no_wrap=True)
    table.add_column("duplicates", no_wrap=True)
    table.add_column("captioned", justify="right", no_wrap=True)
    table.add_column("mixture", justify="right")
    for dataset in sorted(recipe.datasets):
        ingested = _counts(recipe, IMAGES, dataset)
        deduplicated = _counts(recipe, duplicates_folder(recipe.dedup.name), dataset)
        captioned = {
            name: _counts(recipe, captions_folder(name), dataset).records_out
            for name in recipe.mixture.caption_sets(dataset)
        }
        mixed = _counts(recipe, mixture_folder(recipe.mixture.name), dataset)
        table.add_row(
            dataset,
            f"{ingested.records_in:,}",
            reasons_text(ingested, "\n"),
            reasons_text(deduplicated, "\n"),
            _captioned_text(captioned),
            f"{mixed.records_out:,}",
        )
    return table


def _captioned_text(captioned: Mapping[str, int]) -> str:
    """Return how many pictures have a usable caption, by caption set if there are several."""
    if len(captioned) == 1:
        (number,) = captioned.values()
        return f"{number:,}"
    return "\n".join(f"{name} {number:,}" for name, number in captioned.items())


def _counts(recipe: Recipe, folder: str, dataset: str) -> Counts:
    """Return a stage's sums; zero for a dataset that the mixture leaves out."""
    summary = read_summary(recipe.root, folder, dataset)
    return summary.counts if summary else Counts()
