"""Ingest of a URL list: what is had, what is not and why, and what a retry gets of it."""

import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from captioning.from_source import SourceCaptioning
from pipeline import addresses, ingest, judge, storage
from pipeline.dry_run import print_dry_run
from pipeline.errors import EvenmixError
from pipeline.publishing import publish_item
from pipeline.receipts import Counts, read_receipt
from pipeline.recipe import Corpus, SourceCaptions
from pipeline.records import key_of
from pipeline.retry import retry_items
from pipeline.stage import WorkItem
from pipeline.summary import finished_shards, read_generation, read_summary
from pipeline.verify import verify
from tests.pictures import save, smooth
from tests.site import Site, serve
from tests.stages import run_here

GOOD = {f"/{number}.jpg": save(smooth(40, 40 + number), "JPEG") for number in range(6)}
RETRY = {"unavailable": 2, "http_error": 1, "opted_out": 1, "placeholder": 1, "not_an_image": 1}


@pytest.fixture
def site() -> Iterator[Site]:
    """Six good pictures, and one of each thing that can be wrong."""
    with serve() as site:
        site.answers = {path: (200, body, {}) for path, body in GOOD.items()}
        site.answers |= {
            "/busy.jpg": (503, b"later", {}),
            "/broken.jpg": (500, b"oops", {}),
            "/mine.jpg": (200, GOOD["/0.jpg"], {"X-Robots-Tag": "noai"}),
            "/page.jpg": (200, b"<html>hello</html>", {}),
            "/moved.jpg": (302, b"", {"Location": "/removed.png"}),
            "/removed.png": (200, save(smooth(50, 50), "PNG"), {}),
        }
        yield site


PATHS = [*GOOD, "/busy.jpg", "/broken.jpg", "/mine.jpg", "/page.jpg", "/moved.jpg", "/gone.jpg"]


def corpus(folder: Path, site: Site, **changes: Any) -> Corpus:
    """Return a corpus of one URL list, which is written if it is not there yet."""
    source = folder / "urls.parquet"
    if not source.exists():
        rows = [{"id": path[1:-4], "url": site.url + path, "by": "me"} for path in PATHS]
        pq.write_table(pa.Table.from_pylist(rows), source)
    dataset = {
        "layout": "url_list",
        "source": str(source),
        "licence": "CC0 1.0",
        "id_rule": "{id}",
        "image_url": "{url}",
        "extra_fields": ["by"],
        "placeholder_urls": ["*/removed.png"],
    }
    document = {
        "root": str(folder / "R"),
        "datasets": {"web": dataset},
        "images": {"min_short_edge_px": 32, "records_per_shard": 5},
        "fetch": {"attempts": 2, "backoff_s": 0, "allow_private_addresses": True},
    }
    return Corpus.model_validate(document | changes)


def run(corpus: Corpus) -> None:
    stage, items = ingest.plan(corpus)
    run_here(stage, items)


def retry(corpus: Corpus) -> int:
    """Try again; return the number of shards of the new generation."""
    stage, items = ingest.plan(corpus)
    items = retry_items(stage, items)
    if items:
        run_here(stage, items)
    return len(items)


def rows_of(corpus: Corpus, pattern: str) -> list[dict[str, Any]]:
    files = storage.glob_files(f"{corpus.root}/images/web/{pattern}")
    return [row for file in files for row in storage.read_parquet(file.url).to_pylist()]


def test_every_url_is_kept_or_in_the_ledger(tmp_path: Path, site: Site) -> None:
    asked = corpus(tmp_path, site)
    run(asked)

    summary = read_summary(asked.root, "images", "web")
    assert summary is not None
    assert summary.counts == Counts(12, 6, dict(sorted(RETRY.items())))
    kept = rows_of(asked, "urls-00000000?.parquet")
    assert {row["source_id"]: row["source_url"] for row in kept} == {
        path[1:-4]: site.url + path for path in GOOD
    }
    assert {row["fields"] for row in kept} == {'{"by": "me"}'}
    ledger = {row["source_id"]: row for row in rows_of(asked, "*.rejected.parquet")}
    assert {name: (row["attempts"], row["retryable"]) for name, row in ledger.items()} == {
        "busy": (2, True),
        "broken": (2, True),
        "mine": (1, False),
        "page": (1, False),
        "moved": (1, False),
        "gone": (1, False),
    }
    assert ledger["gone"]["source_url"] == f"{site.url}/gone.jpg"
    assert ledger["gone"]["key"] == key_of("web", "gone")
    fetched = rows_of(asked, "*.fetch.parquet")
    assert {row["url"][len(site.url) :]: row["outcome"] for row in fetched} == {
        **dict.fromkeys(GOOD, "kept"),
        "/busy.jpg": "unavailable",
        "/broken.jpg": "unavailable",
        "/mine.jpg": "opted_out",
        "/page.jpg": "not_an_image",
        "/moved.jpg": "placeholder",
        "/gone.jpg": "http_error",
    }
    assert site.asked.count("/gone.jpg") == site.asked.count("/mine.jpg") == 1
    _, findings = verify(asked.root, deep=True)
    assert findings == []


def test_a_retry_asks_only_for_what_may_be_had(tmp_path: Path, site: Site) -> None:
    asked = corpus(tmp_path, site)
    run(asked)
    before = {f.name: storage.read_bytes(f.url) for f in storage.list_files(asked.root)}

    site.asked.clear()
    site.answers["/busy.jpg"] = (200, save(smooth(64, 64), "PNG"), {})
    assert retry(asked) == 1
    assert sorted(site.asked) == ["/broken.jpg", "/broken.jpg", "/busy.jpg"]
    after = {f.name: storage.read_bytes(f.url) for f in storage.list_files(asked.root)}
    assert before.items() <= after.items()
    (kept,) = rows_of(asked, "*.r1.parquet")
    assert kept["source_id"] == "busy"
    (left,) = rows_of(asked, "*.r1.rejected.parquet")
    assert (left["source_id"], left["attempts"], left["retryable"]) == ("broken", 4, True)
    generation = read_generation(asked.root, "images", "web", 1)
    assert generation is not None
    assert generation.counts == Counts(2, 1, {"unavailable": 1}, {"unavailable": 2})
    summary = read_summary(asked.root, "images", "web")
    assert summary is not None
    assert summary.counts == Counts(12, 7, dict(sorted((RETRY | {"unavailable": 1}).items())))

    # What can never be had is not asked for again, and no generation is empty.
    site.answers["/broken.jpg"] = (410, b"gone for good", {})
    assert retry(asked) == 1
    site.asked.clear()
    assert retry(asked) == 0
    assert site.asked == []
    summary = read_summary(asked.root, "images", "web")
    assert summary is not None
    assert summary.counts.rejected == {
        **{reason: n for reason, n in RETRY.items() if reason != "unavailable"},
        "http_error": 2,
    }
    recounted, findings = verify(asked.root, deep=True)
    assert findings == []
    assert recounted["images/web"] == summary.counts
    # The first run is complete as it was.
    run(asked)


def test_pictures_beyond_the_memory_of_a_shard_are_left_for_a_retry(
    tmp_path: Path, site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Room for two of the pictures: each generation of a shard takes what fits.
    largest = max(map(len, GOOD.values()))
    monkeypatch.setattr(judge, "SHARD_ROOM_BYTES", 2 * largest)
    everything = corpus(tmp_path, site)
    run(everything)
    num_kept = []
    while (summary := read_summary(everything.root, "images", "web")) is not None:
        num_kept.append(summary.counts.records_out)
        if "shard_full" not in summary.counts.rejected:
            break
        retry(everything)
    assert num_kept == sorted(set(num_kept))
    assert len(num_kept) > 1
    assert num_kept[-1] == len(GOOD)
    index = rows_of(everything, "[!.]*[0-9].parquet") + rows_of(everything, "*.r?.parquet")
    assert {row["source_id"] for row in index} == {path[1:-4] for path in GOOD}


def test_the_stages_after_ingest_follow_a_retry(tmp_path: Path, site: Site) -> None:
    asked = corpus(tmp_path, site)
    run(asked)
    captioning = SourceCaptioning(asked.root, "own", SourceCaptions(engine="source"))

    def caption() -> Counts:
        shards = finished_shards(asked.root, "images", "web", "ingest")
        work = [WorkItem("web", shard, {"images": digest}) for shard, digest in shards.items()]
        return run_here(captioning, work)["web"].counts

    assert caption().records_in == 6
    before = storage.list_files(f"{asked.root}/captions")
    site.answers["/busy.jpg"] = site.answers["/2.jpg"]
    retry(asked)
    assert caption().records_in == 7
    after = storage.list_files(f"{asked.root}/captions")
    assert set(before) <= set(after)
    assert {file.name for file in after} - {file.name for file in before} == {
        "own/web/stage.r1.json",
        "own/web/urls-000000005.r1.parquet",
    }
    assert verify(asked.root, deep=False)[1] == []


def test_of_records_with_one_id_the_first_that_is_had_is_kept(tmp_path: Path, site: Site) -> None:
    rows = [{"id": name, "url": f"{site.url}/{n}.jpg", "by": ""} for n, name in enumerate("aaba")]
    rows[0]["url"] = f"{site.url}/gone.jpg"
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "urls.parquet")
    asked = corpus(tmp_path, site)
    stage, (item,) = ingest.plan(asked)
    publish_item(stage, item)
    shard = f"{asked.root}/images/web/{item.shard}"
    index = storage.read_parquet(f"{shard}.parquet")
    assert index["locator"].to_pylist() == ["urls.parquet:1", "urls.parquet:2"]
    ledger = {row["locator"]: row["reason"] for row in rows_of(asked, "*.rejected.parquet")}
    assert ledger == {"urls.parquet:0": "http_error", "urls.parquet:3": "duplicate_id"}

    # It is the same if another attempt finds the tar alone.
    for suffix in (".parquet", ".rejected.parquet"):
        storage.remove(f"{shard}{suffix}")
    run_here(stage, [item])
    assert storage.read_parquet(f"{shard}.parquet") == index
    assert verify(asked.root, deep=True)[1] == []


def test_a_retry_may_be_about_dead_servers_alone(tmp_path: Path, site: Site) -> None:
    paths = [f"/{number}" for number in range(30)]
    urls = [f"http://127.0.0.1:1{path}" for path in paths] + [f"{site.url}/0.jpg"]
    rows = [{"id": str(n), "url": url, "by": ""} for n, url in enumerate(urls)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "urls.parquet")
    asked = corpus(tmp_path, site, images={"min_short_edge_px": 32})
    run(asked)
    assert retry(asked) == 1
    ledger = rows_of(asked, "*.r1.rejected.parquet")
    assert {(row["reason"], row["attempts"]) for row in ledger} == {("connection_failed", 4)}
    summary = read_summary(asked.root, "images", "web")
    assert summary is not None
    assert summary.counts == Counts(31, 1, {"connection_failed": 30})


def test_names_that_all_seem_not_to_exist_stop_the_run(
    tmp_path: Path, site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So it is where there is no network at all."""

    def look_up(host: str) -> list[str]:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(addresses, "look_up", look_up)
    rows = [{"id": str(n), "url": f"http://{n}.example/", "by": ""} for n in range(30)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "urls.parquet")
    asked = corpus(tmp_path, site, images={"min_short_edge_px": 32})
    with pytest.raises(EvenmixError, match="of 30 downloads not one reached a server"):
        run(asked)
    assert not storage.exists(f"{asked.root}/images/web/stage.json")


def test_a_dry_run_of_a_retry_counts_what_it_would_ask_for(
    tmp_path: Path, site: Site, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = corpus(tmp_path, site)
    run(asked)
    stage, items = ingest.plan(asked)
    print_dry_run(stage, retry_items(stage, items))
    assert "of them the 2 records that may be had now" in capsys.readouterr().out


def test_a_retry_waits_for_the_first_run(tmp_path: Path, site: Site) -> None:
    with pytest.raises(EvenmixError, match="web: not finished; run the command without --retry"):
        retry(corpus(tmp_path, site))


@pytest.mark.parametrize("cut_after", ["tar", "rejected"])
def test_a_shard_is_completed_from_what_a_killed_attempt_published(
    tmp_path: Path, site: Site, cut_after: str
) -> None:
    """The pictures of the first attempt count, even if the second one gets others."""
    asked = corpus(tmp_path, site, images={"min_short_edge_px": 32})
    stage, (item,) = ingest.plan(asked)
    publish_item(stage, item)
    shard = f"{asked.root}/images/web/{item.shard}"
    whole = storage.read_bytes(f"{shard}.parquet")
    tar = storage.read_bytes(f"{shard}.tar")
    for suffix in [".parquet", ".fetch.parquet"] + [".rejected.parquet"] * (cut_after == "tar"):
        storage.remove(f"{shard}{suffix}")

    site.answers["/busy.jpg"] = site.answers["/2.jpg"]
    del site.answers["/0.jpg"]
    publish_item(stage, item)
    assert storage.read_bytes(f"{shard}.tar") == tar
    receipt = read_receipt(f"{shard}.parquet")
    assert receipt.counts.is_conserved()
    assert receipt.counts.records_out == 6
    ledger = {row["source_id"]: row for row in rows_of(asked, "*.rejected.parquet")}
    # This attempt had got it, and the next one can.
    assert ledger["busy"]["reason"] == "unavailable"
    assert ledger["busy"]["retryable"]
    if cut_after == "rejected":
        assert storage.read_bytes(f"{shard}.parquet") == whole
    run_here(stage, [item])
    assert verify(asked.root, deep=True)[1] == []


def test_two_attempts_at_once_publish_one_shard(tmp_path: Path, site: Site) -> None:
    """Each picture is there for one of the two attempts only, so what they have differs."""
    asked = corpus(tmp_path, site, images={"min_short_edge_px": 32})
    stage, (item,) = ingest.plan(asked)
    site.once = set(GOOD)
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda _: publish_item(stage, item), range(2)))

    receipt = read_receipt(f"{asked.root}/images/web/{item.shard}.parquet")
    assert receipt.counts.records_in == len(PATHS)
    run_here(stage, [item])
    assert verify(asked.root, deep=True)[1] == []


def test_what_another_setting_left_behind_is_replaced(tmp_path: Path, site: Site) -> None:
    asked = corpus(tmp_path, site, images={"min_short_edge_px": 32})
    stage, (item,) = ingest.plan(asked)
    publish_item(stage, item)
    shard = f"{asked.root}/images/web/{item.shard}"
    storage.remove(f"{shard}.parquet")

    stage, (item,) = ingest.plan(corpus(tmp_path, site, images={"min_short_edge_px": 41}))
    # A worker cannot know whether the other run is dead; the next run may.
    with pytest.raises(EvenmixError, match="left by a run with other settings or sources"):
        publish_item(stage, item)
    run_here(stage, [item])
    receipt = read_receipt(f"{shard}.parquet")
    assert receipt.counts.rejected["too_small"] == 6
    assert verify(asked.root, deep=True)[1] == []
