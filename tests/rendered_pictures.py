"""Six hundred different pictures of text and plain graphics, which SSCD takes for copies.

Pictures of a kind share size, layout, colours and axes. Every third is the one before it with a
small change: other words on one of its lines, another bar, a block of other modules, another word.
"""

import random
from collections.abc import Callable, Iterator
from functools import cache

from PIL import Image, ImageDraw, ImageOps

from demo.fonts import plain_font
from demo.text_lines import COLOUR_PAIRS, COLOURS, WORDS

NUM_OF_EACH_KIND = 120

_PAPER, _INK = "white", (20, 20, 20)
_MODULE_PX = 16
_MODULES = 25


def rendered_pictures() -> Iterator[tuple[str, Image.Image]]:
    """Yield the name of each kind with one of its pictures, RGB; no two are alike."""
    for kind, draw in KINDS.items():
        for number in range(NUM_OF_EACH_KIND):
            yield kind, draw(number)


def paragraph(number: int) -> Image.Image:
    """Draw a page of lines of words."""
    rng, changes = _generators("paragraph", number)
    size_px = rng.choice((14, 18, 22))
    line_px = round(1.4 * size_px)
    lines = [_line_of_words(rng, size_px) for _ in range((640 - 64) // line_px)]
    if changes:
        lines[changes.randrange(len(lines))] = _line_of_words(changes, size_px)
    picture = Image.new("RGB", (480, 640), _PAPER)
    canvas = ImageDraw.Draw(picture)
    for row, line in enumerate(lines):
        canvas.text((32, 32 + row * line_px), line, fill=_INK, font=plain_font(size_px))
    return picture


def _line_of_words(rng: random.Random, size_px: int) -> str:
    words = [rng.choice(WORDS)]
    width_px = _width_px(words[0], size_px)
    while (width_px := width_px + _width_px(word := f" {rng.choice(WORDS)}", size_px)) <= 416:
        words.append(word)
    return "".join(words)


@cache
def _width_px(text: str, size_px: int) -> float:
    return plain_font(size_px).getlength(text)


def chart(number: int) -> Image.Image:
    """Draw bars over named axes."""
    rng, changes = _generators("chart", number)
    heights = [rng.randrange(20, 300) for _ in range(8)]
    names = [rng.choice(WORDS) for _ in heights]
    colour = COLOURS[rng.choice(("red", "green", "blue", "purple"))]
    if changes:
        bar = changes.randrange(len(heights))
        heights[bar] += 48 if heights[bar] < 160 else -48
    picture = Image.new("RGB", (560, 420), _PAPER)
    canvas = ImageDraw.Draw(picture)
    for tick in range(7):
        y = 360 - tick * 50
        canvas.line((60, y, 540, y), fill=(220, 220, 220))
        canvas.text((50, y), str(tick * 10), fill=_INK, font=plain_font(14), anchor="rm")
    for place, (height, name) in enumerate(zip(heights, names, strict=True)):
        x = 70 + place * 59
        canvas.rectangle((x, 360 - height, x + 42, 360), fill=colour)
        canvas.text((x + 21, 372), name, fill=_INK, font=plain_font(12), anchor="mm")
    canvas.line((60, 40, 60, 360, 540, 360), fill=_INK, width=2)
    return picture


def headline(number: int) -> Image.Image:
    """Draw three large words on a ground of one colour."""
    rng, changes = _generators("headline", number)
    letters, ground = rng.choice(COLOUR_PAIRS)
    words = [rng.choice(WORDS) for _ in range(3)]
    if changes:
        words[changes.randrange(3)] = changes.choice(WORDS)
    picture = Image.new("RGB", (512, 512), COLOURS[ground])
    ImageDraw.Draw(picture).multiline_text(
        (256, 256),
        "\n".join(words),
        fill=COLOURS[letters],
        font=plain_font(96),
        anchor="mm",
        align="center",
    )
    return picture


def code(number: int) -> Image.Image:
    """Draw a square code: random modules between the three finder patterns of a QR code."""
    rng, changes = _generators("code", number)
    modules = Image.frombytes(
        "L", (_MODULES, _MODULES), bytes(rng.choices((0, 255), k=_MODULES**2))
    )
    if changes:
        x, y = changes.randrange(8, _MODULES - 4), changes.randrange(8, _MODULES - 4)
        block = (x, y, x + 4, y + 4)
        modules.paste(ImageOps.invert(modules.crop(block)), block)
    canvas = ImageDraw.Draw(modules)
    for x, y in ((0, 0), (_MODULES - 7, 0), (0, _MODULES - 7)):
        canvas.rectangle((x, y, x + 6, y + 6), fill=0)
        canvas.rectangle((x + 1, y + 1, x + 5, y + 5), fill=255)
        canvas.rectangle((x + 2, y + 2, x + 4, y + 4), fill=0)
    side = (_MODULES + 8) * _MODULE_PX
    picture = Image.new("RGB", (side, side), _PAPER)
    edge = _MODULES * _MODULE_PX
    picture.paste(
        modules.resize((edge, edge), Image.Resampling.NEAREST), (4 * _MODULE_PX, 4 * _MODULE_PX)
    )
    return picture


def plain(number: int) -> Image.Image:
    """Fill a square with a colour; channels of two pictures differ by 51 at least, in one."""
    levels = (0, 51, 102, 204, 255)
    red, rest = divmod(number, 25)
    green, blue = divmod(rest, 5)
    return Image.new("RGB", (512, 512), (levels[red], levels[green], levels[blue]))


def _generators(kind: str, number: int) -> tuple[random.Random, random.Random | None]:
    """Return what draws a picture, and what changes it if it is a changed one."""
    is_changed = number % 3 == 2
    base = number - 1 if is_changed else number
    rng = random.Random(f"{kind} {base}")
    return rng, random.Random(f"{kind} {base} changed") if is_changed else None


KINDS: dict[str, Callable[[int], Image.Image]] = {
    "paragraph": paragraph,
    "chart": chart,
    "headline": headline,
    "code": code,
    "plain": plain,
}
