"""The stages that decide what becomes of the pictures, from the graph of copies to the outcome.

removals   all        the removed pictures, by group of shards
report     a table    _removed, _groups, _summary or _recall in R/duplicates/<name>
outcome    a shard    R/duplicates/<name>/<dataset>/<shard>
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dedup import recall, report
from dedup.corpus import Search, Shard, shards_of
from dedup.records import DUPLICATES, GRAPH, PICTURES, REMOVALS, Bools, Ints, keys_of, to_hex
from dedup.removals import Edges, Graph, Removals, choose_removals, rule_names
from dedup.rules import AGAINST
from dedup.truth import TRUE_PAIRS, found_in
from pipeline import storage
from pipeline.exchange import exchange_table, read_slices
from pipeline.reasons import RejectReason
from pipeline.receipts import Counts
from pipeline.records import IMAGES
from pipeline.stage import Output, WorkItem
from pipeline.summary import read_shard

REMOVED, GROUPS, SUMMARY = "_removed", "_groups", "_summary"
RECALL, CONTAMINATION = "_recall", "_contamination"
"""The tables of the report: pseudo datasets beside the real ones."""


@dataclass(frozen=True)
class Everyone:
    """All pictures in the order of the shards, and of the evaluation pictures behind them."""

    groups: Sequence[Sequence[Shard]]
    pictures: pa.Table

    @classmethod
    def read(cls, search: Search, item: WorkItem) -> "Everyone":
        """Read who is who, of all groups that a work item lists."""
        groups = [shards_of({"shards": shards}) for shards in item.payload["groups"]]
        tables = [search.pictures(group) for group in range(len(groups))]
        return cls(groups, pa.concat_tables([PICTURES.empty_table(), *tables]).combine_chunks())

    @cached_property
    def shards(self) -> list[Shard]:
        """All shards."""
        return [shard for group in self.groups for shard in group]

    @cached_property
    def offsets(self) -> Ints:
        """Where each shard begins, and where the last one ends."""
        return np.cumsum([0, *(shard.num_pictures for shard in self.shards)])

    @cached_property
    def at(self) -> Ints:
        """Where the picture of each rank is."""
        at = np.empty(self.pictures.num_rows, np.int64)
        at[self.column("rank")] = np.arange(len(at))
        return at

    def column(self, name: str) -> Any:
        """Return a column of numbers."""
        return self.pictures[name].to_numpy()

    def shard_of(self, places: Ints) -> Ints:
        """Return the number of the shard in which a picture is."""
        return np.searchsorted(self.offsets, places, "right") - 1

    def hex_keys(self, places: Ints) -> pa.Array:
        """Return the keys of pictures as they are in the image index."""
        keys = keys_of(self.pictures["key"].combine_chunks())
        return pa.array(to_hex(keys[places]), pa.string())


@dataclass(frozen=True)
class _Stage:
    """What the stages share."""

    search: Search
    root: str
    folder: str
    version: int = 1
    resource_hints: Mapping[str, str] = field(default_factory=dict)
    items_at_once: int = 1

    def config(self, dataset: str) -> Mapping[str, Any]:
        """Return nothing: the inputs decide."""
        return {}


@dataclass(frozen=True)
class ChooseRemovals(_Stage):
    """The stage that decides who goes; its table is exchanged by group of shards."""

    remove_contamination: bool = True
    name: str = "dedup-removals"

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
        starts = np.cumsum([0, *(sum(s.num_pictures for s in group) for group in everyone.groups)])
        group = np.searchsorted(starts, place, "right") - 1
        rows = table.set_column(0, "place", pa.array(place - starts[group]))
        reasons = Counter(table["rule"].to_pylist())
        num_pictures = everyone.pictures.num_rows - graph.num_evaluation
        counts = Counts(num_pictures, num_pictures - len(place), dict(sorted(reasons.items())))
        return Output(exchange_table(rows, group), counts)


def _read_graph(search: Search, everyone: Everyone, urls: Sequence[str]) -> Graph:
    """Bring together, by rank, who is who and what is alike."""
    columns = ["neighbour_rank", "rank", "similarity", "equal"]
    tables = [storage.read_parquet(url, columns) for url in urls]
    edges = pa.concat_tables([GRAPH.empty_table().select(columns), *tables])
    is_equal = edges["equal"].to_numpy()
    better, worse, similarity = (edges[name].to_numpy() for name in columns[:3])
    numbers = [search.rules.datasets.index(shard.dataset) for shard in everyone.shards]
    sizes = [shard.num_pictures for shard in everyone.shards]
    at = everyone.at
    return Graph(
        stand_in=everyone.column("stand_in")[at],
        copies=everyone.column("copies")[at],
        dataset=np.repeat(np.array(numbers, np.int64), sizes)[at],
        accepted=everyone.column("accepted")[at],
        settled=everyone.column("settled")[at],
        near=Edges(better[~is_equal], worse[~is_equal], similarity[~is_equal]),
        equal=Edges(better[is_equal], worse[is_equal], similarity[is_equal]),
        num_evaluation=sum(s.num_pictures for s in everyone.shards if s.dataset == AGAINST),
    )


def removal_rows(everyone: Everyone, chosen: Removals) -> pa.Table:
    """Return the chosen removals (REMOVALS); ``place`` counts from the first shard of all."""
    at = everyone.at
    keeper = at[chosen.duplicate_of]
    columns = [
        pa.array(at[chosen.removed]),
        everyone.hex_keys(at[chosen.removed]),
        everyone.hex_keys(keeper),
        *_places(everyone, keeper),
        pa.array(chosen.similarity, from_pandas=True),
        everyone.hex_keys(at[chosen.group]),
        rule_names(chosen.rule),
    ]
    return pa.table(columns, schema=REMOVALS)


def _places(everyone: Everyone, places: Ints) -> list[pa.Array]:
    """Return dataset, shard and row of pictures."""
    number = everyone.shard_of(places)
    shards = pa.array(number)
    return [
        pa.array([shard.dataset for shard in everyone.shards], pa.string()).take(shards),
        pa.array([shard.name for shard in everyone.shards], pa.string()).take(shards),
        pa.array(places - everyone.offsets[number]),
    ]


def settled_rows(search: Search, everyone: Everyone, removed: Ints) -> Iterator[pa.Table]:
    """Yield the removals (REMOVALS) of an earlier search that still hold.

    ``removed`` are the ranks of those that this search removes, for reasons of its own.
    """
    settled = everyone.column("settled").copy()
    settled[everyone.at[removed]] = False
    for number, shard in enumerate(everyone.shards):
        start, stop = everyone.offsets[number : number + 2]
        rows = np.flatnonzero(settled[start:stop])
        if not len(rows):
            continue
        earlier = storage.read_parquet(search.accepted_url(shard.dataset, shard.name)).take(rows)
        stand_in = everyone.column("stand_in")[start + rows]
        is_known = stand_in != everyone.column("rank")[start + rows]
        unknown = pa.array(~is_known)
        columns = [
            pa.array(start + rows),
            earlier["key"],
            earlier["duplicate_of"],
            *(
                pc.if_else(unknown, pa.scalar(None, column.type), column)
                for column in _places(everyone, everyone.at[stand_in])
            ),
            earlier["similarity"],
            earlier["group"],
            earlier["rule"],
        ]
        yield pa.table(columns, schema=REMOVALS)


@dataclass(frozen=True)
class Report(_Stage):
    """The stage that makes the tables of the report; each is the one item of its dataset."""

    name: str = "dedup-report"

    def process(self, item: WorkItem) -> Output:
        """Make one of the tables."""
        table = self._table(Everyone.read(self.search, item), item)
        return Output(table, Counts(table.num_rows, table.num_rows))

    def _table(self, everyone: Everyone, item: WorkItem) -> pa.Table:
        if item.dataset == RECALL:
            return recall.recall_rows(_measures(everyone, item))
        if item.dataset == CONTAMINATION:
            graph = _read_graph(self.search, everyone, item.payload["graph"])
            rules = self.search.rules
            chosen = removal_rows(
                everyone, choose_removals(graph, rules, remove_contamination=True)
            )
            contaminated = chosen.filter(pc.equal(chosen["rule"], RejectReason.CONTAMINATION))
            return report.removed_table([_located(everyone, contaminated, 0)])
        removed = report.removed_table(_removed(everyone, item))
        if item.dataset == GROUPS:
            return report.groups_table(removed)
        return report.summary(removed) if item.dataset == SUMMARY else removed


def _removed(everyone: Everyone, item: WorkItem) -> Iterator[pa.Table]:
    """Yield the removals with dataset, shard and row of the removed, a group at a time."""
    start = 0
    for number, group in enumerate(everyone.groups):
        for removals in read_slices([item.payload["removals"]], number):
            yield _located(everyone, removals, start)
        start += sum(shard.num_pictures for shard in group)


def _located(everyone: Everyone, removals: pa.Table, start: int) -> pa.Table:
    """Add dataset, shard and row of the removed, whose places count from ``start``."""
    places = _places(everyone, start + removals["place"].to_numpy())
    names = [*REMOVALS.names, "dataset", "shard", "row"]
    return pa.table([*removals.columns, *places], names=names)


def _measures(everyone: Everyone, item: WorkItem) -> dict[str, recall.Estimate]:
    """Compare what was found with the truth about some pictures."""
    payload = item.payload
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
            pairs, queries, _kept(everyone, item), num_searched
        ),
        "comparisons_share": recall.comparisons_share(payload["num_comparisons"], num_searched),
    }


def _kept(everyone: Everyone, item: WorkItem) -> Bools:
    """Tell of each rank whether that is a picture of the corpus that is kept."""
    kept = np.ones(everyone.pictures.num_rows, np.bool_)
    rank = everyone.column("rank")
    start = 0
    for number, group in enumerate(everyone.groups):
        for removals in read_slices([item.payload["removals"]], number):
            kept[rank[start + removals["place"].to_numpy()]] = False
        for shard in group:
            if shard.dataset == AGAINST:
                kept[rank[start : start + shard.num_pictures]] = False
            start += shard.num_pictures
    return kept


def read_truth(urls: Sequence[str]) -> pa.Table:
    """Read the true pairs that were found in all groups."""
    return pa.concat_tables(
        [TRUE_PAIRS.empty_table(), *(storage.read_parquet(url) for url in urls)]
    ).combine_chunks()


@dataclass(frozen=True)
class WriteOutcome(_Stage):
    """The stage that gives each shard its part of the outcome."""

    name: str = "dedup"
    version: int = 2

    def process(self, item: WorkItem) -> Output:
        """Write what became of each picture of a shard."""
        key = read_shard(self.root, IMAGES, item.dataset, item.shard, ["key"])["key"]
        rows = np.full(len(key), -1)
        removals = REMOVALS.empty_table()
        for removals in read_slices([item.payload["removals"]], item.payload["group"]):
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
        reasons = Counter(table["rule"].drop_null().to_pylist())
        num_kept = len(key) - reasons.total()
        return Output(table, Counts(len(key), num_kept, dict(sorted(reasons.items()))))
