"""A JPEG that will be made small is decoded small; all else about it stays as it is."""

import numpy as np
import pytest
from PIL import Image

from pipeline import images
from pipeline.images import Limits
from pipeline.reasons import PictureError, RejectReason
from tests import pictures

LIMITS = Limits(min_short_edge_px=1, max_pixels=10_000_000, max_bytes=10_000_000)


@pytest.mark.parametrize(
    ("size", "short_edge_px", "expected"),
    [
        ((641, 1001), 320, (321, 501)),  # halves are rounded up
        ((640, 1000), 320, (320, 500)),
        ((639, 1000), 320, (639, 1000)),
        ((640, 1000), 160, (160, 250)),
        ((640, 1000), 81, (160, 250)),
        ((640, 1000), 80, (80, 125)),
        ((640, 1000), 1, (80, 125)),  # libjpeg goes no further than an eighth
    ],
)
def test_the_shorter_edge_keeps_a_least_length(
    size: tuple[int, int], short_edge_px: int, expected: tuple[int, int]
) -> None:
    data = pictures.save(pictures.smooth(*size), "JPEG", quality=95)
    assert images.decode(data, LIMITS, short_edge_px).shape == (*expected, 3)
    assert images.decode(data, LIMITS).shape == (*size, 3)


def test_it_shows_the_same() -> None:
    picture = pictures.smooth(640, 1000)
    reduced = images.decode(pictures.save(picture, "JPEG", quality=95), LIMITS, 160)
    expected = np.asarray(Image.fromarray(picture).reduce(4))
    assert np.abs(reduced.astype(int) - expected).max() <= 4


@pytest.mark.parametrize("orientation", range(1, 9))
def test_it_is_turned_upright(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = pictures.save(pictures.smooth(320, 480), "JPEG", quality=95, exif=exif)
    whole = images.decode(data, LIMITS)
    reduced = images.decode(data, LIMITS, 160)
    assert reduced.shape == (whole.shape[0] // 2, whole.shape[1] // 2, 3)
    expected = np.asarray(Image.fromarray(whole).reduce(2)).astype(int)
    assert np.abs(reduced - expected).max() <= 4


def test_what_cannot_be_reduced_comes_whole() -> None:
    picture = pictures.smooth(320, 480)
    cmyk = pictures.save(Image.fromarray(picture).convert("CMYK"), "JPEG", quality=95)
    for data in (cmyk, pictures.save(picture, "PNG"), pictures.save(picture, "WEBP")):
        np.testing.assert_array_equal(images.decode(data, LIMITS, 8), images.decode(data, LIMITS))


def test_a_truncated_jpeg_is_still_refused() -> None:
    data = pictures.save(pictures.smooth(640, 640), "JPEG", quality=95)
    with pytest.raises(PictureError) as caught:
        images.decode(data[: len(data) // 2] + b"\xff\xd9", LIMITS, 80)
    assert caught.value.reason == RejectReason.TRUNCATED


def test_limits_are_those_of_the_whole_picture() -> None:
    data = pictures.save(pictures.smooth(640, 640), "JPEG")
    with pytest.raises(PictureError) as caught:
        images.decode(data, Limits(1, 640 * 640 - 1, 10_000_000), 80)
    assert caught.value.reason == RejectReason.TOO_MANY_PIXELS
