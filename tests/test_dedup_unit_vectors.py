"""What a descriptor's model gives must be vectors with a direction, one for each picture."""

import numpy as np
import pytest

from dedup.unit_vectors import unit_vectors
from pipeline.errors import EvenmixError


def test_rows_get_length_1() -> None:
    vectors = unit_vectors([[3, 4], [0, -0.5]], 2, "m.onnx")
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(vectors, [[0.6, 0.8], [0.0, -1.0]], rtol=1e-6)


@pytest.mark.parametrize(
    ("output", "message"),
    [
        (np.zeros((2, 3, 4, 4)), r"m\.onnx gives shape \(2, 3, 4, 4\) for 2 pictures, not one"),
        (np.ones((3, 8)), r"m\.onnx gives shape \(3, 8\) for 2 pictures, not one vector each"),
        ([[1, 0], [0, 0]], r"m\.onnx gives vectors without a direction"),
        ([[1, 0], [np.nan, 1]], r"m\.onnx gives vectors without a direction"),
        ([[1, 0], [np.inf, 1]], r"m\.onnx gives vectors without a direction"),
    ],
)
def test_anything_else_is_refused(output: object, message: str) -> None:
    with pytest.raises(EvenmixError, match=message):
        unit_vectors(output, 2, "m.onnx")
