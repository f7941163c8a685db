"""The search for near-duplicates, step by step; the stages are in :mod:`dedup.search_stages`.

A few pictures are compared with all others first. So what the clusters can reach is known before
the search, and what the search found is measured after it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from typing import Any

from dedup import clusters, recall
from dedup.corpus import ALL, Search, Shard, group_item
from dedup.outcome_stages import read_truth
from dedup.records import read_vectors
from dedup.search_stages import (
    QUERIES_PER_LOT,
    RANKS_PER_RANGE,
    FindPairs,
    FindTruth,
    FitClusters,
    MergeGraph,
    Regroup,
    Sample,
    Size,
    clustering_name,
)
from dedup.steps import Published, run_step
from pipeline.beam_job import RunnerOptions
from pipeline.exchange import read_slices
from pipeline.progress import console
from pipeline.recipe import Dedup
from pipeline.stage import WorkItem

GRAPH = "_graph"
"""The pseudo dataset of the graph, beside the real ones of the outcome."""


@dataclass(frozen=True)
class Searched:
    """The pictures that are searched, and where that is done.

    ``num_searched`` of those in ``groups`` are; ``inputs`` identify them and their descriptors.
    """

    search: Search
    groups: Sequence[Sequence[Shard]]
    num_searched: int
    inputs: Mapping[str, Any]
    runner: RunnerOptions

    def group_items(
        self, dataset: str, inputs: Mapping[str, Any], **payload: Any
    ) -> list[WorkItem]:
        """Return an item of a step for each group."""
        return [
            group_item(dataset, number, group, {**self.inputs, **inputs}, **payload)
            for number, group in enumerate(self.groups)
        ]


@dataclass(frozen=True)
class Truth:
    """The true pairs of some pictures: where they are, and the ranks of those pictures."""

    urls: Sequence[str]
    queries: Sequence[int]


@dataclass(frozen=True)
class Found:
    """What the search has left."""

    size: Size
    truth: Truth
    graph: Published
    num_comparisons: int


def find_near_duplicates(searched: Searched, options: Dedup) -> Found:
    """Search for near-duplicates.

    Raises:
        EvenmixError: the clusters cannot reach the recall that the recipe asks for.
    """
    search, runner = searched.search, searched.runner
    num_clusters = options.num_clusters or clusters.default_num_clusters(searched.num_searched)
    num_clusterings = options.clusterings if num_clusters > 1 else 1
    size = Size(searched.num_searched, num_clusters, num_clusterings)
    names = [clustering_name(number) for number in range(num_clusterings)]

    pick = Sample.of(search, "sample", size)
    samples = run_step(pick, searched.group_items(ALL, {}), runner)
    fit = FitClusters.of(search, "clusters", size)
    fits = [
        WorkItem(name, ALL, {"samples": samples.digest}, {"number": i, "samples": samples.urls})
        for i, name in enumerate(names)
    ]
    inputs = {"clusters": run_step(fit, fits, runner).digest}

    truth = _find_truth(searched, size, samples, inputs)
    _check_reach(truth, size, options.min_recall)

    regroup = Regroup.of(search, "vectors", size)
    vectors = run_step(
        regroup,
        [
            item
            for i, name in enumerate(names)
            for item in searched.group_items(name, inputs, number=i)
        ],
        runner,
    )
    comparisons = [item for name in names for item in _comparisons(search, size, name, vectors)]
    pairs = run_step(FindPairs.of(search, "pairs", size), comparisons, runner)

    merge = MergeGraph(search, search.root, search.folder, size)
    num_pictures = sum(shard.num_pictures for group in searched.groups for shard in group)
    ranges = [
        WorkItem(
            GRAPH,
            f"range-{number:05}",
            {"pairs": pairs.digest},
            {"range": number, "pairs": pairs.urls},
        )
        for number in range(ceil(num_pictures / RANKS_PER_RANGE))
    ]
    graph = run_step(merge, ranges, runner)
    return Found(size, truth, graph, pairs.counts.records_in)


def _comparisons(search: Search, size: Size, name: str, vectors: Published) -> list[WorkItem]:
    """Return the comparisons of a clustering: of parts, and of two parts of a large cluster."""
    url = search.table_url("clusters", name, ALL)
    table, _ = read_vectors(url, "centroid", search.dimension, ["share"])
    layout = clusters.lay_out(table["share"].to_numpy(), size.num_searched)
    return [
        WorkItem(
            name,
            "part-" + "-".join(f"{part:05}" for part in parts),
            {"vectors": vectors.digest},
            {"parts": list(parts), "vectors": vectors.by_dataset[name]},
        )
        for parts in layout.comparisons()
    ]


def _find_truth(
    searched: Searched, size: Size, samples: Published, inputs: Mapping[str, Any]
) -> Truth:
    """Compare some pictures with all, then more of them if too few true pairs are seen."""
    stage = FindTruth.of(searched.search, "truth", size)
    queries: list[int] = []
    urls: list[str] = []
    for round_name in ("first", "further"):
        num_pairs = round(read_truth(urls)["weight"].to_numpy().sum())
        wanted = recall.more_queries(len(queries), num_pairs, size.num_searched)
        first_lot = len(queries) // QUERIES_PER_LOT
        lots = list(range(first_lot, first_lot + ceil(wanted / QUERIES_PER_LOT)))
        if not lots:
            break
        items = searched.group_items(
            round_name, {**inputs, "lots": lots}, lots=lots, samples=samples.urls
        )
        urls += run_step(stage, items, searched.runner).urls
        for lot in lots:
            for table in read_slices(samples.urls, size.num_clusterings + lot):
                queries += table["rank"].to_pylist()
    return Truth(urls, queries)


def _check_reach(truth: Truth, size: Size, min_recall: float) -> None:
    """Show what the clusterings can reach at most.

    Raises:
        EvenmixError: it is less than ``min_recall``.
    """
    pairs = read_truth(truth.urls)
    num_queries = len(truth.queries)
    reachable = recall.reach(pairs, size.num_clusterings, num_queries, size.num_searched)
    measures = recall.reach_measures(reachable)
    console.print(recall.recall_table(recall.recall_rows(measures)))
    if reachable[-1].value < min_recall:
        needed = recall.needed_clusterings(pairs, size.num_clusterings, min_recall)
        recall.refuse_low_reach(reachable, min_recall, needed)
