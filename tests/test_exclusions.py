"""A picture on the list of exclusions is in no shard that is made from then on."""

import hashlib
from pathlib import Path

import pytest

from pipeline import ingest, storage
from pipeline.errors import EvenmixError
from pipeline.exclusions import Exclusions, load_exclusions
from pipeline.receipts import Counts
from pipeline.recipe import Corpus
from pipeline.records import key_of
from tests.pictures import save, smooth
from tests.stages import run_here

PICTURES = {f"{number}.png": save(smooth(40, 40 + number), "PNG") for number in range(5)}
KEY = key_of("d", "0.png")
SHA256 = hashlib.sha256(PICTURES["2.png"]).hexdigest()


def write(path: Path, *lines: str) -> str:
    path.write_text("\n".join(lines), encoding="utf-8")
    return str(path)


def test_a_list_names_pictures_by_key_id_url_and_hash(tmp_path: Path) -> None:
    url = "https://example.org/a.jpg#top"
    listed = load_exclusions(
        write(
            tmp_path / "list",
            "# taken down in May",
            "",
            f"key {KEY}   # by letter",
            "source_id d a picture.png",
            f"url {url}",
            f"sha256 {SHA256}",
        )
    )
    assert listed.reason(KEY) == "key"
    assert listed.reason(key_of("d", "a picture.png")) == "key"
    assert listed.reason(key_of("e", "a picture.png")) is None
    assert listed.reason(None, (None, url)) == "url"
    assert listed.reason(None, ("https://example.org/a.jpg",)) is None
    assert listed.reason(None, (), ("0" * 64, SHA256)) == "sha256"


def test_without_a_list_nothing_is_excluded() -> None:
    assert load_exclusions(None) == Exclusions()
    assert Exclusions().reason(None, (None,), ()) is None


def test_lines_that_say_nothing_are_all_named(tmp_path: Path) -> None:
    url = write(tmp_path / "list", "key abc", f"key {KEY}", "d 0.png", "source_id d", "sha256")
    with pytest.raises(EvenmixError) as caught:
        load_exclusions(url)
    assert str(caught.value) == "\n".join(
        [
            f"{url}: not a key, source_id, url or sha256 with its value:",
            "  line 1: 'key abc'",
            "  line 3: 'd 0.png'",
            "  line 4: 'source_id d'",
            "  line 5: 'sha256'",
        ]
    )


def test_an_ingest_leaves_out_what_is_listed_when_it_runs(tmp_path: Path) -> None:
    for name, data in PICTURES.items():
        storage.publish(f"{tmp_path}/in/{name}", data)
    document = {
        "root": f"{tmp_path}/R",
        "datasets": {
            "d": {"layout": "folder", "source": f"{tmp_path}/in", "licence": "CC0 1.0"},
        },
        "exclusions": write(tmp_path / "before", f"key {KEY}"),
        "images": {"min_short_edge_px": 32},
    }
    stage, items = ingest.plan(Corpus.model_validate(document))
    summary = run_here(stage, items)["d"]
    assert summary.counts == Counts(5, 4, {"excluded": 1})
    (item,) = items
    ledger = storage.read_parquet(f"{tmp_path}/R/images/d/{item.shard}.rejected.parquet")
    assert ledger.select(["key", "reason", "detail", "retryable"]).to_pylist() == [
        {"key": KEY, "reason": "excluded", "detail": "by its key", "retryable": False}
    ]

    # The list grows. What is published stays as it is, since mixtures honour the list too.
    document["exclusions"] = write(tmp_path / "after", f"key {KEY}", f"sha256 {SHA256}")
    stage, items = ingest.plan(Corpus.model_validate(document))
    assert run_here(stage, items)["d"] == summary
