"""`evenmix dedup`: find exact copies and near-duplicates, and decide which pictures stay.

Four stages write R/duplicates/<name>. Three have one item each, whose pseudo dataset begins with
an underscore: `_clusters` fits k-means, `_pairs` finds the similar pairs, `_removals` chooses the
keepers. The fourth hands the outcome to the shards, row by row. Where no dataset asks for
near-duplicates the first two do not run.

One graph decides. Its edges join exact copies of whatever datasets, and pictures whose cosine
reaches the thresholds of both their datasets. Each removed picture has a kept neighbour in it.
"""

import argparse
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dedup import clusters, embed
from dedup.exact import Ints, pairs_within
from dedup.keepers import choose_keepers, nearest_keepers
from dedup.pictures import EXACT_ONLY, Pictures, read_descriptors, read_pictures
from dedup.records import (
    DUPLICATES,
    PAIRS,
    REMOVALS,
    centroids_schema,
    read_vectors,
    to_column,
)
from dedup.search import Floats, find_pairs, nearest_clusters
from pipeline import storage
from pipeline.beam_job import RunnerOptions
from pipeline.command_options import add_stage_arguments, recipe_of, runner_of
from pipeline.errors import EvenmixError
from pipeline.reasons import RejectReason
from pipeline.receipts import Counts, difference, fingerprint, read_receipt
from pipeline.recipe import Recipe
from pipeline.records import IMAGES
from pipeline.run import run_stage
from pipeline.stage import Output, Stage, WorkItem
from pipeline.summary import finished_shards, read_shard

CLUSTERS, PAIRS_FOUND, REMOVALS_CHOSEN = "_clusters", "_pairs", "_removals"
_ALL = "all"


@dataclass(frozen=True)
class Corpus:
    """The pictures of a run: all image shards, and how alike two of them may be.

    ``thresholds`` has each dataset's least cosine of near-duplicates; ``embeddings`` is their
    folder below R and ``descriptor`` their identity, empty where none are needed.
    """

    root: str
    folder: str
    thresholds: Mapping[str, float]
    embeddings: str
    descriptor: Mapping[str, Any]

    def rules(self) -> dict[str, Any]:
        """Return what every decision depends on, as JSON values."""
        thresholds = {
            dataset: None if threshold == EXACT_ONLY else threshold
            for dataset, threshold in self.thresholds.items()
        }
        return {"thresholds": thresholds, "descriptor": dict(self.descriptor)}

    def pictures(self, item: WorkItem) -> Pictures:
        """Read the indexes of the shards that a work item lists."""
        shards = [(dataset, shard) for dataset, shard in item.payload["shards"]]
        return read_pictures(self.root, shards, self.thresholds)

    def result_url(self, dataset: str) -> str:
        """Return where a stage with a single item puts its table."""
        return storage.join(self.root, self.folder, dataset, f"{_ALL}.parquet")


@dataclass(frozen=True)
class FitClusters:
    """The stage that fits the centroids."""

    corpus: Corpus
    root: str
    folder: str
    num_clusters: int | None
    seed: int
    name: str = "dedup-clusters"
    version: int = 1
    resource_hints: Mapping[str, str] = field(default_factory=dict)
    items_at_once: int = 1

    def config(self, dataset: str) -> Mapping[str, Any]:
        """Return what decides the centroids."""
        return {"num_clusters": self.num_clusters, "seed": self.seed} | self.corpus.rules()

    def process(self, item: WorkItem) -> Output:
        """Fit k-means on a sample of the descriptors."""
        corpus = self.corpus
        dimension = corpus.descriptor["dimension"]
        pictures = corpus.pictures(item)
        rows = pictures.to_compare()
        num_clusters = self.num_clusters or clusters.default_num_clusters(len(rows))
        keys = [key.decode() for key in pictures.key[rows].tolist()]
        size = num_clusters * clusters.SAMPLE_PER_CLUSTER
        chosen = rows[clusters.choose_sample(keys, size, self.seed)]
        sample = read_descriptors(corpus.root, corpus.embeddings, dimension, pictures, chosen)
        centroids = clusters.fit(sample, num_clusters, self.seed)
        table = pa.table([to_column(centroids)], schema=centroids_schema(dimension))
        return Output(table, Counts(table.num_rows, table.num_rows))


@dataclass(frozen=True)
class FindPairs:
    """The stage that finds the similar pairs."""

    corpus: Corpus
    root: str
    folder: str
    nprobe: int
    name: str = "dedup-pairs"
    version: int = 1
    resource_hints: Mapping[str, str] = field(default_factory=dict)
    items_at_once: int = 1

    def config(self, dataset: str) -> Mapping[str, Any]:
        """Return what decides the pairs."""
        return {"nprobe": self.nprobe} | self.corpus.rules()

    def process(self, item: WorkItem) -> Output:
        """Compare each picture with those in the clusters nearest to it."""
        corpus = self.corpus
        dimension = corpus.descriptor["dimension"]
        pictures = corpus.pictures(item)
        rows = pictures.to_compare()
        vectors = read_descriptors(corpus.root, corpus.embeddings, dimension, pictures, rows)
        _, centroids = read_vectors(corpus.result_url(CLUSTERS), "centroid", dimension)
        nearest = nearest_clusters(vectors, centroids, self.nprobe)
        pairs = find_pairs(vectors, pictures.threshold[rows], nearest)
        keys = pictures.key[rows].astype(np.str_)
        columns = [pa.array(keys[pairs.a]), pa.array(keys[pairs.b]), pa.array(pairs.similarity)]
        table = pa.table(columns, schema=PAIRS)
        return Output(table, Counts(table.num_rows, table.num_rows))


@dataclass(frozen=True)
class ChooseKeepers:
    """The stage that decides which pictures go, and in whose favour."""

    corpus: Corpus
    root: str
    folder: str
    name: str = "dedup-removals"
    version: int = 1
    resource_hints: Mapping[str, str] = field(default_factory=dict)
    items_at_once: int = 1

    def config(self, dataset: str) -> Mapping[str, Any]:
        """Return what decides the removals."""
        return self.corpus.rules()

    def process(self, item: WorkItem) -> Output:
        """List the removed pictures by their places."""
        pictures = self.corpus.pictures(item)
        pairs = PAIRS.empty_table()
        if "pairs" in item.inputs:
            pairs = storage.read_parquet(self.corpus.result_url(PAIRS_FOUND))
        table = removals(pictures, pairs)
        return Output(table, Counts(table.num_rows, table.num_rows))


def removals(pictures: Pictures, pairs: pa.Table) -> pa.Table:
    """Return the removed pictures (REMOVALS), in order of dataset, shard and row.

    ``pairs`` (PAIRS) are among ``pictures.to_compare()``.
    """
    everyone = np.arange(len(pictures.key))
    exact = pairs_within(pictures.group, everyone[pictures.stand_in == everyone])
    near_better, near_worse, near_similarity = _in_rows(pictures, pairs)
    # Exact copies may be joined twice, for they are alike too: the edge that comes first counts.
    better, worse = np.append(exact[0], near_better), np.append(exact[1], near_worse)
    similarity = np.append(np.ones(len(exact[0]), np.float32), near_similarity)

    kept = choose_keepers(len(everyone), better, worse)
    keeper, edge = nearest_keepers(kept, better, worse, similarity)
    # Whoever has a stand-in goes where that one goes, or is its copy if it stays (edge -1).
    keeper, edge = keeper[pictures.stand_in], edge[pictures.stand_in]
    removed = np.flatnonzero(keeper != everyone)
    removed = removed[np.lexsort((pictures.row[removed], pictures.shard[removed]))]
    keeper, edge = keeper[removed], edge[removed]
    near = edge >= len(exact[0])
    shards = [pictures.shards[shard] for shard in pictures.shard[removed]]
    columns = {
        "dataset": [dataset for dataset, _ in shards],
        "shard": [shard for _, shard in shards],
        "row": pictures.row[removed],
        "key": pictures.key[removed].astype(np.str_),
        "duplicate_of": pictures.key[keeper].astype(np.str_),
        "similarity": np.append(similarity, np.float32(1))[edge],  # the last for edge -1
        "rule": np.where(near, str(RejectReason.NEAR_DUPLICATE), str(RejectReason.EXACT_COPY)),
    }
    return pa.table(columns, schema=REMOVALS)


def _in_rows(pictures: Pictures, pairs: pa.Table) -> tuple[Ints, Ints, Floats]:
    """Return pairs of keys as pairs of rows, the better first, and their similarity."""
    rows = pictures.to_compare()  # in order of their keys
    a, b = (
        rows[
            np.searchsorted(
                pictures.key[rows], pairs[name].to_numpy(zero_copy_only=False).astype("S32")
            )
        ]
        for name in ("key_a", "key_b")
    )
    return np.minimum(a, b), np.maximum(a, b), pairs["similarity"].to_numpy()


@dataclass(frozen=True)
class Deduplicate:
    """The stage that gives each shard its part of the outcome."""

    root: str
    folder: str
    name: str = "dedup"
    version: int = 1
    resource_hints: Mapping[str, str] = field(default_factory=dict)
    items_at_once: int = 1

    def config(self, dataset: str) -> Mapping[str, Any]:
        """Return nothing: the removals, which are an input, decide."""
        return {}

    def process(self, item: WorkItem) -> Output:
        """Write what became of each picture of a shard."""
        index = read_shard(self.root, IMAGES, item.dataset, item.shard, ["key"])
        keys = index["key"].to_pylist()
        table = storage.read_parquet(item.payload["removals"])
        here = (pc.field("dataset") == item.dataset) & (pc.field("shard") == item.shard)
        kept = {"duplicate_of": None, "similarity": None, "rule": None}
        rows = [kept | {"key": key, "group": key} for key in keys]
        for removal in table.filter(here).to_pylist():
            row = rows[removal["row"]]
            row |= {name: removal[name] for name in kept} | {"group": removal["duplicate_of"]}
        rules = Counter(row["rule"] for row in rows if row["rule"])
        return Output(
            table=pa.Table.from_pylist(rows, schema=DUPLICATES),
            counts=Counts(len(rows), len(rows) - rules.total(), dict(sorted(rules.items()))),
        )


def folder_of(recipe: Recipe) -> str:
    """Return the folder below R that has a recipe's duplicates."""
    return f"duplicates/{recipe.dedup.name}"


def run_recipe(recipe: Recipe, runner: RunnerOptions) -> None:
    """Find the duplicates within and across all datasets of a recipe."""
    root, folder = recipe.root, folder_of(recipe)
    images = {
        dataset: finished_shards(root, IMAGES, dataset, "ingest")
        for dataset in sorted(recipe.datasets)
    }
    near = embed.near_datasets(recipe)
    corpus = Corpus(
        root=root,
        folder=folder,
        thresholds={
            dataset: recipe.datasets[dataset].threshold if dataset in near else EXACT_ONLY
            for dataset in images
        },
        embeddings=embed.folder_of(recipe),
        descriptor=_common_descriptor(recipe, near),
    )
    shards = [[dataset, shard] for dataset in images for shard in sorted(images[dataset])]
    inputs: dict[str, Any] = {
        "images": {dataset: fingerprint(digests) for dataset, digests in images.items()}
    }
    if near:
        inputs["embeddings"] = {
            dataset: fingerprint(finished_shards(root, corpus.embeddings, dataset, "embed"))
            for dataset in near
        }
        fit = FitClusters(corpus, root, folder, recipe.dedup.num_clusters, recipe.seed)
        inputs["clusters"] = _run_single(fit, CLUSTERS, inputs, shards, runner)
        find = FindPairs(corpus, root, folder, recipe.dedup.nprobe)
        inputs["pairs"] = _run_single(find, PAIRS_FOUND, inputs, shards, runner)
    choose = ChooseKeepers(corpus, root, folder)
    chosen = _run_single(choose, REMOVALS_CHOSEN, inputs, shards, runner)
    items = [
        WorkItem(
            dataset,
            shard,
            inputs={"images": digest, "removals": chosen},
            payload={"removals": corpus.result_url(REMOVALS_CHOSEN)},
        )
        for dataset, digests in images.items()
        for shard, digest in digests.items()
    ]
    run_stage(Deduplicate(root, folder), items, runner)


def _run_single(
    stage: Stage,
    dataset: str,
    inputs: Mapping[str, Any],
    shards: list[list[str]],
    runner: RunnerOptions,
) -> str:
    """Run a stage that has one item for the whole corpus; return the digest of its table."""
    item = WorkItem(dataset, _ALL, inputs=dict(inputs), payload={"shards": shards})
    digest: str = run_stage(stage, [item], runner)[dataset].items[_ALL]["digest"]
    return digest


def _common_descriptor(recipe: Recipe, datasets: list[str]) -> Mapping[str, Any]:
    """Return the identity of the descriptor that embedded all of ``datasets``.

    Raises:
        EvenmixError: they were embedded by different ones, or not yet.
    """
    found: dict[str, Mapping[str, Any]] = {}
    folder = embed.folder_of(recipe)
    for dataset in datasets:
        # One receipt is enough: a stage refuses to mix configurations within a dataset.
        shard = min(finished_shards(recipe.root, folder, dataset, "embed"))
        url = storage.join(recipe.root, folder, dataset, f"{shard}.parquet")
        found[dataset] = read_receipt(url).identity["config"]["descriptor"]
    for dataset in datasets[1:]:
        differences = difference(found[datasets[0]], found[dataset])
        if differences:
            raise EvenmixError(
                f"{storage.join(recipe.root, folder)}: {datasets[0]} and {dataset} were embedded "
                f"by different descriptors ({'; '.join(differences)}), which cannot be compared; "
                "embed all under another dedup.descriptor"
            )
    return found[datasets[0]] if datasets else {}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `evenmix dedup`."""
    add_stage_arguments(parser)
    parser.add_argument("--nprobe", type=int, metavar="N", help="clusters searched per picture")


def run(args: argparse.Namespace) -> int:
    """Run `evenmix dedup`."""
    run_recipe(recipe_of(args, {"dedup.nprobe": args.nprobe}), runner_of(args))
    return 0
