"""The photographs that scikit-image ships, with what a crawl adds: copies, edits, broken files.

The layout is a folder: `<name>.jpg` or `<name>.png`, and `<name>.txt` with one sentence. Each
photograph is there as scikit-image ships it, and again in the edits of EDITS, under the same
sentence. The further files:

    astronaut_again.png         the bytes of astronaut.png                  exact copy
    rocket_lossless.png         the pixels of rocket.jpg in a PNG           exact copy
    cell_16_bit.png             the pixels of cell.png as 16-bit grey       exact copy
    coffee_cmyk.jpg             as for print                                near-duplicate
    chelsea_on_its_side.jpg     upright by its EXIF orientation             near-duplicate
    thumbnail_*.jpg             48 pixels at the shorter edge               too_small
    one_pixel.png               1 × 1                                       too_small
    empty.jpg                   no bytes                                    empty_file
    web_page.jpg                HTML, as from a server that lost the file   not_an_image
    half_a_download.jpg         the first half of a JPEG                    truncated
"""

import io
from collections.abc import Callable
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageOps

from demo.fonts import plain_font

THUMBNAIL_SHORT_EDGE_PX = 48
EXIF_ORIENTATION = 0x0112
TURN_RIGHT_TO_DISPLAY = 6  # the orientation of a picture stored turned left by a quarter

REJECTIONS = {"too_small": 4, "empty_file": 1, "not_an_image": 1, "truncated": 1}


@dataclass(frozen=True)
class Photograph:
    """A file of scikit-image's data folder, and what its documentation says of its licence."""

    file: str
    text: str
    credit: str
    licence: str

    @property
    def name(self) -> str:
        """The file's name without its extension."""
        return Path(self.file).stem


# The photographs of the data folder whose licence scikit-image 0.26 states (which leaves out
# moon, page and motorcycle; drawings, masks and charts are no photographs).
PHOTOGRAPHS = (
    Photograph(
        "astronaut.png",
        "A smiling woman astronaut in an orange space suit, with her helmet in front of her, "
        "beside a flag of the United States and a model of a space shuttle.",
        "NASA (Eileen Collins)",
        "public domain",
    ),
    Photograph(
        "brick.png",
        "A black and white photograph of a wall of long grey bricks.",
        "CC0Textures, Bricks25",
        "CC0 1.0",
    ),
    Photograph(
        "camera.png",
        "A black and white photograph of a man in a dark coat who looks through a camera on a "
        "tripod, with a lawn and towers behind him.",
        "Lav Varshney",
        "CC0 1.0",
    ),
    Photograph(
        "cell.png",
        "A microscope picture of one round bright cell that floats on a dark grey ground.",
        "Paul Müller et al., doi:10.1364/OE.26.010729",
        "CC0 1.0",
    ),
    Photograph(
        "chelsea.png",
        "The face of a ginger tabby cat with green eyes that looks to the right.",
        "Stéfan van der Walt",
        "CC0 1.0",
    ),
    Photograph(
        "clock_motion.png",
        "A round clock on a grey wall, blurred because the camera moved sideways.",
        "Stéfan van der Walt",
        "public domain",
    ),
    Photograph(
        "coffee.png",
        "An espresso in a white and red cup on a red saucer with a spoon, on a wooden table.",
        "Rachel Michetti, courtesy of Pikolo Espresso Bar",
        "CC0 1.0",
    ),
    Photograph(
        "coins.png",
        "A black and white photograph of four rows of ancient Greek coins.",
        "Brooklyn Museum",
        "no known copyright restrictions",
    ),
    Photograph(
        "grass.png",
        "A black and white photograph of grass and clover seen from above.",
        "linolafett, DeviantArt",
        "CC0 1.0",
    ),
    Photograph(
        "gravel.png",
        "A black and white photograph of gravel seen from above.",
        "CC0Textures, Gravel04",
        "CC0 1.0",
    ),
    Photograph(
        "hubble_deep_field.jpg",
        "Hundreds of distant galaxies of many colours on the black of space, seen by the Hubble "
        "Space Telescope.",
        "NASA, HubbleSite",
        "public domain",
    ),
    Photograph(
        "ihc.png",
        "A microscope picture of glands stained brown in tissue with blue nuclei.",
        "Center for Microscopy and Molecular Imaging (CMMI)",
        "no known copyright restrictions",
    ),
    Photograph(
        "retina.jpg",
        "The orange disc of a human retina with its branching blood vessels, on black.",
        "Mikael Häggström, doi:10.15347/wjm/2014.008",
        "CC0 1.0",
    ),
    Photograph(
        "rocket.jpg",
        "A white rocket on its launch pad between tall towers at dusk, with bright lamps.",
        "SpaceX",
        "public domain",
    ),
    Photograph(
        "text.png",
        "A black and white photograph of formulas written by hand on squared paper.",
        "Wikipedia, File:Corner.png",
        "public domain",
    ),
)


def write_photographs(folder: Path) -> int:
    """Write photographs, edits, copies and broken files with their texts; return their number."""
    folder.mkdir(parents=True, exist_ok=True)
    files: dict[str, tuple[bytes, str]] = {}
    for photograph in PHOTOGRAPHS:
        for file_name, data in _original_and_edits(photograph).items():
            files[file_name] = (data, photograph.text)
    by_name = {photograph.name: photograph for photograph in PHOTOGRAPHS}
    for file_name, (source, build) in ODD_FILES.items():
        photograph = by_name[source]
        files[file_name] = (build(_shipped(photograph)), photograph.text)
    for file_name, (data, text) in files.items():
        (folder / file_name).write_bytes(data)
        (folder / file_name).with_suffix(".txt").write_text(f"{text}\n", encoding="utf-8")
    return len(files)


def half_size(picture: Image.Image) -> Image.Image:
    """Halve both edges."""
    return picture.resize((picture.width // 2, picture.height // 2), Image.Resampling.LANCZOS)


def cropped(picture: Image.Image) -> Image.Image:
    """Keep the middle 70 % of both edges."""
    width, height = picture.size
    margin_x, margin_y = round(0.15 * width), round(0.15 * height)
    return picture.crop((margin_x, margin_y, width - margin_x, height - margin_y))


def overlaid(picture: Image.Image) -> Image.Image:
    """Write a line of white text on a black bar along the lower edge."""
    picture = picture.convert("RGB")
    width, height = picture.size
    bar_height = height // 10
    draw = ImageDraw.Draw(picture)
    draw.rectangle((0, height - bar_height, width, height), fill="black")
    centre = (width / 2, height - bar_height / 2)
    font = plain_font(bar_height * 0.6)
    draw.text(centre, "found on the web", fill="white", font=font, anchor="mm")
    return picture


EDITS: dict[str, Callable[[Image.Image], Image.Image]] = {
    "half_size": half_size,
    "cropped": cropped,
    "mirrored": ImageOps.mirror,
    "overlaid": overlaid,
    "grey": ImageOps.grayscale,
}


def _original_and_edits(photograph: Photograph) -> dict[str, bytes]:
    data = _shipped(photograph)
    picture = Image.open(io.BytesIO(data))
    files = {photograph.file: data, f"{photograph.name}_quality_30.jpg": _jpeg(picture, 30)}
    for edit, apply in EDITS.items():
        if not (edit == "grey" and picture.mode == "L"):  # which would change nothing
            files[f"{photograph.name}_{edit}.jpg"] = _jpeg(apply(picture))
    return files


def _shipped(photograph: Photograph) -> bytes:
    return (resources.files("skimage") / "data" / photograph.file).read_bytes()


def _jpeg(picture: Image.Image, quality: int = 90) -> bytes:
    return _encoded(picture, "JPEG", quality=quality)


def _encoded(picture: Image.Image, image_format: str, **options: object) -> bytes:
    file = io.BytesIO()
    picture.save(file, image_format, **options)
    return file.getvalue()


def same_bytes(data: bytes) -> bytes:
    """Return the very same file."""
    return data


def as_png(data: bytes) -> bytes:
    """Return the same pixels as a PNG."""
    return _encoded(Image.open(io.BytesIO(data)), "PNG")


def as_16_bit_grey(data: bytes) -> bytes:
    """Return 8-bit grey as a PNG of 16 bits: each value times 257, so that 255 becomes 65535."""
    pixels = np.asarray(Image.open(io.BytesIO(data))).astype(np.uint16) * 257
    return _encoded(Image.fromarray(pixels), "PNG")


def as_cmyk(data: bytes) -> bytes:
    """Return a CMYK JPEG."""
    return _jpeg(Image.open(io.BytesIO(data)).convert("CMYK"))


def on_its_side(data: bytes) -> bytes:
    """Return a JPEG that is stored turned left, with the EXIF orientation that turns it back."""
    picture = Image.open(io.BytesIO(data)).transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = TURN_RIGHT_TO_DISPLAY
    return _encoded(picture, "JPEG", quality=90, exif=exif)


def thumbnail(data: bytes) -> bytes:
    """Return a JPEG of 48 pixels at the shorter edge."""
    picture = Image.open(io.BytesIO(data))
    scale = THUMBNAIL_SHORT_EDGE_PX / min(picture.size)
    size = (round(picture.width * scale), round(picture.height * scale))
    return _jpeg(picture.resize(size, Image.Resampling.LANCZOS))


def one_pixel(data: bytes) -> bytes:
    """Return a 1 × 1 PNG."""
    return _encoded(Image.open(io.BytesIO(data)).resize((1, 1)), "PNG")


def empty(data: bytes) -> bytes:
    """Return no bytes."""
    return b""


def web_page(data: bytes) -> bytes:
    """Return what many servers send for a picture that is gone."""
    return b"<!DOCTYPE html>\n<title>404 Not Found</title>\n<p>This picture has moved.\n"


def half_a_download(data: bytes) -> bytes:
    """Return the first half of the file."""
    return data[: len(data) // 2]


# File name: the photograph that it is made from (whose sentence it carries), and how.
ODD_FILES: dict[str, tuple[str, Callable[[bytes], bytes]]] = {
    "astronaut_again.png": ("astronaut", same_bytes),
    "rocket_lossless.png": ("rocket", as_png),
    "cell_16_bit.png": ("cell", as_16_bit_grey),
    "coffee_cmyk.jpg": ("coffee", as_cmyk),
    "chelsea_on_its_side.jpg": ("chelsea", on_its_side),
    "thumbnail_chelsea.jpg": ("chelsea", thumbnail),
    "thumbnail_coffee.jpg": ("coffee", thumbnail),
    "thumbnail_rocket.jpg": ("rocket", thumbnail),
    "one_pixel.png": ("hubble_deep_field", one_pixel),
    "empty.jpg": ("brick", empty),
    "web_page.jpg": ("grass", web_page),
    "half_a_download.jpg": ("retina", half_a_download),
}
