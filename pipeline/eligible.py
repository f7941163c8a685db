"""Which pictures a mixture could take, before anyone has asked for their captions.

A picture must not be on the list of exclusions, nor a duplicate, and must be large enough. Of those
a mixture takes the ones with the smallest hash of (seed, key).
"""

from pipeline.errors import EvenmixError
from pipeline.exclusions import load_exclusions
from pipeline.reasons import RejectReason
from pipeline.recipe import Recipe
from pipeline.records import IMAGES, uniform_hash
from pipeline.summary import read_shard

HASH_RANGE = 1 << 64
"""Hashes are below this."""

_INDEX_COLUMNS = [
    "key", "width", "height", "source_url", "final_url", "sha256", "pixels_sha256",
]  # fmt: skip


def judge_shard(recipe: Recipe, dataset: str, shard: str) -> list[tuple[str, RejectReason | None]]:
    """Return the key of each picture of a shard, in order, and why it cannot be taken, if so.

    Raises:
        EvenmixError: a table is missing, or they do not fit together.
    """
    root = recipe.root
    index = read_shard(root, IMAGES, dataset, shard, _INDEX_COLUMNS).to_pylist()
    duplicates = read_shard(
        root, f"duplicates/{recipe.dedup.name}", dataset, shard, ["key", "rule"]
    ).to_pylist()
    if [row["key"] for row in index] != [row["key"] for row in duplicates]:
        raise EvenmixError(
            f"{dataset}/{shard}: its index and duplicates speak of different pictures; "
            "`evenmix verify` tells which file is damaged"
        )
    exclusions = load_exclusions(recipe.exclusions)
    least_px = min_short_edge_px(recipe)
    judged: list[tuple[str, RejectReason | None]] = []
    for picture, duplicate in zip(index, duplicates, strict=True):
        reason = None
        hashes = (picture["sha256"], picture["pixels_sha256"])
        urls = (picture["source_url"], picture["final_url"])
        if exclusions.reason(picture["key"], urls, hashes):
            reason = RejectReason.EXCLUDED
        elif duplicate["rule"] is not None:
            reason = RejectReason(duplicate["rule"])
        elif min(picture["width"], picture["height"]) < least_px:
            reason = RejectReason.TOO_SMALL
        judged.append((picture["key"], reason))
    return judged


def min_short_edge_px(recipe: Recipe) -> int:
    """Return the least shorter edge that a mixture takes: its resolution unless the recipe says."""
    return recipe.mixture.min_short_edge_px or recipe.mixture.resolution


def selection_hash(recipe: Recipe, key: str) -> int:
    """Return the hash of which a mixture takes the smallest."""
    return uniform_hash(recipe.seed, key, "select")


def is_held_out(recipe: Recipe, key: str) -> bool:
    """Tell whether a picture is one for validation, of which all are taken."""
    held_out_below = int(recipe.mixture.validation_fraction * HASH_RANGE)
    return uniform_hash(recipe.seed, key, "validation") < held_out_below
