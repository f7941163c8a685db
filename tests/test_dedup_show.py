"""Sheets of groups: which pictures are on them, in which order, and what is said of each."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from dedup import against, report, show
from dedup.contact_sheet import MAX_COLUMNS, PICTURE_PX, Tile, contact_sheet, small
from dedup.records import DUPLICATES
from pipeline import images, ingest, storage
from pipeline.beam_job import RunnerOptions
from pipeline.errors import EvenmixError
from pipeline.images import Limits, Pixels
from pipeline.receipts import Counts
from pipeline.recipe import Recipe
from pipeline.records import IMAGES, key_of
from pipeline.stage import Output, Stage, WorkItem
from pipeline.summary import Summary, finished_shards, read_shard
from tests.pictures import save, smooth
from tests.stages import run_here

NUM_PICTURES = 80
NUM_LARGE = 75
LIMITS = Limits(1, 1_000_000, 1_000_000)


def key(number: int) -> str:
    return key_of("album", f"{number:02}.png")


# The best picture of each group, and the groups by key.
LARGE, SMALL, CONTAMINATED, ALONE = key(0), key(NUM_LARGE), key(77), key(79)
EVALUATION = key_of("_against", "eval/a.png")


@dataclass(frozen=True)
class Outcome:
    """The tables of a search that kept all pictures: only their keys matter here."""

    root: str
    folder: str = "duplicates/sscd"
    name: str = "dedup"
    version: int = 1
    resource_hints: Mapping[str, str] = field(default_factory=dict)
    items_at_once: int = 1

    def config(self, dataset: str) -> Mapping[str, Any]:
        return {}

    def process(self, item: WorkItem) -> Output:
        keys = read_shard(self.root, IMAGES, item.dataset, item.shard, ["key"])["key"]
        rows = [{"key": key, "group": key} for key in keys.to_pylist()]
        table = pa.Table.from_pylist(rows, schema=DUPLICATES)
        return Output(table, Counts(len(rows), len(rows)))


def colour(number: int) -> tuple[int, int, int]:
    return (3 * number, 255 - 3 * number, 37 * number % 256)


def picture(number: int) -> Pixels:
    return np.full((40, 40 + number, 3), colour(number), np.uint8)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """Ingest pictures, each of another colour and width, and write what a search found."""
    folder = tmp_path_factory.mktemp("show")
    for name in ("album", "evaluation/eval"):
        (folder / name).mkdir(parents=True)
    for number in range(NUM_PICTURES):
        (folder / "album" / f"{number:02}.png").write_bytes(save(picture(number), "PNG"))
    (folder / "evaluation" / "eval" / "a.png").write_bytes(save(smooth(300, 400), "PNG"))
    recipe = Recipe.model_validate(
        {
            "root": str(folder / "corpus"),
            "datasets": {
                "album": {
                    "layout": "folder",
                    "source": str(folder / "album"),
                    "licence": "CC0 1.0",
                    "duplicates": "exact",
                }
            },
            "images": {"min_short_edge_px": 32, "records_per_shard": 30},
            "dedup": {"against": str(folder / "evaluation")},
            "captions": {"source": {"engine": "source"}},
            "mixture": {"name": "m", "resolution": 32, "captions": "source"},
        }
    )

    def here(stage: Stage, items: list[WorkItem], _: RunnerOptions) -> Mapping[str, Summary]:
        return run_here(stage, items)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ingest, "run_stage", here)
        ingest.run_recipe(recipe, RunnerOptions(workers=1))
    run_here(against.describe_against(recipe, {}), against.against_items(recipe))
    shards = finished_shards(recipe.root, IMAGES, "album", "ingest")
    run_here(Outcome(recipe.root), [WorkItem("album", shard, {}) for shard in shards])
    write_tables(recipe, removals(shards, recipe.root))
    return recipe


def removals(shards: Mapping[str, str], root: str) -> list[dict[str, Any]]:
    """Return the removed pictures: a large group, a small one, a contaminated one; one is alone."""
    places = {
        key: {"dataset": "album", "shard": shard, "row": row}
        for shard in shards
        for row, key in enumerate(read_shard(root, IMAGES, "album", shard)["key"].to_pylist())
    }
    places[EVALUATION] = {"dataset": "_against", "shard": "against-000000000", "row": 0}
    unknown = {"dataset": None, "shard": None, "row": None}

    def removal(number: int, of: str, group: str, rule: str, similarity: float | None) -> Any:
        keeper = {f"keeper_{name}": at for name, at in places.get(of, unknown).items()}
        row = {"key": key(number), "duplicate_of": of, "group": group, "rule": rule}
        return places[key(number)] | row | keeper | {"similarity": similarity}

    return [
        *(
            removal(number, LARGE, LARGE, "near_duplicate", 1 - number / 256)
            for number in range(1, NUM_LARGE)
        ),
        removal(76, SMALL, SMALL, "exact_copy", 1.0),
        removal(77, EVALUATION, CONTAMINATED, "contamination", 0.875),
        removal(78, EVALUATION, CONTAMINATED, "contamination", None),
    ]


def write_tables(recipe: Recipe, rows: Sequence[Mapping[str, Any]]) -> None:
    removed = report.removed_table([pa.Table.from_pylist(rows, schema=report.REMOVED)])
    tables = {"_removed": removed, "_groups": report.groups_table(removed)}
    for name, table in tables.items():
        url = storage.join(recipe.root, "duplicates", recipe.dedup.name, name, "all.parquet")
        storage.publish(url, storage.parquet_bytes(table, {}))


@dataclass
class Drawn:
    """The sheet that was drawn last."""

    title: Sequence[str] = ()
    tiles: Sequence[Tile] = ()
    sheet: Pixels = field(default_factory=lambda: np.zeros((0, 0, 3), np.uint8))

    def lines(self) -> list[list[str]]:
        return [list(tile.lines) for tile in self.tiles]


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> Drawn:
    """Look on as sheets are drawn."""
    last = Drawn()

    def draw(title: Sequence[str], tiles: Sequence[Tile]) -> Pixels:
        last.title, last.tiles, last.sheet = title, tiles, contact_sheet(title, tiles)
        return last.sheet

    monkeypatch.setattr(show, "contact_sheet", draw)
    return last


def test_a_group_is_found_by_any_of_its_pictures(recipe: Recipe, drawn: Drawn) -> None:
    for wanted in (key(76), SMALL, SMALL.upper()):
        url = show.show(recipe, wanted)
        assert url == f"{recipe.root}/notes/duplicates-sscd/{SMALL}.jpg"
        assert drawn.title == [
            f"group {SMALL}",
            "1 removed by search sscd, the least similar first",
        ]
        assert drawn.lines() == [
            ["album, 115 x 40", "kept", SMALL],
            ["album, 116 x 40", "1.000, exact copy", key(76)],
        ]
        assert [tile.frame is None for tile in drawn.tiles] == [False, True]
        for tile, number in zip(drawn.tiles, (NUM_LARGE, 76), strict=True):
            np.testing.assert_array_equal(tile.picture, picture(number))
        stored = images.decode(storage.read_bytes(url), LIMITS).astype(int)
        assert np.abs(stored - drawn.sheet).mean() < 2


def test_of_a_large_group_the_least_similar_are_shown(recipe: Recipe, drawn: Drawn) -> None:
    show.show(recipe, key(3))
    shown = range(NUM_LARGE - 1, NUM_LARGE - show.MAX_TILES, -1)
    assert [tile.lines[2] for tile in drawn.tiles] == [LARGE, *map(key, shown)]
    assert drawn.lines()[1][1] == f"{1 - 74 / 256:.3f}, near duplicate"
    assert drawn.title[1] == (
        "74 removed by search sscd, the least similar first; 59 of them, and 15 more"
    )


def test_evaluation_pictures_come_first(recipe: Recipe, drawn: Drawn) -> None:
    url = show.show(recipe, key(78))
    assert url.endswith(f"/{CONTAMINATED}.jpg")
    assert drawn.lines() == [
        ["eval/a.png, 400 x 300", "evaluation picture", EVALUATION],
        ["album, 117 x 40", "0.875, contamination", key(77)],
        ["album, 118 x 40", "contamination", key(78)],
    ]
    np.testing.assert_array_equal(drawn.tiles[0].picture, small(smooth(300, 400)))
    frames = [tile.frame for tile in drawn.tiles]
    show.show(recipe, SMALL)
    assert frames == [frames[0], None, None]
    assert drawn.tiles[0].frame not in (None, frames[0])


@pytest.mark.parametrize("change", ["gone", "other", "not named"])
def test_what_cannot_be_read_leaves_a_grey_tile(
    recipe: Recipe, drawn: Drawn, tmp_path: Path, change: str
) -> None:
    folder = tmp_path / "moved" / "eval"
    if change == "other":
        folder.mkdir(parents=True)
        (folder / "a.png").write_bytes(save(smooth(301, 400), "PNG"))
    where = None if change == "not named" else str(folder.parent)
    dedup = recipe.dedup.model_copy(update={"against": where})
    show.show(recipe.model_copy(update={"dedup": dedup}), key(78))
    assert [tile.picture is None for tile in drawn.tiles] == [True, False, False]
    assert drawn.lines()[0] == ["_against", "evaluation picture", EVALUATION]
    left, middle = 20 + PICTURE_PX // 2, drawn.sheet.shape[0] // 2
    assert drawn.sheet[middle, left - 100].tolist() == drawn.sheet[middle, left + 100].tolist()


def test_a_picture_that_only_an_earlier_search_knew(
    recipe: Recipe, drawn: Drawn, tmp_path: Path
) -> None:
    shards = finished_shards(recipe.root, IMAGES, "album", "ingest")
    (row,) = (r for r in removals(shards, recipe.root) if r["key"] == key(76))
    later = recipe.model_copy(update={"dedup": recipe.dedup.model_copy(update={"name": "later"})})
    unknown = {f"keeper_{name}": None for name in ("dataset", "shard", "row")}
    write_tables(later, [row | unknown])
    show.show(later, key(76))
    assert drawn.tiles[0].picture is None
    assert drawn.lines()[0] == ["of an earlier search", "kept", SMALL]
    np.testing.assert_array_equal(drawn.tiles[1].picture, picture(76))


def test_the_largest_groups(recipe: Recipe, drawn: Drawn) -> None:
    folder = f"{recipe.root}/notes/duplicates-sscd"
    largest = [f"{folder}/{LARGE}.jpg", f"{folder}/{CONTAMINATED}.jpg", f"{folder}/{SMALL}.jpg"]
    if CONTAMINATED > SMALL:  # both have two pictures
        largest[1:] = reversed(largest[1:])
    assert show.draw_largest(recipe, 2) == largest[:2]
    assert show.draw_largest(recipe) == largest


def test_without_removals_nothing_is_drawn(recipe: Recipe) -> None:
    idle = recipe.model_copy(update={"dedup": recipe.dedup.model_copy(update={"name": "idle"})})
    write_tables(idle, [])
    assert show.draw_largest(idle) == []
    with pytest.raises(EvenmixError, match=r"duplicates/idle/album is missing or not finished"):
        show.show(idle, ALONE)


def test_a_picture_without_copies(recipe: Recipe) -> None:
    with pytest.raises(EvenmixError, match=f"{ALONE} of album was kept and has no copies"):
        show.show(recipe, ALONE)


@pytest.mark.parametrize("unknown", [key_of("album", "no.png"), "", "[bold]"])
def test_an_unknown_key(recipe: Recipe, unknown: str) -> None:
    with pytest.raises(EvenmixError, match=r"duplicates/sscd knows no picture .*32 hexadecimal"):
        show.show(recipe, unknown)


def test_a_search_that_has_not_ended(recipe: Recipe) -> None:
    other = recipe.model_copy(update={"dedup": recipe.dedup.model_copy(update={"name": "other"})})
    with pytest.raises(EvenmixError, match=r"duplicates/other/_removed/all\.parquet is missing"):
        show.show(other, LARGE)


def test_tiles_are_in_rows_without_overlap() -> None:
    tiles = [Tile(small(picture(number)), ["a", "b", "c"]) for number in range(MAX_COLUMNS + 2)]
    sheet = contact_sheet(["title"], tiles)
    centres = []
    for number in range(len(tiles)):
        rows, columns = np.nonzero((sheet == colour(number)).all(axis=2))
        height, width, _ = picture(number).shape
        assert (len(rows), np.ptp(rows) + 1, np.ptp(columns) + 1) == (height * width, height, width)
        centres.append((rows.mean() // 10, columns.mean()))
    assert centres == sorted(centres)
    assert len({row for row, _ in centres}) == 2


def test_long_lines_stay_below_their_picture() -> None:
    white = np.full((PICTURE_PX, PICTURE_PX, 3), 255, np.uint8)
    words = "a very long name of a dataset or path " * 9
    lone = contact_sheet(["t"], [Tile(white, [words, f"{words}\n{words}", "\N{SNOWMAN}\x1b[1m"])])
    both = contact_sheet(
        ["t"], [Tile(white, [words, f"{words}\n{words}", "x"]), Tile(white, ["x"])]
    )
    assert lone.shape[0] == both.shape[0]
    beside = both[-60:, 21 + PICTURE_PX : 38 + PICTURE_PX]
    assert (beside == 255).all()


def test_large_pictures_are_made_small_and_small_ones_stay() -> None:
    assert small(smooth(1000, 500)).shape == (PICTURE_PX, PICTURE_PX // 2, 3)
    np.testing.assert_array_equal(small(smooth(30, 50)), smooth(30, 50))
    assert small(np.asarray(Image.new("RGB", (4000, 3)))).shape == (1, PICTURE_PX, 3)
