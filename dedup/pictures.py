"""Who is who: the declared order of all pictures of a corpus, and which are exact copies.

All is decided in one place, on arrays (:data:`dedup.corpus.BYTES_PER_PICTURE`). From here on a
picture is known by its rank in the declared order: of two copies the one with the lower rank stays.
"""

from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from dedup.clusters import mixed
from dedup.corpus import Search, Shard, shards_of
from dedup.exact import copy_groups, first_of_equal
from dedup.keepers import declared_order
from dedup.records import PICTURES, Bools, Ints, key_column, keys_from_hex
from dedup.rules import AGAINST, Rules
from dedup.steps import SearchStage
from pipeline import storage
from pipeline.errors import EvenmixError
from pipeline.exchange import exchange_table
from pipeline.receipts import Counts
from pipeline.stage import Output, WorkItem

Keys = npt.NDArray[np.void]

_CONCURRENT_READS = 16

EVALUATION, ACCEPTED, NEW = 0, 1, 2
"""Levels of the declared order: what stays in any case comes first."""


@dataclass(frozen=True)
class Facts:
    """What decides the order, arrays with one entry a picture, by dataset, shard and row.

    Keys and hashes (their first 128 bits) have dtype V16. ``dataset`` is the number among the
    rules' datasets, int16, and ``level`` int8. ``keeper`` is the key of the picture in whose favour
    an earlier search removed this one, where ``settled`` says that it did.
    """

    key: Keys
    num_pixels: Ints
    num_bytes: Ints
    sha256: Keys
    pixels_sha256: Keys
    dataset: npt.NDArray[np.int16]
    level: npt.NDArray[np.int8]
    settled: Bools
    keeper: Keys


def who_is_who(facts: Facts, rules: Rules, priority: Sequence[str], seed: int) -> pa.Table:
    """Return PICTURES in the order of the facts.

    A record that repeats the key of an earlier one goes with that one, whatever picture it has, and
    is settled if that one is. An exact copy goes with the best one of its dataset, for these have
    one rule, and so the same neighbours: a million copies make no pairs. Pictures that were
    accepted, and those of datasets whose copies stay, are free.
    """
    first = first_of_equal(facts.key)
    order = _order(facts, rules, priority, first)
    rank = np.empty(len(order), np.int64)
    rank[order] = np.arange(len(order))

    # From here on by rank.
    dataset, level = facts.dataset[order], facts.level[order]
    stand_in = rank[first[order]]
    settled = facts.settled[order][stand_in] | facts.settled[order]
    free = ~settled & (stand_in == np.arange(len(order)))
    _bind_settled(stand_in, facts, order)

    copies = np.arange(len(order))
    rows = np.flatnonzero(free)
    copies[rows] = rows[copy_groups(facts.sha256[order[rows]], facts.pixels_sha256[order[rows]])]
    lose_copies = np.array([rules.between(d, d).is_exact for d in range(len(rules.datasets))])
    bound = free & (level == NEW) & lose_copies[dataset]
    best = np.arange(len(order))
    best[rows] = rows[first_of_equal(copies[rows] * len(rules.datasets) + dataset[rows])]
    stand_in[bound] = best[bound]
    free &= stand_in == np.arange(len(order))

    near = np.isin(np.array(rules.datasets), rules.searched_datasets())
    searched = np.flatnonzero(free & near[dataset])
    draw = np.full(len(order), -1)
    in_random_order = np.argsort(_hashes(facts.key[order[searched]], seed), kind="stable")
    draw[searched[in_random_order]] = np.arange(len(searched))
    columns = [
        pa.array(rank),
        key_column(facts.key),
        pa.array(stand_in[rank]),
        pa.array(copies[rank]),
        pa.array(draw[rank]),
        pa.array(facts.level == ACCEPTED),
        pa.array(settled[rank]),
    ]
    return pa.table(columns, schema=PICTURES)


def _order(facts: Facts, rules: Rules, priority: Sequence[str], first: Ints) -> Ints:
    """Return the places from best to worst, records that repeat a key (not ``first``) last."""
    places = [
        priority.index(dataset) if dataset in priority else len(priority)
        for dataset in rules.datasets
    ]
    order = declared_order(
        facts.level, facts.num_pixels, facts.num_bytes, np.array(places)[facts.dataset], facts.key
    )
    is_repeat = first != np.arange(len(order))
    return order[np.argsort(is_repeat[order], kind="stable")]


def _bind_settled(stand_in: Ints, facts: Facts, order: Ints) -> None:
    """Bind what an earlier search removed to its keeper, where that is a picture of the corpus."""
    rows = np.flatnonzero(facts.settled[order] & (stand_in == np.arange(len(order))))
    if not len(rows):
        return
    key, keeper = facts.key[order], facts.keeper[order[rows]]
    by_key = np.argsort(key.view("S16"), kind="stable")
    found = np.searchsorted(key.view("S16")[by_key], keeper.view("S16"))
    found = by_key[np.minimum(found, len(by_key) - 1)]
    is_there = key[found] == keeper
    stand_in[rows[is_there]] = found[is_there]


def _hashes(keys: Keys, seed: int) -> npt.NDArray[np.uint64]:
    """Return 64 bits that stand for a random draw about each key, whose own bits are random."""
    leading = keys.view("<u8").reshape(-1, 2)[:, 0]
    return mixed(leading ^ mixed(np.array([seed % 2**64], np.uint64)))


@dataclass(frozen=True)
class OrderPictures(SearchStage):
    """The stage that finds out who is who; its table is exchanged by group of shards."""

    name: str = "dedup-pictures"
    version: int = 2

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
    """Read the indexes of shards, and what an earlier search says of them.

    Raises:
        EvenmixError: a file is missing or damaged, or two do not fit together.
    """
    stops = np.cumsum([shard.num_pictures for shard in shards], dtype=np.int64).tolist()
    num_pictures = stops[-1] if stops else 0
    facts = Facts(
        key=np.empty(num_pictures, "V16"),
        num_pixels=np.empty(num_pictures, np.int64),
        num_bytes=np.empty(num_pictures, np.int64),
        sha256=np.empty(num_pictures, "V16"),
        pixels_sha256=np.empty(num_pictures, "V16"),
        dataset=np.empty(num_pictures, np.int16),
        level=np.empty(num_pictures, np.int8),
        settled=np.zeros(num_pictures, np.bool_),
        keeper=np.zeros(num_pictures, "V16"),
    )

    def read(shard: Shard, stop: int) -> None:
        _read_shard(search, shard, facts, slice(stop - shard.num_pictures, stop))

    with ThreadPoolExecutor(_CONCURRENT_READS) as pool:
        deque(pool.map(read, shards, stops), maxlen=0)
    return facts


def _read_shard(search: Search, shard: Shard, facts: Facts, rows: slice) -> None:
    """Fill in the rows of a shard."""
    url = search.index_url(shard.dataset, shard.name)
    columns = ["key", "width", "height", "num_bytes", "sha256", "pixels_sha256"]
    index = storage.read_parquet(url, columns)
    if index.num_rows != shard.num_pictures:
        raise EvenmixError(
            f"{url} has {index.num_rows} pictures, but its folder's stage.json says "
            f"{shard.num_pictures}; `evenmix verify` tells more"
        )
    key = keys_from_hex(index["key"])
    facts.key[rows] = key
    facts.num_pixels[rows] = index["width"].to_numpy().astype(np.int64) * index["height"].to_numpy()
    facts.num_bytes[rows] = index["num_bytes"].to_numpy()
    facts.sha256[rows] = _leading_bits(index["sha256"])
    facts.pixels_sha256[rows] = _leading_bits(index["pixels_sha256"])
    facts.dataset[rows] = search.rules.datasets.index(shard.dataset)
    facts.level[rows] = EVALUATION if shard.dataset == AGAINST else NEW
    if shard.is_accepted:
        facts.level[rows] = ACCEPTED
        accepted_url = search.accepted_url(shard.dataset, shard.name)
        outcome = storage.read_parquet(accepted_url, ["key", "duplicate_of"])
        if not np.array_equal(keys_from_hex(outcome["key"]), key):
            raise EvenmixError(
                f"{accepted_url} and {url} speak of different pictures; `evenmix verify` tells "
                "which file is damaged"
            )
        settled = outcome["duplicate_of"].is_valid().to_numpy()
        facts.settled[rows] = settled
        facts.keeper[rows][settled] = keys_from_hex(outcome["duplicate_of"].drop_null())


def _leading_bits(hashes: pa.ChunkedArray) -> Keys:
    """Return the first 128 bits of hashes in hex; two files that share these share all."""
    return keys_from_hex(pc.utf8_slice_codeunits(hashes, 0, 32))
