"""What stands between a recipe and its mixture, found before any work and told all at once.

:func:`check_recipe` needs the recipe alone, so a build asks it before its first stage;
:func:`check_corpus` looks at what the stages before have left, and reads no picture.
"""

from collections import defaultdict
from collections.abc import Collection, Iterator

from mixing.weights import check_weights
from pipeline import storage
from pipeline.eligible import filters_of, input_columns
from pipeline.errors import EvenmixError, did_you_mean
from pipeline.recipe import PublishedCaptions, Recipe
from pipeline.records import IMAGES
from pipeline.summary import dataset_url, read_summary

_SHOWN = 12


def check_recipe(recipe: Recipe) -> None:
    """Check what can be known of a mixture without its corpus.

    Raises:
        EvenmixError: its weights cannot be kept, or datasets would come out without captions.
    """
    _refuse(_in_the_recipe(recipe))


def check_corpus(recipe: Recipe) -> None:
    """Check that a mixture can be cut from its corpus; whether pictures are left is not known yet.

    Raises:
        EvenmixError: with all that stands in the way.
    """
    _refuse([*_in_the_recipe(recipe), *_in_the_corpus(recipe)])


def _refuse(obstacles: list[str]) -> None:
    if obstacles:
        raise EvenmixError("\n  ".join(["the mixture cannot be cut:", *obstacles]))


def _in_the_recipe(recipe: Recipe) -> list[str]:
    obstacles = []
    for check in (check_weights, _check_joins):
        try:
            check(recipe)
        except EvenmixError as error:
            obstacles.append(str(error))
    return obstacles


def _check_joins(recipe: Recipe) -> None:
    """Check that no dataset depends on published captions that cannot be joined to its pictures.

    Raises:
        EvenmixError: some do.
    """
    silent = [
        dataset
        for dataset in recipe.mixture_datasets()
        if recipe.datasets[dataset].join_rule is None
        and all(
            isinstance(recipe.captions[name], PublishedCaptions)
            for name in recipe.mixture.caption_sets(dataset)
        )
    ]
    if silent:
        captions_of = ", ".join(f'{dataset} = "own"' for dataset in silent)
        without = ", ".join(f'"{dataset}"' for dataset in silent)
        raise EvenmixError(
            f"no picture of {', '.join(silent)} would have a caption, since it is not known by "
            "which identifiers the published captions know them (there is no join_rule): have "
            f"them captioned, with captions_of = {{ {captions_of} }} in [mixture] and a table "
            f'[captions.own] with engine = "vllm"; or leave them out, with without = [{without}]'
        )


def _in_the_corpus(recipe: Recipe) -> Iterator[str]:
    """Yield what is wrong with the tables that judge the pictures; what datasets share, once."""
    datasets_with = defaultdict[tuple[str, str], list[str]](list)
    for dataset in recipe.mixture_datasets():
        for obstacle in _in_the_dataset(recipe, dataset):
            datasets_with[obstacle].append(dataset)
    for (problem, remedy), datasets in datasets_with.items():
        yield f"{problem}: {', '.join(datasets)}{remedy}"


def _in_the_dataset(recipe: Recipe, dataset: str) -> Iterator[tuple[str, str]]:
    """Yield problems of a dataset and what helps; the name of the dataset belongs in between."""
    images = read_summary(recipe.root, IMAGES, dataset)
    if images is None:
        yield "not ingested, or not to the end", "; run `evenmix ingest`"
        return
    for folder in input_columns(recipe, dataset, with_captions=True):
        family, _, name = folder.partition("/")
        shards = _shards(recipe, folder, dataset)
        missing = sorted(images.items.keys() - shards)
        if not shards:
            yield _absence(recipe, family, name)
        elif missing:
            yield (
                f"{folder} lacks {len(missing):,} shards of the image index, such as {missing[0]}",
                _REMEDIES[family].format(name=name),
            )
        elif family in (IMAGES, "attributes"):
            yield from _missing_columns(recipe, folder, dataset, min(images.items))


_REMEDIES = {
    "duplicates": "; give dedup.name another value and run `evenmix dedup`",
    "captions": "; run `evenmix caption --captions {name}`",
    "attributes": "; each needs a table of its name, with its keys in its order",
}
"""What adds the shards that a folder lacks, by the first part of its name."""


def _shards(recipe: Recipe, folder: str, dataset: str) -> Collection[str]:
    """Return the shards of a dataset in a folder; none, if the stage there has not finished."""
    if folder.startswith("attributes/"):
        files = storage.list_files(dataset_url(recipe.root, folder, dataset))
        return {file.name.removesuffix(".parquet") for file in files}
    summary = read_summary(recipe.root, folder, dataset)
    return summary.items.keys() if summary else ()


def _absence(recipe: Recipe, family: str, name: str) -> tuple[str, str]:
    """Return the problem that a family of a dataset is not there, or not finished."""
    if family == "duplicates":
        return f"dedup {name} has not finished", "; run `evenmix dedup`"
    files = storage.list_files(storage.join(recipe.root, family))
    known = sorted({file.name.partition("/")[0] for file in files})
    among = f"there {'are' if len(known) > 1 else 'is'} {', '.join(known[:_SHOWN])}"
    hint = did_you_mean(name, set(known) - {name}, among if known else "")
    if family == "captions":
        return f"captions/{name} is missing, or not finished", f"; run `evenmix caption`{hint}"
    return f"attributes/{name}, which mixture.filters name, is missing", hint


def _missing_columns(
    recipe: Recipe, folder: str, dataset: str, shard: str
) -> Iterator[tuple[str, str]]:
    """Yield the columns that filters want of a folder and its first shard does not have."""
    filters = filters_of(recipe, dataset)
    wanted = {of.column.rpartition(".")[2]: of for of in filters if _folder(of.table) == folder}
    if not wanted:
        return
    url = storage.join(dataset_url(recipe.root, folder, dataset), f"{shard}.parquet")
    with storage.open_parquet(url) as file:
        there = file.schema_arrow.names
    for column in ["key", *wanted]:
        if column not in there:
            asks = f", which the filter {wanted[column]} asks for" if column in wanted else ""
            yield (
                f"{folder} has no column {column}{asks}",
                did_you_mean(column, there, f"it has {', '.join(there)}"),
            )


def _folder(table: str | None) -> str:
    return IMAGES if table is None else f"attributes/{table}"
