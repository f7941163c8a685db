"""Words drawn in one colour on a ground of another, with their ground truth.

The layout is that of Hugging Face datasets: Parquet files with an image struct of `bytes` and
`path`. Letters and ground are plain to see at 32 × 32 pixels: a model that follows its prompts
gets the colours right.
"""

import io
import random
from bisect import bisect_left
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, ImageDraw

from demo.fonts import plain_font

NUM_FILES = 2
ROWS_PER_FILE = 1000
ROWS_PER_ROW_GROUP = 250
SIDES_PX = (96, 104, 112, 120, 128)
FONT_SIZES_PX = range(1, 65)
MARGIN_PX = 6
STROKE_PX = 1  # makes the letters bolder, so that their colour survives small sizes

# The rows (of all files together) that are broken, and how.
NULL_IMAGES = (137, 1492)
EMPTY_IMAGES = (420, 1111)
CUT_IMAGES = (777, 1666)
REJECTIONS = {
    "missing_picture": len(NULL_IMAGES),
    "empty_file": len(EMPTY_IMAGES),
    "truncated": len(CUT_IMAGES),
}

COLOURS = {
    "red": (214, 30, 30),
    "green": (20, 140, 50),
    "blue": (25, 60, 200),
    "yellow": (250, 220, 40),
    "white": (255, 255, 255),
    "black": (0, 0, 0),
    "orange": (245, 130, 20),
    "purple": (110, 30, 150),
    "pink": (255, 160, 195),
    "brown": (105, 60, 20),
    "grey": (128, 128, 128),
}
LEAST_CONTRAST = 3.0

# No colours: the colour names in a sentence are those of letters and ground.
WORD_LIST = """
air animal apple arm autumn baby bag ball band bank bath beach bear bed bee bell bird boat body bone
book box boy bread bridge bus cake car card cat chair city clock cloud coat coffee cold corn cow cup
dance dark day deep dog door dream dress drum duck earth east egg empty evening eye face farm fast
field fire fish flag floor flower food foot forest free fresh fruit game garden gate gift girl glass
good grass great hair hall hand happy hat heart heavy high hill home honey horse hotel hour house
ice island jacket job juice jump key king kitchen lake lamp large leaf left lemon letter light lion
little long lost lucky lunch map market meal milk mirror money moon morning mountain mouse music
name new night north nose ocean old open paint paper park party path pear pencil phone piano picture
plane plant play poem pool quick quiet rain rest rice right ring river road rock room round salt
sand school sea season ship shoe shop short sing sky sleep slow small smile snow soft song soup
south spoon spring square stairs star stone storm story street strong sugar summer sun sweet table
tall tea team ticket tiger time tower town train travel tree valley village voice walk wall warm
water wave west wheel wild wind window winter wolf wood word work world young zebra
"""
WORDS = tuple(WORD_LIST.split())

SCHEMA = pa.schema(
    {
        "id": pa.string(),
        "image": pa.struct({"bytes": pa.binary(), "path": pa.string()}),
        "text": pa.string(),
        "words": pa.string(),
        "letter_colour": pa.string(),
        "ground_colour": pa.string(),
    }
)


@dataclass(frozen=True)
class TextLine:
    """What one picture shows.

    `width` and `height` are in pixels; `place` says how much of the free room is left of and
    above the words, each from 0 to 1; the colours are names.
    """

    width: int
    height: int
    place: tuple[float, float]
    words: tuple[str, ...]
    letter_colour: str
    ground_colour: str

    @property
    def text(self) -> str:
        """The sentence that describes the picture."""
        noun = "word" if len(self.words) == 1 else "words"
        article = "an" if self.ground_colour[0] in "aeiou" else "a"
        return (
            f'The {noun} "{" ".join(self.words)}" in {self.letter_colour} letters '
            f"on {article} {self.ground_colour} background."
        )


def write_text_lines(folder: Path) -> int:
    """Write the Parquet files, broken rows among them; return the number of rows."""
    folder.mkdir(parents=True, exist_ok=True)
    for file_number in range(NUM_FILES):
        start = file_number * ROWS_PER_FILE
        rows = [_row(number) for number in range(start, start + ROWS_PER_FILE)]
        path = folder / f"train-{file_number:05d}-of-{NUM_FILES:05d}.parquet"
        table = pa.Table.from_pylist(rows, SCHEMA)
        pq.write_table(table, path, row_group_size=ROWS_PER_ROW_GROUP)
    return NUM_FILES * ROWS_PER_FILE


def compose(number: int) -> TextLine:
    """Choose size, words and colours from the row's number alone."""
    rng = random.Random(f"text line {number}")
    letter_colour, ground_colour = rng.choice(COLOUR_PAIRS)
    words = tuple(rng.choice(WORDS) for _ in range(rng.choice((1, 2))))
    width, height = rng.choice(SIDES_PX), rng.choice(SIDES_PX)
    place = rng.random(), rng.random()
    return TextLine(width, height, place, words, letter_colour, ground_colour)


def draw(line: TextLine) -> Image.Image:
    """Return the RGB picture: the words below each other, as large as they fit."""
    picture = Image.new("RGB", (line.width, line.height), COLOURS[line.ground_colour])
    canvas = ImageDraw.Draw(picture)
    text = "\n".join(line.words)

    def free_room(size_px: int) -> tuple[float, float]:
        left, top, right, bottom = _box(canvas, text, size_px)
        return (
            line.width - 2 * MARGIN_PX - (right - left),
            line.height - 2 * MARGIN_PX - (bottom - top),
        )

    too_large = bisect_left(FONT_SIZES_PX, True, key=lambda size_px: min(free_room(size_px)) < 0)
    size_px = FONT_SIZES_PX[too_large - 1]
    left, top, _, _ = _box(canvas, text, size_px)
    free_x, free_y = free_room(size_px)
    place_x, place_y = line.place
    canvas.multiline_text(
        (MARGIN_PX + place_x * free_x - left, MARGIN_PX + place_y * free_y - top),
        text,
        fill=COLOURS[line.letter_colour],
        font=plain_font(size_px),
        align="center",
        stroke_width=STROKE_PX,
    )
    return picture


def _box(canvas: ImageDraw.ImageDraw, text: str, size_px: int) -> tuple[float, float, float, float]:
    """Return left, top, right and bottom of the words drawn at (0, 0)."""
    return canvas.multiline_textbbox(
        (0, 0), text, font=plain_font(size_px), align="center", stroke_width=STROKE_PX
    )


def contrast(colour: tuple[int, int, int], other: tuple[int, int, int]) -> float:
    """Return the contrast ratio of two sRGB colours, 1 to 21 (WCAG 2.1, section 1.4.3)."""
    darker, lighter = sorted((_luminance(colour), _luminance(other)))
    return (lighter + 0.05) / (darker + 0.05)


def _luminance(colour: tuple[int, int, int]) -> float:
    values = (channel / 255 for channel in colour)
    red, green, blue = (v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in values)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


COLOUR_PAIRS = tuple(
    (letters, ground)
    for letters, ground in permutations(COLOURS, 2)
    if contrast(COLOURS[letters], COLOURS[ground]) >= LEAST_CONTRAST
)


def _row(number: int) -> dict[str, object]:
    line = compose(number)
    identifier = f"line-{number:05d}"
    file = io.BytesIO()
    draw(line).save(file, "PNG")
    data = file.getvalue()
    if number in EMPTY_IMAGES:
        data = b""
    elif number in CUT_IMAGES:
        data = data[: len(data) // 2]
    image = None if number in NULL_IMAGES else {"bytes": data, "path": f"{identifier}.png"}
    return {
        "id": identifier,
        "image": image,
        "text": line.text,
        "words": " ".join(line.words),
        "letter_colour": line.letter_colour,
        "ground_colour": line.ground_colour,
    }
