"""Caption sets in numbers that can be counted by hand, and side by side, also on a page."""

import base64
import io
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from captioning.from_source import SourceCaptioning
from captioning.sets import statistics as set_statistics
from captioning.sets.committed import find_sets
from captioning.sets.statistics import Vocabulary, count_words, mean, percentiles
from captioning.tables import caption_output
from pipeline import ingest, storage
from pipeline.cli import main
from pipeline.publishing import publish_item
from pipeline.receipts import METADATA_KEY
from pipeline.recipe import Corpus, SourceCaptions
from pipeline.records import IMAGES, key_of
from pipeline.stage import Output, WorkItem
from pipeline.summary import finished_shards, read_shard
from tests import pictures
from tests.stages import run_here

HOSTILE_NAME = "<script>alert(1)<_script>&amp;\"'.png"
HOSTILE = '</blockquote><script>alert("x")</script> &lt; \x1b[2Jcleared\x00 [bold]not bold[/bold]'
HARMLESS = HOSTILE.replace("\x1b", "\ufffd").replace("\x00", "\ufffd")
"""What is shown of it: only the control characters are others."""


@dataclass(frozen=True)
class Answers:
    """A stage that writes given captions, by key, as a model's."""

    root: str
    captions: str
    answers: Mapping[str, Sequence[Mapping[str, Any]]]
    model: str = "some/model"
    parent: str | None = None
    name: str = "caption"
    version: int = 1
    resource_hints: Mapping[str, str] = field(default_factory=dict)
    items_at_once: int = 1

    @property
    def folder(self) -> str:
        return f"captions/{self.captions}"

    def config(self, dataset: str) -> Mapping[str, Any]:
        parent = {"parent": self.parent} if self.parent else {}
        return {"engine": "vllm", "model": self.model, **parent}

    def process(self, item: WorkItem) -> Output:
        return caption_output(
            [
                {"key": key, "captions": [{"model": self.model, **a} for a in self.answers[key]]}
                for key in item.inputs["keys"]
            ]
        )


def answer(text: str | None, tokens: int = 0, outcome: str = "ok") -> dict[str, Any]:
    return {"text": text, "outcome": outcome, "completion_tokens": tokens}


NAMES = ["a.png", "b.png", "c.png", HOSTILE_NAME]
"""The pictures of the corpus, two a shard; the last has no text of its own."""

KEYS = {name: key_of("drawn", name) for name in NAMES}

NEWER = {
    KEYS["a.png"]: [answer("A red cat.", 4), answer("The CAT\nis red", 5, "truncated")],
    KEYS["b.png"]: [answer(None, 0, "empty"), answer("A dog, a cat", 6)],
    KEYS["c.png"]: [answer(None, 0, "not_asked")],
    KEYS[HOSTILE_NAME]: [answer(HOSTILE, 1300), answer("I cannot.", 3, "refused")],
}


@pytest.fixture
def root(tmp_path: Path) -> str:
    """A corpus of four drawn pictures in two shards, with its own texts as the set `own`."""
    source = tmp_path / "drawn"
    source.mkdir()
    for number, name in enumerate(NAMES):
        (source / name).write_bytes(pictures.save(pictures.smooth(40 + number, 800), "PNG"))
        if name != HOSTILE_NAME:
            (source / name).with_suffix(".txt").write_text(f"picture {name[0]}")
    root = str(tmp_path / "corpus")
    document = {
        "root": root,
        "images": {"min_short_edge_px": 32, "records_per_shard": 2},
        "datasets": {"drawn": {"layout": "folder", "source": str(source), "licence": "CC0 1.0"}},
    }
    run_here(*ingest.plan(Corpus.model_validate(document)))
    own = SourceCaptioning(root, "own", SourceCaptions(engine="source"))
    run_here(own, [WorkItem("drawn", shard, {}) for shard in shards(root)])
    return root


def shards(root: str) -> list[str]:
    return list(finished_shards(root, IMAGES, "drawn", "ingest"))


def items(root: str) -> list[WorkItem]:
    """Return an item for each shard, with its keys."""
    keys = {
        shard: read_shard(root, IMAGES, "drawn", shard, ["key"])["key"].to_pylist()
        for shard in shards(root)
    }
    return [WorkItem("drawn", shard, inputs={"keys": keys[shard]}) for shard in keys]


Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Command:
    """`evenmix captions` as a function of its arguments: status, stdout, stderr."""
    monkeypatch.setenv("COLUMNS", "80")

    def run(*arguments: str) -> tuple[int, str, str]:
        capsys.readouterr()
        status = main(["captions", *arguments])
        printed = capsys.readouterr()
        return status, printed.out, printed.err

    return run


# Words and lengths


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", []),
        (" \n\t", []),
        ("... — !", []),
        ("A cat, a CAT.", ["a", "cat", "a", "cat"]),
        ("first\n\nsecond\tthird\u00a0fourth", ["first", "second", "third", "fourth"]),
        ("well-lit dog's snake_case", ["well", "lit", "dog", "s", "snake", "case"]),
        ("“Café”—ÜBER naïve", ["café", "über", "naïve"]),
        ("Кошка сидит", ["кошка", "сидит"]),
        ("一只猫\uff0c坐着。", ["一", "只", "猫", "坐", "着"]),
        ("ひらカナ漢 text2字", ["ひ", "ら", "カ", "ナ", "漢", "text2", "字"]),
        ("고양이 두 마리", ["고양이", "두", "마리"]),
        ("हिन्दी में", ["हिन्दी", "में"]),
        ("قطة حمراء", ["قطة", "حمراء"]),
        ("24 x 36 🐈", ["24", "x", "36"]),
    ],
)
def test_words(text: str, words: list[str]) -> None:
    # Between others, so that one text's words cannot run over into the next's.
    numbers, distinct = count_words(pa.array(["end", text, "begin"]))
    assert numbers.tolist() == [1, len(words), 1]
    assert Counter(distinct.to_pylist()) == Counter({"end", "begin", *words})


def test_no_texts_have_no_words() -> None:
    numbers, distinct = count_words(pa.array([], pa.string()))
    assert (numbers.tolist(), distinct.to_pylist()) == ([], [])


def test_percentiles_are_nearest_ranks() -> None:
    lengths = Counter({10: 1, 20: 18, 300: 1})
    assert list(percentiles(lengths, [0, 5, 6, 50, 95, 96, 100])) == [10, 10, 20, 20, 20, 300, 300]
    assert list(percentiles(Counter({7: 1}), [5, 50, 95])) == [7, 7, 7]
    assert list(percentiles(Counter({1: 1, 2: 1}), [50, 51])) == [1, 2]
    assert mean(lengths) == 33.5


def test_percentiles_are_those_of_numpy() -> None:
    drawn = np.random.default_rng(0).geometric(0.01, 9973)
    expected = np.percentile(drawn, [5, 50, 95], method="inverted_cdf")
    assert list(percentiles(Counter(drawn.tolist()), [5, 50, 95])) == expected.tolist()


def test_a_vocabulary_counts_each_word_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(set_statistics, "_LEAST_MERGE", 8)
    vocabulary, expected = Vocabulary(), set()
    assert len(vocabulary) == 0
    for number in range(200):
        words = [f"word {n % 61}" for n in range(number, number + number % 7)]
        vocabulary.add(np.array([hash(word) for word in words], np.int64))
        expected |= set(words)
        assert len(vocabulary._known) <= len(expected)
        assert vocabulary._num_added <= max(8, len(expected))
    assert len(vocabulary) == len(expected) == 61


# The table


def test_the_sets_in_numbers(root: str, command: Command) -> None:
    run_here(Answers(root, "newer", NEWER, parent="older"), items(root))
    status, printed, _ = command(root)
    assert status == 0
    lines = [line.strip() for line in printed.splitlines()]
    assert max(map(len, printed.splitlines())) <= 80
    sets, lengths = lines.index("caption sets"), lines.index("usable captions")
    assert [line.split() for line in lines[sets + 4 : lengths - 1]] == [
        ["newer", "1", "4", "7", "empty", "1"],
        ["vllm", "not_asked", "1"],
        ["some/model", "ok", "3"],
        ["parent", "older", "refused", "1"],
        ["truncated", "1"],
        [],
        ["own", "1", "4", "4", "ok", "3"],
        ["source", "source_missing", "1"],
    ]
    # Tokens: 4, 5, 6, 1300. Words: 3, 4, 4, 11, in all: a red cat the is dog blockquote script
    # alert x lt 2jcleared bold not.
    assert [line.split() for line in lines[lengths + 5 : lengths + 7]] == [
        ["newer", "328.8", "4", "5", "1,300", "5.5", "3", "4", "11", "14"],
        ["own", "-", "-", "-", "-", "2.0", "2", "2", "2", "4"],
    ]
    assert "not finished" not in printed


def test_an_unfinished_set_shows_what_is_committed(root: str, command: Command) -> None:
    stage, (first, second) = Answers(root, "newer", NEWER), items(root)
    publish_item(stage, first)
    captions = [answer for key in first.inputs["keys"] for answer in NEWER[key]]
    _, printed, _ = command(root)
    assert ["newer", "1", "2", str(len(captions))] in [
        line.split()[:4] for line in printed.splitlines()
    ]
    assert "newer is not finished for drawn: its committed shards are counted." in printed
    run_here(stage, [first, second])
    _, printed, _ = command(root)
    assert "not finished" not in printed


def test_a_retry_that_is_under_way_makes_a_set_unfinished(root: str) -> None:
    stage, (first, second) = Answers(root, "newer", NEWER), items(root)
    run_here(stage, [first, second])
    retried = WorkItem("drawn", f"{first.shard}.r1", inputs={"keys": first.inputs["keys"]})
    publish_item(stage, retried)
    assert find_sets(root)["newer"].unfinished == ["drawn"]
    run_here(stage, [retried])
    found = find_sets(root)["newer"]
    assert found.unfinished == []
    assert sorted(found.shards["drawn"]) == sorted([first.shard, second.shard, retried.shard])


def test_slices_of_a_shard_are_no_shard(root: str, command: Command) -> None:
    slice_name = f"{storage.TEMPORARY_PREFIX}slice-0-0-x.parquet"
    storage.publish(f"{root}/captions/begun/drawn/{slice_name}", b"no Parquet")
    status, printed, _ = command(root)
    assert status == 0
    assert ["begun", "1", "0", "0"] in [line.split() for line in printed.splitlines()]
    assert "begun is not finished for drawn" in printed


def test_sets_in_an_object_store(gcs_bucket: str) -> None:
    root = f"{gcs_bucket}/corpus"
    stage = Answers(root, "newer", {"k": [answer("One, two", 3)], "l": [answer("two", 2)]})
    run_here(stage, [WorkItem("d", f"s-{key}", inputs={"keys": [key]}) for key in "kl"])
    captions = find_sets(root)["newer"]
    assert (captions.shards, captions.unfinished) == ({"d": ["s-k", "s-l"]}, [])
    found = list(set_statistics.read_statistics(root, captions))
    assert [shard.tokens for shard in found] == [Counter({3: 1}), Counter({2: 1})]
    assert [shard.words for shard in found] == [Counter({2: 1}), Counter({1: 1})]


def test_a_file_of_another_make_is_named(root: str, command: Command) -> None:
    shard = f"{root}/captions/own/drawn/{shards(root)[0]}.parquet"
    storage.replace(shard, storage.parquet_bytes(storage.read_parquet(shard), {}))
    status, _, message = command(root)
    assert status == 1
    assert f"error: {shard} was not written by evenmix" in message


def test_names_take_no_orders(root: str, command: Command) -> None:
    """A corpus may come from anybody: names of sets and datasets, models, outcomes."""
    name = "[red]\x1b[2J\udcff"
    hostile = [answer("A cat.", 2, "\x1b[1m[bold]")]
    stage = Answers(root, name, {"k": hostile}, model="[i]\x1b[3m/m", parent="\x07[b]")
    run_here(stage, [WorkItem(name, "s", inputs={"keys": ["k"]})])
    (Path(root) / "captions" / name / name / "stage.json").unlink()
    status, printed, _ = command(root)
    assert status == 0
    assert not {ord(character) for character in printed} & {0x1B, 0x07, 0xDCFF}
    for shown in [
        "[red]\ufffd[2J\ufffd",
        "[i]\ufffd[3m/m",
        "parent \ufffd[b]",
        "\ufffd[1m[bold] 1",
    ]:
        assert shown in printed
    assert "[red]\ufffd[2J\ufffd is not finished for [red]\ufffd[2J\ufffd:" in printed

    renamed = Answers(root, "\x1b[7m[bold]", NEWER, model="[i]\x1b[3m/m")
    run_here(renamed, items(root))
    status, printed, _ = command(root, "--compare", "own", "\x1b[7m[bold]")
    assert status == 0
    assert "\x1b" not in printed
    assert "\ufffd[7m[bold]" in printed
    assert "[i]\ufffd[3m/m" in printed


# Side by side


def test_captions_side_by_side(root: str, command: Command) -> None:
    run_here(Answers(root, "newer", NEWER), items(root))
    status, printed, _ = command(root, "--compare", "own", "newer")
    assert status == 0
    assert command(root, "--compare", "own", "newer")[1] == printed
    headings = [line.rstrip() for line in printed.splitlines() if line.startswith("drawn  ")]
    # Not c.png, for which the one set was not asked.
    assert sorted(headings) == sorted(
        f"drawn  {name}  {KEYS[name]}" for name in NAMES if name != "c.png"
    )
    text = " ".join(printed.split())
    assert "ok ok · 4 tokens · some/model picture a A red cat." in text
    assert "truncated · 5 tokens · some/model The CAT is red" in text
    assert (
        "ok empty · 0 tokens · some/model picture b ok · 6 tokens · some/model A dog, a cat" in text
    )
    assert "source_missing ok · 1,300 tokens · some/model" in text
    assert "[bold]not bold[/bold]" in text
    assert not set(printed) & set("\x1b\0")


def test_pictures_are_of_different_shards_while_there_are_any(root: str, command: Command) -> None:
    run_here(Answers(root, "newer", NEWER), items(root))
    in_shard = {key: item.shard for item in items(root) for key in item.inputs["keys"]}
    _, printed, _ = command(root, "--compare", "own", "own", "--count", "2", "--dataset", "drawn")
    shown = [key for key in in_shard if key in "".join(printed.split())]
    assert len(shown) == len({in_shard[key] for key in shown}) == 2


class Page(HTMLParser):
    """A page's elements, checked to be closed in order, its texts and its pictures."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.texts: dict[str, list[str]] = {}
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in ("meta", "img"):
            self.open.append(tag)
            self.texts.setdefault(tag, []).append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open:
            self.texts[self.open[-1]][-1] += data

    def values(self, tag: str, attribute: str) -> list[str]:
        return [value for *place, value in self.attributes if place == [tag, attribute]]


def test_the_page_shows_pictures_and_takes_no_orders(
    root: str, command: Command, tmp_path: Path
) -> None:
    run_here(Answers(root, "newer", NEWER), items(root))
    file = tmp_path / "new folder" / "page.html"
    status, printed, _ = command(root, "--compare", "own", "newer", "--html", str(file))
    assert (status, printed) == (0, f"{file}: 3 pictures with their captions\n")
    page = Page(file.read_text(encoding="utf-8"))
    assert page.texts["title"] == [f"Captions of {root}: own and newer"]
    assert page.values("img", "alt") == page.texts["bdi"]
    assert sorted(page.texts["bdi"]) == sorted(["a.png", "b.png", HOSTILE_NAME])
    assert page.texts["h3"] == ["own", "newer"] * 3
    assert HARMLESS in page.texts["blockquote"]
    assert "The CAT\nis red" in page.texts["blockquote"]
    assert set(page.texts) == {
        "html", "head", "title", "style", "body", "h1", "main", "article", "header", "h2", "bdi",
        "p", "section", "h3", "span", "blockquote",
    }  # fmt: skip
    outcomes = Counter(page.texts["span"])
    assert outcomes == {"ok": 5, "truncated": 1, "empty": 1, "refused": 1, "source_missing": 1}
    for name in NAMES:
        if name != "c.png":
            assert f"drawn, 800 x {40 + NAMES.index(name)}" in page.texts["p"]
    sources = page.values("img", "src")
    assert len(sources) == 3
    for source, width, height in zip(
        sources, page.values("img", "width"), page.values("img", "height"), strict=True
    ):
        kind, _, data = source.partition(",")
        picture = Image.open(io.BytesIO(base64.b64decode(data, validate=True)))
        assert (kind, picture.format) == ("data:image/jpeg;base64", "JPEG")
        assert picture.size == (384, int(height)) == (int(width), int(height))
        assert int(height) in (19, 20, 21)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--compare", "owm", "own"], "has no caption set 'owm'; did you mean 'own'?"),
        (["--compare", "own", "xyz"], "has no caption set 'xyz'; the sets are newer, other, own"),
        (
            ["--compare", "own", "newer", "--dataset", "drown"],
            "caption set own has no dataset 'drown'; did you mean 'drawn'?",
        ),
        (
            ["--compare", "own", "other", "--dataset", "drawn"],
            "caption set other has no dataset 'drawn'; it has elsewhere",
        ),
        (
            ["--compare", "own", "other"],
            "own and other have no shard in common (own has 2 of drawn; other has 1 of elsewhere)",
        ),
        (["--compare", "own", "newer"], "there is no picture that own and newer were both asked"),
        (["--compare", "own", "newer", "--count", "0"], "--count 0: at least one is needed"),
        (["--html", "x"], "--dataset, --count and --html go with --compare A B"),
    ],
)
def test_what_cannot_be_compared(
    arguments: list[str], message: str, root: str, command: Command
) -> None:
    not_asked = {key: [answer(None, 0, "not_asked")] for key in [*KEYS.values(), "k"]}
    run_here(Answers(root, "newer", not_asked), items(root))
    run_here(
        Answers(root, "other", not_asked), [WorkItem("elsewhere", "s", inputs={"keys": ["k"]})]
    )
    status, printed, errors = command(root, *arguments)
    assert (status, printed) == (1, "")
    assert message in errors


def test_a_root_without_captions(tmp_path: Path, command: Command) -> None:
    status, _, message = command(str(tmp_path))
    assert status == 1
    assert f"there are no captions below {tmp_path}/captions" in message


@pytest.mark.parametrize("folder", ["captions/newer", "images"])
def test_tables_of_different_pictures_are_refused(folder: str, root: str, command: Command) -> None:
    run_here(Answers(root, "newer", NEWER), items(root))
    for shard in shards(root):
        url = f"{root}/{folder}/drawn/{shard}.parquet"
        receipt = storage.parquet_metadata(url)[METADATA_KEY]
        turned = storage.read_parquet(url).take([1, 0])
        storage.replace(url, storage.parquet_bytes(turned, {METADATA_KEY: receipt}))
    status, _, message = command(root, "--compare", "own", "newer")
    assert status == 1
    assert "speak of different pictures" in message
