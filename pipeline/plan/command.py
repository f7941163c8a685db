"""`evenmix plan`: what a recipe takes, before it runs, and what it took, after.

Nothing is read but the recipe, the figures (:mod:`pipeline.plan.figures`), and of the root what
stages have finished and noted, and after a run how large the files are. Each number has a low and
a high value.
"""

import argparse
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from rich.console import Console

from pipeline.dataflow import Command
from pipeline.errors import EvenmixError, did_you_mean
from pipeline.plan.expected import Expected, caption_folders, expect
from pipeline.plan.figures import Figures, load_figures
from pipeline.plan.model import StagePlan, models_of, stages
from pipeline.plan.price import GIB, price
from pipeline.plan.ranges import total
from pipeline.plan.tables import bytes_table, figures_table, span, time_table, used_table
from pipeline.plan.used import seconds_of_trial, used, with_pictures_of_trial
from pipeline.presets import PRESETS
from pipeline.recipe import DEFAULT_CAPTIONER, Recipe, load_recipe, preset_recipe
from pipeline.records import IMAGES


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `evenmix plan`."""
    parser.add_argument("recipe", nargs="?", help="the recipe (TOML), a path or any fsspec URL")
    parser.add_argument(
        "--preset", metavar="NAME", help=f"one of i1's mixtures: {', '.join(PRESETS)}"
    )
    parser.add_argument("--root", help="the corpus root R, instead of the recipe's")
    parser.add_argument(
        "--records",
        action="append",
        default=[],
        metavar="DATASET=N",
        help="how many records a dataset has, where the catalogue does not know (repeatable)",
    )
    parser.add_argument("--costs", metavar="FILE", help="figures of your own (TOML), for some")
    parser.add_argument(
        "--measured", metavar="ROOT", help="go by the runs of a trial on this machine, in ROOT"
    )
    parser.add_argument(
        "--fresh", action="store_true", help="do not look at the root: as if nothing was done"
    )
    parser.add_argument("--explain", action="store_true", help="show all figures and their sources")


def run(args: argparse.Namespace) -> int:
    """Run `evenmix plan`."""
    recipe, figures = _recipe_of(args), load_figures(args.costs)
    measured: dict[Command, float] = {}
    if args.measured:
        measured = seconds_of_trial(args.measured)
        figures = with_pictures_of_trial(figures, args.measured, sorted(recipe.datasets))
    expected = expect(recipe, figures, _records_of(args, recipe), is_fresh=args.fresh)
    plans = stages(recipe, figures, expected, measured)
    prices = [price(plan, figures) for plan in plans]
    # Of a fixed width where nobody looks: rich would take 80 columns.
    console = Console(highlight=False, width=None if Console().is_terminal else 100)
    if any(plan.items for plan in plans):
        console.print(time_table(plans, prices))
        console.print(bytes_table(plans, prices))
        for remark in _remarks(recipe, figures, expected, plans):
            console.print(f"- {remark}", markup=False)
    else:
        console.print(f"all stages are finished in {recipe.root}; nothing is left to pay once")
    for stage, seconds in measured.items():
        console.print(
            f"- {stage}: {seconds * 1000:.3g} ms a record, measured in {args.measured} with all "
            "that starting takes, which thousands of records make small"
        )
    if not args.fresh:
        whole = {name: replace(e, finished=frozenset()) for name, e in expected.items()}
        all_plans = stages(recipe, figures, whole, measured)
        if found := used(recipe, all_plans, figures):
            all_prices = [price(plan, figures) for plan in all_plans]
            console.print(used_table(all_plans, all_prices, found))
            if any(of_stage.was_local for of_stage in found.values()):
                console.print(
                    "- What is planned includes the start of machines for every job, most of it "
                    "where there is little to do; runs on this machine have none to start."
                )
    if args.explain:
        console.print(figures_table(figures))
    return 0


def _recipe_of(args: argparse.Namespace) -> Recipe:
    if (args.recipe is None) == (args.preset is None):
        raise EvenmixError("name a recipe, or --preset NAME with --root R")
    if args.recipe is not None:
        return load_recipe(args.recipe, {"root": args.root})
    if args.root is None:
        raise EvenmixError("--preset needs --root R, the corpus that it is planned for")
    return preset_recipe(args.preset, args.root)


def _records_of(args: argparse.Namespace, recipe: Recipe) -> dict[str, int]:
    records = {}
    for given in args.records:
        name, _, number = given.partition("=")
        if not number.isdecimal():
            raise EvenmixError(f"--records {given}: say DATASET=N, such as photographs=5000")
        if name not in recipe.datasets:
            hint = did_you_mean(name, recipe.datasets)
            raise EvenmixError(f"--records {given}: the recipe has no such dataset{hint}")
        records[name] = int(number)
    return records


def _remarks(
    recipe: Recipe,
    figures: Figures,
    expected: Mapping[str, Expected],
    plans: Sequence[StagePlan],
) -> Iterator[str]:
    """Yield what a reader of the tables has to know."""
    yield (
        "Each range is a low and a high estimate; hours are for the number of machines shown. "
        "`--explain` prints all figures and their sources."
    )
    yield "The cost of requests includes the listings of the bucket that show a stage's progress."
    mirrored = [name for name, e in expected.items() if e.dataset.mirror and not e.finished]
    if mirrored:
        size = span(total(expected[name].files_bytes for name in mirrored), "B")
        yield (
            f"`evenmix mirror` copies {', '.join(mirrored)} ({size}) into the bucket first, from "
            "where it runs; that time is not in the hours."
        )
    if recipe.dedup.accelerator:
        yield (
            "Embedding with an accelerator has not been measured: its machines are priced, but "
            "timed by their vCPUs."
        )
    of_stage = {plan.name: plan for plan in plans}
    ingest, caption, mix = of_stage["ingest"], of_stage["caption"], of_stage["mix"]
    if any(e.dataset.is_fetched and IMAGES not in e.finished for e in expected.values()):
        processes = price(ingest, figures).workers * ingest.machine.vcpus
        yield (
            f"A host of pictures may see {processes * recipe.fetch.per_host:,} requests at once: "
            f"fetch.per_host ({recipe.fetch.per_host}) is for each of {processes:,} processes. "
            "Lower it, or resources.ingest.workers, to what the hosts bear."
        )
    models = models_of(recipe)
    if models and len(models) < len(caption_folders(recipe)):
        yield (
            "Caption sets that no model writes are priced on the GPU machines of those that one "
            "does; in fact they run on machines without a GPU, for less."
        )
    if any(model.accelerator is None for model in models):
        yield "A caption set of the vllm engine names no accelerator; an L4 is planned."
    if any(model.model != DEFAULT_CAPTIONER for model in models):
        yield f"Models are taken to be as fast as {DEFAULT_CAPTIONER}."
    gpu_gb = caption.machine.gpus * figures.caption.gpu_gb.high
    default = [model for model in models if model.model == DEFAULT_CAPTIONER]
    if default and gpu_gb < figures.caption.default_model_gb.low:
        yield (
            f"{DEFAULT_CAPTIONER} has {figures.caption.default_model_gb.low:g} GB of weights, but "
            f"{caption.machine.machine_type} {gpu_gb:g} GB of GPU memory: ask for more L4s "
            '(accelerator = "type:nvidia-l4;count:2;install-nvidia-driver") and set the model\'s '
            "arguments.tensor_parallel_size to their number."
        )
    if mix.items:
        egress = mix.work.stored_bytes / GIB * figures.prices.egress_gb
        yield f"To read the mixture once from outside Google Cloud costs ${span(egress)}."
