"""Who is who: the declared order of all pictures of a corpus, and which are exact copies.

All is decided in one place, on arrays: about 100 bytes a picture, 16 GB for the 160 million of i1.
From here on a picture is known by its rank in the declared order: of two copies the one with the
lower rank stays.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from dedup.corpus import Search, Shard, shards_of
from dedup.exact import copy_groups, first_of_equal
from dedup.keepers import declared_order
from dedup.records import PICTURES, Bools, Ints, key_column, keys_from_hex
from dedup.rules import AGAINST, Rules
from pipeline import storage
from pipeline.errors import EvenmixError
from pipeline.exchange import exchange_table
from pipeline.receipts import Counts
from pipeline.records import uniform_hash
from pipeline.stage import Output, WorkItem

Keys = npt.NDArray[np.void]

EVALUATION, ACCEPTED, NEW = 0, 1, 2
"""Levels of the declared order: what stays in any case comes first."""


@dataclass(frozen=True)
class Facts:
    """What decides the order, arrays with one entry a picture, by dataset, shard and row.

    Keys and hashes (their first 128 bits) have dtype V16. ``dataset`` is the number among the
    rules' datasets. ``keeper`` is the key of the picture in whose favour an earlier search removed
    this one, where ``settled`` says that it did.
    """

    key: Keys
    num_pixels: Ints
    num_bytes: Ints
    sha256: Keys
    pixels_sha256: Keys
    dataset: Ints
    level: Ints
    settled: Bools
    keeper: Keys


def who_is_who(facts: Facts, rules: Rules, priority: Sequence[str], seed: int) -> pa.Table:
    """Return PICTURES in the order of the facts.

    A record that repeats the key of an earlier one goes with that one, whatever picture it has. An
    exact copy goes with the best one of its dataset, for these have one rule, and so the same
    neighbours: a million copies make no pairs. Pictures that were accepted, and those of datasets
    whose copies stay, are free.
    """
    order, num_records = _order(facts, rules, priority)
    rank = np.empty(len(order), np.int64)
    rank[order] = np.arange(len(order))

    # From here on by rank.
    key, dataset, level = facts.key[order], facts.dataset[order], facts.level[order]
    settled = facts.settled[order]
    stand_in = first_of_equal(key)  # of repeats; they come last
    free = np.arange(len(order)) < num_records
    free &= ~settled
    _bind_settled(stand_in, key, facts.keeper[order], settled)

    copies = np.arange(len(order))
    rows = np.flatnonzero(free)
    copies[rows] = rows[copy_groups(facts.sha256[order[rows]], facts.pixels_sha256[order[rows]])]
    lose_copies = np.array([rules.between(d, d).is_exact for d in range(len(rules.datasets))])
    bound = free & (level == NEW) & lose_copies[dataset]
    best = np.arange(len(order))
    best[rows] = rows[first_of_equal(copies[rows] * len(rules.datasets) + dataset[rows])]
    stand_in[bound] = best[bound]
    free &= stand_in == np.arange(len(order))

    near = np.isin(np.array(rules.datasets), [*rules.near_datasets(), AGAINST])
    searched = np.flatnonzero(free & near[dataset])
    draw = np.full(len(order), -1)
    hashes = [uniform_hash(seed, key.hex(), "draw") for key in key[searched].tolist()]
    draw[searched[np.argsort(np.array(hashes, np.uint64), kind="stable")]] = np.arange(
        len(searched)
    )
    columns = [
        pa.array(rank),
        key_column(facts.key),
        pa.array(stand_in[rank]),
        pa.array(copies[rank]),
        pa.array(draw[rank]),
        pa.array(facts.level == ACCEPTED),
        pa.array(facts.settled),
    ]
    return pa.table(columns, schema=PICTURES)


def _order(facts: Facts, rules: Rules, priority: Sequence[str]) -> tuple[Ints, int]:
    """Return the places from best to worst, records that repeat a key last, and how many do not."""
    places = [
        priority.index(dataset) if dataset in priority else len(priority)
        for dataset in rules.datasets
    ]
    order = declared_order(
        facts.level, facts.num_pixels, facts.num_bytes, np.array(places)[facts.dataset], facts.key
    )
    is_repeat = first_of_equal(facts.key) != np.arange(len(order))
    order = order[np.argsort(is_repeat[order], kind="stable")]
    return order, len(order) - int(is_repeat.sum())


def _bind_settled(stand_in: Ints, key: Keys, keeper: Keys, settled: Bools) -> None:
    """Bind what an earlier search removed to its keeper, where that is a picture of the corpus."""
    rows = np.flatnonzero(settled & (stand_in == np.arange(len(key))))
    by_key = np.argsort(key.view("S16"), kind="stable")
    found = np.searchsorted(key.view("S16")[by_key], keeper[rows].view("S16"))
    found = by_key[np.minimum(found, len(by_key) - 1)]
    is_there = key[found] == keeper[rows]
    stand_in[rows[is_there]] = found[is_there]


@dataclass(frozen=True)
class OrderPictures:
    """The stage that finds out who is who; its table is exchanged by group of shards."""

    search: Search
    root: str
    folder: str
    num_pictures: int
    name: str = "dedup-pictures"
    version: int = 1
    items_at_once: int = 1

    @property
    def resource_hints(self) -> Mapping[str, str]:
        """Return the memory that so many pictures need."""
        return {"min_ram": f"{4 + self.num_pictures // 8_000_000}GB"}

    def config(self, dataset: str) -> Mapping[str, Any]:
        """Return what decides the order."""
        search = self.search
        return {
            "rules": search.rules.identity(),
            "priority": list(search.priority),
            "accepted": search.accepted,
            "seed": search.seed,
        }

    def process(self, item: WorkItem) -> Output:
        """Read all indexes; each group of shards is a destination."""
        groups = [shards_of({"shards": shards}) for shards in item.payload["groups"]]
        shards = [shard for group in groups for shard in group]
        table = who_is_who(
            read_facts(self.search, shards),
            self.search.rules,
            self.search.priority,
            self.search.seed,
        )
        sizes = [sum(shard.num_pictures for shard in group) for group in groups]
        draw = table["draw"].to_numpy()
        is_free = table["stand_in"].to_numpy() == table["rank"].to_numpy()
        is_settled = table["settled"].to_numpy()
        num_searched = int((draw >= 0).sum())
        num_bound = int((~is_free & ~is_settled).sum())
        rejected = {
            "accepted_removals": int(is_settled.sum()),
            "exact_copy": num_bound,
            "not_searched": len(draw) - num_searched - num_bound - int(is_settled.sum()),
        }
        return Output(
            exchange_table(table, np.repeat(np.arange(len(groups)), sizes)),
            Counts(len(draw), num_searched, {why: n for why, n in rejected.items() if n}),
        )


def read_facts(search: Search, shards: Sequence[Shard]) -> Facts:
    """Read the indexes of shards, and what an earlier search says of them."""
    columns = ["key", "width", "height", "num_bytes", "sha256", "pixels_sha256"]
    parts = []
    for shard in shards:
        url = search.index_url(shard.dataset, shard.name)
        table = storage.read_parquet(url, columns)
        if table.num_rows != shard.num_pictures:
            raise EvenmixError(
                f"{url} has {table.num_rows} pictures, but its folder's stage.json says "
                f"{shard.num_pictures}; `evenmix verify` tells more"
            )
        parts.append(_facts(search, shard, table))
    return Facts(
        *(
            np.concatenate([getattr(part, column.name) for part in parts])
            for column in fields(Facts)
        )
    )


def _facts(search: Search, shard: Shard, index: pa.Table) -> Facts:
    key = keys_from_hex(index["key"])
    settled, keeper = np.zeros(len(key), np.bool_), np.zeros(len(key), "V16")
    if shard.is_accepted:
        url = search.accepted_url(shard.dataset, shard.name)
        outcome = storage.read_parquet(url, ["key", "duplicate_of"])
        if outcome["key"].to_pylist() != index["key"].to_pylist():
            raise EvenmixError(
                f"{url} and {search.index_url(shard.dataset, shard.name)} speak of different "
                "pictures; `evenmix verify` tells which file is damaged"
            )
        settled = outcome["duplicate_of"].is_valid().to_numpy()
        keeper[settled] = keys_from_hex(outcome["duplicate_of"].drop_null())
    level = NEW
    if shard.dataset == AGAINST:
        level = EVALUATION
    elif shard.is_accepted:
        level = ACCEPTED
    return Facts(
        key=key,
        num_pixels=index["width"].to_numpy().astype(np.int64) * index["height"].to_numpy(),
        num_bytes=index["num_bytes"].to_numpy(),
        sha256=_leading_bits(index["sha256"]),
        pixels_sha256=_leading_bits(index["pixels_sha256"]),
        dataset=np.full(len(key), search.rules.datasets.index(shard.dataset)),
        level=np.full(len(key), level),
        settled=settled,
        keeper=keeper,
    )


def _leading_bits(hashes: pa.ChunkedArray) -> Keys:
    """Return the first 128 bits of hashes in hex; two files that share these share all."""
    return keys_from_hex(pc.utf8_slice_codeunits(hashes, 0, 32))
