"""The funnel of a build: what became of every record of every dataset, from source to mixture."""

from rich.table import Table

from pipeline.ingest import FOLDER as IMAGES
from pipeline.receipts import Counts
from pipeline.recipe import Recipe
from pipeline.stage import read_summary


def funnel_table(recipe: Recipe) -> Table:
    """Return the table of a finished build, counted from the summaries of its stages."""
    table = Table(title=f"the funnel of {recipe.root}", title_justify="left")
    for column in ["dataset", "read", "rejected", "duplicates", "captioned", "in the mixture"]:
        table.add_column(column, justify="right" if column == "read" else "left", overflow="fold")
    for dataset in sorted(recipe.datasets):
        ingested = _counts(recipe, IMAGES, dataset)
        deduplicated = _counts(recipe, f"duplicates/{recipe.dedup.name}", dataset)
        captioned = _counts(recipe, f"captions/{recipe.mixture.captions}", dataset)
        mixed = _counts(recipe, f"mixtures/{recipe.mixture.name}", dataset)
        table.add_row(
            dataset,
            f"{ingested.records_in:,}",
            _reasons(ingested),
            _reasons(deduplicated),
            f"{captioned.records_out:,}",
            f"{mixed.records_out:,}",
        )
    return table


def _counts(recipe: Recipe, folder: str, dataset: str) -> Counts:
    """Return a stage's sums; zero for a dataset that the mixture leaves out."""
    summary = read_summary(recipe.root, folder, dataset)
    return summary.counts if summary else Counts()


def _reasons(counts: Counts) -> str:
    return "\n".join(f"{reason} {n:,}" for reason, n in sorted(counts.rejected.items())) or "none"
