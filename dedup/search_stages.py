"""The stages that search for near-duplicates, from descriptors to the graph of similar pairs.

    sample     a group of shards    hash-chosen vectors: by clustering, and lots of recall queries
    clusters   a clustering         its centroids
    truth      a group of shards    the true pairs of the queries with the group's pictures
    vectors    a group, clustered   all vectors by part: a few clusters, or a piece of a large one
    pairs      a part, or two       the similar pairs in its clusters, by range of ranks
    graph      a range of ranks     the similar pairs that all parts found, each once

Each is a step of an exchange below R/exchange/duplicates-<name>; only the graph is kept beside the
outcome. A worker process holds a group or two parts at a time.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Self

import numpy as np
import pyarrow as pa
from threadpoolctl import threadpool_limits

from dedup import clusters, recall
from dedup.corpus import ALL, Search, read_described
from dedup.graph import merge
from dedup.records import (
    Described,
    Ints,
    Vectors,
    centroids_schema,
    concatenate,
    read_vectors,
    to_column,
)
from dedup.search import find_edges, find_edges_between
from dedup.truth import true_pairs
from pipeline.exchange import exchange_table, read_slices
from pipeline.receipts import Counts
from pipeline.stage import Output, WorkItem

RANKS_PER_RANGE = 500_000
"""Pictures whose neighbours are brought together at a time."""

QUERIES_PER_LOT = recall.MIN_QUERIES
_NUM_LOTS = recall.MAX_QUERIES // QUERIES_PER_LOT


@dataclass(frozen=True)
class Size:
    """How many pictures are searched, in how many clusters of how many clusterings."""

    num_searched: int
    num_clusters: int
    num_clusterings: int


@dataclass(frozen=True)
class _Step:
    """What the stages share."""

    search: Search
    root: str
    folder: str
    size: Size
    version: int = 1
    resource_hints: Mapping[str, str] = field(default_factory=dict)
    items_at_once: int = 1

    @classmethod
    def of(cls, search: Search, step: str, size: Size) -> Self:
        """Return the stage that hands its tables to another one, as ``step`` of the exchange."""
        return cls(search, search.root, search.exchange_folder(step), size)

    def config(self, dataset: str) -> Mapping[str, Any]:
        """Return what decides the search, as far as the inputs do not."""
        return {
            **asdict(self.size),
            "rules": self.search.rules.identity(),
            "seed": self.search.seed,
        }

    def process(self, item: WorkItem) -> Output:
        """Do the work of one item.

        There is a worker process for each core; threads of the matrix library in each would wait
        for one another.
        """
        with threadpool_limits(1, user_api="blas"):
            return self.output(item)

    def output(self, item: WorkItem) -> Output:
        """Return what an item publishes."""
        raise NotImplementedError

    def _clustering(self, number: int) -> tuple[Vectors, clusters.Layout]:
        """Read the centroids of a clustering; return them and how its clusters are parted."""
        url = self.search.table_url("clusters", clustering_name(number), ALL)
        table, centroids = read_vectors(url, "centroid", self.search.dimension, ["share"])
        layout = clusters.lay_out(table["share"].to_numpy(), self.size.num_searched)
        return centroids, layout

    def _homes(self, vectors: Vectors) -> Ints:
        """Return the home clusters of vectors in all clusterings: (n, clusterings)."""
        homes = [
            clusters.home(vectors, self._clustering(number)[0])
            for number in range(self.size.num_clusterings)
        ]
        return np.stack(homes, axis=1)

    def _read(self, urls: Sequence[str], destination: int) -> Described:
        return Described.from_tables(list(read_slices(urls, destination)), self.search.dimension)


def clustering_name(number: int) -> str:
    """Return the name under which the tables of a clustering stand."""
    return f"clustering-{number:02}"


@dataclass(frozen=True)
class Sample(_Step):
    """The stage that picks random vectors.

    Destinations are the clusterings, for what their k-means is fitted on, and behind them the lots
    of queries.
    """

    name: str = "dedup-sample"

    def output(self, item: WorkItem) -> Output:
        """Pick from a group; a picture may be picked for several purposes."""
        pictures = read_described(self.search, item)
        draw = self.search.pictures(item.payload["group"])["draw"].to_numpy()
        draw = draw[draw >= 0]
        size = self.size.num_clusters * clusters.SAMPLE_PER_CLUSTER
        lot = _spread(draw, self.size.num_searched) // QUERIES_PER_LOT
        chosen = [
            (draw - number * size) % self.size.num_searched < size
            for number in range(self.size.num_clusterings)
        ] + [lot == number for number in range(_NUM_LOTS)]
        rows = [np.flatnonzero(rows) for rows in chosen]
        table = pictures.take(np.concatenate(rows)).to_table()
        destinations = np.repeat(np.arange(len(rows)), [len(part) for part in rows])
        return Output(exchange_table(table, destinations), Counts(table.num_rows, table.num_rows))


def _spread(draw: Ints, num_searched: int) -> Ints:
    """Return places in another order of the draws, whose first ones are spread evenly over all.

    Vectors that a clustering was fitted on meet in it more often than others. So among the queries
    there must be as large a part of these as among all. Multiples of the golden ratio are spread.
    """
    step = round(num_searched * (math.sqrt(5) - 1) / 2)
    while math.gcd(step, num_searched) != 1:
        step += 1
    return draw * step % num_searched


@dataclass(frozen=True)
class FitClusters(_Step):
    """The stage that fits the clusterings; an item is one of them."""

    name: str = "dedup-clusters"

    def output(self, item: WorkItem) -> Output:
        """Fit k-means on a sample, in the order of its keys, which is random."""
        number = item.payload["number"]
        sample = self._read(item.payload["samples"], number)
        vectors = sample.vector[np.argsort(sample.key.view("S16"), kind="stable")]
        centroids = clusters.fit(vectors, self.size.num_clusters, self.search.seed + number)
        shares = clusters.shares(vectors, centroids)
        table = pa.table(
            [to_column(centroids), pa.array(shares)],
            schema=centroids_schema(self.search.dimension),
        )
        return Output(table, Counts(table.num_rows, table.num_rows))


@dataclass(frozen=True)
class FindTruth(_Step):
    """The stage that compares some pictures with all, whatever their clusters."""

    name: str = "dedup-truth"

    def output(self, item: WorkItem) -> Output:
        """Compare the queries of some lots with the pictures of a group."""
        pictures = read_described(self.search, item)
        queries = concatenate(
            [
                self._read(item.payload["samples"], self.size.num_clusterings + lot)
                for lot in item.payload["lots"]
            ],
            self.search.dimension,
        )
        table = true_pairs(queries, pictures, self.search.rules, self._homes)
        return Output(table, Counts(table.num_rows, table.num_rows))


@dataclass(frozen=True)
class Regroup(_Step):
    """The stage that sends vectors to the parts of a clustering."""

    name: str = "dedup-vectors"

    def output(self, item: WorkItem) -> Output:
        """Send the vectors of a group, with their home clusters."""
        centroids, layout = self._clustering(item.payload["number"])
        pictures = read_described(self.search, item)
        home = clusters.home(pictures.vector, centroids)
        table = pictures.in_clusters(home).to_table()
        parts = layout.parts_of(home, pictures.vector)
        return Output(exchange_table(table, parts), Counts(table.num_rows, table.num_rows))


@dataclass(frozen=True)
class FindPairs(_Step):
    """The stage that compares the pictures of each cluster."""

    name: str = "dedup-pairs"

    def config(self, dataset: str) -> Mapping[str, Any]:
        """Return what decides the pairs."""
        return {**super().config(dataset), "max_neighbours": self.search.max_neighbours}

    def output(self, item: WorkItem) -> Output:
        """Compare the pictures of a part, or those of two parts of one large cluster."""
        parts = [self._read(item.payload["vectors"], part) for part in item.payload["parts"]]
        rules, most = self.search.rules, self.search.max_neighbours
        if len(parts) == 2:
            num_comparisons = len(parts[0]) * len(parts[1])
            edges = find_edges_between(parts[0], parts[1], rules, most)
        else:
            _, sizes = np.unique(parts[0].cluster, return_counts=True)
            num_comparisons = int((sizes * (sizes - 1) // 2).sum())
            edges = find_edges(parts[0], rules, most)
        table = exchange_table(edges, edges["worse"].to_numpy() // RANKS_PER_RANGE)
        dissimilar = {"dissimilar": num_comparisons - edges.num_rows}
        return Output(table, Counts(num_comparisons, edges.num_rows, dissimilar))


@dataclass(frozen=True)
class MergeGraph(_Step):
    """The stage that makes R/duplicates/<name>/_graph."""

    name: str = "dedup-graph"

    def config(self, dataset: str) -> Mapping[str, Any]:
        """Return what decides the graph."""
        return {"max_neighbours": self.search.max_neighbours}

    def output(self, item: WorkItem) -> Output:
        """Bring together what all parts found for a range of ranks."""
        found = list(read_slices(item.payload["pairs"], item.payload["range"]))
        table = merge(found, self.search.max_neighbours)
        num_found = sum(part.num_rows for part in found)
        return Output(
            table,
            Counts(num_found, table.num_rows, {"repeated": num_found - table.num_rows}),
        )
