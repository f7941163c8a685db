"""A small corpus for tests, in the three layouts, and the command to build it with.

The photographs are those of scikit-image's package (public domain or CC0), with copies of them.
"""

import io
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import skimage.data
from PIL import Image, ImageDraw

COLOURS = ["red", "green", "blue", "yellow", "white", "black", "orange", "purple"]
PHOTOGRAPHS = ["astronaut", "chelsea", "coffee", "rocket"]

RECIPE = """
root = "{root}"
[images]
min_short_edge_px = 32
records_per_shard = 8
[datasets.shapes]
layout = "webdataset"
source = "{sources}/shapes/*.tar"
licence = "CC0 1.0"
id_rule = "{{id}}"
text_field = "text"
duplicates = "exact"
[datasets.photographs]
layout = "folder"
source = "{sources}/photographs"
licence = "public domain"
[datasets.lines]
layout = "parquet"
source = "{sources}/lines/*.parquet"
licence = "CC0 1.0"
id_rule = "{{id}}"
text_field = "text"
extra_fields = ["colour"]
duplicates = "exact"
[captions.source]
engine = "source"
templates.shapes = "A shape: {{text}}."
[mixture]
name = "small"
resolution = 32
captions = "source"
validation_fraction = 0.2
samples_per_shard = 16
"""

COUNTS: dict[str, tuple[int, dict[str, int]]] = {
    "lines": (24, {"missing_picture": 1, "truncated": 1}),
    "photographs": (13, {"empty_file": 1, "not_an_image": 1, "too_small": 1}),
    "shapes": (32, {}),
}
"""Records of each dataset, and how many of them must be rejected for which reason."""

DUPLICATES: dict[str, dict[str, int]] = {
    "lines": {},
    "photographs": {"exact_copy": 1, "near_duplicate": 5},
    "shapes": {"exact_copy": 1},
}


def write_recipe(folder: Path, sources: Path, root: str | None = None) -> Path:
    """Write a recipe for the small corpus and return its path."""
    path = folder / "recipe.toml"
    text = RECIPE.format(root=root or folder / "corpus", sources=sources)
    path.write_text(text, encoding="utf-8")
    return path


def write_sources(folder: Path) -> None:
    """Write the sources of the small corpus."""
    write_shapes(folder / "shapes")
    _write_photographs(folder / "photographs")
    _write_lines(folder / "lines")


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def _shape(number: int) -> tuple[bytes, str]:
    colour, ground = COLOURS[number % 8], COLOURS[(number * 3 + 1 + number // 8) % 8]
    image = Image.new("RGB", (48, 40), ground)
    ImageDraw.Draw(image).ellipse((8 + number % 5, 8, 36, 20 + number % 7), fill=colour)
    return _png(image), f"{colour} ellipse on {ground}"


def write_shapes(folder: Path) -> None:
    """Write 32 drawn shapes with their texts into two tars; the last is the first one again."""
    folder.mkdir(parents=True)
    for part in range(2):
        with tarfile.open(folder / f"shapes-{part}.tar", "w") as tar:
            for number in range(part * 16, part * 16 + 16):
                # The last one is the first one again.
                picture, text = _shape(0 if number == 31 else number)
                members = {
                    "png": picture,
                    "json": json.dumps({"id": number, "text": text}).encode(),
                }
                for extension, data in members.items():
                    info = tarfile.TarInfo(f"{number:04d}.{extension}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))


def _write_photographs(folder: Path) -> None:
    folder.mkdir(parents=True)
    for name in PHOTOGRAPHS:
        image = Image.fromarray(getattr(skimage.data, name)())
        image.thumbnail((320, 320))
        image.save(folder / f"{name}.png")
    astronaut = Image.open(folder / "astronaut.png")
    astronaut.resize((160, 160)).save(folder / "astronaut_half.png")
    astronaut.convert("L").save(folder / "astronaut_grey.png")
    chelsea = Image.open(folder / "chelsea.png")
    chelsea.transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(folder / "chelsea_mirrored.png")
    chelsea.save(folder / "chelsea_saved.jpg", quality=40)
    Image.open(folder / "coffee.png").save(folder / "coffee_again.png", compress_level=1)
    Image.open(folder / "rocket.png").resize((120, 120)).save(folder / "rocket_small.png")
    Image.open(folder / "rocket.png").resize((20, 20)).save(folder / "rocket_thumbnail.png")
    for path in list(folder.iterdir()):
        path.with_suffix(".txt").write_text(f"A photograph: {path.stem.replace('_', ' ')}.")
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "page.jpg").write_text("<html>not found</html>")


def _write_lines(folder: Path) -> None:
    folder.mkdir(parents=True)
    rows = []
    for number in range(24):
        colour = COLOURS[number % 8]
        image = Image.new("RGB", (64, 40), COLOURS[(number + 3) % 8])
        ImageDraw.Draw(image).text((4, 10), f"line {number}", fill=colour)
        picture = _png(image)
        struct: dict[str, object] | None = {"bytes": picture, "path": f"{number}.png"}
        if number == 5:
            struct = None
        if number == 6:
            struct = {"bytes": picture[: len(picture) // 2], "path": None}
        text = f'The words "line {number}" in {colour}.'
        rows.append({"id": number, "image": struct, "text": text, "colour": colour})
    for part in range(2):
        table = pa.Table.from_pylist(rows[part * 12 : part * 12 + 12])
        pq.write_table(table, folder / f"lines-{part}.parquet", row_group_size=5)


def evenmix(*arguments: str, **options: Any) -> subprocess.Popen[str]:
    """Start the command as a user does; what it prints can be read from its standard output."""
    process: subprocess.Popen[str] = subprocess.Popen(
        [sys.executable, "-m", "pipeline.cli", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "COLUMNS": "120"},
        **options,
    )
    return process


def finish(process: subprocess.Popen[str]) -> str:
    """Wait for a command that must succeed and return what it printed."""
    try:
        printed, _ = process.communicate(timeout=1800)
    except subprocess.TimeoutExpired:
        process.kill()  # or it would slow down all tests that follow
        raise
    assert process.returncode == 0, printed
    return printed
