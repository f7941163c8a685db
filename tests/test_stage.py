"""A stage does what is missing and nothing else, and says what stands in its way."""

import io
import tarfile
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import Any

import pyarrow as pa
import pytest

from pipeline import publishing, storage
from pipeline.beam_job import RunnerOptions
from pipeline.errors import EvenmixError
from pipeline.publishing import publish_item
from pipeline.receipts import Counts, checksum, fingerprint, read_receipt
from pipeline.run import run_stage
from pipeline.stage import (
    OBSERVED_SUFFIX,
    WorkItem,
    finish,
    item_identity,
    lines_of_work_list,
    make_plan,
    read_line,
    read_work_list,
    write_work_lists,
)
from pipeline.summary import Summary, finished_shards, read_summary
from tests.stages import Words, items

ONE_WORKER = RunnerOptions(workers=1)


@pytest.fixture(params=["local", "gs"])
def root(request: pytest.FixtureRequest) -> str:
    """An empty root in each kind of store."""
    if request.param == "gs":
        return str(request.getfixturevalue("gcs_bucket"))
    return str(request.getfixturevalue("tmp_path"))


def contents(root: str) -> dict[str, bytes]:
    """Return every file below a root, but notes of times."""
    return {
        file.name: storage.read_bytes(file.url)
        for file in storage.list_files(root)
        if not file.name.startswith("notes/runs/")
    }


def publish_all(stage: Words, work: list[WorkItem]) -> None:
    for item in work:
        publish_item(stage, item)


def test_an_item_publishes_tar_rejects_and_receipt(root: str) -> None:
    stage = Words(root, min_length=2)
    publish_item(stage, *items("a"))

    files = contents(f"{root}/words/d")
    assert list(files) == ["a.parquet", "a.rejected.parquet", "a.tar"]
    with tarfile.open(fileobj=io.BytesIO(files["a.tar"])) as tar:
        assert tar.getnames() == ["abb.txt", "ccccc.txt"]
    assert storage.read_parquet(f"{root}/words/d/a.parquet").to_pydict() == {
        "key": ["abb", "ccccc"]
    }
    rejected = storage.read_parquet(f"{root}/words/d/a.rejected.parquet", ["key", "reason"])
    assert rejected.to_pydict() == {"key": ["a"], "reason": ["too_small"]}
    receipt = read_receipt(f"{root}/words/d/a.parquet")
    assert receipt.counts == Counts(3, 2, {"too_small": 1})
    assert receipt.tar == checksum([files["a.tar"]])
    assert receipt.identity == {
        "stage": "words",
        "version": 1,
        "item": "d/a",
        "config": {"min_length": 2},
        "inputs": {"words": ["a", "abb", "ccccc"]},
    }


def test_a_finished_stage_sums_up_and_leaves_no_work_lists(root: str) -> None:
    stage = Words(root, min_length=2)
    work = [*items("a", "b"), *items("x", dataset="e")]
    write_work_lists(stage, work)
    publish_all(stage, work)
    finish(stage, work)

    summaries = {name: read_summary(root, "words", name) for name in ("d", "e")}
    assert {name: summary and summary.counts for name, summary in summaries.items()} == {
        "d": Counts(6, 4, {"too_small": 2}),
        "e": Counts(3, 2, {"too_small": 1}),
    }
    assert finished_shards(root, "words", "e", "words") == {
        "x": read_receipt(f"{root}/words/e/x.parquet").digest
    }
    shards = ["d/a", "d/b", "e/x"]
    suffixes = [".parquet", ".rejected.parquet", ".tar"]
    expected = {f"{shard}{suffix}" for shard in shards for suffix in suffixes}
    assert contents(f"{root}/words").keys() == expected | {"d/stage.json", "e/stage.json"}


def test_what_is_published_is_skipped(root: str) -> None:
    stage, work = Words(root), items("a", "b", "c")
    publish_item(stage, work[1])
    before = contents(root)

    plan = make_plan(stage, work)
    assert [item.shard for item in plan.missing] == ["a", "c"]
    assert list(plan.finished) == ["d/b"]
    # A stage that would fail if it were asked to work again.
    publish_item(Words(root, defect="was asked again"), work[1])
    assert contents(root) == before


def test_runner_of_an_item_cannot_tell_how_often_it_ran(root: str) -> None:
    """Two attempts at once, with equal bytes, end as one."""
    stage, work = Words(root, min_length=2, pause_s=0.05), items("a", "b", "c")
    start = Barrier(2)

    def attempt(_: int) -> None:
        start.wait()
        publish_all(stage, work)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(attempt, range(2)))
    finish(stage, work)

    alone = Words(f"{root}/alone", min_length=2)
    publish_all(alone, work)
    finish(alone, work)
    assert contents(f"{root}/words") == contents(f"{root}/alone/words")


@pytest.mark.parametrize("change", [{"min_length": 2}, {"version": 2}])
def test_other_settings_are_refused_with_what_differs(root: str, change: dict[str, Any]) -> None:
    work = items("a", "b")
    publish_all(Words(root), work)
    ((name, value),) = change.items()
    place = {"min_length": "config.min_length", "version": "version"}[name]
    expected = (
        f"{root}/words/d/a.parquet was made in another way ({place}: 1 -> {value}). Repeat the "
        "options and sources that it was made with; or, for other work, take another root or "
        "another name (of the dataset, dedup.name, a caption set's, mixture.name), or remove that "
        "folder. After `evenmix ingest --retry` dedup and mixture need new names."
    )
    changed = Words(root, **change)
    with pytest.raises(EvenmixError) as caught:
        make_plan(changed, work)
    assert str(caught.value) == expected
    # The same on a worker, whose plan was made before the other build published.
    with pytest.raises(EvenmixError) as caught:
        publish_item(changed, work[0])
    assert str(caught.value) == expected
    # And at the end, if no attempts met.
    with pytest.raises(EvenmixError) as caught:
        finish(changed, work)
    assert str(caught.value) == expected
    finish(Words(root), work)
    with pytest.raises(EvenmixError) as caught:
        make_plan(changed, work)
    assert str(caught.value) == expected


def test_other_inputs_are_refused(root: str) -> None:
    publish_all(Words(root), items("a", "b"))
    with pytest.raises(
        EvenmixError, match="made from inputs that this run does not have"
    ) as caught:
        make_plan(Words(root), items("a"))
    assert str(caught.value).startswith(f"{root}/words/d/b.parquet")
    with pytest.raises(EvenmixError, match="made from inputs that this run does not have"):
        finish(Words(root), items("a"))
    assert read_summary(root, "words", "d") is None


def test_inputs_of_a_finished_dataset_cannot_grow(root: str) -> None:
    publish_all(Words(root), items("a"))
    finish(Words(root), items("a"))
    with pytest.raises(EvenmixError, match=r"have grown by 1 shards \(b\.\.\.\)"):
        make_plan(Words(root), items("a", "b"))


def test_a_commit_that_was_removed_is_missed(root: str) -> None:
    work = items("a", "b")
    publish_all(Words(root), work)
    finish(Words(root), work)
    storage.remove(f"{root}/words/d/a.parquet")
    # A plan reads one file when all is well; a change makes it look at each.
    with pytest.raises(EvenmixError, match=r"a\.parquet is listed in its folder's stage\.json"):
        make_plan(Words(root, version=2), work)


def test_lost_records_stop_the_stage(root: str) -> None:
    with pytest.raises(AssertionError, match="words d/a lost records"):
        publish_item(Words(root, loses=1), *items("a"))
    assert contents(root) == {}


def test_an_item_without_commit_cannot_be_finished(root: str) -> None:
    publish_all(Words(root), items("a"))
    with pytest.raises(EvenmixError, match="words: 2 shards of d were not published, such as b"):
        finish(Words(root), items("a", "b", "c"))
    assert read_summary(root, "words", "d") is None


def test_what_a_killed_run_left_without_commit_is_replaced_or_swept(root: str) -> None:
    """A run with other settings was killed between an item's tar, its rejects and its commit."""
    folder = f"{root}/words/d"
    work = items("a", "b")
    for name in ["a.tar", "a.rejected.parquet", "other.tar", "other.rejected.parquet"]:
        storage.publish(f"{folder}/{name}", b"left over")
    storage.publish(f"{folder}/{storage.TEMPORARY_PREFIX}0123-b.tar", b"left over")
    write_work_lists(Words(root), items("z"))

    publish_all(Words(root), work)
    finish(Words(root), work)

    fresh = Words(f"{root}/fresh")
    publish_all(fresh, work)
    finish(fresh, work)
    assert contents(f"{root}/words") == contents(f"{root}/fresh/words")


def test_a_committed_tar_is_there_at_every_moment(
    root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While one attempt replaces a leftover, an equal attempt does so and commits.

    The first must not remove the tar that is now committed: it might be killed before it puts
    its own there.
    """
    stage, (item,) = Words(root), items("a")
    folder = f"{root}/words/d"
    storage.publish(f"{folder}/a.tar", b"left over")
    replace = storage.replace

    def overtaken(url: str, data: bytes) -> None:
        monkeypatch.undo()
        publish_item(stage, item)
        replace(url, data)

    monkeypatch.setattr(storage, "replace", overtaken)
    monkeypatch.setattr(storage, "remove", lambda url: pytest.fail(f"removed {url}"))
    publish_item(stage, item)
    monkeypatch.undo()
    receipt = read_receipt(f"{folder}/a.parquet")
    assert receipt.tar == checksum(storage.read_chunks(f"{folder}/a.tar"))


def test_a_commit_whose_tar_was_taken_for_a_leftover_is_told(
    root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A job that everybody thought dead, with other settings, commits at the worst moment."""
    stage, older, work = Words(root, min_length=2), Words(root), items("a")
    observed, tar = f"{root}/words/d/a{OBSERVED_SUFFIX}", f"{root}/words/d/a.tar"
    made_by = {publishing._MADE_BY: fingerprint(item_identity(older, work[0]))}
    storage.publish(observed, storage.parquet_bytes(pa.table({"n": [1]}), made_by))
    storage.publish(tar, b"observed")
    plan, remove = make_plan(stage, work), storage.remove

    def overtaken(url: str) -> None:
        if url == tar:
            publish_item(older, work[0])
        remove(url)

    monkeypatch.setattr(storage, "remove", overtaken)
    with pytest.raises(EvenmixError, match=r"published .*/a\.parquet while its tar was removed"):
        publishing.remove_leftovers(stage, plan)


def test_work_lists_carry_items_and_go_with_their_dataset(root: str) -> None:
    stage = Words(root)
    ours, theirs = items("a", "b"), items("x", dataset="e")
    (our_list,) = write_work_lists(stage, ours)
    (their_list,) = write_work_lists(stage, theirs)
    assert read_work_list(our_list) == ours
    lines = lines_of_work_list(our_list)
    assert [read_line(line) for line in lines] == ours
    publish_all(stage, ours)
    finish(stage, ours)
    assert read_work_list(our_list) == []
    assert lines_of_work_list(our_list) == []
    assert [read_line(line) for line in lines] == [None, None]
    assert read_work_list(their_list) == theirs


def test_a_stage_is_resumed_and_then_has_nothing_to_do(
    root: str, capsys: pytest.CaptureFixture[str]
) -> None:
    stage, work = Words(root, min_length=2), items("a", "b", "c")
    publish_item(stage, work[0])
    first = contents(root)
    summaries = run_stage(stage, work, ONE_WORKER)
    assert "words: 1 of 3 items are published already" in capsys.readouterr().err
    assert summaries["d"].counts == Counts(9, 6, {"too_small": 3})
    complete = contents(root)
    assert complete.items() >= first.items()
    assert sorted(complete) == [
        *[f"words/d/{s}{e}" for s in "abc" for e in (".parquet", ".rejected.parquet", ".tar")],
        "words/d/stage.json",
    ]

    # Killed after its last commit and before its end, it has still something to sweep.
    storage.publish(f"{root}/words/d/{storage.TEMPORARY_PREFIX}0123-stage.json", b"{")
    assert run_stage(stage, work, ONE_WORKER) == summaries
    assert capsys.readouterr().err == f"words: {root}/words is complete; nothing to do\n"
    assert contents(root) == complete


def test_the_order_of_items_does_not_matter(root: str) -> None:
    run_stage(Words(f"{root}/1"), items("a", "b", "c"), ONE_WORKER)
    run_stage(Words(f"{root}/2"), items("c", "a", "b"), ONE_WORKER)
    assert contents(f"{root}/1") == contents(f"{root}/2")


def test_summary_survives_json() -> None:
    summary = Summary("s", "d", {"a": {"digest": "x"}}, Counts(2, 1, {"r": 1}))
    assert Summary.from_json(summary.to_json()) == summary


def test_later_stages_need_a_finished_one(root: str) -> None:
    publish_all(Words(root), items("a"))
    with pytest.raises(EvenmixError, match="missing or not finished; run `evenmix words` first"):
        finished_shards(root, "words", "d", "words")


def test_a_file_of_another_program_is_refused(root: str) -> None:
    table = pa.table({"key": ["a"]})
    storage.publish(f"{root}/words/d/a.parquet", storage.parquet_bytes(table, {}))
    with pytest.raises(EvenmixError, match=r"a\.parquet was not written by evenmix"):
        make_plan(Words(root), items("a"))


def test_a_finished_generation_leaves_the_next_one_its_work_list(root: str) -> None:
    stage, work, retried = Words(root), items("a"), items("a.r1")
    publish_all(stage, work)
    finish(stage, work)
    (work_list,) = write_work_lists(stage, retried)
    storage.publish(f"{root}/words/d/.temporary-0123-a.r1.tar", b"on its way")
    run_stage(stage, work, ONE_WORKER)
    assert read_work_list(work_list) == retried
    publish_all(stage, retried)
    finish(stage, retried)
    assert contents(f"{root}/words/d").keys() == {
        *("a.parquet", "a.tar", "stage.json", "a.r1.parquet", "a.r1.tar", "stage.r1.json")
    }


def test_a_damaged_summary_is_named(root: str) -> None:
    stage, work = Words(root), items("a")
    publish_all(stage, work)
    finish(stage, work)
    storage.replace(f"{root}/words/d/stage.json", b"{}")
    with pytest.raises(EvenmixError, match=r"stage\.json is damaged .* remove it"):
        make_plan(stage, work)
