"""Builders of odd, broken and hostile picture files, for every test that needs one."""

import io
import struct
import zlib
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
from PIL import Image

Pixels = npt.NDArray[np.uint8]


def smooth(height: int, width: int) -> Pixels:
    """Return a picture of soft colour ramps, other in each corner; JPEG hardly changes it."""
    rows, columns = np.mgrid[0:height, 0:width].astype(np.float64)
    rows, columns = rows / max(1, height - 1), columns / max(1, width - 1)
    planes = (40 + 170 * rows, 30 + 200 * columns, 220 - 120 * rows - 60 * columns)
    return np.stack(planes, axis=-1).round().astype(np.uint8)


def save(picture: Image.Image | Pixels, image_format: str, **options: object) -> bytes:
    """Encode a picture (or uint8 array) with Pillow."""
    image = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
    buffer = io.BytesIO()
    image.save(buffer, image_format, **options)
    return buffer.getvalue()


# PNG, chunk by chunk


def png_chunk(kind: bytes, content: bytes) -> bytes:
    checksum = struct.pack(">I", zlib.crc32(kind + content))
    return struct.pack(">I", len(content)) + kind + content + checksum


def png(
    width: int,
    height: int,
    bit_depth: int,
    colour_type: int,
    scanlines: bytes,
    *before_pixels: tuple[bytes, bytes],
) -> bytes:
    """Assemble a PNG from unfiltered scanlines (each begins with its filter byte, 0)."""
    ihdr = struct.pack(">IIBBBBB", width, height, bit_depth, colour_type, 0, 0, 0)
    chunks = [(b"IHDR", ihdr), *before_pixels, (b"IDAT", zlib.compress(scanlines)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(png_chunk(*chunk) for chunk in chunks)


def png_with(data: bytes, *chunks: tuple[bytes, bytes]) -> bytes:
    """Insert chunks after a PNG's header chunk (IHDR always ends at byte 33)."""
    return data[:33] + b"".join(png_chunk(*chunk) for chunk in chunks) + data[33:]


def bomb_png(edge_px: int = 20_000) -> bytes:
    """Return a black 8-bit grey PNG of ``edge_px`` squared: 400 megapixels in 388 KB by default."""
    compressor = zlib.compressobj(9)
    row = bytes(1 + edge_px)
    idat = b"".join([*(compressor.compress(row) for _ in range(edge_px)), compressor.flush()])
    ihdr = struct.pack(">IIBBBBB", edge_px, edge_px, 8, 0, 0, 0, 0)
    chunks = [(b"IHDR", ihdr), (b"IDAT", idat), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(png_chunk(*chunk) for chunk in chunks)


# EXIF and JPEG segments


def exif_orientation(orientation: int, byte_order: str = "<") -> bytes:
    """Return an EXIF block (a TIFF header and one directory) that holds nothing but the tag."""
    magic = b"II*\0" if byte_order == "<" else b"MM\0*"
    entry = struct.pack(f"{byte_order}HHIHH", 0x0112, 3, 1, orientation, 0)
    return magic + struct.pack(f"{byte_order}IH", 8, 1) + entry + bytes(4)


Tag = tuple[int, int, int, int]
"""Of a TIFF: the tag, its type (3: 16 bits, 4: 32 bits, 7: bytes), its length, value or offset."""


def tiff(*tags: Tag, padding: int = 0) -> bytes:
    """Assemble a little-endian TIFF of one directory; ``padding`` zero bytes follow it."""
    entries = b"".join(struct.pack("<HHII", *tag) for tag in tags)
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4 + padding)


def greedy_tags(num_tags: int, value_bytes: int) -> list[Tag]:
    """Return tags that all name the same bytes: a reader holds ``num_tags * value_bytes``."""
    return [(0x9000 + number, 7, value_bytes, 8) for number in range(num_tags)]


def one_pixel_in_strips(num_strips: int) -> list[Tag]:
    """Return the tags of a black 8-bit grey pixel with ``num_strips`` offsets and byte counts.

    Offsets and counts are zeros behind the directory (or, if there is one strip, are inline).
    """
    after = 8 + 2 + 12 * 8 + 4
    offsets, counts = (after, after + 4 * num_strips) if num_strips > 1 else (after, 1)
    return [
        (256, 4, 1, 1),
        (257, 4, 1, 1),
        (258, 3, 1, 8),
        (259, 3, 1, 1),
        (262, 3, 1, 1),
        (273, 4, num_strips, offsets),
        (278, 4, 1, 1),
        (279, 4, num_strips, counts),
    ]


def jpeg_with(data: bytes, marker: int, content: bytes) -> bytes:
    """Insert a segment after a JPEG's first two bytes."""
    segment = struct.pack(">BBH", 0xFF, marker, 2 + len(content)) + content
    return data[:2] + segment + data[2:]


def cmyk_jpeg(cmyk: Pixels) -> bytes:
    """Return an Adobe CMYK JPEG: inverted samples, APP14 marker with transform 0."""
    return save(Image.fromarray(cmyk, "CMYK"), "JPEG", quality=100, subsampling=0)


def ycck_jpeg(rgb: Pixels, black: Pixels) -> bytes:
    """Return an Adobe YCCK JPEG of the colours ``rgb``, darkened by the ink ``black`` (0: none).

    Photoshop stores inverted inks, C' = 255 - C; YCCK (libjpeg, jccolor.c) is the YCC of
    255 - C', that is of the inks themselves, and K'. Pillow cannot write one: the four planes
    are written as if they were CMYK, and the transform of the Adobe marker is set from 0 to 2.
    """
    ycc = np.asarray(Image.fromarray(255 - rgb).convert("YCbCr"))
    planes = np.dstack([ycc, 255 - black])
    # Pillow inverts what it is given.
    data = save(Image.fromarray(255 - planes, "CMYK"), "JPEG", quality=100, subsampling=0)
    transform = data.index(b"Adobe") + 11
    assert data[transform] == 0
    return data[:transform] + b"\x02" + data[transform + 1 :]


def chatty_gif(num_comments: int) -> bytes:
    """Return a GIF of one black pixel behind comments of one letter each."""
    data = save(Image.new("P", (1, 1)), "GIF")
    comments = b"\x21\xfe\x01a\x00" * num_comments
    colours_end = 13 + (3 << (data[10] & 7) + 1 if data[10] & 0x80 else 0)
    return data[:colours_end] + comments + data[colours_end:]


def many_scans_jpeg(num_scans: int) -> bytes:
    """Return a progressive JPEG that repeats its last scan."""
    data = save(smooth(64, 64), "JPEG", progressive=True)
    last_scan = data[data.rindex(b"\xff\xda") : -2]
    return data[:-2] + last_scan * num_scans + data[-2:]


# One valid file of each kind, for mutation


def valid_files() -> Iterator[tuple[str, bytes]]:
    """Yield (name, file) for one small valid picture of each format and notable kind."""
    rgb = smooth(40, 56)
    image = Image.fromarray(rgb)
    frames = [Image.fromarray(np.roll(rgb, shift, axis=1)) for shift in (0, 9, 18)]
    animation: dict[str, object] = {"save_all": True, "append_images": frames[1:]}
    yield "jpeg", jpeg_with(save(rgb, "JPEG"), 0xE1, b"Exif\0\0" + exif_orientation(6))
    yield "progressive jpeg", save(rgb, "JPEG", progressive=True)
    yield "cmyk jpeg", cmyk_jpeg(np.dstack([rgb, rgb[..., :1] // 4]))
    yield "mpo", save(frames[0], "MPO", **animation)
    yield "png", png_with(save(rgb, "PNG"), (b"eXIf", exif_orientation(8, ">")))
    yield "palette png", save(image.quantize(16), "PNG", transparency=3)
    yield "16-bit png", save(Image.fromarray(rgb[..., 0].astype(np.uint16) * 257), "PNG")
    yield "animated png", save(frames[0], "PNG", **animation)
    yield "webp", save(rgb, "WEBP", exif=b"Exif\0\0" + exif_orientation(3))
    yield "lossless webp", save(image.convert("RGBA"), "WEBP", lossless=True)
    yield "animated webp", save(frames[0], "WEBP", **animation)
    yield "gif", save(image, "GIF")
    yield "animated gif", save(frames[0], "GIF", **animation)
    yield "bmp", save(rgb, "BMP")
    yield "tiff", save(rgb, "TIFF")
    yield "lzw tiff", save(rgb, "TIFF", compression="tiff_lzw")
    yield "jpeg tiff", save(rgb, "TIFF", compression="jpeg")
    yield "16-bit tiff", save(Image.fromarray(rgb[..., 0].astype(np.uint16) * 257), "TIFF")
