"""The pixel rules, each with the picture that must come out."""

import io
import json
import random
import struct
import subprocess
import sys
import time
import tracemalloc
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFile

from pipeline import images
from pipeline.images import Limits
from pipeline.reasons import PictureError, RejectReason
from tests import pictures

LIMITS = Limits(min_short_edge_px=1, max_pixels=10_000_000, max_bytes=10_000_000)


def decode(data: bytes, limits: Limits = LIMITS) -> pictures.Pixels:
    """Decode, and hold the result to what is promised of every clean picture."""
    header = images.probe(data)
    pixels = images.decode(data, limits)
    assert pixels.shape == (header.height, header.width, 3)
    assert pixels.dtype == np.uint8
    assert pixels.flags.c_contiguous
    return pixels


def reason_of(data: bytes, limits: Limits = LIMITS) -> RejectReason:
    with pytest.raises(PictureError) as caught:
        images.decode(data, limits)
    assert caught.value.detail
    return caught.value.reason


def grey(*rows: list[int]) -> pictures.Pixels:
    return np.repeat(np.array(rows, np.uint8)[:, :, np.newaxis], 3, axis=2)


def assert_equal(actual: pictures.Pixels, expected: object) -> None:
    np.testing.assert_array_equal(actual, expected)


# Headers


@pytest.mark.parametrize(
    ("image_format", "extension"),
    [
        ("PNG", "png"),
        ("JPEG", "jpg"),
        ("WEBP", "webp"),
        ("GIF", "gif"),
        ("BMP", "bmp"),
        ("TIFF", "tiff"),
    ],
)
def test_probe_reads_the_header(image_format: str, extension: str) -> None:
    header = images.probe(pictures.save(pictures.smooth(20, 30), image_format))
    mode = "P" if image_format == "GIF" else "RGB"
    assert header == images.Header(image_format.lower(), 30, 20, mode, animated=False)
    assert header.extension == extension


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", RejectReason.EMPTY_FILE),
        (b"not a picture at all, whatever its name", RejectReason.NOT_AN_IMAGE),
        (b"BMW is a maker of cars, and this is text", RejectReason.NOT_AN_IMAGE),
        (b"<?xml version='1.0'?><Error>AccessDenied</Error>", RejectReason.NOT_AN_IMAGE),
        (b"<?xml version='1.0'?>\n<svg xmlns='x'/>", RejectReason.UNSUPPORTED_FORMAT),
        (b"\0\0\0\x1cftypavif", RejectReason.UNSUPPORTED_FORMAT),
        (b"8BPS\0\1", RejectReason.UNSUPPORTED_FORMAT),
        (b"\xff\xd8\xff\xe0\0\x10JFIF", RejectReason.TRUNCATED),
        (b"\x89PNG\r\n\x1a\n", RejectReason.TRUNCATED),
    ],
)
def test_what_is_no_picture_has_a_reason(data: bytes, reason: RejectReason) -> None:
    assert reason_of(data) == reason
    with pytest.raises(PictureError):
        images.probe(data)


def test_a_format_that_pillow_could_read_is_refused_all_the_same() -> None:
    for image_format in ("ICO", "JPEG2000"):
        data = pictures.save(pictures.smooth(32, 32), image_format)
        assert reason_of(data) == RejectReason.UNSUPPORTED_FORMAT


def test_one_pixel_is_a_picture_and_is_too_small() -> None:
    data = pictures.save(np.full((1, 1, 3), 7, np.uint8), "PNG")
    assert_equal(decode(data), [[[7, 7, 7]]])
    assert reason_of(data, Limits(2, 100, 1000)) == RejectReason.TOO_SMALL


@pytest.mark.parametrize("tail", [b"\xff\xd9", bytes(1000) + b"\xff\xd9"])
def test_a_jpeg_that_was_cut_and_ended_again_is_truncated(tail: bytes) -> None:
    """Decoders fill what is missing with grey and only warn of it."""
    data = pictures.save(pictures.smooth(200, 200), "JPEG", quality=95)
    assert reason_of(data[: len(data) // 2] + tail, LIMITS) == RejectReason.TRUNCATED


def test_a_jpeg_with_a_fault_that_no_viewer_minds_is_kept() -> None:
    data = pictures.save(pictures.smooth(40, 56), "JPEG", quality=95)
    extraneous = data[:-2] + bytes(20) + data[-2:]
    assert_equal(decode(extraneous), decode(data))


def test_limits_are_inclusive_and_bytes_come_first() -> None:
    data = pictures.save(pictures.smooth(20, 30), "PNG")
    decode(data, Limits(20, 600, len(data)))
    assert reason_of(data, Limits(21, 600, len(data))) == RejectReason.TOO_SMALL
    assert reason_of(data, Limits(21, 599, len(data))) == RejectReason.TOO_MANY_PIXELS
    assert reason_of(data, Limits(21, 599, len(data) - 1)) == RejectReason.TOO_MANY_BYTES


def test_a_bomb_is_refused_from_its_header_without_time_or_memory(tmp_path: Path) -> None:
    bomb = tmp_path / "bomb.png"
    bomb.write_bytes(pictures.bomb_png())
    assert 380_000 < bomb.stat().st_size < 400_000
    measure = """
import json, sys, time
from pathlib import Path
from pipeline import images
from pipeline.reasons import PictureError
from tests.peak_memory import peak_bytes
images.probe(Path(sys.argv[2]).read_bytes())  # imports and first-use costs are not the bomb's
data = Path(sys.argv[1]).read_bytes()
before = peak_bytes()
start_s = time.process_time()
header = images.probe(data)
probe_s = time.process_time() - start_s
try:
    images.decode(data, images.Limits(1, 100_000_000, 10_000_000))
except PictureError as error:
    reason = error.reason
grown = peak_bytes() - before
print(json.dumps([header.width, header.height, reason, probe_s, grown]))
"""
    small = tmp_path / "small.png"
    small.write_bytes(pictures.save(pictures.smooth(8, 8), "PNG"))
    command = [sys.executable, "-c", measure, str(bomb), str(small)]
    output = subprocess.run(command, check=True, capture_output=True, timeout=60).stdout
    width, height, reason, probe_s, grown_bytes = json.loads(output)
    assert (width, height, reason) == (20_000, 20_000, "too_many_pixels")
    assert probe_s < 0.5
    assert grown_bytes < 20 << 20


# Orientation


def upright(stored: pictures.Pixels, orientation: int) -> pictures.Pixels:
    """Turn as EXIF 2.3 words it: where row 0 and column 0 of the stored picture are displayed."""
    return {
        1: stored,  # top, left
        2: np.fliplr(stored),  # top, right
        3: np.rot90(stored, 2),  # bottom, right
        4: np.flipud(stored),  # bottom, left
        5: np.transpose(stored, (1, 0, 2)),  # left, top
        6: np.rot90(stored, -1),  # right, top
        7: np.rot90(np.transpose(stored, (1, 0, 2)), 2),  # right, bottom
        8: np.rot90(stored, 1),  # left, bottom
    }[orientation]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("byte_order", ["<", ">"])
def test_exif_orientation_is_applied(orientation: int, byte_order: str) -> None:
    stored = pictures.smooth(16, 24)
    expected = upright(stored, orientation)
    exif = pictures.exif_orientation(orientation, byte_order)

    assert_equal(decode(pictures.png_with(pictures.save(stored, "PNG"), (b"eXIf", exif))), expected)
    for prefix in (b"", b"Exif\0\0"):
        webp = pictures.save(stored, "WEBP", lossless=True, exif=prefix + exif)
        assert_equal(decode(webp), expected)
    tiff = pictures.save(stored, "TIFF", tiffinfo={0x0112: orientation})
    assert_equal(decode(tiff), expected)

    jpeg = pictures.save(stored, "JPEG", quality=95)
    turned = pictures.jpeg_with(jpeg, 0xE1, b"Exif\0\0" + exif)
    assert_equal(decode(turned), upright(decode(jpeg), orientation))


def test_exif_after_the_pixels_of_a_png_does_not_count() -> None:
    stored = pictures.smooth(16, 24)
    data = pictures.save(stored, "PNG")
    late = pictures.png_chunk(b"eXIf", pictures.exif_orientation(6))
    assert_equal(decode(data[:-12] + late + data[-12:]), stored)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_turns_are_pillows(orientation: int) -> None:
    from PIL import ImageOps

    stored = pictures.smooth(16, 24)
    exif = pictures.exif_orientation(orientation)
    data = pictures.png_with(pictures.save(stored, "PNG"), (b"eXIf", exif))
    turned = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    assert_equal(decode(data), np.asarray(turned))


@pytest.mark.parametrize(
    "exif",
    [
        b"",
        b"junk",
        b"II*\0\xff\xff\xff\xff",
        pictures.exif_orientation(0),
        pictures.exif_orientation(9),
        pictures.exif_orientation(6)[:15],
    ],
)
def test_unreadable_exif_says_nothing(exif: bytes) -> None:
    stored = pictures.smooth(16, 24)
    assert_equal(decode(pictures.png_with(pictures.save(stored, "PNG"), (b"eXIf", exif))), stored)
    jpeg = pictures.save(stored, "JPEG")
    assert_equal(decode(pictures.jpeg_with(jpeg, 0xE1, b"Exif\0\0" + exif)), decode(jpeg))


# Transparency


def over_white(rgba: pictures.Pixels) -> pictures.Pixels:
    colour, alpha = rgba[..., :3].astype(np.uint32), rgba[..., 3:].astype(np.uint32)
    laid: pictures.Pixels = ((colour * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)
    return laid


def test_alpha_is_laid_over_white_to_the_nearest_value() -> None:
    levels, alphas = np.meshgrid(np.arange(256, dtype=np.uint8), np.arange(256, dtype=np.uint8))
    rgba = np.dstack([levels, 255 - levels, levels // 2, alphas])
    assert_equal(decode(pictures.save(rgba, "PNG")), over_white(rgba))
    visible = rgba[1:]  # WebP forgets the colour of what cannot be seen
    assert_equal(decode(pictures.save(visible, "WEBP", lossless=True)), over_white(visible))
    la = Image.merge("LA", (Image.fromarray(levels), Image.fromarray(alphas)))
    expected = over_white(np.dstack([levels, levels, levels, alphas]))
    assert_equal(decode(pictures.save(la, "PNG")), expected)


def test_png_colour_keys_of_every_depth() -> None:
    def one_row(depth: int, colour: int, width: int, row: bytes, key: bytes) -> pictures.Pixels:
        return decode(pictures.png(width, 1, depth, colour, b"\0" + row, (b"tRNS", key)))

    assert_equal(one_row(1, 0, 4, b"\x50", b"\0\0"), grey([255, 255, 255, 255]))
    assert_equal(one_row(1, 0, 4, b"\x50", b"\0\1"), grey([0, 255, 0, 255]))
    assert_equal(one_row(2, 0, 4, b"\x1b", b"\0\1"), grey([0, 255, 170, 255]))
    assert_equal(one_row(4, 0, 2, b"\x5a", b"\0\5"), grey([255, 170]))
    assert_equal(one_row(8, 0, 3, b"\1\2\3", b"\0\2"), grey([1, 255, 3]))
    # All 16 bits of a grey key count: 0x1299 is another colour than 0x1234.
    assert_equal(one_row(16, 0, 2, b"\x12\x34\x12\x99", b"\x12\x34"), grey([255, 0x12]))
    rgb = one_row(8, 2, 2, b"\1\2\3\4\5\6", b"\0\1\0\2\0\3")
    assert_equal(rgb, [[[255, 255, 255], [4, 5, 6]]])
    rgb = one_row(16, 2, 2, bytes(range(1, 13)), bytes(range(1, 7)))
    assert_equal(rgb, [[[255, 255, 255], [7, 9, 11]]])


def test_palette_with_transparency() -> None:
    palette = bytes([255, 0, 0, 0, 255, 0, 0, 0, 255])

    def indexed(*chunks: tuple[bytes, bytes]) -> pictures.Pixels:
        return decode(pictures.png(3, 1, 8, 3, b"\0\0\1\2", (b"PLTE", palette), *chunks))

    assert_equal(indexed(), [[[255, 0, 0], [0, 255, 0], [0, 0, 255]]])
    assert_equal(indexed((b"tRNS", b"\xff\0")), [[[255, 0, 0], [255, 255, 255], [0, 0, 255]]])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_equal(
            indexed((b"tRNS", b"\x80\0\xff")), [[[255, 127, 127], [255, 255, 255], [0, 0, 255]]]
        )


def test_transparent_gif() -> None:
    image = Image.fromarray(np.array([[0, 1], [1, 0]], np.uint8), "P")
    image.putpalette([10, 20, 30, 200, 100, 50])
    data = pictures.save(image, "GIF", transparency=1)
    white, dark = [255, 255, 255], [10, 20, 30]
    assert_equal(decode(data), [[dark, white], [white, dark]])


# Depths and colour spaces


def test_16_bit_grey_keeps_its_upper_byte() -> None:
    ramp = np.arange(0, 65536, 64, dtype=np.uint16).reshape(32, 32)
    expected = np.repeat((ramp >> 8).astype(np.uint8)[:, :, np.newaxis], 3, axis=2)
    assert expected.max() == 255
    assert len(np.unique(expected)) == 256
    assert_equal(decode(pictures.save(Image.fromarray(ramp), "PNG")), expected)
    assert_equal(decode(pictures.save(Image.fromarray(ramp), "TIFF")), expected)
    big_endian = Image.frombytes("I;16B", (32, 32), ramp.astype(">u2").tobytes())
    data = pictures.save(big_endian, "TIFF")
    assert images.probe(data).mode == "I;16B"
    assert_equal(decode(data), expected)


def test_16_bit_colour_keeps_its_upper_byte() -> None:
    samples = struct.pack(">6H", 0x0102, 0x80FF, 0xFF00, 0x00FF, 0x7F80, 0xFFFF)
    data = pictures.png(2, 1, 16, 2, b"\0" + samples)
    assert_equal(decode(data), [[[0x01, 0x80, 0xFF], [0x00, 0x7F, 0xFF]]])


def test_one_bit_and_grey() -> None:
    assert_equal(decode(pictures.png(4, 1, 1, 0, b"\0\x50")), grey([0, 255, 0, 255]))
    assert_equal(decode(pictures.png(3, 1, 8, 0, b"\0\1\2\3")), grey([1, 2, 3]))


@pytest.mark.parametrize("image_format", ["JPEG", "TIFF"])
def test_cmyk_comes_out_the_right_way_round(image_format: str) -> None:
    inks = {
        (0, 0, 0, 0): (255, 255, 255),
        (255, 0, 0, 0): (0, 255, 255),
        (0, 255, 0, 0): (255, 0, 255),
        (0, 0, 255, 0): (255, 255, 0),
        (0, 0, 0, 255): (0, 0, 0),
        (0, 128, 255, 51): (204, 102, 0),
    }
    for cmyk, rgb in inks.items():
        block = np.full((16, 16, 4), cmyk, np.uint8)
        if image_format == "JPEG":
            data = pictures.cmyk_jpeg(block)
            assert b"Adobe" in data
        else:
            data = pictures.save(Image.fromarray(block, "CMYK"), "TIFF")
        assert images.probe(data).mode == "CMYK"
        tolerance = 1 if image_format == "JPEG" else 0  # quality 100 on a flat colour
        assert np.abs(decode(data).astype(int) - rgb).max() <= tolerance


def test_ycck_comes_out_the_right_way_round() -> None:
    rgb = np.full((16, 16, 3), (200, 120, 40), np.uint8)
    for black, expected in [(0, (200, 120, 40)), (51, (160, 96, 32)), (255, (0, 0, 0))]:
        data = pictures.ycck_jpeg(rgb, np.full((16, 16), black, np.uint8))
        assert images.probe(data).mode == "CMYK"
        assert np.abs(decode(data).astype(int) - expected).max() <= 2  # YCC is rounded to 8 bits


def test_colour_profiles_change_nothing() -> None:
    from PIL import ImageCms

    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    pixels = pictures.smooth(12, 12)
    assert_equal(decode(pictures.save(pixels, "PNG", icc_profile=profile)), pixels)


@pytest.mark.parametrize("mode", ["F", "I"])
def test_32_bit_samples_are_unsupported(mode: str) -> None:
    data = pictures.save(Image.new(mode, (8, 8), 1000), "TIFF")
    assert reason_of(data) == RejectReason.UNSUPPORTED_FORMAT


def test_16_bit_grey_of_another_meaning_is_unsupported() -> None:
    data = pictures.save(Image.fromarray(np.full((4, 4), 9, np.uint16)), "TIFF")
    white_is_zero = struct.pack("<HHIH", 262, 3, 1, 0)
    changed = data.replace(struct.pack("<HHIH", 262, 3, 1, 1), white_is_zero)
    assert changed != data
    assert reason_of(changed) == RejectReason.UNSUPPORTED_FORMAT


# Several frames


@pytest.mark.parametrize("image_format", ["PNG", "WEBP", "GIF", "TIFF"])
def test_the_first_frame_is_the_picture(image_format: str) -> None:
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255)]
    first, *rest = (Image.new("RGB", (16, 12), colour) for colour in colours)
    lossless = {"lossless": True} if image_format == "WEBP" else {}
    data = pictures.save(first, image_format, save_all=True, append_images=rest, **lossless)
    assert images.probe(data).animated
    assert_equal(decode(data), np.asarray(first))


def test_a_gif_cut_in_its_second_frame_has_its_first() -> None:
    first, second = (Image.fromarray(pictures.smooth(40, 40)[::step]) for step in (1, -1))
    alone = pictures.save(first, "GIF")
    data = pictures.save(first, "GIF", save_all=True, append_images=[second])
    assert_equal(decode(data[:-200]), decode(alone))


def test_an_mpo_is_its_first_jpeg() -> None:
    first, second = (Image.fromarray(pictures.smooth(32, 32)[::step]) for step in (1, -1))
    data = pictures.save(first, "MPO", save_all=True, append_images=[second])
    assert Image.open(io.BytesIO(data)).format == "MPO"
    assert images.probe(data) == images.Header("jpeg", 32, 32, "RGB", animated=False)
    assert_equal(decode(data), np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))


# Broken and hostile files


@pytest.mark.parametrize("fraction", [0.1, 0.5, 0.9, 0.99, 1.0])
def test_a_cut_file_is_never_a_picture(fraction: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    rgb = pictures.smooth(200, 300)
    noise = np.random.default_rng(0).integers(0, 256, rgb.shape, np.uint8) // 8 + rgb // 2
    for image_format, options in [
        ("JPEG", {}),
        ("JPEG", {"progressive": True}),
        ("PNG", {}),
        ("WEBP", {}),
        ("GIF", {}),
        ("BMP", {}),
    ]:
        data = pictures.save(noise, image_format, **options)
        # What follows the pixels of a GIF or BMP (a terminator, padding) holds none of them.
        kept = min(int(len(data) * fraction), len(data) - (8 if image_format == "GIF" else 2))
        assert reason_of(data[:kept]) == RejectReason.TRUNCATED, (image_format, options)


def test_a_cut_tiff_is_never_a_picture() -> None:
    for compression in (None, "tiff_lzw", "jpeg"):
        data = pictures.save(pictures.smooth(200, 300), "TIFF", compression=compression)
        for fraction in (0.1, 0.5, 0.9, 0.99):  # libtiff does not say what was wrong
            reason = reason_of(data[: int(len(data) * fraction)])
            assert reason in {RejectReason.TRUNCATED, RejectReason.UNDECODABLE}


def test_flipped_bits_in_a_png_are_noticed() -> None:
    """Pillow lets one in eight of these through, with other pixels."""
    data = bytearray(pictures.save(pictures.smooth(50, 50), "PNG"))
    first, end = data.index(b"IDAT") + 4, data.index(b"IEND") - 8
    for position in range(first, end):
        data[position] ^= 4
        assert reason_of(bytes(data)) == RejectReason.UNDECODABLE
        data[position] ^= 4
    decode(bytes(data))


def test_long_text_and_profiles_do_not_cost_a_picture() -> None:
    import zlib

    pixels = pictures.smooth(10, 10)
    long = zlib.compress(bytes(80_000_000))
    data = pictures.png_with(
        pictures.save(pixels, "PNG"),
        (b"iCCP", b"profile\0\0" + long),
        (b"zTXt", b"comment\0\0" + long),
        (b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + long),
        (b"iCCP", b"broken"),
    )
    assert_equal(decode(data), pixels)


def test_metadata_cannot_exhaust_memory() -> None:
    """A block of 60 KB that 4,000 tags name, and 400,000 strips: each costs Pillow over 100 MB."""
    jpeg = pictures.save(pictures.smooth(10, 10), "JPEG")
    exif = pictures.tiff(*pictures.greedy_tags(4_000, 59_000)).ljust(60_000, b"\0")
    tracemalloc.start()
    assert_equal(decode(pictures.jpeg_with(jpeg, 0xE1, b"Exif\0\0" + exif)), decode(jpeg))
    assert reason_of(exif) == RejectReason.UNDECODABLE
    strips = pictures.tiff(*pictures.one_pixel_in_strips(400_000), padding=3_200_000)
    assert reason_of(strips) == RejectReason.UNDECODABLE
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak_bytes < 20_000_000
    assert_equal(decode(pictures.tiff(*pictures.one_pixel_in_strips(1), padding=8)), [[[0, 0, 0]]])


def test_metadata_cannot_exhaust_time() -> None:
    """Pillow alone takes a minute and a half for a GIF of a million comments."""
    data = pictures.chatty_gif(1_000_000)
    start_s = time.process_time()
    assert_equal(decode(data), [[[0, 0, 0]]])
    assert time.process_time() - start_s < 10


def test_a_jpeg_of_many_scans_is_refused() -> None:
    decode(pictures.many_scans_jpeg(10))
    assert reason_of(pictures.many_scans_jpeg(600)) == RejectReason.UNDECODABLE


def test_only_pictures_and_reasons_come_out_of_damaged_files() -> None:
    limits = Limits(min_short_edge_px=1, max_pixels=1_000_000, max_bytes=1_000_000)
    for name, valid in pictures.valid_files():
        decode(valid)
        dice = random.Random(name)
        outcomes = set()
        for _ in range(300):
            damaged = bytearray(valid)
            for _ in range(dice.choice([1, 1, 2, 8])):
                damaged[dice.randrange(len(damaged))] = dice.randrange(256)
            if dice.random() < 0.3:
                del damaged[dice.randrange(len(damaged)) :]
            try:
                pixels = images.decode(bytes(damaged), limits)
            except PictureError as error:
                outcomes.add(error.reason)
            else:
                assert pixels.dtype == np.uint8
                assert pixels.ndim == 3
                assert pixels.shape[2] == 3
        assert outcomes, f"no damage of {name} was noticed"


# Sizes


def test_a_square_is_the_centre_of_the_resized_picture() -> None:
    for height, width, resolution in [(300, 200, 64), (97, 341, 32), (50, 50, 50), (20, 33, 64)]:
        pixels = pictures.smooth(height, width)
        shorter = min(height, width)
        size = (width * resolution // shorter, height * resolution // shorter)
        whole = np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BILINEAR))
        assert min(whole.shape[:2]) == resolution
        left, top = (whole.shape[1] - resolution) // 2, (whole.shape[0] - resolution) // 2
        cropped = whole[top : top + resolution, left : left + resolution]
        square, _ = images.resize_and_crop_square(pixels, resolution)
        assert square.shape == (resolution, resolution, 3)
        # Pillow holds a box in single precision: a value may fall on the other side of a half.
        assert np.abs(square.astype(int) - cropped).max() <= 1


def test_a_square_of_whole_blocks_is_exact() -> None:
    """Columns 2 to 5 of an 8 x 4 picture are its centre square; nothing is resampled."""
    pixels = np.random.default_rng(1).integers(0, 256, (4, 8, 3), np.uint8)
    square, box = images.resize_and_crop_square(pixels, 4, "bicubic")
    assert box == (2, 0, 6, 4)
    assert_equal(square, pixels[:, 2:6])


def test_the_box_is_in_pixels_of_the_original() -> None:
    assert images.resize_and_crop_square(pictures.smooth(100, 300), 50)[1] == (100, 0, 200, 100)
    # 301 rows become 150; the square is rows 50 to 100 of these: 100.3 to 200.7 of the original.
    assert images.resize_and_crop_square(pictures.smooth(301, 100), 50)[1] == (0, 100, 100, 201)


def test_a_very_long_picture_is_squared_in_bounded_memory() -> None:
    line = np.zeros((1, 2_000_000, 3), np.uint8)  # resized as a whole: 393 GB
    square, box = images.resize_and_crop_square(line, 256)
    assert square.shape == (256, 256, 3)
    assert box == (999_999, 0, 1_000_001, 1)


@pytest.mark.parametrize(("height", "width"), [(60, 90), (300, 20), (41, 160), (1, 2_000_000)])
def test_only_what_is_beyond_the_longer_edge_is_cropped(height: int, width: int) -> None:
    pixels = pictures.smooth(height, width)
    resized, box = images.resize_and_crop(pixels, 16, 64, "lanczos")
    size = images.cropped_size(width, height, 16, 64)
    assert resized.shape == (size[1], size[0], 3)
    assert min(size) == 16
    assert box == images.crop_box(width, height, 16, 64)
    if max(size) < 64:
        assert box == (0, 0, width, height)
        assert_equal(resized, images.resize_short_edge(pixels, 16, "lanczos"))
    else:
        # The middle, four times as long as it is wide.
        left, top, right, bottom = box
        edges = sorted((right - left, bottom - top))
        assert edges[0] == min(height, width)
        assert 4 * edges[0] <= edges[1] <= 4 * edges[0] + 2
        assert abs(left - (width - right)) <= 1
        assert abs(top - (height - bottom)) <= 1


def test_resampling_is_antialiased() -> None:
    stripes = grey(*([[0, 255] * 32] * 64))
    for resample in ("bilinear", "bicubic"):
        small, _ = images.resize_and_crop_square(stripes, 8, resample)
        assert np.abs(small.astype(int) - 127.5).max() < 8


# Encoding and identity


@pytest.mark.parametrize("image_format", ["png", "webp"])
def test_lossless_formats_return_the_pixels(image_format: images.ImageFormat) -> None:
    pixels = np.random.default_rng(2).integers(0, 256, (31, 17, 3), np.uint8)
    data = images.encode(pixels, image_format)
    assert data == images.encode(pixels.copy(), image_format)
    assert images.probe(data).format == image_format
    assert_equal(decode(data), pixels)


def test_jpeg_is_written_without_subsampling() -> None:
    pixels = pictures.smooth(64, 64)
    data = images.encode(pixels, "jpeg")
    assert data == images.encode(pixels.copy(), "jpeg")
    from PIL import JpegImagePlugin

    assert JpegImagePlugin.get_sampling(Image.open(io.BytesIO(data))) == 0  # 4:4:4
    assert np.abs(decode(data).astype(int) - pixels).max() <= 4


def test_the_hash_is_of_pixels_and_shape() -> None:
    pixels = pictures.smooth(6, 8)
    copies = [decode(pictures.save(pixels, name)) for name in ("PNG", "BMP", "TIFF")]
    assert {images.sha256_of_pixels(copy) for copy in copies} == {images.sha256_of_pixels(pixels)}
    assert images.sha256_of_pixels(pixels[:, ::-1]) != images.sha256_of_pixels(pixels)
    flat = np.zeros((4, 6, 3), np.uint8)
    assert images.sha256_of_pixels(flat) != images.sha256_of_pixels(flat.reshape(6, 4, 3))
