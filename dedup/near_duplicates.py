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
from dedup.search_stages import (
    FindPairs,
    FindTruth,
    FitClusters,
    MergeGraph,
    Regroup,
    Sample,
    Size,
    clustering_name,
    comparison_name,
    num_ranges,
    query_destinations,
    read_layout,
)
from dedup.steps import Published, run_step
from dedup.truth import read_truth
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
    num_groups = len(searched.groups)

    pick = Sample.of(search, "sample", size)
    samples = run_step(pick, searched.group_items(ALL, {}), runner)
    fit = FitClusters.of(search, "clusters", size)
    fits = [
        WorkItem(name, ALL, {"samples": samples.digest}, {"number": i, "num_groups": num_groups})
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
    comparisons = [
        WorkItem(
            name,
            comparison_name(parts),
            {"vectors": vectors.digest},
            {"parts": list(parts), "num_groups": num_groups},
        )
        for i, name in enumerate(names)
        for parts in read_layout(search, size, i).comparisons()
    ]
    pairs = run_step(FindPairs.of(search, "pairs", size), comparisons, runner)

    merge = MergeGraph(search, search.root, search.folder, size=size)
    num_pictures = sum(shard.num_pictures for group in searched.groups for shard in group)
    ranges = [
        WorkItem(GRAPH, f"range-{number:05}", {"pairs": pairs.digest}, {"range": number})
        for number in range(num_ranges(num_pictures))
    ]
    graph = run_step(merge, ranges, runner)
    return Found(size, truth, graph, pairs.counts.records_in)


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
        first_lot = len(queries) // recall.MIN_QUERIES
        lots = list(range(first_lot, first_lot + ceil(wanted / recall.MIN_QUERIES)))
        if not lots:
            break
        items = searched.group_items(
            round_name, {**inputs, "lots": lots}, lots=lots, num_groups=len(searched.groups)
        )
        urls += run_step(stage, items, searched.runner).urls
        for table in read_slices(samples.urls, *query_destinations(size, lots)):
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
    warning = recall.check_reach(reachable, pairs, min_recall)
    if warning is not None:
        console.print(f"warning: {warning}; going on, as it may be chance", soft_wrap=True)
