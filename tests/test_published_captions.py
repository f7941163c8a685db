"""Published captions find their pictures, whatever the order of either; all are counted."""

import io
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from captioning.published import files
from captioning.published import job as published
from captioning.published.join import PartPublished
from pipeline import storage
from pipeline.beam_job import RunnerOptions
from pipeline.errors import EvenmixError
from pipeline.readers.items import identities
from pipeline.receipts import Counts, read_receipt
from pipeline.recipe import PublishedCaptions, Recipe
from pipeline.records import IMAGES, INDEX
from pipeline.stage import Output, Stage, WorkItem
from pipeline.summary import Summary, read_summary
from pipeline.verify import verify
from tests.hub import Hub, Repository, point_at, serve_hub
from tests.stages import run_here

RUNNER = RunnerOptions(workers=1)
HEAD, LATER = "ab" * 20, "cd" * 20

Row = tuple[str | None, Sequence[str | None]]
"""A published row: its key and its captions."""


@dataclass(frozen=True)
class Indexes:
    """Publishes image indexes without pictures: an item's inputs are its rows."""

    root: str
    name: str = "ingest"
    version: int = 1
    folder: str = IMAGES
    resource_hints: Mapping[str, str] = field(default_factory=dict)
    items_at_once: int = 1

    def config(self, dataset: str) -> Mapping[str, Any]:
        return {}

    def process(self, item: WorkItem) -> Output:
        rows = item.inputs["rows"]
        counts = Counts(len(rows), len(rows), {}, item.inputs.get("retried", {}))
        return Output(pa.Table.from_pylist(rows, schema=INDEX), counts)


def picture(key: str, join_id: str | None, ambiguous: bool = False) -> dict[str, Any]:
    return {"key": key, "join_id": join_id, "join_ambiguous": ambiguous}


def write_indexes(root: Path, datasets: Mapping[str, Mapping[str, list[dict[str, Any]]]]) -> None:
    """Write the index rows of each dataset's shards."""
    items = [
        WorkItem(dataset, shard, inputs={"rows": rows})
        for dataset, shards in datasets.items()
        for shard, rows in shards.items()
    ]
    run_here(Indexes(str(root)), items)


def parquet(rows: Sequence[Row], row_group_size: int = 1000, **others: Any) -> bytes:
    """Return a file of published captions; rows have equally many."""
    columns: dict[str, Any] = {"key": pa.array([key for key, _ in rows], pa.string())}
    for number, texts in enumerate(zip(*(texts for _, texts in rows), strict=True), start=1):
        columns[f"caption{number}"] = pa.array(texts, pa.string())
    sink = io.BytesIO()
    pq.write_table(pa.table(columns | others), sink, row_group_size=row_group_size)
    return sink.getvalue()


def write_published(folder: Path, *files: bytes) -> Path:
    folder.mkdir(parents=True)
    for number, data in enumerate(files):
        (folder / f"train-{number:05d}.parquet").write_bytes(data)
    return folder


def recipe_of(root: Path, datasets: Sequence[str], **settings: Any) -> Recipe:
    return Recipe.model_validate(
        {
            "root": str(root),
            "datasets": {
                name: {
                    "layout": "folder",
                    "source": "nowhere",
                    "licence": "CC0 1.0",
                    "caption_subset": name,
                }
                for name in datasets
            },
            "captions": {"theirs": {"engine": "published", **settings}},
            "mixture": {"name": "m", "resolution": 64, "captions": "theirs"},
        }
    )


def settings_of(recipe: Recipe) -> PublishedCaptions:
    settings = recipe.captions["theirs"]
    assert isinstance(settings, PublishedCaptions)
    return settings


def write(recipe: Recipe) -> None:
    published.write(recipe, "theirs", settings_of(recipe), RUNNER)


def captions(root: Path, dataset: str) -> dict[str, list[tuple[str, str | None, str | None]]]:
    """Return outcome, text and detail of each picture's captions by key, as they stand."""
    found = {}
    for file in storage.list_files(str(root / IMAGES / dataset)):
        if not file.name.endswith(".parquet"):
            continue
        index = storage.read_parquet(file.url, ["key"])
        table = storage.read_parquet(str(root / "captions" / "theirs" / dataset / file.name))
        assert table["key"].to_pylist() == index["key"].to_pylist()
        for row in table.to_pylist():
            found[row["key"]] = [(c["outcome"], c["text"], c["detail"]) for c in row["captions"]]
    return found


def counts(root: Path, folder: str, dataset: str = "d") -> Counts:
    summary = read_summary(str(root), folder, dataset)
    assert summary is not None
    return summary.counts


@pytest.fixture(autouse=True)
def stages_run(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> list[str]:
    """Run stages without Beam, but for the test that is about it; return what they processed."""
    processed = list[str]()

    def here(stage: Stage, items: list[WorkItem], _: RunnerOptions) -> Mapping[str, Summary]:
        process = type(stage).process

        def noting(self: Stage, item: WorkItem) -> Output:
            processed.append(f"{stage.name} {item.dataset}/{item.shard}")
            return process(self, item)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(type(stage), "process", noting)
            return run_here(stage, items)

    if "with_beam" not in request.node.name:
        monkeypatch.setattr(published, "run_stage", here)
    return processed


def test_each_picture_says_what_became_of_it(tmp_path: Path) -> None:
    root, source = tmp_path / "corpus", tmp_path / "my-captions"
    pictures = [
        picture("k0", "id-0"),
        picture("k1", None),
        picture("k2", "indoor_1", ambiguous=True),
        picture("k3", "not there"),
        picture("k4", "4"),
        picture("k5", "id-0"),
    ]
    write_indexes(root, {"d": {"a": pictures[:3], "b": pictures[3:]}})
    write_published(
        source / "d",
        parquet([("id-0", ["One.", "Two.\n"]), ("indoor_1", ["Whose?", ""]), (None, ["x", "y"])]),
        parquet([("ID-0", ["n", "n"]), ("id-0", ["Late.", "n"]), ("4", ["", None]), ("", "ab")]),
    )
    write(recipe_of(root, ["d"], source=str(source)))

    missing = "source_missing"
    assert captions(root, "d") == {
        "k0": [("ok", "One.", None), ("ok", "Two.\n", None)],
        "k1": [(missing, None, "its identifier in the published captions is not known")],
        "k2": [(missing, None, "identifier indoor_1 stands for several pictures")],
        "k3": [(missing, None, "none is published for identifier not there")],
        "k4": [
            (missing, None, "published caption 1 is empty, no UTF-8, or too long"),
            (missing, None, "published caption 2 is empty, no UTF-8, or too long"),
        ],
        "k5": [("ok", "One.", None), ("ok", "Two.\n", None)],
    }
    table = storage.read_parquet(str(root / "captions/theirs/d/a.parquet"))
    models = {caption["model"] for row in table["captions"].to_pylist() for caption in row}
    assert models == {"my-captions"}
    # Both sides are conserved, from row to join and from picture to caption.
    assert counts(root, "exchange/theirs/published") == Counts(7, 5, {"no_key": 2})
    joined = {"ambiguous": 1, "no_picture": 1, "repeated_key": 1}
    assert counts(root, "exchange/theirs/joined") == Counts(5, 2, joined)
    assert counts(root, "exchange/theirs/pictures") == Counts(6, 5, {"no_join_id": 1})
    assert counts(root, "captions/theirs") == Counts(6, 2, {missing: 4})
    assert verify(str(root), deep=False)[1] == []


def test_files_without_a_row_are_an_error_before_any_work(tmp_path: Path) -> None:
    write_indexes(tmp_path / "corpus", {"d": {"a": [picture("k0", "0")]}})
    write_published(tmp_path / "c" / "d", parquet([], caption1=pa.array([], pa.string())))
    with pytest.raises(EvenmixError, match="no file has a row"):
        write(recipe_of(tmp_path / "corpus", ["d"], source=str(tmp_path / "c")))
    assert not (tmp_path / "corpus" / "exchange").exists()


def test_the_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = tmp_path / "corpus"
    write_indexes(root, {"d": {"a": [picture("k0", "0"), picture("k1", None), picture("k2", "2")]}})
    write_published(tmp_path / "c" / "d", parquet([("0", ["x"]), ("1", ["y"]), ("0", ["z"])]))
    write(recipe_of(root, ["d"], source=str(tmp_path / "c")))
    rows = [line.split() for line in capsys.readouterr().err.splitlines()]
    assert ["d", "3", "no_picture", "1", "3", "source_missing", "2", "(of", "them"] in [
        row[:9] for row in rows
    ]
    assert any(row[:2] == ["repeated_key", "1"] for row in rows)


def test_any_order_and_size_gives_the_plain_join(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Many parts, groups and ranges, row groups cut within: as if it were one dictionary."""
    draw = random.Random(5)
    ids = [f"{draw.randrange(1 << 40):x}" for _ in range(120)]
    rows: list[Row] = [
        (key, [f"{key} {number}" for number in range(3)]) for key in [*ids[:80], *ids[:20]]
    ]
    draw.shuffle(rows)
    pictures = [picture(f"{number:032x}", key) for number, key in enumerate(ids[40:])]
    pictures += [picture("f" * 32, None)]
    draw.shuffle(pictures)
    shards = {f"s{number:02d}": pictures[number::9] for number in range(9)}
    expected, first = {}, dict[str, Sequence[str | None]]()
    for key, texts in rows:
        assert key is not None
        first.setdefault(key, texts)
    for row in pictures:
        texts = first.get(row["join_id"], [None])
        expected[row["key"]] = [("source_missing" if t is None else "ok", t) for t in texts]

    source = tmp_path / "c"
    write_published(
        source / "d", parquet(rows[:20]), parquet(rows[20:80], 30), parquet(rows[80:], 3)
    )
    found = []
    for part_bytes, shards_per_group in ((1 << 30, 512), (40_000, 2)):
        root = tmp_path / f"corpus-{part_bytes}"
        monkeypatch.setattr(published, "PART_BYTES", part_bytes)
        monkeypatch.setattr(published, "_SHARDS_PER_GROUP", shards_per_group)
        write_indexes(root, {"d": shards})
        write(recipe_of(root, ["d"], source=str(source)))
        got = captions(root, "d")
        assert {key: [c[:2] for c in texts] for key, texts in got.items()} == expected
        assert counts(root, "exchange/theirs/joined") == Counts(
            100, 40, {"no_picture": 40, "repeated_key": 20}
        )
        assert verify(str(root), deep=False)[1] == []
        items = [
            len(list((root / "exchange/theirs" / step / "d").glob("*.parquet")))
            for step in ("published", "pictures", "joined", "gathered")
        ]
        found.append((items, {f.name: f.read_bytes() for f in (root / "captions").rglob("*.*")}))
    assert found[0][0] == [3, 1, 1, 1]
    assert min(found[1][0]) > 4
    # How it was parted does not show in what is published.
    assert found[0][1] == found[1][1]


def test_a_second_run_has_nothing_to_do_and_the_exchange_may_go(
    tmp_path: Path, stages_run: list[str]
) -> None:
    root, source = tmp_path / "corpus", tmp_path / "c"
    write_indexes(root, {"d": {"a": [picture("k0", "0")]}})
    write_published(source / "d", parquet([("0", ["x"])]))
    recipe = recipe_of(root, ["d"], source=str(source))
    write(recipe)
    assert len(stages_run) == 5
    write(recipe)
    for file in storage.list_files(str(root / "exchange")):
        storage.remove(file.url)
    write(recipe)
    assert len(stages_run) == 5
    write_published(source / "other", parquet([("0", ["y"])]))
    other = recipe_of(root, ["d"], source=str(source), subsets={"d": "other"})
    with pytest.raises(EvenmixError, match=r"made in another way .*subset: \"d\" -> \"other\""):
        write(other)


@pytest.mark.parametrize("exchange_is_there", [True, False])
def test_pictures_of_a_retry_join_as_a_generation(
    tmp_path: Path, stages_run: list[str], exchange_is_there: bool
) -> None:
    root, source = tmp_path / "corpus", tmp_path / "c"
    first = {"a": [picture("k0", "0"), picture("k1", "1")], "b": [picture("k2", "2")]}
    write_indexes(root, {"d": first})
    rows: list[Row] = [(key, [f"text {key}"]) for key in "0245645"]
    write_published(source / "d", parquet(rows))
    recipe = recipe_of(root, ["d"], source=str(source))
    write(recipe)
    before = captions(root, "d")
    assert counts(root, "exchange/theirs/joined") == Counts(
        7, 2, {"no_picture": 3, "repeated_key": 2}
    )

    if not exchange_is_there:
        for file in storage.list_files(str(root / "exchange")):
            storage.remove(file.url)
    write_indexes(root, {"d": {"b.r1": [picture("k4", "4"), picture("k0-again", "0")]}})
    stages_run.clear()
    write(recipe)
    text = "text 4"
    assert captions(root, "d") == before | {
        "k4": [("ok", text, None)],
        "k0-again": [("ok", "text 0", None)],
    }
    assert [item for item in stages_run if item.startswith("caption ")] == ["caption d/b.r1"]
    assert len(stages_run) == (4 if exchange_is_there else 8)
    # Each published row counts once, with what became of it in the end.
    assert counts(root, "exchange/theirs/joined") == Counts(
        7, 3, {"no_picture": 2, "repeated_key": 2}
    )
    assert verify(str(root), deep=False)[1] == []


def test_bad_text_is_an_outcome(tmp_path: Path) -> None:
    root, source = tmp_path / "corpus", tmp_path / "c"
    write_indexes(root, {"d": {"a": [picture("k0", "0"), picture("k1", "1")]}})
    bad = pa.array([b"0", b"1", b"\xff"]).cast(pa.binary())
    texts = pa.array([b"\xff", b"good", b"x"])
    table = pa.table(
        {
            "key": pa.Array.from_buffers(pa.string(), 3, bad.buffers()),
            "caption1": pa.Array.from_buffers(pa.string(), 3, texts.buffers()),
        }
    )
    sink = io.BytesIO()
    pq.write_table(table, sink)
    write_published(source / "d", sink.getvalue())
    write(recipe_of(root, ["d"], source=str(source)))
    assert captions(root, "d") == {
        "k0": [("source_missing", None, "published caption 1 is empty, no UTF-8, or too long")],
        "k1": [("ok", "good", None)],
    }
    assert counts(root, "exchange/theirs/published") == Counts(3, 2, {"no_key": 1})


def shared(text: str, num_rows: int, **options: Any) -> bytes:
    """Return a file whose rows have one caption in common: from a dictionary, by default."""
    sink = io.BytesIO()
    table = pa.table({"key": [str(row) for row in range(num_rows)], "caption1": [text] * num_rows})
    pq.write_table(table, sink, **options)
    return sink.getvalue()


def test_what_is_too_long_is_an_outcome(tmp_path: Path) -> None:
    root, source = tmp_path / "corpus", tmp_path / "c"
    write_indexes(root, {"d": {"a": [picture("k0", "0"), picture("k1", "1")]}})
    longest = "é" * (files.MAX_TEXT_BYTES // 2)
    longer = f"{longest}."
    rows: list[Row] = [("0", [longest, longer]), (longest, ["a", "b"]), (longer, ["a", "b"])]
    write_published(source / "d", parquet(rows))
    write(recipe_of(root, ["d"], source=str(source)))
    assert captions(root, "d")["k0"] == [
        ("ok", longest, None),
        ("source_missing", None, "published caption 2 is empty, no UTF-8, or too long"),
    ]
    assert counts(root, "exchange/theirs/published") == Counts(3, 2, {"no_key": 1})


def test_a_text_that_rows_share_is_not_read_for_all_of_them_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The footer speaks of 1 MB where the rows would have 100 MB."""
    root, source = tmp_path / "corpus", tmp_path / "c"
    write_indexes(root, {"d": {"a": [picture("k0", "0")]}})
    data = shared("x" * (1 << 20), 100, dictionary_pagesize_limit=2 << 20)
    assert len(data) < 2 << 20
    write_published(source / "d", data)
    monkeypatch.setattr(files, "_READ_BYTES", 8 << 20)
    texts, sizes = files._texts, list[int]()

    def noting(column: pa.Array) -> pa.LargeBinaryArray:
        sizes.append(column.nbytes)
        return texts(column)

    monkeypatch.setattr(files, "_texts", noting)
    write(recipe_of(root, ["d"], source=str(source)))
    assert 1 << 20 < max(sizes) <= 8 << 20
    assert sum(sizes) > 100 << 20
    assert captions(root, "d") == {
        "k0": [("source_missing", None, "published caption 1 is empty, no UTF-8, or too long")]
    }
    assert counts(root, "exchange/theirs/joined") == Counts(100, 1, {"no_picture": 99})


def test_far_more_text_than_the_footer_says_is_refused(tmp_path: Path) -> None:
    """Ranges and parts are as large as footers say, so memory is bounded by what they hide."""
    root, source = tmp_path / "corpus", tmp_path / "c"
    write_indexes(root, {"d": {"a": [picture("k0", "0")]}})
    text = "x" * files.MAX_TEXT_BYTES
    write_published(source / "d", shared(text, 200))
    with pytest.raises(EvenmixError, match=r"train-00000\.parquet has far more text behind row 0"):
        write(recipe_of(root, ["d"], source=str(source)))
    # The remedy that is named.
    (source / "d" / "train-00000.parquet").write_bytes(shared(text, 200, use_dictionary=False))
    write(recipe_of(root, ["d"], source=str(source)))
    assert captions(root, "d") == {"k0": [("ok", text, None)]}


def test_nothing_is_read_for_pictures_without_identifiers(
    tmp_path: Path, stages_run: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    root, source = tmp_path / "corpus", tmp_path / "c"
    write_indexes(root, {"d": {"a": [picture("k0", "0")]}, "m": {"a": [picture("k1", None)]}})
    for dataset in "dm":
        write_published(source / dataset, parquet([("0", ["x"])]))
    recipe = recipe_of(root, ["d", "m"], source=str(source))
    write(recipe)
    processed = [item for item in stages_run if " m/" in item]
    assert processed == ["caption-pictures m/00000", "caption m/a"]
    assert captions(root, "d") == {"k0": [("ok", "x", None)]}
    unknown = "its identifier in the published captions is not known"
    assert captions(root, "m") == {"k1": [("source_missing", None, unknown)]}
    printed = " ".join(capsys.readouterr().err.split())
    assert "m not read no picture has an 1 source_missing 1 (of" in printed
    assert verify(str(root), deep=False)[1] == []
    stages_run.clear()
    write(recipe)
    assert stages_run == []
    # With such a dataset alone there is nothing to exchange at all.
    other = tmp_path / "other"
    write_indexes(other, {"m": {"a": [picture("k1", None)]}})
    write(recipe_of(other, ["m"], source=str(source)))
    assert stages_run == processed


def test_the_report_takes_no_orders(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = tmp_path / "corpus"
    write_indexes(root, {"d": {"a": [picture("k0", "0")]}})
    write_published(tmp_path / "c" / "d", parquet([("0", ["x"]), ("1", ["y"])]))
    recipe = recipe_of(root, ["d"], source=str(tmp_path / "c"))
    write(recipe)
    summary = root / "exchange/theirs/joined/d/stage.json"
    summary.write_text(summary.read_text().replace("no_picture", "[red]\\u001b[2J"))
    capsys.readouterr()
    write(recipe)
    printed = capsys.readouterr().err
    assert "[red]\ufffd[2J 1" in printed
    assert "\x1b" not in printed


def test_keys_may_be_numbers_and_captions_are_in_numeric_order(tmp_path: Path) -> None:
    root, source = tmp_path / "corpus", tmp_path / "c"
    write_indexes(root, {"d": {"a": [picture("k0", "7")]}})
    names = ["caption10", "caption2", "no_center_crop", "caption1", "caption"]
    table = pa.table({"key": [7]} | {name: [name] for name in names})
    sink = io.BytesIO()
    pq.write_table(table, sink)
    write_published(source / "d", sink.getvalue())
    write(recipe_of(root, ["d"], source=str(source)))
    assert [text for _, text, _ in captions(root, "d")["k0"]] == [
        "caption1",
        "caption2",
        "caption10",
    ]


def test_everything_that_stands_in_the_way_is_said_before_any_work(tmp_path: Path) -> None:
    source = tmp_path / "c"
    whole = parquet([("0", ["x"])])
    table = io.BytesIO()
    pq.write_table(pa.table({"id": ["0"], "caption1": ["x"]}), table)
    number = io.BytesIO()
    pq.write_table(pa.table({"key": ["0"], "caption1": [1.5]}), number)
    nothing = io.BytesIO()
    pq.write_table(pa.table({"key": ["0"], "no_center_crop": ["x"]}), nothing)
    write_published(source / "keyless", whole, table.getvalue(), number.getvalue())
    write_published(source / "wordless", nothing.getvalue(), b"PAR1 no more")
    write_published(source / "whole", whole)
    recipe = recipe_of(
        tmp_path / "corpus", ["keyless", "nowhere", "unknown", "whole", "wordless"],
        source=str(source),
    )  # fmt: skip
    unknown = recipe.datasets["unknown"].model_copy(update={"caption_subset": None})
    recipe = recipe.model_copy(update={"datasets": {**recipe.datasets, "unknown": unknown}})
    with pytest.raises(EvenmixError) as caught:
        published.check(recipe, "theirs", settings_of(recipe))
    needs = (
        "needs a column key with the identifiers of the pictures and columns caption1, caption2 "
        "and so on with their captions, each once; it has"
    )
    remedy = "Replace the file, or name another source or subset"
    lines = str(caught.value).split("\n  ")
    assert lines[0] == "captions.theirs cannot be made:"
    assert lines[1:6] == [
        f"dataset keyless: {source}/keyless/train-00001.parquet {needs} id, caption1. {remedy}",
        f"{source}/keyless/train-00002.parquet: column caption1 is double, not text; replace the "
        "file, or name another source or subset",
        f"dataset nowhere: no files at {source}/nowhere/*.parquet; correct the caption set's "
        "source, or its subsets, which name the folder of each dataset",
        "dataset unknown: no published captions of it are known; name their folder in "
        "captions.theirs.subsets.unknown",
        f"dataset wordless: {source}/wordless/train-00000.parquet {needs} key, no_center_crop. "
        f"{remedy}",
    ]
    assert lines[6].startswith(f"{source}/wordless/train-00001.parquet cannot be read as Parquet")
    assert len(lines) == 7
    assert not (tmp_path / "corpus").exists()


def test_a_file_that_changes_meanwhile_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, source = tmp_path / "corpus", tmp_path / "c"
    write_indexes(root, {"d": {"a": [picture("k0", "0")]}})
    folder = write_published(source / "d", parquet([("0", ["x"])]))

    def then_change(files: Sequence[storage.FileInfo]) -> list[dict[str, Any]]:
        found = identities(files)
        (folder / "train-00000.parquet").write_bytes(parquet([("0", ["another"])]))
        return found

    monkeypatch.setattr(published, "identities", then_change)
    with pytest.raises(EvenmixError, match=r"train-00000\.parquet has changed since it was plan"):
        write(recipe_of(root, ["d"], source=str(source)))


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with serve_hub() as served:
        point_at(served, monkeypatch)
        yield served


def test_the_commit_on_the_hub_is_recorded_and_kept(tmp_path: Path, hub: Hub) -> None:
    root = tmp_path / "corpus"
    write_indexes(root, {"d": {"a": [picture("k0", "0")]}})
    began = {"d/train-00000.parquet": parquet([("0", ["x"]), ("1", ["y"])])}
    hub.repositories["someone/captions"] = Repository({HEAD: began})
    recipe = recipe_of(root, ["d"], source="hf://datasets/someone/captions")
    write(recipe)
    table = storage.read_parquet(str(root / "captions/theirs/d/a.parquet"))
    (caption,) = table["captions"][0].as_py()
    origin = f"hf://datasets/someone/captions@{HEAD}"
    assert (caption["text"], caption["model"]) == ("x", origin)
    assert read_receipt(str(root / "captions/theirs/d/a.parquet")).identity["config"] == {
        "engine": "published",
        "subset": "d",
        "origin": origin,
        "revision": HEAD,
    }
    # The repository moves on; a set ends as it began.
    moved = {"d/train-00000.parquet": parquet([("0", ["other"]), ("1", ["other"])])}
    hub.repositories["someone/captions"] = Repository({LATER: moved, HEAD: began})
    write_indexes(root, {"d": {"a.r1": [picture("k1", "1")]}})
    write(recipe)
    assert captions(root, "d")["k1"] == [("ok", "y", None)]


def test_a_set_that_was_cut_short_goes_on_with_its_commit(
    tmp_path: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "corpus"
    write_indexes(root, {"d": {"a": [picture("k0", "0")]}})
    began = {"d/train-00000.parquet": parquet([("0", ["x"])])}
    hub.repositories["someone/captions"] = Repository({HEAD: began})
    recipe = recipe_of(root, ["d"], source="hf://datasets/someone/captions")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):

        def interrupt(stage: Stage, item: WorkItem) -> Output:
            raise KeyboardInterrupt

        patch.setattr(PartPublished, "process", interrupt)
        write(recipe)
    moved = {"d/train-00000.parquet": parquet([("0", ["other"])])}
    hub.repositories["someone/captions"] = Repository({LATER: moved, HEAD: began})
    write(recipe)
    assert captions(root, "d") == {"k0": [("ok", "x", None)]}


def test_the_stages_run_with_beam(tmp_path: Path) -> None:
    root, source = tmp_path / "corpus", tmp_path / "c"
    write_indexes(root, {"d": {"a": [picture("k0", "0")], "b": [picture("k1", "1")]}})
    write_published(source / "d", parquet([("1", ["one"])]), parquet([("0", ["nought"])]))
    write(recipe_of(root, ["d"], source=str(source)))
    assert captions(root, "d") == {"k0": [("ok", "nought", None)], "k1": [("ok", "one", None)]}
    assert verify(str(root), deep=False)[1] == []
