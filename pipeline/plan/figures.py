"""What a plan goes by: unit prices, and what a picture costs in each stage, each with its source.

They stand in costs.toml, which a file of one's own changes entry by entry.
"""

from pathlib import Path
from typing import Any

from pydantic import Field, model_validator

from pipeline.config_file import Layer, Section, configure, read_toml
from pipeline.plan.ranges import Range

COSTS = Path(__file__).with_name("costs.toml")


class Figure(Section):
    """A number that lies between two others, and where it comes from."""

    low: float = Field(ge=0)
    high: float
    source: str = Field(min_length=1)

    @model_validator(mode="after")
    def _low_is_lower(self) -> "Figure":
        if self.low > self.high:
            raise ValueError(f"low = {self.low:g} is above high = {self.high:g}")
        return self

    @property
    def range(self) -> Range:
        """The number itself."""
        return Range(self.low, self.high)


class Prices(Section):
    """In US dollars. A GB of Google's is 2^30 bytes, stored, on the way and in a machine."""

    vcpu_hour: Figure
    memory_gb_hour: Figure
    l4_hour: Figure
    disk_gb_hour: Figure
    shuffled_gb: Figure
    stored_gb_month: Figure
    class_a_thousand: Figure
    class_b_thousand: Figure
    egress_gb: Figure


class Machines(Section):
    """What holds for every stage.

    ``vcpu_s_per_measured_s`` is how long a vCPU of Dataflow's takes for what a process of the
    machine took that measured; ``waste`` multiplies the time of workers: starting, scaling, work
    that is done twice; ``start_s`` passes before the first item of each of a stage's jobs begins.
    ``listings_per_hour`` are pages that its progress takes, where there are that many.
    """

    vcpu_s_per_measured_s: Figure
    waste: Figure
    start_s: Figure
    listings_per_hour: Figure
    bucket_s_per_mb: Figure
    internet_s_per_mb: Figure


class IngestFigures(Section):
    """``download_s`` is how long one download takes; a process has ``[fetch] per_host`` a host.

    ``kept_in_files`` and ``kept_of_downloads`` are the shares of i1's pictures that can be had
    today, from files and by download; ``kept_of_own`` is the share that is kept of the records of
    datasets that the catalogue lacks.
    """

    cpu_s_per_record: Figure
    cpu_s_per_mb: Figure
    download_s: Figure
    hosts: Figure
    kept_in_files: Figure
    kept_of_downloads: Figure
    kept_of_own: Figure
    bytes_per_picture: Figure


class EmbedFigures(Section):
    """``cpu_s_per_picture`` is by ``dedup.model``."""

    cpu_s_per_picture: dict[str, Figure]
    cpu_s_per_mb: Figure
    bytes_per_picture: Figure


class DedupFigures(Section):
    """``kept_near`` and ``kept_exact`` are the shares that stay of datasets with these rules.

    ``uneven_clusters`` multiplies the comparisons that clusters of one size would take;
    ``alone_s_per_picture`` is time in which only one item can run.
    """

    cpu_s_per_million_products: Figure
    uneven_clusters: Figure
    cpu_s_per_picture: Figure
    alone_s_per_picture: Figure
    kept_near: Figure
    kept_exact: Figure
    bytes_per_picture: Figure


class CaptionFigures(Section):
    """Captions from a text of the dataset, published ones, and a model's."""

    source_cpu_s_per_picture: Figure
    published_cpu_s_per_picture: Figure
    published_bytes_per_picture: Figure
    tokens_per_caption: Figure
    tokens_per_gpu_s: Figure
    client_cpu_s_per_caption: Figure
    server_start_s: Figure
    default_model_gb: Figure
    gpu_gb: Figure
    bytes_per_caption: Figure


class MixFigures(Section):
    """``bytes_per_pixel`` is by ``mixture.image_format``.

    ``large_enough`` is the share of pictures that have the mixture's resolution.
    """

    large_enough: Figure
    cpu_s_per_candidate: Figure
    cpu_s_per_sample: Figure
    cpu_s_per_mpx: Figure
    cpu_s_per_mb: Figure
    bytes_per_pixel: dict[str, Figure]
    bytes_per_sample: Figure


class Figures(Section):
    """All of them; ``picture_mb`` is by dataset, ``other`` that of datasets without an entry."""

    prices: Prices
    machines: Machines
    picture_mb: dict[str, Figure]
    ingest: IngestFigures
    embed: EmbedFigures
    dedup: DedupFigures
    caption: CaptionFigures
    mix: MixFigures


def load_figures(own: str | None = None) -> Figures:
    """Read the figures, with those of a file of one's own in their place.

    Raises:
        EvenmixError: that file is missing, no TOML, or has an entry that is unknown or incomplete.
    """
    ours = read_toml(str(COSTS))
    if own is None:
        return configure(str(COSTS), ours, Figures, {})
    theirs = read_toml(own)
    layers = [Layer(own, theirs), Layer(str(COSTS), ours)]
    return configure(own, _merged(ours, theirs), Figures, {}, layers)


def _merged(ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, Any]:
    """Replace figures; a table of figures keeps those that are not named."""
    merged = dict(ours)
    for key, value in theirs.items():
        known = ours.get(key)
        if isinstance(known, dict) and isinstance(value, dict) and "source" not in known:
            merged[key] = _merged(known, value)
        else:
            merged[key] = value
    return merged
