"""The stages that search for near-duplicates, from descriptors to the graph of similar pairs.

    sample     a group of shards    hash-chosen vectors: by clustering, and lots of recall queries
    clusters   a clustering         its centroids
    truth      a group of shards    the true pairs of the queries with the group's pictures
    vectors    a group, clustered   all vectors by part: a few clusters, or a piece of a large one
    pairs      a part, or two       the similar pairs in its clusters, by range of ranks
    graph      a range of ranks     the similar pairs that all parts found, each once

Each is a step of an exchange below R/exchange/duplicates-<name>/<clusterings>x<clusters>, so that a
search that is refused can be begun with another number of them; only the graph is kept beside the
outcome. A worker process holds a group or two parts at a time.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from threadpoolctl import threadpool_limits

from dedup import clusters, recall
from dedup.corpus import ALL, Search, group_name, read_described
from dedup.graph import merge
from dedup.records import (
    Described,
    Ints,
    centroids_schema,
    read_vectors,
    to_column,
)
from dedup.search import find_edges, find_edges_between
from dedup.steps import SearchStage
from dedup.truth import true_pairs
from pipeline import storage
from pipeline.exchange import exchange_table, read_slices
from pipeline.receipts import Counts
from pipeline.stage import Output, WorkItem

RANKS_PER_RANGE = 500_000
"""Pictures whose neighbours are brought together at a time."""


@dataclass(frozen=True)
class Size:
    """How many pictures are searched, in how many clusters of how many clusterings."""

    num_searched: int
    num_clusters: int
    num_clusterings: int

    def step(self, name: str) -> str:
        """Return the name of a step of the exchange, one for each number of clusters."""
        return f"{self.num_clusterings}x{self.num_clusters}/{name}"


@dataclass(frozen=True)
class _Step(SearchStage):
    """What the stages share."""

    size: Size = field(kw_only=True)

    @classmethod
    def of(cls, search: Search, step: str, size: Size) -> Self:
        """Return the stage that hands its tables to another one, as ``step`` of the exchange."""
        return cls(search, search.root, search.exchange_folder(size.step(step)), size=size)

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

    def _url(self, step: str, dataset: str, shard: str) -> str:
        return self.search.table_url(self.size.step(step), dataset, shard)

    def _group_urls(self, step: str, dataset: str, num_groups: int) -> list[str]:
        return [self._url(step, dataset, group_name(group)) for group in range(num_groups)]

    def _centroids(self, number: int) -> npt.NDArray[np.float16]:
        url = self._url("clusters", clustering_name(number), ALL)
        return read_vectors(url, "centroid", self.search.dimension)[1]

    def _homes(self, vectors: npt.NDArray[np.float16]) -> Ints:
        """Return the home clusters of vectors in all clusterings: (n, clusterings)."""
        homes = [
            clusters.home(vectors, self._centroids(number))
            for number in range(self.size.num_clusterings)
        ]
        return np.stack(homes, axis=1)

    def _read(self, urls: Sequence[str], *destinations: int) -> Described:
        return Described.from_tables(list(read_slices(urls, *destinations)), self.search.dimension)


def clustering_name(number: int) -> str:
    """Return the name under which the tables of a clustering stand."""
    return f"clustering-{number:02}"


def comparison_name(parts: Sequence[int]) -> str:
    """Return the name under which the table of a comparison of parts stands."""
    return "part-" + "-".join(f"{part:05}" for part in parts)


def read_layout(search: Search, size: Size, number: int) -> clusters.Layout:
    """Return how the clusters of a clustering are parted."""
    url = search.table_url(size.step("clusters"), clustering_name(number), ALL)
    shares = storage.read_parquet(url, ["share"])["share"].to_numpy()
    return clusters.lay_out(shares, size.num_searched)


def query_destinations(size: Size, lots: Sequence[int]) -> list[int]:
    """Return the destinations of lots of queries in a sample: those behind the clusterings."""
    return [size.num_clusterings + lot for lot in lots]


def num_ranges(num_pictures: int) -> int:
    """Return in how many ranges of ranks the graph is made."""
    return math.ceil(num_pictures / RANKS_PER_RANGE)


@dataclass(frozen=True)
class Sample(_Step):
    """The stage that picks random vectors.

    Destinations are the clusterings, for what their k-means is fitted on, and behind them the lots
    of queries, ``recall.MIN_QUERIES`` each.
    """

    name: str = "dedup-sample"

    def output(self, item: WorkItem) -> Output:
        """Pick from a group; a picture may be picked for several purposes."""
        pictures = read_described(self.search, item)
        draw = self.search.pictures(item.payload["group"])["draw"].to_numpy()
        draw = draw[draw >= 0]
        size = self.size.num_clusters * clusters.SAMPLE_PER_CLUSTER
        lot = _spread(draw, self.size.num_searched) // recall.MIN_QUERIES
        num_lots = math.ceil(recall.MAX_QUERIES / recall.MIN_QUERIES)
        is_chosen = [
            (draw - number * size) % self.size.num_searched < size
            for number in range(self.size.num_clusterings)
        ] + [lot == number for number in range(num_lots)]
        rows = [np.flatnonzero(some) for some in is_chosen]
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

    @classmethod
    def of(cls, search: Search, step: str, size: Size) -> Self:
        """Return the stage, which asks for the memory that a sample takes."""
        hints = clusters.fit_memory(size.num_clusters, size.num_searched, search.dimension)
        return replace(super().of(search, step, size), resource_hints=hints)

    def output(self, item: WorkItem) -> Output:
        """Fit k-means on a sample, in the order of its keys, which is random."""
        number = item.payload["number"]
        urls = self._group_urls("sample", ALL, item.payload["num_groups"])
        sample = self._read(urls, number)
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
        urls = self._group_urls("sample", ALL, item.payload["num_groups"])
        queries = self._read(urls, *query_destinations(self.size, item.payload["lots"]))
        table = true_pairs(queries, pictures, self.search.rules, self._homes)
        return Output(table, Counts(table.num_rows, table.num_rows))


@dataclass(frozen=True)
class Regroup(_Step):
    """The stage that sends vectors to the parts of a clustering."""

    name: str = "dedup-vectors"

    def output(self, item: WorkItem) -> Output:
        """Send the vectors of a group, with their home clusters."""
        number = item.payload["number"]
        pictures = read_described(self.search, item)
        home = clusters.home(pictures.vector, self._centroids(number))
        table = pictures.in_clusters(home).to_table()
        layout = read_layout(self.search, self.size, number)
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
        urls = self._group_urls("vectors", item.dataset, item.payload["num_groups"])
        parts = [self._read(urls, part) for part in item.payload["parts"]]
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
        urls = [
            self._url("pairs", clustering_name(number), comparison_name(parts))
            for number in range(self.size.num_clusterings)
            for parts in read_layout(self.search, self.size, number).comparisons()
        ]
        found = read_slices(urls, item.payload["range"])
        merged = merge(found, self.search.max_neighbours)
        dropped = {
            "beyond_max_neighbours": merged.num_beyond,
            "repeated": merged.num_repeated,
        }
        num_edges = merged.graph.num_rows
        counts = Counts(
            num_edges + sum(dropped.values()),
            num_edges,
            {reason: number for reason, number in dropped.items() if number},
        )
        return Output(merged.graph, counts)
