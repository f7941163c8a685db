"""The report's tables, against counting by hand and a plain reading of their definitions."""

import io
from pathlib import Path
from random import Random
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from dedup import report
from dedup.report import GROUPS, REMOVED, SUMMARY
from pipeline import storage
from pipeline.errors import EvenmixError

PLACES = {"dataset": "album", "shard": "s", "row": 0}
KEPT = {"keeper_dataset": "album", "keeper_shard": "k", "keeper_row": 1}
EVALUATION = {"keeper_dataset": "_against", "keeper_shard": "against-000000000", "keeper_row": 2}
UNKNOWN = {"keeper_dataset": None, "keeper_shard": None, "keeper_row": None}


def removal(key: str, group: str, rule: str, similarity: float | None, **more: Any) -> Any:
    """Return a row for a copy of the picture whose key names its group."""
    row = {"key": key, "duplicate_of": group, "group": group}
    return PLACES | KEPT | row | {"rule": rule, "similarity": similarity} | more


ROWS = [
    removal("f", "a", "near_duplicate", 0.75),
    removal("b", "a", "exact_copy", 1.0, dataset="crawl"),
    removal("c", "a", "near_duplicate", 0.875, dataset="crawl"),
    removal("e", "d", "near_duplicate", 0.9375, dataset="crawl", **UNKNOWN),
    # A whole group that is like an evaluation picture, its best one too; and one that is alone.
    removal("h", "h", "contamination", 0.8125, duplicate_of="x", **EVALUATION),
    removal("g", "h", "contamination", None, duplicate_of="x", dataset="web", **EVALUATION),
    removal("i", "i", "contamination", None, duplicate_of="y", **EVALUATION),
]


def removed_table(rows: list[Any]) -> pa.Table:
    """Return what the stage gives: some rows in each part, in no order, with a further column."""
    parts = [rows[start : start + 3] for start in range(0, len(rows), 3)]
    schema = pa.schema([("place", pa.int64()), *reversed(list(REMOVED))])
    return report.removed_table(pa.Table.from_pylist(part, schema=schema) for part in parts)


def test_the_removed_are_sorted_by_key() -> None:
    table = removed_table(ROWS)
    assert table.schema == REMOVED
    assert table.to_pylist() == sorted(ROWS, key=lambda row: row["key"])


def test_groups_count_the_kept_picture_if_there_is_one() -> None:
    table = report.groups_table(removed_table(ROWS))
    assert table.schema == GROUPS
    assert [tuple(row.values()) for row in table.to_pylist()] == [
        ("a", 4, 1, 2, 0, ["album", "crawl"], 0.75),
        ("d", 2, 0, 1, 0, ["crawl"], 0.9375),
        ("h", 2, 0, 0, 2, ["album", "web"], 0.8125),
    ]


def test_a_repeated_record_is_a_further_picture() -> None:
    rows = [
        removal("a", "a", "exact_copy", 1.0),
        removal("b", "b", "contamination", 0.875, duplicate_of="x", **EVALUATION),
        removal("b", "b", "contamination", None, duplicate_of="x", row=1, **EVALUATION),
    ]
    table = report.groups_table(removed_table(rows))
    assert table.select(["group", "num_pictures"]).to_pylist() == [
        {"group": "a", "num_pictures": 2},
        {"group": "b", "num_pictures": 2},
    ]


def test_the_summary_is_by_pair_of_datasets_and_rule() -> None:
    table = report.summary(removed_table(ROWS))
    assert table.schema == SUMMARY
    assert [tuple(row.values()) for row in table.to_pylist()] == [
        ("album", "_against", "contamination", 2),
        ("album", "album", "near_duplicate", 1),
        ("crawl", "album", "exact_copy", 1),
        ("crawl", "album", "near_duplicate", 1),
        ("crawl", None, "near_duplicate", 1),
        ("web", "_against", "contamination", 1),
    ]


def test_the_summary_as_it_is_shown() -> None:
    console = Console(file=io.StringIO(), width=80, record=True)
    console.print(report.summary_table(report.summary(removed_table(ROWS))))
    lines = [line.split() for line in console.export_text().splitlines()]
    assert ["dataset", "copy", "of", "exact", "near", "contamination"] in lines
    assert lines[-7:] == [
        ["album", "evaluation", "pictures", "2"],
        ["album", "album", "1"],
        ["crawl", "album", "1", "1"],
        ["crawl", "an", "earlier", "search's", "1"],
        ["web", "evaluation", "pictures", "1"],
        ["all", "1", "3", "3"],
        [],
    ]


def test_nothing_removed_gives_empty_tables(tmp_path: Path) -> None:
    removed = report.removed_table([])
    assert removed.equals(REMOVED.empty_table())
    assert report.groups_table(removed).equals(GROUPS.empty_table())
    sums = report.summary(removed)
    assert sums.equals(SUMMARY.empty_table())
    assert report.summary_table(sums).row_count == 1
    url = str(tmp_path / "all.parquet")
    storage.publish(url, storage.parquet_bytes(removed, {}))
    assert list(report.find_removed(url, "key", ["a"])) == []


def test_order_and_parts_do_not_matter() -> None:
    random = Random(7)
    rows = [
        removal(
            f"{number:04x}",
            f"g{random.randrange(120):02}",
            random.choice(["exact_copy", "near_duplicate"]),
            random.randrange(192, 256) / 256,
            dataset=random.choice(["album", "crawl", "web"]),
        )
        for number in range(600)
    ]
    groups = report.groups_table(removed_table(rows))
    sizes: dict[str, list[Any]] = {}
    for row in rows:
        sizes.setdefault(row["group"], []).append(row)
    assert groups.to_pylist() == [
        {
            "group": group,
            "num_pictures": len(members) + 1,
            "num_exact": sum(row["rule"] == "exact_copy" for row in members),
            "num_near": sum(row["rule"] == "near_duplicate" for row in members),
            "num_contaminated": 0,
            "datasets": sorted({"album", *(row["dataset"] for row in members)}),
            "least_similarity": min(row["similarity"] for row in members),
        }
        for group, members in sorted(sizes.items(), key=lambda item: (-len(item[1]), item[0]))
    ]
    random.shuffle(rows)
    assert report.groups_table(removed_table(rows)).equals(groups)


@pytest.mark.parametrize("row_group_size", [1, 2, 100])
def test_rows_are_found_without_reading_the_whole_table(
    tmp_path: Path, row_group_size: int
) -> None:
    removed = removed_table(ROWS)
    url = str(tmp_path / "all.parquet")
    pq.write_table(removed, url, row_group_size=row_group_size)

    def keys(column: str, *values: str) -> list[str]:
        found = report.find_removed(url, column, values)
        return [key for rows in found for key in rows["key"].to_pylist()]

    assert keys("key", "e") == ["e"]
    assert keys("key", "a") == keys("key", "z") == keys("key", "dd") == []
    assert keys("group", "a") == ["b", "c", "f"]
    assert keys("group", "h", "d") == ["e", "g", "h"]


def test_a_damaged_table_is_named(tmp_path: Path) -> None:
    path = tmp_path / "all.parquet"
    pq.write_table(removed_table(ROWS), path, compression="zstd")
    data = bytearray(path.read_bytes())
    data[4:60] = bytes(56)
    path.write_bytes(data)
    with pytest.raises(
        EvenmixError, match=r"(?s)all\.parquet is damaged.*run `evenmix dedup` again"
    ):
        list(report.find_removed(str(path), "key", ["e"]))
