"""The report of a search: every removed picture, every group, and how many by pair of datasets.

Pure functions of tables, columns at a time: the report of 160 million pictures has some 30 million
rows.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from rich import box
from rich.table import Table

from dedup.rules import AGAINST
from pipeline import storage
from pipeline.errors import EvenmixError
from pipeline.reasons import RejectReason

REMOVED = pa.schema(
    [
        ("key", pa.string()),
        ("dataset", pa.string()),
        ("shard", pa.string()),
        ("row", pa.int64()),
        ("duplicate_of", pa.string()),
        ("keeper_dataset", pa.string()),
        ("keeper_shard", pa.string()),
        ("keeper_row", pa.int64()),
        ("similarity", pa.float32()),
        ("group", pa.string()),
        ("rule", pa.string()),
    ]
)
"""A removed picture, by its key. ``shard`` and ``row`` say where it is in its dataset's image
index, ``keeper_shard`` and ``keeper_row`` the same of the picture ``duplicate_of``, which is an
evaluation picture if its dataset is ``_against``; the three are null where only an earlier search
knew. The others are as in :data:`dedup.records.DUPLICATES`."""

GROUPS = pa.schema(
    [
        ("group", pa.string()),
        ("num_pictures", pa.int64()),
        ("num_exact", pa.int64()),
        ("num_near", pa.int64()),
        ("num_contaminated", pa.int64()),
        ("datasets", pa.list_(pa.string())),
        ("least_similarity", pa.float32()),
    ]
)
"""A group of at least two pictures of the corpus, the largest first, then by key.

``num_pictures`` counts the kept one too, the next three those that are removed, by rule;
``datasets`` are those of all of them, sorted. ``least_similarity`` is the least of a removed
picture with what it is a duplicate of, null if there is none."""

SUMMARY = pa.schema(
    [
        ("dataset", pa.string()),
        ("keeper_dataset", pa.string()),
        ("rule", pa.string()),
        ("num_pictures", pa.int64()),
    ]
)
"""How many pictures of a dataset were removed, by the dataset of what they duplicate, and rule."""

COLUMNS_OF_GROUPS = ["key", "dataset", "keeper_dataset", "similarity", "group", "rule"]
COLUMNS_OF_SUMMARY = SUMMARY.names[:3]
"""The columns of REMOVED that the groups and the summary are made of."""

_HEADINGS = {
    RejectReason.EXACT_COPY: "exact",
    RejectReason.NEAR_DUPLICATE: "near",
    RejectReason.CONTAMINATION: "contamination",
}


def removed_table(parts: Iterable[pa.Table]) -> pa.Table:
    """Return all removed pictures (REMOVED), sorted by key, of tables that have its columns."""
    selected = [part.select(REMOVED.names).cast(REMOVED) for part in parts]
    table = pa.concat_tables([REMOVED.empty_table(), *selected])
    # To take rows of many chunks takes several times as long.
    return table.combine_chunks().sort_by("key")


def groups_table(removed: pa.Table) -> pa.Table:
    """Return the groups (GROUPS) of removed pictures, of which it takes COLUMNS_OF_GROUPS."""
    is_contaminated = pc.equal(removed["rule"], RejectReason.CONTAMINATION)
    flags = {
        "num_exact": pc.equal(removed["rule"], RejectReason.EXACT_COPY),
        "num_near": pc.equal(removed["rule"], RejectReason.NEAR_DUPLICATE),
        "num_contaminated": is_contaminated,
        # A contaminated group loses its best picture too. A repeated record has its key as well.
        "lost_best": pc.and_(is_contaminated, pc.equal(removed["key"], removed["group"])),
    }
    rows = removed.select(["group", "similarity"])
    for name, flag in flags.items():
        rows = rows.append_column(name, flag.cast(pa.int64()))
    counts = [(name, "sum") for name in GROUPS.names[2:5]]
    others = [([], "count_all"), ("lost_best", "max"), ("similarity", "min")]
    grouped = rows.group_by("group").aggregate([*counts, *others]).sort_by("group")
    num_pictures = pc.subtract(pc.add(grouped["count_all"], 1), grouped["lost_best_max"])
    columns = [
        grouped["group"],
        num_pictures,
        *(grouped[f"{name}_sum"] for name, _ in counts),
        _datasets(removed),
        grouped["similarity_min"],
    ]
    table = pa.table(columns, schema=GROUPS)
    table = table.filter(pc.greater(num_pictures, 1))
    return table.sort_by([("num_pictures", "descending"), ("group", "ascending")]).combine_chunks()


def _datasets(removed: pa.Table) -> pa.Array:
    """Return the datasets of each group, sorted, in order of the groups' keys."""
    of_removed = removed.select(["group", "dataset"])
    is_of_corpus = pc.not_equal(removed["keeper_dataset"], AGAINST)  # null if it is not known
    of_keepers = removed.filter(is_of_corpus).select(["group", "keeper_dataset"])
    both = pa.concat_tables([of_removed, of_keepers.rename_columns(of_removed.column_names)])
    pairs = both.group_by(["group", "dataset"]).aggregate([])
    pairs = pairs.sort_by([("group", "ascending"), ("dataset", "ascending")]).combine_chunks()
    stops = pc.run_end_encode(pairs["group"].combine_chunks()).run_ends.to_numpy()
    offsets = pa.array(np.append(0, stops), pa.int32())
    return pa.ListArray.from_arrays(offsets, pairs["dataset"].combine_chunks())


def summary(removed: pa.Table) -> pa.Table:
    """Return the sums (SUMMARY), sorted, of removed pictures: of their COLUMNS_OF_SUMMARY."""
    keys = COLUMNS_OF_SUMMARY
    sums = removed.group_by(keys).aggregate([([], "count_all")])
    table = sums.select([*keys, "count_all"]).rename_columns(SUMMARY.names).cast(SUMMARY)
    return table.sort_by([(key, "ascending") for key in keys]).combine_chunks()


def summary_table(sums: pa.Table) -> Table:
    """Return what is shown of the sums (SUMMARY): a line for each pair of datasets."""
    table = Table(title="removed pictures", title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("dataset", overflow="fold")
    table.add_column("copy of", overflow="fold")
    for heading in _HEADINGS.values():
        table.add_column(heading, justify="right")
    lines: dict[tuple[str, str], Counter[str]] = {}
    everything = Counter[str]()
    for dataset, keeper_dataset, rule, num_pictures in zip(*sums.to_pydict().values(), strict=True):
        line = lines.setdefault((dataset, _name(keeper_dataset)), Counter())
        line[rule] = num_pictures
        everything[rule] += num_pictures
    for names, line in [*lines.items(), (("all", ""), everything)]:
        table.add_row(*names, *(f"{line[rule]:,}" if line[rule] else "" for rule in _HEADINGS))
    return table


def _name(keeper_dataset: str | None) -> str:
    if keeper_dataset is None:
        return "an earlier search's"
    return "evaluation pictures" if keeper_dataset == AGAINST else keeper_dataset


def find_removed(url: str, column: str, values: Sequence[str]) -> Iterator[pa.Table]:
    """Yield the rows of a stored table (REMOVED) with one of ``values`` in ``column``, in order.

    A row group is read at a time, and only those that may have such rows.

    Raises:
        EvenmixError: the file is missing or damaged.
    """
    wanted = pa.array(values, pa.string())
    with storage.open_parquet(url) as file:
        place = file.schema_arrow.get_field_index(column)
        for number in range(file.num_row_groups):
            bounds = file.metadata.row_group(number).column(place).statistics
            if bounds is not None and (bounds.max < min(values) or bounds.min > max(values)):
                continue
            try:
                found = pc.is_in(file.read_row_group(number, [column])[column], wanted)
                if pc.any(found).as_py():
                    yield file.read_row_group(number).filter(found)
            except (pa.ArrowException, OSError) as error:
                raise EvenmixError(
                    f"{url} is damaged ({error}); remove the folder of this search and run "
                    "`evenmix dedup` again"
                ) from error
