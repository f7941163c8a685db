"""Trying a dataset: its first records, a part of it by hash, or only what would be read."""

import gzip
import random
from pathlib import Path

import pytest

from pipeline import cli, ingest, readers, storage
from pipeline.errors import EvenmixError
from pipeline.ingest import Trial
from pipeline.mirror import mirror
from pipeline.recipe import Corpus, Images, load_recipe
from pipeline.summary import read_summary
from tests import corpora
from tests.http_files import serve_files
from tests.pictures import save, smooth
from tests.sources import MAX_BYTES, dataset, tar_bytes
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


@pytest.mark.parametrize("kind", ["plain", "nested", "compressed"])
def test_a_trial_of_a_dataset_that_must_be_mirrored_reads_its_beginning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Of pictures, then 20 MB that are never fetched."""
    monkeypatch.setattr(storage, "_FAR_BUFFER_BYTES", 1 << 20)
    rest = random.Random(0).randbytes(20 << 20)
    members = [(f"birds/{n}.png", save(smooth(300 + n, 300), "PNG")) for n in range(6)]
    data = tar_bytes([*members, ("rest.bin", rest)])
    if kind == "nested":
        data = tar_bytes([("a.tar", tar_bytes(members)), ("b.tar", rest)])
    name = "birds.tar.gz" if kind == "compressed" else "birds.tar"
    data = gzip.compress(data, compresslevel=1) if kind == "compressed" else data
    (tmp_path / name).write_bytes(data)
    with serve_files(tmp_path) as server:
        birds = {"layout": "tar", "source": server.url(name), "licence": "CC0", "mirror": True}
        document = {"root": str(tmp_path / "R"), "datasets": {"birds": birds}}
        corpus = Corpus.model_validate(document)
        with pytest.raises(EvenmixError, match="run `evenmix mirror birds` first"):
            ingest.plan(corpus)
        stage, items = ingest.plan(corpus, Trial(limit=4))
        counts = run_here(stage, items)["birds"].counts
    assert (counts.records_in, counts.records_out) == (4, 4)
    assert sum(last - first + 1 for first, last in server.ranges) < 10 << 20
    prefix = "a/" if kind == "nested" else ""
    (shard,) = (tmp_path / "R/images/birds").glob("*0.parquet")
    found = storage.read_parquet(str(shard))["source_id"].to_pylist()
    assert found == [f"{prefix}birds/{n}.png" for n in range(4)]


def test_a_trial_reads_a_mirror_that_is_there(tmp_path: Path) -> None:
    path = tmp_path / "birds.tar.gz"
    members = [(f"{n}.png", save(smooth(300 + n, 300), "PNG")) for n in range(6)]
    path.write_bytes(gzip.compress(tar_bytes(members)))
    birds = {"layout": "tar", "source": str(path), "licence": "CC0", "mirror": True}
    corpus = Corpus.model_validate({"root": str(tmp_path / "R"), "datasets": {"birds": birds}})
    mirror(corpus.root, "birds", corpus.datasets["birds"], {})
    path.unlink()
    stage, items = ingest.plan(corpus, Trial(limit=4))
    assert run_here(stage, items)["birds"].counts.records_out == 4


def test_a_database_far_away_cannot_be_tried_without_a_mirror(tmp_path: Path) -> None:
    (tmp_path / "a.sql").write_bytes(bytes(4096))
    with serve_files(tmp_path) as server:
        photos = {"catalog": "yfcc", "source": server.url("a.sql")}
        document = {"root": str(tmp_path / "R"), "datasets": {"photos": photos}}
        with pytest.raises(EvenmixError) as caught:
            ingest.plan(Corpus.model_validate(document), Trial(limit=4))
        assert str(caught.value) == (
            f"{server.url('a.sql')} (4,096 bytes) is not a local file, and SQLite reads no other; "
            "`evenmix mirror photos` makes Parquet of it, once, that every worker can read"
        )


@pytest.mark.parametrize("name", ["a.tar.gz", "a.tgz", "a.tar.xz"])
def test_a_compressed_tar_that_is_no_gzip_or_is_cut(tmp_path: Path, name: str) -> None:
    tar = tar_bytes([("1.jpg", random.Random(0).randbytes(5000)), ("2.jpg", b"x")])
    (tmp_path / name).write_bytes(gzip.compress(tar)[:3000] if name == "a.tar.gz" else b"no gzip")
    spec = dataset("tar", tmp_path / name)
    expected = "is compressed" if name == "a.tar.xz" else "cannot be decompressed"
    with pytest.raises(EvenmixError, match=rf"{name} {expected}"):
        for item in readers.plan("d", spec, Images(), is_trial=True):
            list(readers.read(spec, item, MAX_BYTES))


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
