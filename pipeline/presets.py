"""i1's mixtures, as data, and how a recipe that names one is completed.

    root = "gs://bucket/corpus"
    [mixture]
    preset = "i1-256-0.4M"

is a whole build. The preset says what the mixture is; the keys beside it in the recipe change that.
Datasets of the mixture that the recipe does not describe are those of the catalogue, and where it
names no captions they are i1's published ones.

Pictures whose shorter edge is below the resolution are left out, as i1 does but at 256 px, where it
takes them all. With ``min_short_edge_px = 1`` in both ``[images]`` and ``[mixture]`` a recipe takes
them too.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.catalog import CATALOG
from pipeline.errors import did_you_mean

CAPTIONS = "i1"
"""The name of the set of i1's published captions, where a recipe names none."""


@dataclass(frozen=True)
class Preset:
    """What i1 cuts from its corpus. ``resolution`` is in pixels; None takes all pictures."""

    resolution: int
    datasets: tuple[str, ...]
    images_per_dataset: int | None = None
    weights: str = "equal"

    @property
    def samples_per_shard(self) -> int:
        """Return how many pictures make a shard of about 0.5 GB, as PNG.

        163 million pictures are 40,000 shards then, which a trainer lists in seconds.
        """
        return 4096 * 256**2 // self.resolution**2


def _stage(resolution: int) -> tuple[str, ...]:
    """Return the datasets on which i1 trains at a resolution."""
    return tuple(name for name, entry in CATALOG.items() if resolution in entry.stages)


_SIZES = {"full": None, "1.0M": 1_000_000, "0.4M": 400_000, "0.1M": 100_000}
_OWN_SIZE = {256: "full", 512: "1.0M", 1024: "1.0M"}
"""How much i1 itself takes of each dataset, by resolution."""

PRESETS: Mapping[str, Preset] = {
    **{
        f"i1-{resolution}" + (f"-{size}" if size != own_size else ""): Preset(
            resolution, _stage(resolution), images_per_dataset
        )
        for resolution, own_size in _OWN_SIZE.items()
        for size, images_per_dataset in _SIZES.items()
    },
    # The baseline of i1's controlled experiments, iNaturalist included.
    "i1-256-12-datasets": Preset(256, tuple(CATALOG), weights="size"),
    "i1-256-without-megalith-places": Preset(
        256,
        tuple(
            name for name in _stage(256) if name not in ("megalith10m", "places365-challenge2016")
        ),
    ),
}
"""i1's three stages by their resolution, each also with other numbers of pictures a dataset, and
its ablations of datasets."""


def find_preset(name: str) -> Preset:
    """Return the preset of a name.

    Raises:
        ValueError: there is none.
    """
    if name not in PRESETS:
        hint = did_you_mean(name, PRESETS, f"there are {', '.join(PRESETS)}")
        raise ValueError(f"{name!r} is none of i1's mixtures{hint}")
    return PRESETS[name]


def complete(document: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a recipe, not checked yet, with all that its preset says and it does not.

    Of what has the wrong type nothing is made, so that the check finds it.

    Raises:
        ValueError: there is no such preset.
    """
    mixture, described, captions = (
        document.get(table, {}) for table in ("mixture", "datasets", "captions")
    )
    if not all(isinstance(table, dict) for table in (mixture, described, captions)):
        return document
    if mixture.get("preset") is None:
        return document
    preset = find_preset(str(mixture["preset"]))
    completed = {
        "name": mixture["preset"],
        "resolution": preset.resolution,
        "images_per_dataset": preset.images_per_dataset,
        "weights": preset.weights,
        "samples_per_shard": preset.samples_per_shard,
        "captions": CAPTIONS,
        "datasets": list(preset.datasets),
        "without": [],
        **mixture,
    }
    named, without = completed["datasets"], completed["without"]
    if isinstance(named, list) and isinstance(without, list):
        # What the mixture goes without is not brought in, and need not be among the datasets then.
        completed["datasets"] = [name for name in named if name not in without]
        completed["without"] = [name for name in without if name not in named]
        brought_in = {name: {"catalog": name} for name in CATALOG if name in completed["datasets"]}
        described = brought_in | described
    return {
        **document,
        "mixture": completed,
        "datasets": described,
        "captions": {CAPTIONS: {"engine": "published"}, **captions},
    }
