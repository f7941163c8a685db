"""Trying a dataset: its first records, a part of it by hash, or only what would be read."""

from pathlib import Path

import pytest

from pipeline import cli, ingest
from pipeline.errors import EvenmixError
from pipeline.ingest import Trial
from pipeline.recipe import Corpus, load_recipe
from pipeline.summary import read_summary
from tests import corpora
from tests.stages import run_here


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sources")
    corpora.write_sources(folder)
    return folder


@pytest.fixture
def corpus(sources: Path, tmp_path: Path) -> Corpus:
    return load_recipe(str(corpora.write_recipe(tmp_path, sources)))


def ingested(corpus: Corpus, trial: Trial) -> dict[str, int]:
    """Ingest a part and return the number of records of each dataset."""
    stage, items = ingest.plan(corpus, trial)
    return {name: found.counts.records_in for name, found in run_here(stage, items).items()}


@pytest.mark.parametrize("limit", [1, 10, 12, 20, 1000])
def test_a_limit_takes_the_first_records_of_each_dataset(corpus: Corpus, limit: int) -> None:
    assert ingested(corpus, Trial(limit=limit)) == {
        name: min(limit, num_records) for name, (num_records, _) in corpora.COUNTS.items()
    } | {"photographs": min(limit, 13)}


def test_a_sample_is_a_part_by_hash_and_larger_ones_contain_it(corpus: Corpus) -> None:
    def keys(fraction: float) -> set[str]:
        stage, items = ingest.plan(corpus, Trial(sample_fraction=fraction))
        outputs = [stage.process(item) for item in items]
        return {key for output in outputs for key in output.table["key"].to_pylist()}

    tenth, half, whole = keys(0.1), keys(0.5), keys(1.0)
    assert tenth < half < whole
    assert len(half) == pytest.approx(len(whole) / 2, rel=0.35)


def test_a_trial_is_not_taken_for_the_whole(
    corpus: Corpus, capsys: pytest.CaptureFixture[str]
) -> None:
    ingested(corpus, Trial(sample_fraction=0.5))
    with pytest.raises(EvenmixError, match=r"config\.sample_fraction: 0\.5 -> null"):
        ingested(corpus, ingest.EVERYTHING)


def test_a_dry_run_says_what_would_be_read_and_writes_nothing(
    sources: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = corpora.write_recipe(tmp_path, sources)
    assert cli.main(["ingest", str(recipe), "--dry-run", "--dataset", "shapes"]) == 0
    num_bytes = sum(path.stat().st_size for path in (sources / "shapes").iterdir())
    assert capsys.readouterr().out == (
        f"shapes: webdataset at {sources}/shapes/*.tar\n"
        f"  2 files, {num_bytes:,} bytes, into 2 shards of {tmp_path}/corpus\n"
    )
    assert cli.main(["ingest", str(recipe), "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert f"photographs: folder at {sources}/photographs\n  24 files, " in shown
    assert not (tmp_path / "corpus").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "name a recipe, or a dataset of the catalogue with --dataset NAME --root R"),
        (["--dataset", "redcaps"], "with --dataset NAME --root R"),
        (["--dataset", "redcap", "--root", "R"], "did you mean 'redcaps'?"),
        (["RECIPE", "--dataset", "shape"], "has no dataset shape, only shapes, photographs, lines"),
        (["RECIPE", "--limit", "0"], "--limit 0: at least one record is needed"),
        (["RECIPE", "--sample-fraction", "1.5"], "--sample-fraction 1.5: above 0, at most 1"),
        (["RECIPE", "--retry"], "not finished; run the command without --retry first"),
        (["--runner", "DataflowRunner"], "DataflowRunner is no recipe"),
    ],
)
def test_a_wrong_command_line_is_explained(
    sources: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    recipe = str(corpora.write_recipe(tmp_path, sources))
    given = [recipe if argument == "RECIPE" else argument for argument in arguments]
    assert cli.main(["ingest", *given]) == 1
    assert message in capsys.readouterr().err
    assert read_summary(f"{tmp_path}/corpus", "images", "shapes") is None
