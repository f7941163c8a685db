"""The pixel rules: everything between hostile bytes and a clean picture.

A clean picture is a uint8 RGB array of shape (height, width, 3), upright, opaque, of known size;
the arrays that come out of here may be read-only. What stands in a file and is not pixels is
ignored: text, thumbnails, XMP, and colour profiles too (values are kept as they are stored, the
rule of i1). Of the metadata only the EXIF orientation counts. Of several frames or pages the first
is the picture. Whatever is wrong with the bytes comes out as a
:class:`pipeline.reasons.PictureError`; sizes are checked in the header, before a pixel is decoded.
"""

import hashlib
import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import simplejpeg
from PIL import Image, ImageFile
from PIL.BmpImagePlugin import BmpImageFile
from PIL.GifImagePlugin import GifImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import TiffImageFile
from PIL.WebPImagePlugin import WebPImageFile

from pipeline import containers
from pipeline.reasons import PictureError, RejectReason

Pixels = npt.NDArray[np.uint8]
Resample = Literal["bilinear", "bicubic", "lanczos"]
ImageFormat = Literal["png", "jpeg", "webp"]
Box = tuple[int, int, int, int]
"""Left, top, right and bottom, in pixels."""

EXTENSIONS = {
    "jpeg": "jpg", "png": "png", "webp": "webp", "gif": "gif", "bmp": "bmp", "tiff": "tiff",
}  # fmt: skip
"""The formats that are read, and the file name extension of each."""

_READERS: dict[str, type[ImageFile.ImageFile]] = {
    "jpeg": JpegImageFile,
    "png": PngImageFile,
    "webp": WebPImageFile,
    "gif": GifImageFile,
    "bmp": BmpImageFile,
    "tiff": TiffImageFile,
}
_MODES = {
    "1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr",
    "I;16", "I;16L", "I;16B",
}  # fmt: skip

_ORIENTATIONS = {  # EXIF 2.3, tag 0x0112: are the axes swapped; then the steps along rows, columns
    1: (False, 1, 1), 2: (False, 1, -1), 3: (False, -1, -1), 4: (False, -1, 1),
    5: (True, 1, 1), 6: (True, 1, -1), 7: (True, -1, -1), 8: (True, -1, 1),
}  # fmt: skip


@dataclass(frozen=True)
class Header:
    """What a picture says of itself; ``width`` and ``height`` in pixels, as displayed.

    ``mode`` is Pillow's name of the stored pixel layout; ``animated`` means more than one frame
    or page.
    """

    format: str
    width: int
    height: int
    mode: str
    animated: bool

    @property
    def extension(self) -> str:
        """The usual file name extension of the format, without its dot."""
        return EXTENSIONS[self.format]


@dataclass(frozen=True)
class Limits:
    """Which pictures are wanted; all bounds are inclusive."""

    min_short_edge_px: int
    max_pixels: int
    max_bytes: int


def probe(data: bytes) -> Header:
    """Read a picture's header; no pixel is decoded and no pixel memory is allocated.

    Raises:
        PictureError: empty, not a picture, of an unsupported kind, or broken before its pixels.
    """
    return _open(data)[1]


def check(header: Header, num_bytes: int, limits: Limits) -> None:
    """Raise :class:`PictureError` unless a picture of ``num_bytes`` bytes is within ``limits``."""
    size = f"{header.width}x{header.height}"
    if num_bytes > limits.max_bytes:
        raise PictureError(RejectReason.TOO_MANY_BYTES, f"{num_bytes} bytes")
    if header.width * header.height > limits.max_pixels:
        raise PictureError(RejectReason.TOO_MANY_PIXELS, f"{size} pixels")
    if min(header.width, header.height) < limits.min_short_edge_px:
        raise PictureError(RejectReason.TOO_SMALL, f"{size} pixels")


def decode(data: bytes, limits: Limits, short_edge_px: int | None = None) -> Pixels:
    """Decode the picture that ``data`` holds to uint8 RGB of shape (height, width, 3).

    EXIF orientation is applied, transparency is laid over white, 16-bit samples keep their upper
    8 bits, CMYK becomes RGB without a profile. The shape is that of :func:`probe`; but if
    ``short_edge_px`` is given, a JPEG may come at a half, a quarter or an eighth of its size, as
    small as it can be while its shorter edge is still so long. That is quicker: what would be
    averaged away is never computed.

    Raises:
        PictureError: for all that is wrong with the bytes, and for a picture outside ``limits``.
    """
    image, header, orientation = _open_within(data, limits)
    reduction = 1 if short_edge_px is None else _reduction(header, short_edge_px)
    return _pixels_of(image, header, orientation, reduction)


def read(data: bytes, limits: Limits) -> tuple[Header, Pixels]:
    """Return a picture's header and its pixels; as :func:`probe` and :func:`decode`, in one go."""
    image, header, orientation = _open_within(data, limits)
    return header, _pixels_of(image, header, orientation, reduction=1)


def resize_and_crop_square(
    pixels: Pixels, resolution: int, resample: Resample = "bilinear"
) -> tuple[Pixels, Box]:
    """Bring the shorter edge to ``resolution``, then cut out the centre square of that size.

    The rule of i1: bilinear for training samples; for its captioner bicubic and a resolution of
    ``min(512, shorter edge)``. Returns what :func:`resize_and_crop` does.
    """
    return resize_and_crop(pixels, resolution, resolution, resample)


def resize_and_crop(
    pixels: Pixels, short_edge_px: int, max_long_edge_px: int, resample: Resample
) -> tuple[Pixels, Box]:
    """Bring the shorter edge to ``short_edge_px``, then cut the ends off a longer edge above that.

    What stays is the middle, of :func:`cropped_size`. Both steps are one, so no part that is cut
    off is ever computed.

    Returns:
        The picture, and the part of the original that it shows (:func:`crop_box`).
    """
    height, width, _ = pixels.shape
    size = cropped_size(width, height, short_edge_px, max_long_edge_px)
    resized_width, resized_height = resized_size(width, height, short_edge_px)
    left, top, right, bottom = _middle(resized_width, resized_height, size)
    x_scale, y_scale = width / resized_width, height / resized_height
    resized = Image.fromarray(pixels).resize(
        size,
        Image.Resampling[resample.upper()],
        box=(left * x_scale, top * y_scale, right * x_scale, bottom * y_scale),
    )
    return np.asarray(resized), crop_box(width, height, short_edge_px, max_long_edge_px)


def cropped_size(
    width: int, height: int, short_edge_px: int, max_long_edge_px: int
) -> tuple[int, int]:
    """Return width and height of what :func:`resize_and_crop` makes of a picture of such size."""
    resized_width, resized_height = resized_size(width, height, short_edge_px)
    return min(resized_width, max_long_edge_px), min(resized_height, max_long_edge_px)


def crop_box(width: int, height: int, short_edge_px: int, max_long_edge_px: int) -> Box:
    """Return the smallest box of whole pixels with all that :func:`resize_and_crop` shows.

    ``width`` and ``height`` are those of the original, and so is the box.
    """
    size = cropped_size(width, height, short_edge_px, max_long_edge_px)
    resized_width, resized_height = resized_size(width, height, short_edge_px)
    left, top, right, bottom = _middle(resized_width, resized_height, size)
    return (
        left * width // resized_width,
        top * height // resized_height,
        -(-right * width // resized_width),  # rounded up
        -(-bottom * height // resized_height),
    )


def resize_short_edge(pixels: Pixels, short_edge_px: int, resample: Resample) -> Pixels:
    """Bring the shorter edge to ``short_edge_px`` and keep the aspect (:func:`resized_size`)."""
    height, width, _ = pixels.shape
    size = resized_size(width, height, short_edge_px)
    return np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling[resample.upper()]))


def resized_size(width: int, height: int, short_edge_px: int) -> tuple[int, int]:
    """Return width and height at a shorter edge of ``short_edge_px``, to the pixel below."""
    shorter = min(width, height)
    return width * short_edge_px // shorter, height * short_edge_px // shorter


def encode(pixels: Pixels, image_format: ImageFormat) -> bytes:
    """Encode uint8 RGB (height, width, 3): PNG and WebP without loss, JPEG at quality 95, 4:4:4.

    Equal pixels give equal bytes, as far as one version of Pillow and its codecs goes.
    """
    buffer = io.BytesIO()
    image = Image.fromarray(pixels)
    match image_format:
        case "png":
            image.save(buffer, "PNG")
        case "jpeg":
            image.save(buffer, "JPEG", quality=95, subsampling=0)
        case "webp":
            image.save(buffer, "WEBP", lossless=True)
    return buffer.getvalue()


def sha256_of_pixels(pixels: Pixels) -> str:
    """Return the SHA-256 (hex) of shape and pixels: equal for copies in other containers."""
    digest = hashlib.sha256(f"{pixels.shape}".encode())
    digest.update(np.ascontiguousarray(pixels).data)
    return digest.hexdigest()


def _open_within(data: bytes, limits: Limits) -> tuple[ImageFile.ImageFile, Header, int]:
    """Open a picture, as :func:`_open`, and hold what its header says to ``limits``."""
    if len(data) > limits.max_bytes:
        raise PictureError(RejectReason.TOO_MANY_BYTES, f"{len(data)} bytes")
    image, header, orientation = _open(data)
    check(header, len(data), limits)
    return image, header, orientation


def _open(data: bytes) -> tuple[ImageFile.ImageFile, Header, int]:
    """Return the picture with nothing decoded, its header, and its EXIF orientation (1 to 8)."""
    picture_format = containers.sniff(data)
    exif, animated = b"", False
    with _pillow_errors(picture_format):
        match picture_format:
            case "jpeg":
                data, exif = containers.jpeg_without_metadata(data)
            case "png":
                data, exif, animated = containers.png_without_metadata(data)
            case "gif":
                data, animated = containers.gif_first_frame(data)
            case "webp" if 8 + int.from_bytes(data[4:8], "little") > len(data):
                raise PictureError(RejectReason.TRUNCATED, "webp: shorter than it says")
            case "tiff":
                containers.check_tiff(data)
        image = _READERS[picture_format](io.BytesIO(data))
        _require_known_pixels(image)
        if isinstance(image, PngImageFile):
            _scale_colour_key(image)
        if isinstance(image, WebPImageFile):
            exif = image.info.get("exif", b"")
        # A TIFF's own tag is no matter here: Pillow swaps the size itself, and turns on loading.
        orientation = containers.orientation(exif)
        swap_axes, _, _ = _ORIENTATIONS[orientation]
        width, height = reversed(image.size) if swap_axes else image.size
        animated = animated or bool(getattr(image, "is_animated", False))
    return image, Header(picture_format, width, height, image.mode, animated), orientation


def _reduction(header: Header, short_edge_px: int) -> int:
    """Return by how much a picture may be reduced, for the sizes that libjpeg decodes fastest."""
    shorter = min(header.width, header.height)
    return next((by for by in (8, 4, 2) if shorter >= by * short_edge_px), 1)


def _pixels_of(
    image: ImageFile.ImageFile, header: Header, orientation: int, reduction: int
) -> Pixels:
    """Decode an opened picture; only a JPEG that libjpeg-turbo takes is reduced."""
    with _pillow_errors(header.format):
        pixels = _jpeg_to_rgb(image, reduction) if header.format == "jpeg" else None
        if pixels is None:
            reduction = 1
            image.load()
            pixels = _to_rgb(image)
        swap_axes, row_step, column_step = _ORIENTATIONS[orientation]
        if swap_axes:
            pixels = pixels.swapaxes(0, 1)
        pixels = np.ascontiguousarray(pixels[::row_step, ::column_step])
    expected = _reduced(header.height, reduction), _reduced(header.width, reduction), 3
    if pixels.shape != expected:
        raise PictureError(RejectReason.UNDECODABLE, "the picture has not the size of its header")
    return pixels


def _reduced(edge_px: int, reduction: int) -> int:
    return -(-edge_px // reduction)  # rounded up, as libjpeg does


@contextmanager
def _pillow_errors(picture_format: str) -> Iterator[None]:
    """Turn whatever Pillow raises on broken bytes, which is any exception, into a reason."""
    ImageFile.LOAD_TRUNCATED_IMAGES = False  # another library may have set it
    try:
        yield
    except PictureError:
        raise
    except Image.DecompressionBombError as error:
        raise PictureError(RejectReason.TOO_MANY_PIXELS, str(error)) from error
    except Exception as error:
        cut = "truncated" in str(error).lower()
        reason = RejectReason.TRUNCATED if cut else RejectReason.UNDECODABLE
        detail = f"{picture_format}: {type(error).__name__}: {error}"[:200]
        raise PictureError(reason, detail) from error


def _require_known_pixels(image: ImageFile.ImageFile) -> None:
    known = image.mode in _MODES
    if known and isinstance(image, TiffImageFile) and image.mode.startswith("I;16"):
        # 12 bits in 16, and 0 for white, come from Pillow as if they were plain 16-bit grey.
        bits_per_sample, photometric = image.tag_v2.get(258), image.tag_v2.get(262)
        known = bits_per_sample == (16,) and photometric == 1
    if not known:
        detail = f"pixels of mode {image.mode} (32-bit, float, Lab or an unusual 16-bit grey)"
        raise PictureError(RejectReason.UNSUPPORTED_FORMAT, detail)


def _scale_colour_key(image: PngImageFile) -> None:
    """Bring a PNG's transparent colour to 8 bits, which Pillow does for its samples only."""
    key = image.info.get("transparency")
    match image.tile[0].args if image.tile else None:
        case "L;2" | "L;4" as raw if key is not None:
            image.info["transparency"] = key * {"L;2": 85, "L;4": 17}[raw] & 255
        case "RGB;16B" if key is not None:
            image.info["transparency"] = tuple(value >> 8 for value in key)


def _jpeg_to_rgb(image: ImageFile.ImageFile, reduction: int) -> Pixels | None:
    """Decode a colour or grey JPEG, reduced; None is for one that Pillow should rather look at.

    Pillow has the same decoder, libjpeg-turbo, but takes a third longer, and keeps its warnings to
    itself. The one that data end too early means that what is missing is grey; others, such as of
    extraneous bytes, are of faults that no viewer minds.
    """
    if image.mode not in ("RGB", "L") or not isinstance(image.fp, io.BytesIO):
        return None
    try:
        pixels: Pixels = simplejpeg.decode_jpeg(
            image.fp.getvalue(),
            "RGB",
            min_height=_reduced(image.height, reduction),
            min_width=_reduced(image.width, reduction),
        )
    except ValueError as error:
        if "premature end" in str(error).lower():
            raise PictureError(RejectReason.TRUNCATED, f"jpeg: {error}") from error
        return None
    return pixels


def _to_rgb(image: Image.Image) -> Pixels:
    """Return a loaded picture as uint8 RGB over white, not yet turned."""
    if image.mode.startswith("I;16"):
        samples = np.asarray(image)
        grey = (samples >> 8).astype(np.uint8)  # Pillow's own conversion clips at 255
        grey[samples == image.info.get("transparency")] = 255
        return np.repeat(grey[:, :, np.newaxis], 3, axis=2)
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        over_white = Image.new("RGB", image.size, "white")
        over_white.paste(rgba.convert("RGB"), mask=rgba.getchannel("A"))
        return np.asarray(over_white)
    # Pillow would copy one that is RGB already.
    return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))


def _middle(width: int, height: int, size: tuple[int, int]) -> Box:
    """Return the box of ``size`` (width, height) in the middle of a picture."""
    left, top = (width - size[0]) // 2, (height - size[1]) // 2
    return left, top, left + size[0], top + size[1]
