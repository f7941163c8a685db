"""`evenmix dedup`: find exact copies and near-duplicates, and decide which pictures stay.

The story is :func:`run_recipe`: who is who; a few pictures compared with all, to know what the
clusters can reach; the search within clusters; the removals; the report and the outcome. The
stages are in :mod:`dedup.search_stages` and :mod:`dedup.outcome_stages`. Where no dataset asks for
near-duplicates there is no search.
"""

import argparse
from collections.abc import Mapping, Sequence
from typing import Any

from dedup import against, embed
from dedup.corpus import ALL, Search, Shard, group_shards
from dedup.near_duplicates import Found, Searched, find_near_duplicates
from dedup.outcome_stages import (
    CONTAMINATION,
    GROUPS,
    RECALL,
    REMOVED,
    SUMMARY,
    ChooseRemovals,
    Report,
    WriteOutcome,
)
from dedup.pictures import OrderPictures
from dedup.recall import recall_table
from dedup.report import summary_table
from dedup.rules import AGAINST, rules_of
from dedup.show import draw_largest, show
from dedup.steps import run_step
from pipeline import storage
from pipeline.beam_job import RunnerOptions
from pipeline.command_options import add_stage_arguments, recipe_of, runner_of
from pipeline.errors import EvenmixError
from pipeline.progress import console
from pipeline.receipts import difference, fingerprint, read_receipt
from pipeline.recipe import Recipe
from pipeline.records import IMAGES
from pipeline.run import run_stage
from pipeline.stage import WorkItem
from pipeline.summary import finished_shards, finished_summary


def run_recipe(recipe: Recipe, runner: RunnerOptions) -> None:
    """Find the duplicates within and across all datasets of a recipe.

    Raises:
        EvenmixError: a stage before has not finished, the descriptors do not fit together, or the
            clusters cannot reach the recall that the recipe asks for.
    """
    search = _search_of(recipe)
    inputs = _inputs(recipe, search, runner)
    groups = group_shards(_shards(recipe, search))
    payload: dict[str, Any] = {"groups": groups, "graph": []}
    num_pictures = sum(shard.num_pictures for group in groups for shard in group)

    order = OrderPictures(
        search, search.root, search.exchange_folder("pictures"), num_pictures=num_pictures
    )
    pictures = run_step(order, [WorkItem(ALL, ALL, inputs, payload)], runner)
    inputs["pictures"] = pictures.digest
    found = None
    num_searched = pictures.counts.records_out
    if num_searched:
        searched = Searched(search, groups, num_searched, {**inputs}, runner)
        found = find_near_duplicates(searched, recipe.dedup)
        inputs["graph"] = found.graph.digest
        payload["graph"] = found.graph.urls

    choose = ChooseRemovals(
        search,
        search.root,
        search.exchange_folder("removals"),
        remove_contamination=recipe.dedup.contamination == "remove",
    )
    removals = run_step(choose, [WorkItem(ALL, ALL, inputs, payload)], runner)
    payload["removals"] = removals.urls[0]
    inputs = {"removals": removals.digest}
    _report(search, inputs, payload, found, runner)
    write = WriteOutcome(search, search.root, search.folder)
    run_stage(write, _outcome_items(search, groups, inputs, payload), runner)
    _show_report(recipe, search, found)


def _search_of(recipe: Recipe) -> Search:
    rules = rules_of(recipe)
    return Search(
        root=recipe.root,
        name=recipe.dedup.name,
        seed=recipe.seed,
        rules=rules,
        embeddings=embed.folder_of(recipe),
        descriptor=_common_descriptor(recipe, rules.near_datasets()),
        max_neighbours=recipe.dedup.max_neighbours,
        priority=tuple(recipe.dedup.priority),
        accepted=recipe.dedup.accepted,
    )


def _inputs(recipe: Recipe, search: Search, runner: RunnerOptions) -> dict[str, Any]:
    """Return what identifies all that is read, and describe the evaluation pictures."""
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
    if recipe.dedup.against is not None:
        describe = against.describe_against(recipe, search.descriptor)
        described = run_step(describe, against.against_items(recipe), runner)
        inputs["against"] = described.digest
    if recipe.dedup.accepted is not None:
        inputs["accepted"] = {
            dataset: fingerprint(finished_shards(root, _accepted_folder(recipe), dataset, "dedup"))
            for dataset in _accepted_datasets(recipe)
        }
    return inputs


def _accepted_folder(recipe: Recipe) -> str:
    return f"duplicates/{recipe.dedup.accepted}"


def _accepted_datasets(recipe: Recipe) -> list[str]:
    """Return the datasets that the earlier search was about.

    Raises:
        EvenmixError: there is no such search, or it was about datasets that the recipe lacks.
    """
    folder = storage.join(recipe.root, _accepted_folder(recipe))
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
    return datasets


def _shards(recipe: Recipe, search: Search) -> list[Shard]:
    """Return all shards by dataset and name, those of evaluation pictures last."""
    accepted = set()
    if recipe.dedup.accepted is not None:
        accepted = {
            (dataset, name)
            for dataset in _accepted_datasets(recipe)
            for name in finished_shards(recipe.root, _accepted_folder(recipe), dataset, "dedup")
        }
    folders = dict.fromkeys(sorted(recipe.datasets), IMAGES)
    if recipe.dedup.against is not None:
        folders[AGAINST] = search.exchange_folder("against")
    return [
        Shard(dataset, name, item["counts"]["records_out"], (dataset, name) in accepted)
        for dataset, folder in folders.items()
        for name, item in sorted(
            finished_summary(recipe.root, folder, dataset, "ingest").items.items()
        )
    ]


def _report(
    search: Search,
    inputs: Mapping[str, Any],
    payload: Mapping[str, Any],
    found: Found | None,
    runner: RunnerOptions,
) -> None:
    """Make the tables of the report."""
    names = [REMOVED, GROUPS, SUMMARY]
    if AGAINST in search.rules.datasets:
        names.append(CONTAMINATION)
    items = [WorkItem(name, ALL, inputs, payload) for name in names]
    if found is not None:
        truth = {
            "truth": found.truth.urls,
            "queries": found.truth.queries,
            "num_clusterings": found.size.num_clusterings,
            "num_searched": found.size.num_searched,
            "num_comparisons": found.num_comparisons,
        }
        items.append(WorkItem(RECALL, ALL, inputs, {**payload, **truth}))
    run_step(Report(search, search.root, search.folder), items, runner)


def _outcome_items(
    search: Search,
    groups: Sequence[Sequence[Shard]],
    inputs: Mapping[str, Any],
    payload: Mapping[str, Any],
) -> list[WorkItem]:
    """Return an item for each image shard: it is told its place in its group."""
    digests = {
        dataset: finished_shards(search.root, IMAGES, dataset, "ingest")
        for dataset in search.rules.datasets
        if dataset != AGAINST
    }
    items = []
    for number, group in enumerate(groups):
        start = 0
        for shard in group:
            if shard.dataset != AGAINST:
                own = {"images": digests[shard.dataset][shard.name]}
                place = {"group": number, "start": start, "removals": payload["removals"]}
                items.append(WorkItem(shard.dataset, shard.name, {**inputs, **own}, place))
            start += shard.num_pictures
    return items


def _show_report(recipe: Recipe, search: Search, found: Found | None) -> None:
    """Print what was removed and what was missed, and draw the largest groups."""
    console.print(summary_table(storage.read_parquet(search.outcome_url(SUMMARY))))
    if found is not None:
        console.print(recall_table(storage.read_parquet(search.outcome_url(RECALL))))
    if AGAINST in search.rules.datasets:
        url = search.outcome_url(CONTAMINATION)
        number = storage.read_parquet(url, ["key"]).num_rows
        what = "removed" if recipe.dedup.contamination == "remove" else "reported, not removed"
        console.print(
            f"dedup: {number:,} pictures are in groups with one like an evaluation picture; they "
            f"are {what}, and listed in {url}",
            soft_wrap=True,
        )
    drawn = draw_largest(recipe)
    if drawn:
        folder = drawn[0].rpartition("/")[0]
        console.print(f"dedup: {len(drawn)} largest groups are drawn in {folder}", soft_wrap=True)


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


def check(recipe: Recipe) -> None:
    """Check what a search needs beside the stages before it.

    Raises:
        EvenmixError: there are no evaluation pictures where the recipe says, or no such earlier
            search.
    """
    against.check(recipe)
    if recipe.dedup.accepted is not None:
        _accepted_datasets(recipe)


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
    recipe, runner = recipe_of(args, overrides), runner_of(args)
    if args.show is not None:
        console.print(show(recipe, args.show), soft_wrap=True)
        return 0
    run_recipe(recipe, runner)
    return 0
