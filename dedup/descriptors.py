"""Descriptors: short vectors that stay close when a picture is copied and edited.

SSCD and its student are for copies (:mod:`dedup.sscd`); an image tower of open_clip
(:mod:`dedup.clip`) is for pictures that mean the same, duplicates in the sense of SemDeDup (Abbas
et al., arXiv:2303.09540).
"""

from collections.abc import Iterable
from typing import Any, Protocol

from dedup.clip import clip_tower
from dedup.records import Vectors
from dedup.sscd import sscd
from pipeline.images import Pixels
from pipeline.recipe import Dedup


class Descriptor(Protocol):
    """What embedding asks of a descriptor; instances are pickled to the workers."""

    @property
    def name(self) -> str:
        """A short name for people, such as ``sscd``."""

    @property
    def dimension(self) -> int:
        """The length of its vectors."""

    @property
    def short_edge_px(self) -> int:
        """A picture whose shorter edge is longer may be given reduced, down to this."""

    def identity(self) -> dict[str, Any]:
        """Everything that decides its vectors, as JSON values: only equal ones may be compared."""

    def runs_on_gpu(self) -> bool:
        """Tell whether this machine has a GPU that it runs on."""

    def embed(self, pictures: Iterable[Pixels]) -> Vectors:
        """Describe uint8 RGB pictures of any sizes: float32 (n, dimension), rows of length 1.

        They are one batch; each is made small before the next is taken, so they may be decoded
        one by one.
        """


def descriptor_of(dedup: Dedup) -> Descriptor:
    """Return the descriptor that a recipe asks for, loaded and tried.

    Raises:
        EvenmixError: its weights or what runs them are missing, or not what they should be.
    """
    if dedup.open_clip_model is not None:
        return clip_tower(dedup.open_clip_model, dedup.weights)
    return sscd(dedup.weights, "sscd" if dedup.model == "sscd" else "sscd_distilled")
