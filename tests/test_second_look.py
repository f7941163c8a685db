"""Thumbnails of copies agree, those of different pictures do not, in any order and block size."""

from collections.abc import Callable

import numpy as np
import pytest
import skimage.data
from PIL import Image, ImageOps

from dedup import second_look
from dedup.records import THUMBNAIL_BYTES, Bools
from dedup.second_look import Thumbnails, agreeing, is_graphic, is_mirrored, thumbnail
from demo.photographs import half_size
from pipeline.images import Pixels
from tests.edits import EDITS, crop, jpeg
from tests.rendered_pictures import KINDS, headline, paragraph

Edit = Callable[[Image.Image], Image.Image]

PHOTOGRAPHS = ["astronaut", "camera", "chelsea", "coffee", "rocket"]
WHOLE = ["half size", "JPEG quality 30", "JPEG quality 10", "half size, JPEG quality 30"]


def photograph(name: str) -> Image.Image:
    return Image.fromarray(getattr(skimage.data, name)()).convert("RGB")


def pixels_of(picture: Image.Image) -> Pixels:
    return np.asarray(picture.convert("RGB"))


def thumbnails(pictures: list[Image.Image]) -> Thumbnails:
    return np.stack([thumbnail(pixels_of(picture)) for picture in pictures])


def agree(one: Image.Image, other: Image.Image, *, mirrored: bool = False) -> bool:
    left, right = thumbnails([one]), thumbnails([other])
    return bool(agreeing(left, right, np.ones((1, 1), np.bool_), mirrored)[0, 0])


@pytest.fixture(scope="module")
def rendered() -> list[Image.Image]:
    """Return nine pictures of each kind, three of them small changes of the one before."""
    return [draw(number) for draw in KINDS.values() for number in range(9)]


def everything(rows: Thumbnails, columns: Thumbnails) -> Bools:
    return np.ones((len(rows), len(columns)), np.bool_)


@pytest.mark.parametrize(
    ("colour", "luminance", "cb", "cr"),
    [
        ("black", -104, 0, 0),
        ("white", 104, 0, 0),
        ((128, 128, 128), 0, 0, 0),
        ((255, 0, 0), -42, -36, 103),
        ((0, 0, 255), -80, 103, -17),
    ],
)
def test_a_thumbnail_is_luminance_and_chroma_around_0(
    colour: str | tuple[int, int, int], luminance: int, cb: int, cr: int
) -> None:
    small = thumbnail(pixels_of(Image.new("RGB", (700, 300), colour)))
    assert small.dtype == np.int8 and small.shape == (THUMBNAIL_BYTES,)
    assert np.unique(small[:1408]).tolist() == [luminance]
    assert np.unique(small[1408:1472]).tolist() == [cb]
    assert np.unique(small[1472:]).tolist() == [cr]


def test_a_thumbnail_has_the_rows_from_the_top_and_the_columns_from_the_left() -> None:
    picture = Image.new("RGB", (320, 320))
    picture.paste("white", (160, 0, 320, 80))
    rows = thumbnail(pixels_of(picture))[:1408].reshape(44, 32)
    # Cells beside an edge have a little of the other side.
    assert (rows[:10, 17:] == 104).all()
    assert (rows[12:] == -104).all() and (rows[:, :15] == -104).all()


@pytest.mark.parametrize("size", [(1, 1), (1, 500), (31, 33), (33, 900)])
def test_pictures_of_any_size_have_a_thumbnail(size: tuple[int, int]) -> None:
    picture = pixels_of(Image.new("RGB", size, "white"))
    assert (thumbnail(picture)[:1408] == 104).all()
    assert is_graphic(picture)


def test_half_a_photograph_has_the_same_thumbnail() -> None:
    for name in PHOTOGRAPHS:
        picture = photograph(name)
        whole, half = thumbnails([picture, half_size(picture)]).astype(int)
        assert np.abs(whole - half).max() <= 6, name


def test_all_rendered_pictures_are_graphics_also_when_they_are_copied(
    rendered: list[Image.Image],
) -> None:
    for picture in rendered:
        assert is_graphic(pixels_of(picture))
        for edit in WHOLE:
            assert is_graphic(pixels_of(EDITS[edit](picture))), edit


def test_photographs_are_no_graphics_also_when_they_are_copied() -> None:
    for name in PHOTOGRAPHS:
        picture = photograph(name)
        assert not is_graphic(pixels_of(picture)), name
        for edit in WHOLE:
            assert not is_graphic(pixels_of(EDITS[edit](picture))), (name, edit)


def test_different_pictures_never_agree(rendered: list[Image.Image]) -> None:
    small = thumbnails([*rendered, *(photograph(name) for name in PHOTOGRAPHS)])
    agreed = agreeing(small, small, everything(small, small), mirrored=True)
    np.testing.assert_array_equal(agreed, np.eye(len(small), dtype=np.bool_))


def test_pages_with_one_other_line_or_word_do_not_agree() -> None:
    """These pages are other ones than those that set the limits."""
    changed = range(1001, 1361, 3)
    pages = [paragraph(number - 1) for number in changed]
    original = thumbnails(pages)
    small = thumbnails([paragraph(number) for number in changed])
    assert not agreeing(original, small, everything(original, small), mirrored=False).any()
    copies = thumbnails([jpeg(30)(page) for page in pages])
    agreed = agreeing(copies, small, everything(copies, small), mirrored=False)
    one_line, one_word = agreed[::2], agreed[1::2]
    assert not one_line.any()
    assert one_word.sum() <= 0.15 * len(one_word)  # measured: 0.1


@pytest.mark.parametrize("edit", ["half size", "JPEG quality 30"])
def test_copies_agree_whichever_comes_first(rendered: list[Image.Image], edit: str) -> None:
    small = thumbnails(rendered)
    copies = thumbnails([EDITS[edit](picture) for picture in rendered])
    agreed = agreeing(small, copies, everything(small, copies), mirrored=False)
    np.testing.assert_array_equal(agreed, np.eye(len(small), dtype=np.bool_))
    turned_round = agreeing(copies, small, everything(copies, small), mirrored=False)
    np.testing.assert_array_equal(turned_round, agreed.T)


@pytest.mark.parametrize("name", PHOTOGRAPHS)
def test_whole_copies_of_photographs_agree_and_crops_do_not(name: str) -> None:
    picture = photograph(name)
    for quality in (75, 30):
        assert agree(picture, jpeg(quality)(picture)), quality
    assert agree(picture, half_size(picture))
    assert not agree(picture, crop(0.7)(picture))


def test_only_candidates_agree(rendered: list[Image.Image]) -> None:
    small = thumbnails(rendered)
    candidates = everything(small, small)
    candidates[3] = candidates[:, 5] = False
    agreed = agreeing(small, small, candidates, mirrored=False)
    assert np.flatnonzero(~agreed.diagonal()).tolist() == [3, 5]
    nothing = agreeing(small, small, np.zeros_like(candidates), mirrored=True)
    assert not nothing.any()


def test_blocks_decide_nothing(
    rendered: list[Image.Image], monkeypatch: pytest.MonkeyPatch
) -> None:
    small = thumbnails(rendered)
    copies = thumbnails([jpeg(10)(picture) for picture in rendered])
    whole = agreeing(small, copies, everything(small, copies), mirrored=True)
    lead = is_mirrored(small, copies)
    assert whole.any() and not whole.all()
    monkeypatch.setattr(second_look, "_PAIRS_AT_ONCE", 7)
    for rows in np.array_split(np.arange(len(small)), 4):
        for columns in np.array_split(np.arange(len(small)), 3):
            left, right = small[rows], copies[columns]
            part = agreeing(left, right, everything(left, right), mirrored=True)
            np.testing.assert_array_equal(part, whole[np.ix_(rows, columns)])
    np.testing.assert_array_equal(is_mirrored(small, copies), lead)


@pytest.mark.parametrize("picture", [paragraph(0), headline(0)], ids=["paragraph", "headline"])
def test_mirrored_graphics_agree_only_where_mirror_images_count(picture: Image.Image) -> None:
    copy = jpeg(30)(ImageOps.mirror(picture))
    assert agree(picture, copy, mirrored=True)
    assert not agree(picture, copy, mirrored=False)


@pytest.mark.parametrize("edit", [half_size, jpeg(10), ImageOps.grayscale, crop(0.9)])
def test_mirror_images_are_told_from_copies(edit: Edit) -> None:
    pictures = [*map(photograph, PHOTOGRAPHS), paragraph(0), headline(0)]
    if edit not in (half_size, EDITS["JPEG quality 10"]):
        pictures = pictures[: len(PHOTOGRAPHS)]  # pages that are cropped have other cells
    small = thumbnails(pictures)
    straight = thumbnails([edit(picture) for picture in pictures])
    mirrored = thumbnails([edit(ImageOps.mirror(picture)) for picture in pictures])
    assert not is_mirrored(small, straight).any()
    assert is_mirrored(small, mirrored).all()
    assert is_mirrored(mirrored, small).all()


def test_what_is_its_own_mirror_image_is_not_mirrored() -> None:
    half = photograph("coffee").crop((0, 0, 300, 400))
    symmetric = Image.new("RGB", (600, 400))
    symmetric.paste(half, (0, 0))
    symmetric.paste(ImageOps.mirror(half), (300, 0))
    small = thumbnails([symmetric, Image.new("RGB", (64, 64), "red")])
    other = thumbnails([jpeg(30)(symmetric), Image.new("RGB", (64, 64), "red")])
    assert is_mirrored(small, other).tolist() == [False, False]
    none = np.zeros((0, THUMBNAIL_BYTES), np.int8)
    assert is_mirrored(none, none).tolist() == []
