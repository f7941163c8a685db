"""What stands around a picture's pixels: signatures, and metadata that is taken out.

Pillow parses comments, profiles, thumbnails and EXIF before it is asked to, at a cost that a
hostile file chooses (5 MB of empty GIF comments take it 92 s), and refuses a sound PNG for a long
comment. So it is handed JPEG, PNG and GIF without them. The one thing kept aside is the EXIF
block, of which only the orientation is read, here. All costs are linear in the file's size, and
nothing in this file decodes a pixel.
"""

import re
import struct
import zlib

from pipeline.reasons import PictureError, RejectReason

_SIGNATURES = {
    "jpeg": re.compile(rb"\xff\xd8\xff"),
    "png": re.compile(rb"\x89PNG\r\n\x1a\n"),
    "webp": re.compile(rb"RIFF.{4}WEBP", re.DOTALL),
    "gif": re.compile(rb"GIF8[79]a"),
    "bmp": re.compile(rb"BM.{12}[\x0c\x28\x34\x38\x40\x6c\x7c]\0\0\0", re.DOTALL),
    "tiff": re.compile(rb"II\*\0|MM\0\*"),
}
_SIGNATURES_NOT_READ = {  # known, so that they are not mistaken for junk
    "avif, heif or mp4": re.compile(rb".{4}ftyp", re.DOTALL),
    "jpeg 2000": re.compile(rb"\0\0\0\x0cjP  |\xff\x4f\xff\x51"),
    "jpeg xl": re.compile(rb"\0\0\0\x0cJXL |\xff\x0a"),
    "bigtiff": re.compile(rb"II\+\0|MM\0\+"),
    "psd": re.compile(rb"8BPS"),
    "ico": re.compile(rb"\0\0\x01\0"),
    "svg": re.compile(rb"(\xef\xbb\xbf)?\s*(<\?xml[^>]*>\s*)?<(svg|!DOCTYPE svg)"),
}

_JPEG_SEGMENT = re.compile(rb"\xff[^\x00\x01\xd0-\xd9\xff]")  # a marker that has content

_JPEG_METADATA = {*range(0xE1, 0xEE), 0xEF, 0xFE}  # APP1 to APP15, COM; not APP14 (Adobe: colour)

_ORIENTATION_TAG = 0x0112  # EXIF 2.3, section 4.6.4

_TIFF_TYPE_BYTES = dict(enumerate((1, 1, 2, 4, 8, 1, 1, 2, 4, 8, 4, 8, 4), start=1))  # TIFF 6.0, 2

_TIFF_OFFSET_TAGS = {273, 324}  # StripOffsets, TileOffsets
_MAX_TIFF_OFFSET_BYTES = 1 << 20  # 262,144 strips or tiles

_MAX_JPEG_SCANS = 500
"""Scans of a few bytes each make a decoder walk every block again; honest encoders write about
ten. (libjpeg-turbo, "Two Issues with the JPEG Standard", and the limit of its own fuzzers.)"""


def sniff(data: bytes) -> str:
    """Return the format (jpeg, png, webp, gif, bmp, tiff) that the first bytes announce.

    Raises:
        PictureError: empty, no signature of a picture, or one of a format that is not read.
    """
    if not data:
        raise PictureError(RejectReason.EMPTY_FILE, "0 bytes")
    head = data[:1024]
    for name, signature in _SIGNATURES.items():
        if signature.match(head):
            return name
    for name, signature in _SIGNATURES_NOT_READ.items():
        if signature.match(head):
            raise PictureError(RejectReason.UNSUPPORTED_FORMAT, name)
    raise PictureError(RejectReason.NOT_AN_IMAGE, f"begins with {head[:16]!r}")


def jpeg_without_metadata(data: bytes) -> tuple[bytes, bytes]:
    """Return a JPEG without comments and application segments, save JFIF and Adobe; and its EXIF.

    Pillow parses them eagerly, and their cost has no bound. Only what stands before the first
    scan is taken out; libjpeg skips the rest. Without its index (MPF), an MPO is its first picture.
    """
    kept, exif, position = [data[:2]], b"", 2
    while True:
        segment = _JPEG_SEGMENT.search(data, position)
        if segment is None or segment.end() + 2 > len(data):
            raise PictureError(RejectReason.TRUNCATED, "jpeg: ends before its first scan")
        position, marker = segment.start(), data[segment.start() + 1]
        if marker == 0xDA:  # start of scan
            break
        end = position + 2 + int.from_bytes(data[position + 2 : position + 4], "big")
        if marker == 0xE1 and not exif and data.startswith(b"Exif\0\0", position + 4):
            exif = data[position + 4 : end]
        if marker not in _JPEG_METADATA:
            kept.append(data[position:end])
        position = end
    if data.count(b"\xff\xda", position) > _MAX_JPEG_SCANS:
        raise PictureError(RejectReason.UNDECODABLE, f"jpeg: over {_MAX_JPEG_SCANS} scans")
    return b"".join([*kept, data[position:]]), exif


def png_without_metadata(data: bytes) -> tuple[bytes, bytes, bool]:
    """Return a PNG of nothing but its pixels; its EXIF; whether it is animated.

    Pillow rejects a picture for a long comment or profile, and lets flipped bits in the pixels
    pass; here the comment is dropped and the checksums of the pixels count. EXIF counts where
    PNG (third edition, section 5.6) allows it: before the pixels.
    """
    kept, exif, animated, position = [data[:8]], b"", False, 8
    kind = b""
    while kind != b"IEND":
        if position + 12 > len(data):
            raise PictureError(RejectReason.TRUNCATED, "png: ends before its end chunk")
        length, kind = struct.unpack_from(">I4s", data, position)
        end = position + 12 + length
        if end > len(data):
            raise PictureError(RejectReason.TRUNCATED, f"png: ends inside its {kind!r} chunk")
        if kind in (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND"):
            crc = int.from_bytes(data[end - 4 : end], "big")
            if zlib.crc32(memoryview(data)[position + 4 : end - 4]) != crc:
                raise PictureError(RejectReason.UNDECODABLE, f"png: checksum of {kind!r}")
            kept.append(data[position:end])
        elif kind == b"eXIf" and kept[-1][4:8] != b"IDAT":
            exif = data[position + 8 : end - 4]
        animated = animated or kind == b"acTL"
        position = end
    return b"".join(kept), exif, animated


def gif_first_frame(data: bytes) -> tuple[bytes, bool]:
    """Return a GIF of nothing but its first frame; whether there was a second."""
    kept, num_frames = [], 0
    try:
        position = 13 + _gif_colour_table_bytes(data[10])
        kept.append(data[:position])
        while num_frames < 2 and data[position] != 0x3B:  # trailer
            start, introducer, label = position, data[position], data[position + 1]
            if introducer == 0x21:  # extension
                position = _after_gif_sub_blocks(data, start + 2)
                if num_frames == 0 and label == 0xF9:  # graphic control: transparency
                    kept.append(data[start:position])
            elif introducer == 0x2C:  # image
                colours = _gif_colour_table_bytes(data[start + 9])
                position = _after_gif_sub_blocks(data, start + 11 + colours)
                if num_frames == 0:
                    kept.append(data[start:position])
                num_frames += 1
            else:  # padding
                position += 1
    except IndexError:  # A file may end after its first frame: no pixel is missing.
        if num_frames == 0:
            raise PictureError(RejectReason.TRUNCATED, "gif: ends in its first frame") from None
    return b"".join([*kept, b"\x3b"]), num_frames > 1


def _gif_colour_table_bytes(flags: int) -> int:
    return 3 << (flags & 7) + 1 if flags & 0x80 else 0


def _after_gif_sub_blocks(data: bytes, position: int) -> int:
    while data[position]:
        position += 1 + data[position]
    return position + 1


def check_tiff(data: bytes) -> None:
    """Raise unless Pillow can open a TIFF in memory of the order of its size.

    Pillow reads every tag at once, though thousands of them may name the same bytes, and builds
    an object for each strip or tile of pixels.
    """
    tags = _tiff_tags(data)
    if sum(size for _, size, _ in tags) > len(data):
        raise PictureError(RejectReason.UNDECODABLE, "tiff: tags larger than the file")
    if any(tag in _TIFF_OFFSET_TAGS and size > _MAX_TIFF_OFFSET_BYTES for tag, size, _ in tags):
        raise PictureError(RejectReason.UNDECODABLE, "tiff: too many strips or tiles")


def _tiff_tags(tiff: bytes) -> list[tuple[int, int, int]]:
    """Return (tag, size of its value in bytes, its first 16 bits) of a TIFF's first directory.

    Raises:
        struct.error: the directory does not lie within ``tiff``.
    """
    order = "<" if tiff[:2] == b"II" else ">"
    (offset,) = struct.unpack_from(f"{order}I", tiff, 4)
    (count,) = struct.unpack_from(f"{order}H", tiff, offset)
    entries = struct.iter_unpack(f"{order}HHIHxx", tiff[offset + 2 : offset + 2 + 12 * count])
    return [
        (tag, _TIFF_TYPE_BYTES.get(kind, 8) * items, value) for tag, kind, items, value in entries
    ]


def orientation(exif: bytes) -> int:
    """Return the EXIF orientation (1 to 8); a block that cannot be read says nothing: 1."""
    try:
        tags = _tiff_tags(exif.removeprefix(b"Exif\0\0"))
    except struct.error:
        return 1
    value = next((value for tag, _, value in tags if tag == _ORIENTATION_TAG), 1)
    return value if 1 <= value <= 8 else 1
