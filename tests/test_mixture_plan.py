"""`evenmix mix --plan` counts what the mixture will be, and writes nothing of it."""

import tarfile
from collections.abc import Mapping, Sequence
from fractions import Fraction
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console
from rich.table import Table

from captioning import caption
from dedup import deduplicate, steps
from mixing import mix, plan
from mixing.manifest import Shard, load_manifest
from mixing.plan import Part, funnel_table, mixture_table
from mixing.select import Selection
from pipeline import ingest, storage
from pipeline.beam_job import RunnerOptions
from pipeline.catalog import CATALOG
from pipeline.cli import main
from pipeline.errors import EvenmixError
from pipeline.receipts import Counts
from pipeline.recipe import load_recipe, preset_recipe
from pipeline.stage import Stage, WorkItem
from pipeline.summary import Summary
from tests import corpora
from tests.stages import run_here

HERE = RunnerOptions(1, ())

FILTERS = """
[[mixture.filters]]
column = "width"
at_least = 60
datasets = ["lines"]
[[mixture.filters]]
column = "source_id"
one_of = ["5", "6", "7"]
datasets = ["shapes"]
"""


def here(stage: Stage, items: Sequence[WorkItem], _: RunnerOptions) -> Mapping[str, Summary]:
    return run_here(stage, items)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small corpus, its duplicates and its captions, and a recipe without its photographs."""
    folder = tmp_path_factory.mktemp("corpus")
    corpora.write_sources(folder / "sources")
    path = corpora.write_recipe(folder, folder / "sources")
    text = path.read_text()
    begin, end = text.index("[datasets.photographs]"), text.index("[datasets.lines]")
    path.write_text(text[:begin] + text[end:])
    recipe = load_recipe(str(path))
    with pytest.MonkeyPatch.context() as patch:
        for module in (ingest, deduplicate, steps, caption):
            patch.setattr(module, "run_stage", here)
        for job in (ingest, deduplicate, caption):
            job.run_recipe(recipe, HERE)
    return path


@pytest.fixture(autouse=True)
def _without_beam(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "run_stage", here)
    monkeypatch.setattr(mix, "run_stage", here)


def recipe_file(corpus: Path, folder: Path, text: str = "") -> str:
    """Write the recipe with more lines in its mixture, and return its path."""
    (folder / "recipe.toml").write_text(corpus.read_text() + text)
    return str(folder / "recipe.toml")


def files(corpus: Path) -> set[str]:
    return {file.name for file in storage.list_files(str(corpus.parent / "corpus"))}


def rows(printed: str, heading: str) -> dict[str, list[str]]:
    """Return the words of each row of the table whose title begins so, by dataset."""
    lines = printed[printed.index(heading) :].splitlines()
    words = [line.split() for line in lines[3:]]
    end = next(n for n, row in enumerate(words) if row and row[0] == "all")
    return {row[0]: row[1:] for row in words[: end + 1] if row and len(row) > 1}


def sample_bytes(root: str, shards: Sequence[Shard]) -> int:
    """Return the bytes of all samples in some shards, without what ends each tar."""
    num_bytes = 0
    for shard in shards:
        with tarfile.open(Path(root, "mixtures", "small", shard.name)) as tar:
            num_bytes += sum(512 + -(-member.size // 512) * 512 for member in tar)
    return num_bytes


def test_the_plan_is_what_the_mixture_becomes(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = 'weights = "size"\nimages_per_dataset = 20\n'
    recipe = load_recipe(recipe_file(corpus, tmp_path, text))
    plan.print_plan(recipe, HERE)
    planned = rows(capsys.readouterr().out, "the mixture small")
    mix.run_recipe(recipe, HERE)
    manifest = load_manifest(f"{recipe.root}/mixtures/small")
    assert planned.keys() == {"lines", "shapes", "all"}
    for dataset in manifest.datasets:
        train, validation, weight, percent, repeated, size, unit, shards, place = planned[
            dataset.name
        ]
        assert (int(train), int(validation)) == (
            dataset.train.num_samples,
            dataset.validation.num_samples,
        )
        assert weight == dataset.weight
        assert percent == f"{float(Fraction(dataset.weight)):.2%}"
        # Of weights by size, an epoch shows each picture once.
        assert repeated == "1.00"
        written = [*dataset.train.shards, *dataset.validation.shards]
        assert int(shards) == len(written)
        assert unit == "kB"
        assert float(size) * 1000 == pytest.approx(sample_bytes(recipe.root, written), rel=0.1)
        assert place == "source"


def test_nothing_is_written_but_the_candidates_and_another_number_of_pictures_shares_them(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = files(corpus)
    plan.print_plan(load_recipe(recipe_file(corpus, tmp_path, "crop = 'none'\n" + FILTERS)), HERE)
    folder = capsys.readouterr().out.splitlines()[-1].split()[4].rstrip(",")
    below = folder.removeprefix(f"{corpus.parent}/corpus/")
    new = files(corpus) - before
    assert below.startswith("exchange/candidates-")
    assert new
    assert {name for name in new if not name.startswith(f"{below}/")} == set()
    for more in ("images_per_dataset = 3\n", 'weights = "cap:5"\n'):
        plan.print_plan(load_recipe(recipe_file(corpus, tmp_path, more + FILTERS)), HERE)
    assert files(corpus) - before == new


def test_the_funnel_counts_what_is_left_after_each_step(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    listed = tmp_path / "exclusions.txt"
    listed.write_text("source_id lines 0\nsource_id lines 1\nsource_id shapes 1\n")
    path = recipe_file(corpus, tmp_path, FILTERS)
    recipe = load_recipe(path, {"exclusions": str(listed)})
    plan.print_plan(recipe, HERE)
    printed = capsys.readouterr().out
    # In the corpus; allowed, unique, large enough; by each filter; with captions.
    assert rows(printed, "pictures that are left") == {
        "lines": ["22", "20", "20", "20", "20", "20", "20"],
        "shapes": ["32", "31", "30", "30", "30", "3", "3"],
        "all": ["54", "51", "50", "50", "50", "23", "23"],
    }
    assert "filter 1: width >= 60" in printed
    assert "filter 2: source_id in 5, 6, 7" in printed
    assert f"{recipe.root}/exclusions/" in printed.splitlines()[-1]


def test_datasets_that_come_out_empty_are_named_and_the_status_is_one(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = recipe_file(corpus, tmp_path, "min_short_edge_px = 41\n")
    assert main(["mix", path, "--plan", "--workers=1"]) == 1
    printed = capsys.readouterr()
    assert rows(printed.out, "pictures that are left") == {
        "lines": ["22", "22", "22", "0", "0"],
        "shapes": ["32", "32", "31", "0", "0"],
        "all": ["54", "54", "53", "0", "0"],
    }
    assert "the mixture small" not in printed.out
    assert "error: no picture is left to train on in: lines, shapes. Relax" in printed.err


def test_the_corpus_is_checked_before_any_work(corpus: Path, tmp_path: Path) -> None:
    before = files(corpus)
    path = recipe_file(corpus, tmp_path, '[dedup]\nname = "second"\n')
    with pytest.raises(EvenmixError, match="dedup second has not finished: lines, shapes"):
        plan.print_plan(load_recipe(path), HERE)
    assert files(corpus) == before


# The tables of a mixture as large as i1's


def text_of(table: Table) -> str:
    printed = StringIO()
    Console(width=1000, file=printed).print(table)
    return printed.getvalue()


def parts_of(sizes: Mapping[str, int]) -> dict[str, Part]:
    return {
        name: Part(Selection(name, 0, size, size // 1000, 1000, 0), 150_000, name != "yfcc")
        for name, size in sizes.items()
    }


def test_the_tables_of_twelve_datasets_fit_a_terminal() -> None:
    sizes = {name: entry.in_i1.pictures for name, entry in CATALOG.items()}
    recipe = preset_recipe("i1-256-12-datasets", "corpus")
    rejected = {"exact_copy": 1, "near_duplicate": 1, "too_small": 1, "no_caption": 1}
    counts = {name: Counts(size, size - 4, rejected) for name, size in sizes.items()}
    for table in (funnel_table(recipe, counts), mixture_table(recipe, parts_of(sizes))):
        lines = text_of(table).splitlines()
        assert max(len(line.rstrip()) for line in lines) <= 100
        assert {line.split()[0] for line in lines if line.split()} >= {*CATALOG, "all"}


def test_an_epoch_ends_when_the_slowest_dataset_was_seen() -> None:
    recipe = preset_recipe("i1-1024", "corpus")
    sizes = dict.fromkeys(recipe.mixture_datasets(), 1_000_000) | {"gptedit": 300_000}
    text = text_of(mixture_table(recipe, parts_of(sizes)))
    table = rows(text, "the mixture i1-1024")
    assert table["redcaps"][2:] == ["1/5", "20.00%", "1.00", "150.2", "GB", "1,001", "source"]
    assert table["gptedit"][2:] == ["1/5", "20.00%", "3.33", "45.0", "GB", "301", "source"]
    assert table["all"][:4] == ["4,300,000", "4,300", "1", "100.00%"]
    assert "An epoch of the mixture is 5,000,000 draws" in " ".join(text.split())


def test_weights_by_size_show_every_picture_once_an_epoch_but_for_rounding() -> None:
    sizes = {name: entry.in_i1.pictures for name, entry in CATALOG.items()}
    recipe = preset_recipe("i1-256-12-datasets", "corpus")
    text = text_of(mixture_table(recipe, parts_of(sizes)))
    table = rows(text, "the mixture i1-256-12-datasets")
    assert {name: row[4] for name, row in table.items() if name != "all"} == dict.fromkeys(
        sizes, "1.00"
    )
    assert table["yfcc"][-1] == "shard"
    assert sum(Fraction(row[2]) for name, row in table.items() if name != "all") == 1
