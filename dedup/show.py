"""A group of copies as a picture: what was removed beside what was kept in its favour.

The kept picture comes first, in a green frame; where a group went because it is like evaluation
pictures, these come first, in red. Of those that were removed the least similar come first, since
mistakes are among them. Sheets are notes: no part of the corpus.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from dedup import against
from dedup.contact_sheet import Tile, contact_sheet, small
from dedup.corpus import Places, Table
from dedup.report import REMOVED, find_removed
from dedup.rules import AGAINST
from pipeline import images, originals, storage
from pipeline.errors import EvenmixError
from pipeline.images import Pixels
from pipeline.recipe import Recipe
from pipeline.records import IMAGES, NOTES
from pipeline.summary import dataset_url, finished_shards, read_shard

MAX_TILES = 60
MAX_EVALUATION_PICTURES = 12

_CONCURRENT_READS = 16
_CONCURRENT_PICTURES = 4  # originals can be large
_GREEN, _RED = "#2a9d5c", "#c8452d"


def show(recipe: Recipe, key: str) -> str:
    """Draw the group of a picture that was removed, or in whose favour others were.

    Returns the URL of the sheet.

    Raises:
        EvenmixError: the search has not ended, knows no such picture, or found no copies of it.
    """
    url = _table_url(recipe, Table.REMOVED)
    key = key.lower()
    found = [rows["group"][0].as_py() for rows in find_removed(url, "key", [key])]
    (group,) = _read_groups(url, found or [key])
    if not group.num_removed:
        raise EvenmixError(_why_no_group(recipe, key))
    return _draw(recipe, group)


def draw_largest(recipe: Recipe, count: int = 10) -> list[str]:
    """Draw the largest groups of a search and return the URLs of the sheets."""
    groups = storage.read_parquet(_table_url(recipe, Table.GROUPS), ["group"])["group"]
    largest = groups.slice(0, count).to_pylist()
    if not largest:
        return []
    url = _table_url(recipe, Table.REMOVED)
    return [_draw(recipe, group) for group in _read_groups(url, largest)]


def _places(recipe: Recipe) -> Places:
    return Places(recipe.root, recipe.dedup.name)


def _table_url(recipe: Recipe, table: Table) -> str:
    url = _places(recipe).outcome_url(table)
    if not storage.exists(url):
        raise EvenmixError(f"{url} is missing: no search of this name has ended; run it first")
    return url


@dataclass(frozen=True)
class _Group:
    """Pictures that were removed together: how many, and the rows (REMOVED) of some of them."""

    key: str
    num_removed: int
    rows: Sequence[Mapping[str, Any]]


def _read_groups(url: str, keys: Sequence[str]) -> list[_Group]:
    """Read groups, of each what is least similar: a group may be larger than memory."""
    num_removed = Counter[str]()
    least = dict.fromkeys(keys, REMOVED.empty_table())
    for rows in find_removed(url, "group", keys):
        for key in keys:
            of_group = rows.filter(pc.equal(rows["group"], key))
            num_removed[key] += of_group.num_rows
            together = pa.concat_tables([least[key], of_group.cast(REMOVED)])
            order = [("similarity", "ascending"), ("key", "ascending")]  # nulls are last
            least[key] = together.sort_by(order).slice(0, MAX_TILES)
    return [_Group(key, num_removed[key], least[key].to_pylist()) for key in keys]


def _why_no_group(recipe: Recipe, key: str) -> str:
    """Return what is said of a picture without a group; the keys of all shards are looked at."""
    folder = _places(recipe).folder
    for dataset in sorted(recipe.datasets):
        shards = finished_shards(recipe.root, folder, dataset, "dedup")
        read = partial(read_shard, recipe.root, folder, dataset, columns=["key"])
        with ThreadPoolExecutor(_CONCURRENT_READS) as pool:
            for table in pool.map(read, shards):
                if pc.is_in(pa.scalar(key), table["key"]).as_py():
                    pool.shutdown(cancel_futures=True)
                    return f"picture {key} of {dataset} was kept and has no copies: nothing to show"
    return (
        f"{storage.join(recipe.root, folder)} knows no picture {key!r}; take a key of 32 "
        "hexadecimal digits from the column `key` of any table"
    )


@dataclass(frozen=True)
class _Shown:
    """A picture on a sheet: where it is, and what is said of it.

    ``dataset``, ``shard`` and ``row`` are None where only an earlier search knew them.
    """

    key: str
    dataset: str | None
    shard: str | None
    row: int | None
    remark: str
    frame: str | None = None


def _draw(recipe: Recipe, group: _Group) -> str:
    in_favour_of = list(dict.fromkeys(map(_favoured, group.rows)))[:MAX_EVALUATION_PICTURES]
    removed = [_removed(row) for row in group.rows[: MAX_TILES - len(in_favour_of)]]
    with ThreadPoolExecutor(_CONCURRENT_PICTURES) as pool:
        tiles = list(pool.map(partial(_tile, recipe), [*in_favour_of, *removed]))
    title = f"{group.num_removed:,} removed by search {recipe.dedup.name}, the least similar first"
    if group.num_removed > len(removed):
        title += f"; {len(removed)} of them, and {group.num_removed - len(removed):,} more"
    sheet = contact_sheet([f"group {group.key}", title], tiles)
    url = storage.join(recipe.root, NOTES, f"duplicates-{recipe.dedup.name}", f"{group.key}.jpg")
    storage.replace(url, images.encode(sheet, "jpeg"))
    return url


def _favoured(row: Mapping[str, Any]) -> _Shown:
    """Return the picture in whose favour one was removed."""
    is_evaluation = row["keeper_dataset"] == AGAINST
    return _Shown(
        row["duplicate_of"],
        row["keeper_dataset"],
        row["keeper_shard"],
        row["keeper_row"],
        "evaluation picture" if is_evaluation else "kept",
        _RED if is_evaluation else _GREEN,
    )


def _removed(row: Mapping[str, Any]) -> _Shown:
    remark = row["rule"].replace("_", " ")
    if row["similarity"] is not None:
        remark = f"{row['similarity']:.3f}, {remark}"
    return _Shown(row["key"], row["dataset"], row["shard"], row["row"], remark)


def _tile(recipe: Recipe, shown: _Shown) -> Tile:
    """Return the tile of a picture; one that is out of reach leaves the others worth a look."""
    try:
        name, pixels = _read(recipe, shown)
    except EvenmixError:
        lines = [shown.dataset or "of an earlier search", shown.remark, shown.key]
        return Tile(None, lines, shown.frame)
    height, width, _ = pixels.shape
    lines = [f"{name}, {width} x {height}", shown.remark, shown.key]
    return Tile(small(pixels), lines, shown.frame)


def _read(recipe: Recipe, shown: _Shown) -> tuple[str, Pixels]:
    """Return the name of a picture's dataset, or its path if it is for evaluation, and its pixels.

    Raises:
        EvenmixError: it is not where the search found it.
    """
    if shown.dataset is None or shown.shard is None or shown.row is None:
        raise EvenmixError(f"it is not known where picture {shown.key} is")
    if shown.dataset != AGAINST:
        index = read_shard(recipe.root, IMAGES, shown.dataset, shown.shard, originals.COLUMNS)
        tar = storage.join(dataset_url(recipe.root, IMAGES, shown.dataset), f"{shown.shard}.tar")
        return shown.dataset, originals.read_original(tar, _row(index, shown))
    folder = recipe.dedup.against
    if folder is None:
        raise EvenmixError(f"dedup.against does not say where picture {shown.key} is")
    row = _row(read_shard(recipe.root, against.folder_of(recipe), AGAINST, shown.shard), shown)
    url = storage.join(folder, row["source_id"])
    data = storage.read_bytes(url, 0, row["num_bytes"])
    return row["source_id"], originals.decode_original(url, row, data)


def _row(index: pa.Table, shown: _Shown) -> dict[str, Any]:
    rows: list[dict[str, Any]] = index.slice(shown.row, 1).to_pylist()
    if [row["key"] for row in rows] != [shown.key]:
        raise EvenmixError(f"picture {shown.key} is not where the search found it")
    return rows[0]
