"""One sample of a mixture: its picture, resized and encoded, and the JSON with all that is known.

Both follow from the recipe, the picture's row of the index, its captions and its original, so it
makes no difference where and when a sample is made.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from pipeline import images
from pipeline.images import Pixels
from pipeline.mixture import Mixture

_MAX_ASPECT = 4
"""A picture that is not cropped to a square still loses the ends that are beyond this ratio.

There is no bound otherwise to what an upscaled line of pixels would take, and the formats have
bounds of their own (WebP 16,383 pixels)."""


def sample_config(mixture: Mixture, dataset: str) -> dict[str, Any]:
    """Return what decides the samples of given pictures of a dataset."""
    return {
        "resolution": mixture.resolution,
        "crop": mixture.crop,
        "resample": mixture.resample,
        "image_format": mixture.image_format,
        "captions": sorted(mixture.caption_sets(dataset)),
        "captions_per_image": mixture.captions_per_image,
        "outcomes": sorted(mixture.outcomes),
    }


def sample_picture(mixture: Mixture, pixels: Pixels) -> bytes:
    """Return a sample's picture, encoded."""
    edges = mixture.resolution, _max_long_edge_px(mixture)
    resized, _ = images.resize_and_crop(pixels, *edges, mixture.resample)
    return images.encode(resized, mixture.image_format)


def sample_json(
    mixture: Mixture,
    dataset: str,
    picture: Mapping[str, Any],
    captions: Mapping[str, Sequence[Mapping[str, Any]]],
) -> bytes:
    """Return a sample's JSON, without having seen its picture.

    ``picture`` is its row of the index, ``captions`` are all that it has, by caption set.
    """
    width, height = picture["width"], picture["height"]
    edges = mixture.resolution, _max_long_edge_px(mixture)
    sample_width, sample_height = images.cropped_size(width, height, *edges)
    sample = {
        "key": picture["key"],
        "dataset": dataset,
        "source_id": picture["source_id"],
        "source_url": picture["source_url"],
        "licence": picture["licence"],
        "height": sample_height,
        "width": sample_width,
        "captions": [
            {"text": caption["text"], "caption_set": name, "model": caption["model"]}
            for name, of_set in sorted(captions.items())
            for caption in _usable(mixture, of_set)
        ],
        "fields": json.loads(picture["fields"]),
        "original_height": height,
        "original_width": width,
        "crop": list(images.crop_box(width, height, *edges)),
        "original_sha256": picture["sha256"],
    }
    return json.dumps(sample, ensure_ascii=False, sort_keys=True).encode()


def _usable(mixture: Mixture, captions: Sequence[Mapping[str, Any]]) -> Sequence[Mapping[str, Any]]:
    usable = [caption for caption in captions if caption["outcome"] in mixture.outcomes]
    return usable[: mixture.captions_per_image]


def _max_long_edge_px(mixture: Mixture) -> int:
    return mixture.resolution * (1 if mixture.crop == "square" else _MAX_ASPECT)
