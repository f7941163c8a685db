"""Progress counts what is published, and asks no more of a store than it must."""

from itertools import count
from pathlib import Path
from types import SimpleNamespace

import pytest

from pipeline import progress
from pipeline.errors import EvenmixError
from pipeline.progress import Progress
from pipeline.publishing import publish_item
from pipeline.stage import make_plan
from tests.gcs import Proxy
from tests.stages import Words, items


@pytest.fixture(autouse=True)
def an_hour_passes_at_each_look(monkeypatch: pytest.MonkeyPatch) -> None:
    """So every update looks, and prints."""
    hours = count()
    clock = SimpleNamespace(monotonic=lambda: 3600.0 * next(hours))
    monkeypatch.setattr(progress, "time", clock)
    monkeypatch.setattr(progress, "_POLL_TIME_SHARE", 1.0)


def test_progress_is_of_what_is_published(
    gcs_server: Proxy, gcs_bucket: str, capsys: pytest.CaptureFixture[str]
) -> None:
    stage = Words(gcs_bucket, min_length=2)
    work = [*items("a", "b", "c"), *items("x", dataset="e")]
    shown = Progress(stage, make_plan(stage, work))
    for done, item in enumerate(work):
        gcs_server.requests.clear()
        shown.update()
        assert f"words: {done}/4 items, {3 * done} records" in (line := capsys.readouterr().err)
        assert f"{2 * done} kept, {done} rejected" in line
        # Both datasets are listed, and the receipt of what is new is read.
        assert len(gcs_server.requests) == 2 + (1 if done else 0)
        publish_item(stage, item)
    gcs_server.requests.clear()
    shown.update()
    assert len(gcs_server.requests) == 1 + 1  # of the first dataset all is known
    gcs_server.requests.clear()
    capsys.readouterr()
    shown.update()
    assert "words: 4/4 items, 12 records" in capsys.readouterr().err
    assert gcs_server.requests == []


def test_of_many_new_items_some_are_counted(
    gcs_server: Proxy,
    gcs_bucket: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(progress, "_RECEIPTS_A_POLL", 2)
    stage, work = Words(gcs_bucket, min_length=2), items("a", "b", "c", "d", "e")
    shown = Progress(stage, make_plan(stage, work))
    for item in work:
        publish_item(stage, item)
    gcs_server.requests.clear()
    shown.update()
    assert "words: 5/5 items, about 15 records" in (line := capsys.readouterr().err)
    assert "10 kept, 5 rejected" in line
    assert len(gcs_server.requests) == 1 + 2


def test_what_somebody_publishes_in_another_way_is_not_waited_for(tmp_path: Path) -> None:
    stage, work = Words(str(tmp_path), min_length=2), items("a", "b")
    shown = Progress(stage, make_plan(stage, work))
    shown.update()
    publish_item(Words(str(tmp_path), min_length=3), work[0])
    with pytest.raises(EvenmixError, match=r"a\.parquet was made in another way .*min_length"):
        shown.update()
