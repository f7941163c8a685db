"""The stages that decide what becomes of the pictures, from the graph of copies to the outcome.

removals   all        the removed pictures, by group of shards
report     a table    _removed, and from it _groups, _summary and so on, in R/duplicates/<name>
outcome    a shard    R/duplicates/<name>/<dataset>/<shard>
"""

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dedup import recall, report
from dedup.corpus import ALL, Search, Shard, Table, shards_of
from dedup.records import DUPLICATES, GRAPH, PICTURES, REMOVALS, Bools, Ints, keys_of, to_hex
from dedup.removals import Edges, Graph, Removals, choose_removals, rule_names
from dedup.rules import AGAINST
from dedup.steps import SearchStage
from dedup.truth import found_in, read_truth
from pipeline import storage
from pipeline.exchange import exchange_table, read_slices
from pipeline.reasons import RejectReason
from pipeline.receipts import Counts
from pipeline.records import IMAGES
from pipeline.stage import Output, WorkItem
from pipeline.summary import read_shard

_CONCURRENT_READS = 16


@dataclass(frozen=True)
class Shards:
    """All shards by group, those of the evaluation pictures last: where each picture is.

    A picture's place is its number among all, shard by shard.
    """

    groups: Sequence[Sequence[Shard]]

    @classmethod
    def of(cls, item: WorkItem) -> "Shards":
        """Return the shards that a work item lists."""
        return cls([shards_of({"shards": shards}) for shards in item.payload["groups"]])

    @cached_property
    def shards(self) -> list[Shard]:
        """All shards."""
        return [shard for group in self.groups for shard in group]

    @cached_property
    def offsets(self) -> Ints:
        """Where each shard begins, and where the last one ends."""
        return np.cumsum([0, *(shard.num_pictures for shard in self.shards)])

    @cached_property
    def group_offsets(self) -> Ints:
        """Where each group begins, and where the last one ends."""
        sizes = [sum(shard.num_pictures for shard in group) for group in self.groups]
        return np.cumsum([0, *sizes])

    @cached_property
    def num_evaluation(self) -> int:
        """How many evaluation pictures there are."""
        return sum(shard.num_pictures for shard in self.shards if shard.dataset == AGAINST)

    def shard_of(self, places: Ints) -> Ints:
        """Return the number of the shard in which a picture is."""
        return np.searchsorted(self.offsets, places, "right") - 1

    def locate(self, places: Ints) -> list[pa.Array]:
        """Return dataset, shard and row of pictures."""
        number = self.shard_of(places)
        shards = pa.array(number)
        return [
            pa.array([shard.dataset for shard in self.shards], pa.string()).take(shards),
            pa.array([shard.name for shard in self.shards], pa.string()).take(shards),
            pa.array(places - self.offsets[number]),
        ]


@dataclass(frozen=True)
class Everyone(Shards):
    """All pictures (PICTURES) by their places."""

    pictures: pa.Table

    @classmethod
    def read(cls, search: Search, item: WorkItem) -> "Everyone":
        """Read who is who, of all groups that a work item lists."""
        groups = Shards.of(item).groups
        tables = read_slices([search.table_url("pictures", ALL, ALL)], *range(len(groups)))
        return cls(groups, pa.concat_tables([PICTURES.empty_table(), *tables]).combine_chunks())

    @cached_property
    def at(self) -> Ints:
        """Where the picture of each rank is."""
        at = np.empty(self.pictures.num_rows, np.int64)
        at[self.column("rank")] = np.arange(len(at))
        return at

    def column(self, name: str) -> Any:
        """Return a column of numbers."""
        return self.pictures[name].to_numpy()

    def hex_keys(self, places: Ints) -> pa.Array:
        """Return the keys of pictures as they are in the image index."""
        return to_hex(keys_of(self.pictures["key"].combine_chunks())[places])


@dataclass(frozen=True)
class ChooseRemovals(SearchStage):
    """The stage that decides who goes; its table is exchanged by group of shards."""

    remove_contamination: bool = True
    name: str = "dedup-removals"
    version: int = 2

    def config(self, dataset: str) -> Mapping[str, Any]:
        """Return what decides, beside the graph."""
        return {
            "rules": self.search.rules.identity(),
            "remove_contamination": self.remove_contamination,
        }

    def process(self, item: WorkItem) -> Output:
        """Read the whole graph, and choose."""
        everyone = Everyone.read(self.search, item)
        graph = _read_graph(self.search, everyone, item.payload["graph"])
        chosen = choose_removals(
            graph, self.search.rules, remove_contamination=self.remove_contamination
        )
        table = pa.concat_tables(
            [
                removal_rows(everyone, chosen),
                *settled_rows(self.search, everyone, chosen.removed),
            ]
        ).sort_by("place")
        place = table["place"].to_numpy()
        group = np.searchsorted(everyone.group_offsets, place, "right") - 1
        rows = table.set_column(0, "place", pa.array(place - everyone.group_offsets[group]))
        num_pictures = everyone.pictures.num_rows - everyone.num_evaluation
        counts = Counts(num_pictures, num_pictures - len(place), _numbers(table["rule"]))
        return Output(exchange_table(rows, group), counts)


def _numbers(rules: pa.ChunkedArray) -> dict[str, int]:
    """Count the removed pictures by rule, without those that are kept."""
    counts = pc.value_counts(rules.drop_null())
    return dict(sorted(zip(*(part.to_pylist() for part in counts.flatten()), strict=True)))


def _read_graph(search: Search, everyone: Everyone, urls: Sequence[str]) -> Graph:
    """Bring together, by rank, who is who and what is alike."""
    columns = ["neighbour_rank", "rank", "similarity", "equal"]
    with ThreadPoolExecutor(_CONCURRENT_READS) as pool:
        tables = pool.map(partial(storage.read_parquet, columns=columns), urls)
        edges = pa.concat_tables([GRAPH.empty_table().select(columns), *tables])
    is_equal = edges["equal"].to_numpy()
    pairs = Edges.near(*(edges[name].to_numpy() for name in columns[:3]))
    numbers = [search.rules.datasets.index(shard.dataset) for shard in everyone.shards]
    sizes = [shard.num_pictures for shard in everyone.shards]
    at = everyone.at
    return Graph(
        stand_in=everyone.column("stand_in")[at],
        copies=everyone.column("copies")[at],
        dataset=np.repeat(np.array(numbers, np.int16), sizes)[at],
        accepted=everyone.column("accepted")[at],
        settled=everyone.column("settled")[at],
        near=pairs.take(~is_equal),
        equal=pairs.take(is_equal),
        num_evaluation=everyone.num_evaluation,
    )


def removal_rows(everyone: Everyone, chosen: Removals) -> pa.Table:
    """Return the chosen removals (REMOVALS); ``place`` counts from the first shard of all."""
    at = everyone.at
    keeper = at[chosen.duplicate_of]
    columns = [
        pa.array(at[chosen.removed]),
        everyone.hex_keys(at[chosen.removed]),
        everyone.hex_keys(keeper),
        *everyone.locate(keeper),
        pa.array(chosen.similarity, from_pandas=True),
        everyone.hex_keys(at[chosen.group]),
        rule_names(chosen.rule),
    ]
    return pa.table(columns, schema=REMOVALS)


def settled_rows(search: Search, everyone: Everyone, removed: Ints) -> Iterator[pa.Table]:
    """Yield the removals (REMOVALS) of an earlier search that still hold.

    ``removed`` are the ranks of those that this search removes, for reasons of its own. A record
    that the earlier search did not see, and that repeats the key of one that it removed, has the
    same row as that one.
    """
    settled = everyone.column("settled").copy()
    settled[everyone.at[removed]] = False
    places = np.flatnonzero(settled)
    stand_in = everyone.at[everyone.column("stand_in")]
    was_seen = np.array([shard.is_accepted for shard in everyone.shards], np.bool_)
    seen = np.where(was_seen[everyone.shard_of(places)], places, stand_in[places])
    number = everyone.shard_of(seen)
    order = np.argsort(number, kind="stable")
    found, starts = np.unique(number[order], return_index=True)
    for shard, rows in zip(found.tolist(), np.split(order, starts[1:]), strict=False):
        url = search.accepted_url(everyone.shards[shard].dataset, everyone.shards[shard].name)
        earlier = storage.read_parquet(url).take(seen[rows] - everyone.offsets[shard])
        keeper = stand_in[seen[rows]]
        unknown = pa.array(keeper == seen[rows])
        columns = [
            pa.array(places[rows]),
            earlier["key"],
            earlier["duplicate_of"],
            *(
                pc.if_else(unknown, pa.scalar(None, column.type), column)
                for column in everyone.locate(keeper)
            ),
            earlier["similarity"],
            earlier["group"],
            earlier["rule"],
        ]
        yield pa.table(columns, schema=REMOVALS)


@dataclass(frozen=True)
class Report(SearchStage):
    """The stage that makes the tables of the report; each is the one item of its dataset.

    Of all but the first, ``_removed``, some are made from that one.
    """

    name: str = "dedup-report"
    version: int = 2

    def process(self, item: WorkItem) -> Output:
        """Make one of the tables."""
        table = self._table(item)
        return Output(table, Counts(table.num_rows, table.num_rows))

    def _table(self, item: WorkItem) -> pa.Table:
        removed_url = self.search.outcome_url(Table.REMOVED)
        match item.dataset:
            case Table.REMOVED:
                return report.removed_table(_removed(Shards.of(item), item.payload["removals"]))
            case Table.GROUPS:
                columns = report.COLUMNS_OF_GROUPS
                return report.groups_table(storage.read_parquet(removed_url, columns))
            case Table.SUMMARY:
                columns = report.COLUMNS_OF_SUMMARY
                return report.summary(storage.read_parquet(removed_url, columns))
            case Table.CONTAMINATION:
                return self._contamination(item)
            case _:
                return recall.recall_rows(_measures(self.search, item))

    def _contamination(self, item: WorkItem) -> pa.Table:
        """Return what is, or would be, removed for being like an evaluation picture."""
        if item.payload["remove_contamination"]:
            url = self.search.outcome_url(Table.REMOVED)
            return report.removed_table(
                report.find_removed(url, "rule", [RejectReason.CONTAMINATION])
            )
        everyone = Everyone.read(self.search, item)
        graph = _read_graph(self.search, everyone, item.payload["graph"])
        chosen = choose_removals(graph, self.search.rules, remove_contamination=True)
        rows = removal_rows(everyone, chosen)
        is_contaminated = pc.equal(rows["rule"], RejectReason.CONTAMINATION)
        return report.removed_table([_located(everyone, rows.filter(is_contaminated), 0)])


def _removed(shards: Shards, removals: str) -> Iterator[pa.Table]:
    """Yield the removals with dataset, shard and row of the removed, a group at a time."""
    for group in range(len(shards.groups)):
        for rows in read_slices([removals], group):
            yield _located(shards, rows, int(shards.group_offsets[group]))


def _located(shards: Shards, removals: pa.Table, start: int) -> pa.Table:
    """Add dataset, shard and row of the removed, whose places count from ``start``."""
    located = shards.locate(start + removals["place"].to_numpy())
    names = [*REMOVALS.names, "dataset", "shard", "row"]
    return pa.table([*removals.columns, *located], names=names)


def _measures(search: Search, item: WorkItem) -> dict[str, recall.Estimate]:
    """Compare what was found with the truth about some pictures; without a search there is none."""
    payload = item.payload
    if "truth" not in payload:
        return {}
    pairs = read_truth(payload["truth"])
    queries = np.array(payload["queries"], np.int64)
    num_queries, num_searched = len(queries), payload["num_searched"]
    columns = ["rank", "neighbour_rank", "equal", "truncated"]
    found = found_in(
        pairs, lambda: (storage.read_parquet(url, columns) for url in payload["graph"])
    )
    reachable = recall.reach(pairs, payload["num_clusterings"], num_queries, num_searched)
    return {
        **recall.reach_measures(reachable),
        "pair_recall": recall.pair_recall(
            pairs, found.found, found.truncated, num_queries, num_searched
        ),
        "duplicates_left": recall.duplicates_left(
            pairs, queries, _kept(Everyone.read(search, item), item), num_searched
        ),
        "comparisons_share": recall.comparisons_share(payload["num_comparisons"], num_searched),
    }


def _kept(everyone: Everyone, item: WorkItem) -> Bools:
    """Tell of each rank whether that is a picture of the corpus that is kept."""
    kept = np.ones(everyone.pictures.num_rows, np.bool_)
    rank = everyone.column("rank")
    kept[rank[len(rank) - everyone.num_evaluation :]] = False
    for group, start in enumerate(everyone.group_offsets[:-1].tolist()):
        for removals in read_slices([item.payload["removals"]], group):
            kept[rank[start + removals["place"].to_numpy()]] = False
    return kept


@dataclass(frozen=True)
class WriteOutcome(SearchStage):
    """The stage that gives each shard its part of the outcome."""

    name: str = "dedup"
    version: int = 3

    def process(self, item: WorkItem) -> Output:
        """Write what became of each picture of a shard."""
        key = read_shard(self.root, IMAGES, item.dataset, item.shard, ["key"])["key"]
        rows = np.full(len(key), -1)
        slices = read_slices([item.payload["removals"]], item.payload["group"])
        removals = pa.concat_tables([REMOVALS.empty_table(), *slices])
        place = removals["place"].to_numpy() - item.payload["start"]
        here = np.flatnonzero((place >= 0) & (place < len(rows)))
        rows[place[here]] = here
        outcome = removals.take(pa.array(rows, mask=rows < 0))
        columns = [
            key,
            outcome["duplicate_of"],
            outcome["similarity"],
            pc.coalesce(outcome["group"], key),
            outcome["rule"],
        ]
        table = pa.table(columns, schema=DUPLICATES)
        reasons = _numbers(table["rule"])
        return Output(table, Counts(len(key), len(key) - sum(reasons.values()), reasons))
