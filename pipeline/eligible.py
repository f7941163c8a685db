"""Which pictures a mixture could take, and for each of the others why not.

A picture must not be on the list of exclusions, nor a duplicate; it must be large enough, pass the
recipe's filters and, where captions are asked for, have one. Of those a mixture takes the ones
with the smallest hash of (seed, key). The judgement is a pure function of tables that are published
already, row-aligned with the image index, so whoever wants it makes it again.

Filters may look at columns that the user brings: ``R/attributes/<table>/<dataset>/<shard>.parquet``
has the keys of the index, in its order, and any further columns. What a stage has made of a table
is refused when that changes, so one with other values wants another name.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import reduce
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline import storage
from pipeline.errors import EvenmixError
from pipeline.exclusions import load_exclusions
from pipeline.mixture import Filter
from pipeline.reasons import RejectReason
from pipeline.receipts import checksum
from pipeline.recipe import Recipe
from pipeline.records import ATTRIBUTES, IMAGES, captions_folder, duplicates_folder, uniform_hash
from pipeline.storage import FileInfo
from pipeline.summary import dataset_url, finished_shards, read_shard

HASH_RANGE = 1 << 64
"""Hashes are below this."""

_IDENTIFYING_COLUMNS = ["source_url", "final_url", "sha256", "pixels_sha256"]
_OUTCOMES = "captions.list.element.outcome"
_CONCURRENT_READS = 16


def judge_shard(
    recipe: Recipe, dataset: str, shard: str, with_captions: bool
) -> list[tuple[str, str | None]]:
    """Return the key of each picture of a shard, in order, and why it cannot be taken, if so.

    The reason is the first that applies of: excluded, the duplicate's rule, too_small,
    ``filtered: `` with the filter's own words, and ``with_captions`` not_asked or no_caption.

    Raises:
        EvenmixError: a table or a column is missing, or tables do not fit together.
    """
    tables = _read_tables(recipe, dataset, shard, with_captions)
    index = tables[IMAGES]
    short_edge_px = pc.min_element_wise(index["width"], index["height"])
    reasons = [
        _excluded(recipe, index),
        tables[duplicates_folder(recipe.dedup.name)]["rule"],
        _where(pc.less(short_edge_px, min_short_edge_px(recipe)), RejectReason.TOO_SMALL),
        *(
            _where(pc.invert(passes(wanted, tables[wanted.folder])), filtered_reason(wanted))
            for wanted in filters_of(recipe, dataset)
        ),
    ]
    if with_captions:
        sets = [tables[captions_folder(name)] for name in recipe.mixture.caption_sets(dataset)]
        reasons.append(_uncaptioned(sets, recipe.mixture.outcomes))
    first = pc.coalesce(*reasons)
    return list(zip(index["key"].to_pylist(), first.to_pylist(), strict=True))


def filtered_reason(wanted: Filter) -> str:
    """Return the reason for pictures that a filter does not let through, in the filter's words."""
    return f"{RejectReason.FILTERED}: {wanted}"


def filters_of(recipe: Recipe, dataset: str) -> list[Filter]:
    """Return the filters of a recipe's mixture that are for a dataset, in their order."""
    return [
        wanted
        for wanted in recipe.mixture.filters
        if wanted.datasets is None or dataset in wanted.datasets
    ]


def passes(wanted: Filter, table: pa.Table) -> Any:
    """Tell of each picture whether a filter lets it through; null and NaN do not pass.

    A bound is compared as a number of the column's own type: 0.1 is at least 0.1 in float32 too.

    Raises:
        EvenmixError: the column's values cannot be compared with what the filter asks for.
    """
    values = table[wanted.column_name]
    if pa.types.is_null(values.type):
        # As a table is written in which no picture has a value.
        return pa.array(np.zeros(table.num_rows, np.bool_))
    try:
        if pa.types.is_dictionary(values.type):
            values = values.cast(values.type.value_type)
        of_bounds = values.type if pa.types.is_floating(values.type) else pa.float64()
        tests = []
        if wanted.at_least is not None:
            tests.append(pc.greater_equal(values, pa.scalar(wanted.at_least, of_bounds)))
        if wanted.at_most is not None:
            tests.append(pc.less_equal(values, pa.scalar(wanted.at_most, of_bounds)))
        if wanted.one_of is not None:
            tests.append(pc.is_in(values, value_set=pa.array(wanted.one_of, values.type)))
    except (pa.ArrowException, TypeError) as error:
        raise EvenmixError(
            f"the filter {wanted} cannot be applied to {wanted.folder}, whose column has values "
            f"of type {values.type} ({error}); correct mixture.filters"
        ) from error
    return pc.fill_null(reduce(pc.and_, tests), False)


def min_short_edge_px(recipe: Recipe) -> int:
    """Return the least shorter edge that a mixture takes: its resolution unless the recipe says."""
    return recipe.mixture.min_short_edge_px or recipe.mixture.resolution


def selection_hash(recipe: Recipe, key: str) -> int:
    """Return the hash of which a mixture takes the smallest."""
    return uniform_hash(recipe.seed, key, "select")


def is_held_out(recipe: Recipe, key: str) -> bool:
    """Tell whether a picture is one for validation, of which all are taken."""
    held_out_below = int(recipe.mixture.validation_fraction * HASH_RANGE)
    return uniform_hash(recipe.seed, key, "validation") < held_out_below


def judging_config(recipe: Recipe, dataset: str, with_captions: bool) -> dict[str, Any]:
    """Return what decides which pictures of a dataset can be taken, beside the tables' content."""
    config: dict[str, Any] = {
        "seed": recipe.seed,
        "validation_fraction": recipe.mixture.validation_fraction,
        "min_short_edge_px": min_short_edge_px(recipe),
        "filters": [
            wanted.model_dump(exclude={"datasets"}) for wanted in filters_of(recipe, dataset)
        ],
    }
    if with_captions:
        config["outcomes"] = sorted(recipe.mixture.outcomes)
    if recipe.exclusions is not None:
        config["exclusions"] = load_exclusions(recipe.exclusions).digest
    return config


def input_columns(recipe: Recipe, dataset: str, with_captions: bool) -> dict[str, list[str]]:
    """Return what judges the pictures of a dataset: folders below R, and columns of their tables.

    The image index is the first. All have the column ``key`` beside these.
    """
    identifying = [] if recipe.exclusions is None else _IDENTIFYING_COLUMNS
    columns = {
        IMAGES: ["width", "height", *identifying],
        duplicates_folder(recipe.dedup.name): ["rule"],
    }
    for wanted in filters_of(recipe, dataset):
        columns.setdefault(wanted.folder, []).append(wanted.column_name)
    if with_captions:
        columns |= {
            captions_folder(name): [_OUTCOMES] for name in recipe.mixture.caption_sets(dataset)
        }
    return columns


def input_digests(recipe: Recipe, dataset: str, with_captions: bool) -> dict[str, dict[str, str]]:
    """Identify all that judges the pictures of a dataset: digests by folder below R and shard.

    Raises:
        EvenmixError: a stage before has not finished, or a folder lacks shards that the index has;
            the text says what to do.
    """
    digests = {
        folder: folder_digests(recipe.root, folder, dataset)
        for folder in input_columns(recipe, dataset, with_captions)
    }
    shards = digests[IMAGES].keys()
    for folder, found in digests.items():
        missing = sorted(shards - found.keys())
        if missing:
            raise EvenmixError(
                f"{dataset_url(recipe.root, folder, dataset)} lacks {len(missing)} shards, such as "
                f"{missing[0]}, of the image index; {_remedy(folder)}"
            )
    return {folder: {shard: found[shard] for shard in shards} for folder, found in digests.items()}


def folder_digests(root: str, folder: str, dataset: str) -> dict[str, str]:
    """Return what identifies the content of each shard of a dataset in one folder below R.

    Of what a stage has published it is the digest. An attribute table has no receipt; it is its
    size and the store's own checksum from one listing (CRC-32C on GCS). A local disk has none, so
    there the files are read for their CRC-32C: times of change would be cheaper, but a copied
    corpus would count as another. So a table keeps its identity from a disk to GCS.

    Raises:
        EvenmixError: the stage has not finished, or there is no attribute table.
    """
    family, _, name = folder.partition("/")
    if family == ATTRIBUTES:
        return _attribute_digests(dataset_url(root, folder, dataset))
    commands = {IMAGES: "ingest", "duplicates": "dedup", "captions": f"caption --captions {name}"}
    return finished_shards(root, folder, dataset, commands[family])


def _attribute_digests(url: str) -> dict[str, str]:
    files = [file for file in storage.list_files(url) if file.name.endswith(".parquet")]
    if not files:
        raise EvenmixError(
            f"{url} has no attribute tables; {_remedy('attributes')}, or correct mixture.filters"
        )
    with ThreadPoolExecutor(_CONCURRENT_READS) as pool:
        digests = pool.map(_file_digest, files)
        return {
            file.name.removesuffix(".parquet"): digest
            for file, digest in zip(files, digests, strict=True)
        }


def _file_digest(file: FileInfo) -> str:
    version = file.version or f"crc32c:{checksum(storage.read_chunks(file.url)).crc32c}"
    return f"{file.num_bytes} bytes, {version}"


def _remedy(folder: str) -> str:
    family, _, name = folder.partition("/")
    if family == "duplicates":
        return "give dedup.name another value and run `evenmix dedup` again"
    if family == "captions":
        return f"run `evenmix caption --captions {name}` again"
    return "write one for each shard of the index, named as that, with its keys in its order"


def _read_tables(
    recipe: Recipe, dataset: str, shard: str, with_captions: bool
) -> dict[str, pa.Table]:
    """Read the tables that judge a shard, by folder; row by row they are about the same pictures.

    Raises:
        EvenmixError: they are not, or a table or a column is missing.
    """
    tables: dict[str, pa.Table] = {}
    for folder, columns in input_columns(recipe, dataset, with_captions).items():
        names = list(dict.fromkeys(["key", *columns]))
        table = read_shard(recipe.root, folder, dataset, shard, names)
        tables[folder] = table
        if not table["key"].cast(pa.string()).equals(tables[IMAGES]["key"]):
            url = storage.join(dataset_url(recipe.root, folder, dataset), f"{shard}.parquet")
            remedy = (
                "write it anew, with the keys of the index in its order"
                if folder.startswith(f"{ATTRIBUTES}/")
                else "`evenmix verify` tells which file is damaged"
            )
            raise EvenmixError(f"{url} and the image index speak of different pictures; {remedy}")
    return tables


def _where(mask: Any, reason: str) -> Any:
    """Return a reason for each row of a mask, null where it does not apply."""
    return pc.if_else(mask, pa.scalar(str(reason)), pa.scalar(None, pa.string()))


def _excluded(recipe: Recipe, index: pa.Table) -> Any:
    if recipe.exclusions is None:
        return pa.nulls(index.num_rows, pa.string())
    exclusions = load_exclusions(recipe.exclusions)
    keys, source_urls, final_urls, hashes, pixel_hashes = (
        index[name].to_pylist() for name in ("key", *_IDENTIFYING_COLUMNS)
    )
    pictures = zip(
        keys,
        zip(source_urls, final_urls, strict=True),
        zip(hashes, pixel_hashes, strict=True),
        strict=True,
    )
    is_excluded = [exclusions.reason(*picture) is not None for picture in pictures]
    return _where(pa.array(is_excluded, pa.bool_()), RejectReason.EXCLUDED)


def _uncaptioned(sets: Sequence[pa.Table], usable: Sequence[str]) -> Any:
    """Return why pictures have no usable caption in any of some caption sets, null if they have."""
    has_usable, is_not_asked = (
        np.logical_or.reduce([_has_outcome(table["captions"], outcomes) for table in sets])
        for outcomes in (usable, [RejectReason.NOT_ASKED])
    )
    return pc.if_else(
        pa.array(has_usable),
        pa.scalar(None, pa.string()),
        pc.if_else(
            pa.array(is_not_asked), str(RejectReason.NOT_ASKED), str(RejectReason.NO_CAPTION)
        ),
    )


def _has_outcome(captions: pa.ChunkedArray, outcomes: Sequence[str]) -> Any:
    """Tell of each picture whether one of its captions has one of some outcomes."""
    lists = captions.combine_chunks()
    found = pc.struct_field(pc.list_flatten(lists), "outcome")
    is_one = pc.is_in(found, value_set=pa.array(outcomes, pa.string()))
    has_one = np.zeros(len(lists), np.bool_)
    has_one[pc.list_parent_indices(lists).filter(is_one).to_numpy()] = True
    return has_one
