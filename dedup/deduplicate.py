"""`evenmix dedup`: find exact copies and near-duplicates, and decide which pictures stay.

The story is :func:`run_recipe`: who is who; a few pictures compared with all, to know what the
clusters can reach; the search within clusters; the removals; the report and the outcome. The
stages are in :mod:`dedup.search_stages` and :mod:`dedup.outcome_stages`. Where no dataset asks for
near-duplicates there is no search.

Report and outcome are known by what went into the search and by its options, not by its steps. So
once they are finished the steps' tables, in R/exchange, can go, and nothing is done again.
"""

import argparse
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

import pyarrow.compute as pc

from dedup import against
from dedup.corpus import ALL, Places, Search, Shard, Table, group_shards, memory_for
from dedup.near_duplicates import Found, Searched, find_near_duplicates
from dedup.outcome_stages import ChooseRemovals, Report, WriteOutcome
from dedup.pictures import OrderPictures
from dedup.recall import recall_table
from dedup.report import summary_table
from dedup.rules import AGAINST, rules_of
from dedup.search_stages import FindPairs, FindTruth, FitClusters, MergeGraph, Regroup, Sample
from dedup.show import draw_largest, show
from dedup.steps import Published, run_step
from pipeline import storage
from pipeline.beam_job import RunnerOptions
from pipeline.command_options import add_stage_arguments, recipe_of, runner_of
from pipeline.errors import EvenmixError
from pipeline.progress import console
from pipeline.reasons import RejectReason
from pipeline.receipts import difference, fingerprint, read_receipt
from pipeline.recipe import Recipe
from pipeline.records import IMAGES, embeddings_folder
from pipeline.run import run_stage
from pipeline.stage import WorkItem, make_plan
from pipeline.summary import finished_shards, finished_summary

_STEPS = (
    OrderPictures,
    Sample,
    FitClusters,
    FindTruth,
    Regroup,
    FindPairs,
    MergeGraph,
    ChooseRemovals,
)
"""The stages whose logic decides the outcome."""


def run_recipe(recipe: Recipe, runner: RunnerOptions) -> None:
    """Find the duplicates within and across all datasets of a recipe.

    Raises:
        EvenmixError: a stage before has not finished, the descriptors do not fit together, the
            clusters cannot reach the recall that the recipe asks for, or a search of this name has
            been made in another way.
    """
    search = _search_of(recipe)
    accepted = _accepted_shards(recipe)
    inputs = _inputs(recipe, search, accepted)
    evaluation = against.against_items(recipe)
    identity = {"search": _identity(recipe, inputs, evaluation)}

    corpus = _corpus_shards(recipe, accepted)
    num_pictures = sum(shard.num_pictures for shard in corpus)
    report = Report(search, search.root, search.folder, resource_hints=memory_for(num_pictures))
    tables = _table_items(search, identity, {})
    write = WriteOutcome(search, search.root, search.folder)
    outcome = _outcome_items(search, corpus, identity)
    if make_plan(report, tables).is_finished and make_plan(write, outcome).is_finished:
        run_stage(report, tables, runner)
    else:
        if evaluation:
            described = _describe_against(recipe, search, evaluation, runner)
            inputs = {**inputs, "against": described.digest}
            corpus = [*corpus, *_shards(recipe, search.exchange_folder("against"), AGAINST)]
        payload = _find_duplicates(recipe, search, corpus, inputs, runner)
        removed, *others = _table_items(search, identity, payload)
        run_step(report, [removed], runner)
        run_step(report, others, runner)
        _draw(recipe)
    run_stage(write, outcome, runner)
    _show_report(recipe, search)


def _find_duplicates(
    recipe: Recipe,
    search: Search,
    shards: Sequence[Shard],
    inputs: Mapping[str, Any],
    runner: RunnerOptions,
) -> dict[str, Any]:
    """Decide who goes; return what the stage of the report is told."""
    groups = group_shards(shards)
    hints = memory_for(sum(shard.num_pictures for shard in shards))
    order = OrderPictures(
        search, search.root, search.exchange_folder("pictures"), resource_hints=hints
    )
    pictures = run_step(order, [WorkItem(ALL, ALL, inputs, {"groups": groups})], runner)
    inputs = {**inputs, "pictures": pictures.digest}
    found = None
    num_searched = pictures.counts.records_out
    if num_searched:
        searched = Searched(search, groups, num_searched, inputs, runner)
        found = find_near_duplicates(searched, recipe.dedup)
        inputs = {**inputs, "graph": found.graph.digest}

    remove_contamination = recipe.dedup.contamination == "remove"
    choose = ChooseRemovals(
        search,
        search.root,
        search.exchange_folder("removals"),
        resource_hints=hints,
        remove_contamination=remove_contamination,
    )
    payload = {"groups": groups, "graph": found.graph.urls if found else []}
    run_step(choose, [WorkItem(ALL, ALL, inputs, payload)], runner)
    return {
        **payload,
        **_truth(found),
        "removals": _removals_url(search),
        "remove_contamination": remove_contamination,
    }


def _truth(found: Found | None) -> dict[str, Any]:
    """Return what the table of the recall is made of."""
    if found is None:
        return {}
    return {
        "truth": found.truth.urls,
        "queries": found.truth.queries,
        "num_clusterings": found.size.num_clusterings,
        "num_searched": found.size.num_searched,
        "num_comparisons": found.num_comparisons,
    }


def _search_of(recipe: Recipe) -> Search:
    rules = rules_of(recipe)
    return Search(
        root=recipe.root,
        name=recipe.dedup.name,
        seed=recipe.seed,
        rules=rules,
        embeddings=embeddings_folder(recipe.dedup.descriptor),
        descriptor=_common_descriptor(recipe, rules.near_datasets()),
        max_neighbours=recipe.dedup.max_neighbours,
        priority=tuple(recipe.dedup.priority),
        accepted=recipe.dedup.accepted,
    )


def _inputs(
    recipe: Recipe, search: Search, accepted: Mapping[str, Mapping[str, str]]
) -> dict[str, Any]:
    """Return what identifies all that is read of the corpus and of an earlier search."""
    root = recipe.root
    inputs: dict[str, Any] = {
        "images": {
            dataset: fingerprint(finished_shards(root, IMAGES, dataset, "ingest"))
            for dataset in sorted(recipe.datasets)
        },
        "embeddings": {
            dataset: fingerprint(finished_shards(root, search.embeddings, dataset, "embed"))
            for dataset in search.rules.near_datasets()
        },
    }
    if accepted:
        inputs["accepted"] = {dataset: fingerprint(shards) for dataset, shards in accepted.items()}
    return inputs


def _identity(
    recipe: Recipe, inputs: Mapping[str, Any], evaluation: Sequence[WorkItem]
) -> dict[str, Any]:
    """Return all that decides the outcome, briefly, for it stands in every one of its files."""
    dedup = recipe.dedup
    compared_with = {
        "files": [dict(item.inputs) for item in evaluation],
        "max_pixels": recipe.images.max_pixels,
        "max_bytes": recipe.images.max_bytes,
    }
    return {
        **{name: fingerprint(digests) for name, digests in inputs.items()},
        "against": fingerprint(compared_with) if evaluation else None,
        "contamination": dedup.contamination,
        "rules": fingerprint(rules_of(recipe).identity()),
        "seed": recipe.seed,
        "clusterings": dedup.clusterings,
        "num_clusters": dedup.num_clusters,
        "max_neighbours": dedup.max_neighbours,
        "priority": dedup.priority,
        "versions": [step.version for step in _STEPS],
    }


def _accepted_shards(recipe: Recipe) -> dict[str, dict[str, str]]:
    """Return the digests of the shards that the earlier search was about, by dataset.

    Raises:
        EvenmixError: there is no such search, it has not ended, it was about datasets that the
            recipe lacks, or it knew evaluation pictures and this one does not.
    """
    if recipe.dedup.accepted is None:
        return {}
    earlier = Places(recipe.root, recipe.dedup.accepted)
    folder = storage.join(recipe.root, earlier.folder)
    names = {file.name.partition("/")[0] for file in storage.list_files(folder)}
    datasets = sorted(name for name in names if not name.startswith("_"))
    if not datasets:
        raise EvenmixError(f"dedup.accepted: there is no search {folder}")
    strange = sorted(set(datasets) - recipe.datasets.keys())
    if strange:
        raise EvenmixError(
            f"{folder} has accepted pictures of {', '.join(strange)}, which the recipe lacks; "
            "name all of its datasets, since new pictures are compared with what it accepted"
        )
    shards = {
        dataset: finished_shards(recipe.root, earlier.folder, dataset, "dedup")
        for dataset in datasets
    }
    if recipe.dedup.against is None:
        rules = storage.read_parquet(earlier.outcome_url(Table.SUMMARY), ["rule"])["rule"]
        if pc.any(pc.equal(rules, RejectReason.CONTAMINATION)).as_py():
            raise EvenmixError(
                f"{folder} has removed pictures that are like evaluation pictures; copies of them "
                "that are new would come in, so name dedup.against again"
            )
    return shards


def _corpus_shards(recipe: Recipe, accepted: Mapping[str, Mapping[str, str]]) -> list[Shard]:
    """Return the shards of all datasets, by dataset and name."""
    return [
        shard._replace(is_accepted=shard.name in accepted.get(dataset, {}))
        for dataset in sorted(recipe.datasets)
        for shard in _shards(recipe, IMAGES, dataset)
    ]


def _shards(recipe: Recipe, folder: str, dataset: str) -> list[Shard]:
    summary = finished_summary(recipe.root, folder, dataset, "ingest")
    return [
        Shard(dataset, name, item["counts"]["records_out"], is_accepted=False)
        for name, item in sorted(summary.items.items())
    ]


def _describe_against(
    recipe: Recipe, search: Search, items: Sequence[WorkItem], runner: RunnerOptions
) -> Published:
    """Describe the evaluation pictures.

    Raises:
        EvenmixError: none of the files is a picture, or they would be described in another way
            than the corpus was.
    """
    described = run_step(against.describe_against(recipe, search.descriptor), items, runner)
    against.require_pictures(recipe, described.counts)
    console.print(
        f"dedup: the corpus is compared with {described.counts.records_out:,} evaluation pictures"
    )
    return described


def _table_items(
    search: Search, identity: Mapping[str, Any], payload: Mapping[str, Any]
) -> list[WorkItem]:
    """Return an item for each table of the report; the first is that of which others are made."""
    tables = [Table.REMOVED, Table.GROUPS, Table.SUMMARY]
    if AGAINST in search.rules.datasets:
        tables.append(Table.CONTAMINATION)
    if search.rules.near_datasets():
        tables.append(Table.RECALL)
    return [WorkItem(table, ALL, identity, payload) for table in tables]


def _removals_url(search: Search) -> str:
    return search.table_url("removals", ALL, ALL)


def _outcome_items(
    search: Search, corpus: Sequence[Shard], identity: Mapping[str, Any]
) -> list[WorkItem]:
    """Return an item for each image shard: it is told its place in its group.

    Evaluation pictures are behind all others, so they change no place.
    """
    return [
        WorkItem(
            shard.dataset,
            shard.name,
            identity,
            {"group": number, "start": start, "removals": _removals_url(search)},
        )
        for number, group in enumerate(group_shards(corpus))
        for shard, start in zip(
            group, accumulate((shard.num_pictures for shard in group), initial=0), strict=False
        )
    ]


def _draw(recipe: Recipe) -> None:
    drawn = draw_largest(recipe)
    if drawn:
        folder = drawn[0].rpartition("/")[0]
        console.print(f"dedup: {len(drawn)} largest groups are drawn in {folder}", soft_wrap=True)


def _show_report(recipe: Recipe, search: Search) -> None:
    """Print what was removed, what was missed, and what is like evaluation pictures."""
    console.print(summary_table(storage.read_parquet(search.outcome_url(Table.SUMMARY))))
    if search.rules.near_datasets():
        console.print(recall_table(storage.read_parquet(search.outcome_url(Table.RECALL))))
    if AGAINST in search.rules.datasets:
        url = search.outcome_url(Table.CONTAMINATION)
        number = storage.read_parquet(url, ["key"]).num_rows
        what = "removed" if recipe.dedup.contamination == "remove" else "reported, not removed"
        console.print(
            f"dedup: {number:,} pictures are in groups with one like an evaluation picture; they "
            f"are {what}, and listed in {url}",
            soft_wrap=True,
        )


def _common_descriptor(recipe: Recipe, datasets: list[str]) -> Mapping[str, Any]:
    """Return the identity of the descriptor that embedded all of ``datasets``.

    Raises:
        EvenmixError: they were embedded by different ones, or not yet.
    """
    found: dict[str, Mapping[str, Any]] = {}
    folder = embeddings_folder(recipe.dedup.descriptor)
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


def check(recipe: Recipe) -> None:
    """Check what a search needs beside the stages before it.

    Raises:
        EvenmixError: there are no evaluation pictures where the recipe says, or the earlier search
            cannot be gone on from.
    """
    against.check(recipe)
    _accepted_shards(recipe)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `evenmix dedup`."""
    add_stage_arguments(parser)
    parser.add_argument(
        "--clusterings", type=int, metavar="N", help="independent clusterings of the descriptors"
    )
    parser.add_argument(
        "--min-recall", type=float, metavar="SHARE", help="the least share of pairs to be found"
    )
    parser.add_argument(
        "--against", metavar="FOLDER", help="evaluation pictures: what is like one of them goes"
    )
    parser.add_argument(
        "--show", metavar="KEY", help="draw the group of a picture, and do nothing else"
    )


def run(args: argparse.Namespace) -> int:
    """Run `evenmix dedup`."""
    overrides = {
        "dedup.clusterings": args.clusterings,
        "dedup.min_recall": args.min_recall,
        "dedup.against": args.against,
    }
    recipe = recipe_of(args, overrides)
    runner = runner_of(args, recipe)
    if args.show is not None:
        console.print(show(recipe, args.show), soft_wrap=True)
        return 0
    run_recipe(recipe, runner)
    return 0
