"""A grid of samples with their prompts under them, to judge a model by eye."""

import math
import textwrap

import numpy as np
from PIL import Image, ImageDraw, ImageFont

MAX_COLUMNS = 8
MIN_TILE_PX = 128
MARGIN_PX = 8
FONT_PX = 11
LINE_PX = 14
LETTERS_PER_TILE_PX = 1 / 6
MAX_LINES = 4


def draw_grid(pictures: np.ndarray, prompts: list[str]) -> Image.Image:
    """Lay out pictures (n, R, R, 3) uint8 in rows; small ones are magnified by a whole factor."""
    magnified = math.ceil(MIN_TILE_PX / pictures.shape[1])
    tile = pictures.shape[1] * magnified
    cell_width, cell_height = tile + MARGIN_PX, tile + MARGIN_PX + MAX_LINES * LINE_PX
    columns = min(MAX_COLUMNS, len(pictures))
    rows = math.ceil(len(pictures) / columns)
    size = (columns * cell_width + MARGIN_PX, rows * cell_height + MARGIN_PX)
    grid = Image.new("RGB", size, "white")
    canvas = ImageDraw.Draw(grid)
    font = ImageFont.load_default(FONT_PX)
    for number, (picture, prompt) in enumerate(zip(pictures, prompts, strict=True)):
        left = MARGIN_PX + number % columns * cell_width
        top = MARGIN_PX + number // columns * cell_height
        image = Image.fromarray(picture).resize((tile, tile), Image.Resampling.NEAREST)
        grid.paste(image, (left, top))
        canvas.rectangle((left - 1, top - 1, left + tile, top + tile), outline="lightgrey")
        lines = textwrap.wrap(
            prompt, int(tile * LETTERS_PER_TILE_PX), max_lines=MAX_LINES, placeholder="…"
        )
        canvas.multiline_text((left, top + tile + 2), "\n".join(lines), "black", font, spacing=2)
    return grid
