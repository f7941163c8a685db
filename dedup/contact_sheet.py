"""A contact sheet: small pictures in rows, each with a few lines of text below it."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from pipeline.images import Pixels
from pipeline.printable import printable

PICTURE_PX = 240
"""The longer edge of a picture on the sheet, and about the width of a key."""

MAX_COLUMNS = 8

_GAP_PX = 20
_FRAME_PX = 4
_LINE_PX = 17
_TITLE_LINE_PX = 26
_TEXT_SIZE, _TITLE_SIZE = 12, 17

_PAPER, _MOUNT = (255, 255, 255), (242, 242, 240)
_INK, _PALE_INK = (30, 30, 30), (110, 110, 110)


@dataclass(frozen=True)
class Tile:
    """A picture of a sheet, None if it cannot be shown, and the lines below it.

    ``frame`` is the colour of its frame, None for none.
    """

    picture: Pixels | None
    lines: Sequence[str]
    frame: str | None = None


def small(pixels: Pixels) -> Pixels:
    """Bring a picture to the size that it has on a sheet; a smaller one stays as it is."""
    image = Image.fromarray(pixels)
    image.thumbnail((PICTURE_PX, PICTURE_PX), Image.Resampling.LANCZOS)
    return np.asarray(image)


def contact_sheet(title: Sequence[str], tiles: Sequence[Tile]) -> Pixels:
    """Draw a sheet: uint8 RGB (height, width, 3). Pictures are as :func:`small` returns them."""
    columns = min(MAX_COLUMNS, len(tiles))
    rows = -(-len(tiles) // columns)
    num_lines = max(len(tile.lines) for tile in tiles)
    step_x = PICTURE_PX + _GAP_PX
    step_y = PICTURE_PX + num_lines * _LINE_PX + _GAP_PX
    top = _GAP_PX + len(title) * _TITLE_LINE_PX + _GAP_PX // 2
    title_width = max(round(_font(_TITLE_SIZE).getlength(line)) for line in title)
    width = _GAP_PX + max(columns * step_x, title_width + _GAP_PX)
    sheet = Image.new("RGB", (width, top + rows * step_y), _PAPER)
    draw = ImageDraw.Draw(sheet)
    for number, line in enumerate(title):
        place = (_GAP_PX, _GAP_PX + number * _TITLE_LINE_PX)
        draw.text(place, printable(line), _PALE_INK if number else _INK, _font(_TITLE_SIZE))
    for number, tile in enumerate(tiles):
        row, column = divmod(number, columns)
        _draw_tile(sheet, draw, tile, _GAP_PX + column * step_x, top + row * step_y)
    return np.asarray(sheet)


def _draw_tile(
    sheet: Image.Image, draw: ImageDraw.ImageDraw, tile: Tile, left: int, top: int
) -> None:
    square = (left, top, left + PICTURE_PX - 1, top + PICTURE_PX - 1)
    draw.rectangle(square, _MOUNT)
    if tile.picture is None:
        centre = (left + PICTURE_PX // 2, top + PICTURE_PX // 2)
        draw.text(centre, "cannot be read", _PALE_INK, _font(_TITLE_SIZE), anchor="mm")
    else:
        height, width, _ = tile.picture.shape
        place = (left + (PICTURE_PX - width) // 2, top + (PICTURE_PX - height) // 2)
        sheet.paste(Image.fromarray(tile.picture), place)
    if tile.frame is not None:
        around = (left - _FRAME_PX, top - _FRAME_PX, square[2] + _FRAME_PX, square[3] + _FRAME_PX)
        draw.rectangle(around, outline=tile.frame, width=_FRAME_PX)
    font = _font(_TEXT_SIZE)
    for number, line in enumerate(tile.lines):
        place = (left, top + PICTURE_PX + 6 + number * _LINE_PX)
        draw.text(place, _shortened(line, font), _PALE_INK if number else _INK, font)


def _shortened(line: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    """Return a line that is no wider than a picture; its middle goes first."""
    line = printable(line).replace("\n", " ")
    half = min(len(line) // 2, PICTURE_PX // 4)  # no letter is narrower than two pixels
    shown = line
    while half > 1 and font.getlength(shown) > PICTURE_PX:
        half -= 1
        shown = f"{line[:half]}…{line[-half:]}"
    return shown


@cache
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)
