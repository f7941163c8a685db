"""The second look: do two pictures show the same, cell by cell?

SSCD takes different pages of text, charts and codes for copies of each other. Where a cosine is
not enough (:mod:`dedup.rules`), small thumbnails of both pictures must agree as well: encoding and
resizing change all cells a little, another word or bar changes a few of them much. The price is
that a copy of a graphic which is cropped, padded or grey does not count. Of 120 drawn
pages and the same with one other word no two agree, but about 9 % do once one of the two is half
the size or a JPEG.

The outcome is the same on every machine, in every block size, and whichever picture comes first:
sums are of integers that float32 and float64 hold exactly, the rest is done cell by cell.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image

from dedup.records import Bools
from pipeline.images import Pixels

Thumbnails = npt.NDArray[np.int8]
"""Thumbnails, one a row: (n, 1536)."""

_GREATEST = 104
"""Thumbnails have values from -104 to 104, so that products of two are exact in float32: sums of
1536 stay below 2^24. Black to white is 208 units."""

_ROWS, _COLUMNS = 44, 32  # more rows than columns: lines of text are wider than high
_CELLS = _ROWS * _COLUMNS
_CHROMA_SIDE = 8

# All in units, from the first 120 of each kind of tests/rendered_pictures.py and their copies:
# half size, JPEG quality 75, 30 and 10, half size and quality 30. The tests measure other
# pictures of the same kinds.
_MOST_IN_BRIGHTNESS = 5.0  # of the mean; copies 4.1, since JPEG clips what rings around letters
_MOST_IN_CONTRAST = 1.25  # ratio; copies 1.15, for the same reason
_MOST_ON_AVERAGE = 2.6  # root mean square; copies 2.2, pages of the same layout 5.0
_MOST_IN_CHROMA = 9  # a cell; copies 5, colours of the same luminance 20


def _most_in_a_cell(
    contrast: npt.NDArray[np.float64], average: npt.NDArray[np.float64]
) -> npt.NDArray[np.float64]:
    """Return the greatest difference of a cell of luminance in copies of a certain contrast.

    ``average`` is the root mean square difference of all cells. Encoding and resizing change many
    cells: of what rounding does not explain, 1.5, a single cell has six times the average at most,
    where another word on a page has eight times as much, and most have more than eleven. The
    other terms bound what copies differ by in pale pictures; in pages, contrast 15 to 21, where
    that is 7.6, or 8.0 at half size and quality 30; and in charts, contrast 43 to 62, 10.1.
    """
    most = np.minimum(0.5 + 0.43 * contrast, 5.5 + 0.09 * contrast)
    return np.asarray(np.minimum(1.5 + 7 * average, most))


_SAMPLES = 128
_WINDOW_LEVELS = 8
_GRAPHIC_SHARE = 0.5
"""Rendered pictures and their copies have 0.61 at least. Of scikit-image's photographs a wall of
bricks, a cell on grey and the Hubble deep field have 0.7, the other twelve 0.14 to 0.50."""

_MIRRORED_MARGIN = 0.1
"""A difference of two correlations: 98 % of mirrored tiles of photographs and all mirrored pages
and headlines have more, 91 % of those that are also cropped to 70 %; of copies that are cropped to
half, padded or turned, but not mirrored, 0.8 % have."""

_PAIRS_AT_ONCE = 4096
"""Pairs whose cells are compared at once, in about 100 MB."""


def thumbnail(pixels: Pixels) -> Thumbnails:
    """Return a picture in 1,536 numbers: 44 rows of luminance, 32 each, then Cb and Cr 8 x 8 each.

    The thumbnail is int8 (1536,). ``pixels`` are uint8 RGB (height, width, 3) of any size; their
    aspect is lost.
    """
    # Pillow's box filter takes or leaves whole pixels; Hamming's window has no such jumps, so that
    # half a picture gives the same. The gap halves the time.
    hamming = Image.Resampling.HAMMING
    small = Image.fromarray(pixels).resize((_COLUMNS, _ROWS), hamming, reducing_gap=8)
    coloured = small.convert("YCbCr")
    y = np.asarray(coloured)[:, :, 0].ravel().astype(np.int64)
    smaller = np.asarray(coloured.resize((_CHROMA_SIDE, _CHROMA_SIDE), hamming))
    chromas = np.moveaxis(smaller[:, :, 1:], 2, 0).ravel().astype(np.int64)
    # Y is 0 to 255; chromas are 0 to 255, and grey is 128. Halves round up.
    luminance = ((2 * y - 255) * 2 * _GREATEST + 255) // 510
    chroma = ((chromas - 128) * 2 * _GREATEST + 128) // 256
    values: Thumbnails = np.concatenate([luminance, chroma]).astype(np.int8)
    return values


def is_graphic(pixels: Pixels) -> bool:
    """Tell whether a picture is one of text, charts or plain graphics.

    That is one in which two narrow ranges of luminance, ground and ink, have half of the pixels.
    A photograph on plain ground can be one as well.
    """
    height, width, _ = pixels.shape
    sample = pixels[:: max(1, height // _SAMPLES), :: max(1, width // _SAMPLES)]
    counts = np.array(Image.fromarray(sample).convert("L").histogram())
    num_samples = counts.sum()
    most = 0
    for _ in range(2):
        windows = np.convolve(counts, np.ones(_WINDOW_LEVELS, np.int64), "valid")
        start = int(windows.argmax())
        most += int(windows[start])
        counts[start : start + _WINDOW_LEVELS] = 0
    return bool(most >= _GRAPHIC_SHARE * num_samples)


def agreeing(left: Thumbnails, right: Thumbnails, candidates: Bools, mirrored: bool) -> Bools:
    """Return those of the ``candidates``, bool (n, m), whose thumbnails are of one picture.

    With ``mirrored`` one may be the mirror image of the other.
    """
    agree = _agreeing(left, right, candidates)
    if mirrored:
        agree |= _agreeing(_flipped(left), right, candidates & ~agree)
    return agree


def is_mirrored(left: Thumbnails, right: Thumbnails) -> Bools:
    """Tell for each of k pairs whether ``right`` is rather the mirror image of ``left``.

    A picture that is much like its own mirror image is not.
    """
    starts = range(0, len(left), _PAIRS_AT_ONCE)
    parts = [slice(start, start + _PAIRS_AT_ONCE) for start in starts]
    mirrored = [_lead_of_mirrored(left[part], right[part]) > _MIRRORED_MARGIN for part in parts]
    return np.concatenate([np.zeros(0, np.bool_), *mirrored])


@dataclass(frozen=True)
class _Luminance:
    """The luminance of n pictures: values float32 (n, 1408); mean and contrast (n,).

    The contrast is the standard deviation; one below 1 is that of a plain colour, and counts as 1.
    """

    values: npt.NDArray[np.float32]
    mean: npt.NDArray[np.float64]
    contrast: npt.NDArray[np.float64]

    @classmethod
    def of(cls, thumbnails: Thumbnails) -> "_Luminance":
        values = thumbnails[:, :_CELLS].astype(np.float32)
        mean = values.sum(axis=1, dtype=np.float64) / _CELLS
        variance = (values**2).sum(axis=1, dtype=np.float64) / _CELLS - mean**2
        return cls(values, mean, np.sqrt(np.maximum(variance, 1)))

    def normalised(self) -> npt.NDArray[np.float64]:
        """Return the values with mean 0 and contrast 1."""
        return np.asarray((self.values - self.mean[:, np.newaxis]) / self.contrast[:, np.newaxis])


def _agreeing(left: Thumbnails, right: Thumbnails, candidates: Bools) -> Bools:
    """Return the candidates that agree as they are, not mirrored."""
    rows, columns = (np.flatnonzero(candidates.any(axis=axis)) for axis in (1, 0))
    alike = _alike_on_average(left[rows], right[columns]) & candidates[np.ix_(rows, columns)]
    i, j = np.nonzero(alike)
    agree = np.zeros_like(candidates)
    for start in range(0, len(i), _PAIRS_AT_ONCE):
        a, b = rows[i[start : start + _PAIRS_AT_ONCE]], columns[j[start : start + _PAIRS_AT_ONCE]]
        agree[a, b] = _alike_everywhere(left[a], right[b])
    return agree


def _alike_on_average(left: Thumbnails, right: Thumbnails) -> Bools:
    """Compare the luminance of n with m pictures, by one matrix product: bool (n, m).

    With contrasts s and t and the covariance c, and each picture brought to the contrast sqrt(st),
    the mean square of the difference is 2 (st - c).
    """
    a, b = _Luminance.of(left), _Luminance.of(right)
    second_moments = (a.values @ b.values.T).astype(np.float64) / _CELLS
    enough = np.outer(a.mean, b.mean) + np.outer(a.contrast, b.contrast) - _MOST_ON_AVERAGE**2 / 2
    near = np.abs(np.subtract.outer(a.mean, b.mean)) <= _MOST_IN_BRIGHTNESS
    alike: Bools = near & (second_moments >= enough)
    return alike


def _alike_everywhere(left: Thumbnails, right: Thumbnails) -> Bools:
    """Compare k pairs cell by cell, luminance after brightness and contrast are fitted."""
    a, b = _Luminance.of(left), _Luminance.of(right)
    ratio = np.maximum(a.contrast, b.contrast) / np.minimum(a.contrast, b.contrast)
    product = a.contrast * b.contrast
    second_moment = np.einsum("ij,ij->i", a.values, b.values).astype(np.float64) / _CELLS
    mean_square = 2 * (product - (second_moment - a.mean * b.mean))
    average = np.sqrt(np.maximum(mean_square, 0))
    contrast = np.sqrt(product)
    luminance = np.abs(a.normalised() - b.normalised()).max(axis=1) * contrast
    chroma = np.abs(left[:, _CELLS:].astype(np.int16) - right[:, _CELLS:]).max(axis=1)
    alike: Bools = (
        (ratio <= _MOST_IN_CONTRAST)
        & (luminance <= _most_in_a_cell(contrast, average))
        & (chroma <= _MOST_IN_CHROMA)
    )
    return alike


def _lead_of_mirrored(left: Thumbnails, right: Thumbnails) -> npt.NDArray[np.float64]:
    """Return how much better than ``left`` its mirror image correlates with ``right``: (k,)."""
    a, b, flipped = (part.astype(np.int32) for part in (left, right, _flipped(left)))
    lead = np.einsum("ij,ij->i", flipped - a, b).astype(np.float64)
    return np.asarray(lead / np.sqrt(np.maximum(_spread(a) * _spread(b), 1)))


def _spread(values: npt.NDArray[np.int32]) -> npt.NDArray[np.float64]:
    """Return the sum of squared distances from the means of luminance, Cb and Cr."""
    spread = np.zeros(len(values))
    for plane in np.split(values, [_CELLS, _CELLS + _CHROMA_SIDE**2], axis=1):
        total = plane.sum(axis=1, dtype=np.float64)
        spread += np.einsum("ij,ij->i", plane, plane) - total**2 / plane.shape[1]
    return spread


def _flipped(thumbnails: Thumbnails) -> Thumbnails:
    """Return the thumbnails of the mirror images."""
    luminance = thumbnails[:, :_CELLS].reshape(-1, _ROWS, _COLUMNS)[:, :, ::-1]
    chromas = thumbnails[:, _CELLS:].reshape(-1, 2, _CHROMA_SIDE, _CHROMA_SIDE)[:, :, :, ::-1]
    parts = (luminance.reshape(-1, _CELLS), chromas.reshape(len(thumbnails), -1))
    return np.concatenate(parts, axis=1)
