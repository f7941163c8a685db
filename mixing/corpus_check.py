"""What stands between a recipe and its mixture, found before any work and told all at once.

:func:`check_recipe` needs the recipe alone, so a build asks it before its first stage;
:func:`check_corpus` looks at what the stages before have left, and reads no picture.
"""

from collections import defaultdict
from collections.abc import Callable, Collection, Iterator
from functools import cache, partial

from mixing.weights import check_weights
from pipeline import storage
from pipeline.eligible import filters_of, input_columns, passes
from pipeline.errors import EvenmixError, did_you_mean
from pipeline.recipe import PublishedCaptions, Recipe
from pipeline.records import ATTRIBUTES, IMAGES, captions_folder
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
    # A family is listed for a hint, once: it may have a million files.
    names_in = cache(partial(_names_in, recipe.root))
    for dataset in recipe.mixture_datasets():
        for obstacle in _in_the_dataset(recipe, dataset, names_in):
            datasets_with[obstacle].append(dataset)
    for (problem, remedy), datasets in datasets_with.items():
        yield f"{problem}: {', '.join(datasets)}{remedy}"


def _in_the_dataset(
    recipe: Recipe, dataset: str, names_in: Callable[[str], list[str]]
) -> Iterator[tuple[str, str]]:
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
            yield _absence(family, name, names_in)
        elif missing:
            yield (
                f"{folder} lacks {len(missing):,} shards of the image index, such as {missing[0]}",
                _REMEDIES[family].format(name=name),
            )
        elif family in (IMAGES, ATTRIBUTES):
            yield from _unfit_filters(recipe, folder, dataset, min(images.items))


_REMEDIES = {
    "duplicates": "; give dedup.name another value and run `evenmix dedup`",
    "captions": "; run `evenmix caption --captions {name}`",
    ATTRIBUTES: "; each needs a table of its name, with its keys in its order",
}
"""What adds the shards that a folder lacks, by the first part of its name."""


def _shards(recipe: Recipe, folder: str, dataset: str) -> Collection[str]:
    """Return the shards of a dataset in a folder; none, if the stage there has not finished."""
    if folder.startswith(f"{ATTRIBUTES}/"):
        files = storage.list_files(dataset_url(recipe.root, folder, dataset))
        return {file.name.removesuffix(".parquet") for file in files}
    summary = read_summary(recipe.root, folder, dataset)
    return summary.items.keys() if summary else ()


def _names_in(root: str, family: str) -> list[str]:
    """Return the names of the caption sets, say, that a corpus has something of."""
    files = storage.list_files(storage.join(root, family))
    return sorted({file.name.partition("/")[0] for file in files})


def _absence(family: str, name: str, names_in: Callable[[str], list[str]]) -> tuple[str, str]:
    """Return the problem that a family of a dataset is not there, or not finished."""
    if family == "duplicates":
        return f"dedup {name} has not finished", "; run `evenmix dedup`"
    known = names_in(family)
    among = f"there {'are' if len(known) > 1 else 'is'} {', '.join(known[:_SHOWN])}"
    hint = did_you_mean(name, {*known} - {name}, among if known else "")
    if family == "captions":
        return (
            f"{captions_folder(name)} is missing, or not finished",
            f"; run `evenmix caption`{hint}",
        )
    return f"{ATTRIBUTES}/{name}, which mixture.filters name, is missing", hint


def _unfit_filters(
    recipe: Recipe, folder: str, dataset: str, shard: str
) -> Iterator[tuple[str, str]]:
    """Yield what filters ask of a folder's tables that its first shard cannot answer."""
    filters = [wanted for wanted in filters_of(recipe, dataset) if wanted.folder == folder]
    if not filters:
        return
    url = storage.join(dataset_url(recipe.root, folder, dataset), f"{shard}.parquet")
    with storage.open_parquet(url) as file:
        schema = file.schema_arrow
    has = f"it has {', '.join(schema.names)}"
    if "key" not in schema.names:
        yield f"{folder} has no column key", did_you_mean("key", schema.names, has)
    for wanted in filters:
        column = wanted.column_name
        if column not in schema.names:
            problem = f"{folder} has no column {column}, which the filter {wanted} asks for"
            yield problem, did_you_mean(column, schema.names, has)
            continue
        try:
            passes(wanted, schema.empty_table())
        except EvenmixError as error:
            yield str(error), ""
