"""Unit vectors: what every descriptor's model must give, one for each picture."""

from typing import Any

import numpy as np

from dedup.records import Vectors
from pipeline.errors import EvenmixError


def unit_vectors(output: Any, num_pictures: int, source: str) -> Vectors:
    """Return what a model gave for a batch as float32 (``num_pictures``, d), rows of length 1.

    Raises:
        EvenmixError: it is no such thing; the text names ``source``, the model's file.
    """
    vectors = np.asarray(output, np.float32)
    if vectors.ndim != 2 or len(vectors) != num_pictures:
        raise EvenmixError(
            f"{source} gives shape {vectors.shape} for {num_pictures} pictures, not one vector "
            "each, so it is no descriptor; let dedup.weights name one"
        )
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    if not (np.isfinite(lengths) & (lengths > 0)).all():
        raise EvenmixError(
            f"{source} gives vectors without a direction, so it is damaged; let dedup.weights name "
            "a whole file"
        )
    return np.asarray(vectors / lengths)
