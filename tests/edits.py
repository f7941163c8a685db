"""What happens to pictures on the web: the edits by which copies differ."""

import io
from collections.abc import Callable

from PIL import Image, ImageOps

from demo.photographs import half_size, overlaid


def jpeg(quality: int) -> Callable[[Image.Image], Image.Image]:
    """Return what saves a picture as JPEG, and reads it again."""

    def save(picture: Image.Image) -> Image.Image:
        file = io.BytesIO()
        picture.save(file, "JPEG", quality=quality)
        return Image.open(file)

    return save


def crop(share: float) -> Callable[[Image.Image], Image.Image]:
    """Return what keeps the middle of a picture, with a share of its area."""

    def cut(picture: Image.Image) -> Image.Image:
        width, height = picture.size
        x, y = round(width * (1 - share**0.5) / 2), round(height * (1 - share**0.5) / 2)
        return picture.crop((x, y, width - x, height - y))

    return cut


def turned(picture: Image.Image) -> Image.Image:
    """Turn a picture by 10 degrees; the corners become black."""
    return picture.rotate(10, Image.Resampling.BICUBIC)


def padded(picture: Image.Image) -> Image.Image:
    """Lay a white margin around a picture, of a tenth of its edges on each side."""
    return ImageOps.expand(picture, (picture.width // 10, picture.height // 10), "white")


EDITS: dict[str, Callable[[Image.Image], Image.Image]] = {
    "half size": half_size,
    "JPEG quality 30": jpeg(30),
    "JPEG quality 10": jpeg(10),
    "half size, JPEG quality 30": lambda picture: jpeg(30)(half_size(picture)),
    "crop 70 %": crop(0.7),
    "crop 50 %": crop(0.5),
    "mirrored": ImageOps.mirror,
    "turned": turned,
    "text over it": overlaid,
    "padded": padded,
    "grey": ImageOps.grayscale,
}
