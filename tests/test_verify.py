"""Verify recounts from the files, and names each file that is not as it was published."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline import ingest
from pipeline.beam_job import RunnerOptions
from pipeline.dataset import Dataset
from pipeline.mirror import mirror
from pipeline.receipts import Counts
from pipeline.recipe import Recipe
from pipeline.verify import verify
from tests.pictures import save, smooth

COUNTS = Counts(4, 3, {"not_an_image": 1})


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A finished corpus of two shards; the second has a rejected record."""
    source = tmp_path / "in"
    source.mkdir()
    for number in range(3):
        (source / f"{number}.png").write_bytes(save(smooth(32 + number, 40), "PNG"))
    (source / "3.png").write_text("no picture")
    recipe = Recipe.model_validate(
        {
            "root": str(tmp_path / "R"),
            "datasets": {"d": {"layout": "folder", "source": str(source), "licence": "CC0 1.0"}},
            "images": {"min_short_edge_px": 8, "records_per_shard": 2},
            "captions": {"own": {"engine": "source"}},
            "mixture": {"name": "m", "resolution": 32, "captions": "own"},
        }
    )
    ingest.run_recipe(recipe, RunnerOptions(workers=1))
    return tmp_path / "R"


FIRST, SECOND = "folder-000000000", "folder-000000002"


@pytest.mark.parametrize("deep", [False, True])
def test_a_corpus_as_published_has_no_findings(root: Path, deep: bool) -> None:
    assert verify(str(root), deep) == ({"images/d": COUNTS}, [])


def test_tables_that_users_bring_are_no_leftovers(root: Path) -> None:
    table = root / "attributes/quality/d/folder-000000000.parquet"
    table.parent.mkdir(parents=True)
    table.write_bytes(b"theirs")
    assert verify(str(root), deep=False) == ({"images/d": COUNTS}, [])


def test_a_mirrored_source_is_compared_with_its_manifest(root: Path, tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(bytes(10_240))
    spec = Dataset(layout="tar", source=str(tmp_path / "a.tar"), licence="CC0 1.0", mirror=True)
    mirror(str(root), "places", spec, {})
    assert verify(str(root), deep=False) == ({"images/d": COUNTS}, [])
    part = root / "sources/places/a.tar.part-00000"
    part.write_bytes(bytes(10_239) + b"x")
    counts, (finding,) = verify(str(root), deep=False)
    assert counts == {"images/d": COUNTS}
    assert finding.startswith(f"{part}: its bytes are not those that were published")


def flip(offset: int) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        data = bytearray(path.read_bytes())
        data[offset] ^= 1
        path.write_bytes(data)

    return damage


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-600])


def other_count(path: Path) -> None:
    document = json.loads(path.read_text())
    document["counts"]["records_out"] += 1
    path.write_text(json.dumps(document))


def write_text(path: Path) -> None:
    path.write_text("left over")


DAMAGES: list[tuple[str, Callable[[Path], None], str]] = [
    (f"{FIRST}.tar", flip(600), "its bytes are not those that were published"),
    (f"{FIRST}.tar", flip(600), r"picture [0-9a-f]{32}\.png has changed"),
    (f"{FIRST}.tar", flip(3), "its pictures are not those of its index"),
    (f"{FIRST}.tar", flip(-1), "its bytes are not those that were published"),
    (f"{FIRST}.tar", cut, "its bytes are not those that were published"),
    (f"{FIRST}.tar", Path.unlink, "does not exist"),
    (f"{FIRST}.parquet", flip(60), "."),
    (f"{FIRST}.parquet", cut, "cannot be read as Parquet"),
    (f"{FIRST}.parquet", Path.unlink, "does not exist"),
    (f"{SECOND}.rejected.parquet", cut, "cannot be read as Parquet"),
    ("stage.json", other_count, "its sums .* are not those of its shards"),
    ("stage.json", write_text, "is damaged"),
    (f"{FIRST}.rejected.parquet", write_text, "belongs to no finished work"),
    ("stray.tar", write_text, "belongs to no finished work"),
    (".temporary-0123-a.tar", write_text, "belongs to no finished work"),
]


@pytest.mark.parametrize(("name", "damage", "expected"), DAMAGES)
def test_each_damage_is_found_and_its_file_named(
    root: Path, name: str, damage: Callable[[Path], None], expected: str
) -> None:
    damage(root / "images/d" / name)
    _, findings = verify(str(root), deep=False)
    pattern = rf"^{root}/images/d/{name}:? .*"
    assert any(_matches(pattern, expected, finding) for finding in findings), findings


def _matches(pattern: str, expected: str, finding: str) -> bool:
    return re.match(pattern, finding) is not None and re.search(expected, finding) is not None


def test_all_findings_are_listed_and_the_rest_recounted(root: Path) -> None:
    flip(600)(root / "images/d" / f"{FIRST}.tar")
    (root / "images/d" / f"{SECOND}.tar").unlink()
    recounted, findings = verify(str(root), deep=False)
    assert any(FIRST in finding for finding in findings)
    assert any(SECOND in finding for finding in findings)
    assert recounted["images/d"] == Counts(2, 2)


def test_a_lost_rejection_breaks_the_sums(root: Path) -> None:
    (root / "images/d" / f"{SECOND}.rejected.parquet").unlink()
    recounted, findings = verify(str(root), deep=False)
    assert recounted["images/d"] == Counts(2, 2)
    assert any(f"{SECOND}.rejected.parquet does not exist" in finding for finding in findings)
    assert any("its sums" in finding for finding in findings)


def test_no_byte_of_a_tar_can_change_unseen(root: Path) -> None:
    path = root / "images/d" / f"{FIRST}.tar"
    original = path.read_bytes()
    for offset in range(0, len(original), len(original) // 40):
        path.write_bytes(original)
        flip(offset)(path)
        assert verify(str(root), deep=False)[1], offset


def test_no_byte_of_a_summary_can_change_unseen(root: Path) -> None:
    path = root / "images/d/stage.json"
    original = path.read_bytes()
    for offset in range(0, len(original), 5):
        path.write_bytes(original)
        flip(offset)(path)
        findings = verify(str(root), deep=False)[1]
        assert any(f"{root}/images/d/" in finding for finding in findings), offset


def test_a_mixture_without_its_manifest_is_not_finished(root: Path) -> None:
    shutil.copytree(root / "images/d", root / "mixtures/m/d")
    _, findings = verify(str(root), deep=False)
    assert findings == [
        f"{root}/mixtures/m/mixture.json: {root}/mixtures/m/mixture.json does not exist"
    ]
