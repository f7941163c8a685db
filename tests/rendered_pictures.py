"""Different pictures of text and plain graphics, which SSCD takes for copies.

Pictures of a kind share size, layout, colours and axes. Every third is the one before it with a
small change: one other line, one other word, another bar, or a block of other modules.
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


def rendered_pictures(first: int) -> Iterator[Image.Image]:
    """Yield 120 pictures of each kind, RGB, numbered from ``first``: 600 that all differ."""
    for draw in KINDS.values():
        yield from map(draw, range(first, first + NUM_OF_EACH_KIND))


def paragraph(number: int) -> Image.Image:
    """Draw a page of lines of words."""
    rng, changes = _generators("paragraph", number)
    size_px = rng.choice((14, 18, 22))
    line_px = round(1.4 * size_px)
    lines = [_line_of_words(rng, size_px) for _ in range((640 - 64) // line_px)]
    if changes:
        line = changes.choice(lines)
        if number % 2:
            line[:] = _line_of_words(changes, size_px)
        else:
            place = changes.randrange(len(line))
            line[place] = changes.choice([word for word in WORDS if word != line[place]])
    picture = Image.new("RGB", (480, 640), _PAPER)
    for row, line in enumerate(lines):
        x = 32
        for word in line:
            mask = _mask_of_word(word, size_px)
            picture.paste(_INK, (x, 32 + row * line_px), mask)
            x += mask.width
    return picture


def _line_of_words(rng: random.Random, size_px: int) -> list[str]:
    words: list[str] = []
    width_px = 0
    while (width_px := width_px + _mask_of_word(word := rng.choice(WORDS), size_px).width) <= 416:
        words.append(word)
    return words


@cache
def _mask_of_word(word: str, size_px: int) -> Image.Image:
    """Draw a word and the space behind it; a line drawn as a whole takes far longer."""
    font = plain_font(size_px)
    mask = Image.new("L", (round(font.getlength(f"{word} ")), round(1.4 * size_px)))
    ImageDraw.Draw(mask).text((0, 0), word, fill=255, font=font)
    return mask


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
    """Fill a square with a colour; channels of two pictures differ by 51 at least, in one.

    The numbers 0 to 124 have other colours than those from 1000.
    """
    thousand, rest = divmod(number, 1000)
    levels = range(25 * thousand, 256, 51)
    red, rest = divmod(rest, 25)
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
