"""What workers without an image of their own install beside evenmix's sdist, when they start."""

from importlib import metadata

from packaging.requirements import Requirement
from packaging.version import Version

from pipeline.dataflow import command_of

_EXTRAS = {"embed": ["dedup"], "dedup": ["dedup"]}
"""What stages need of evenmix's extras beside those that all of them need."""


def requirements(stage_name: str) -> str:
    """Return the requirements of a stage's workers, a line each, as pip reads them.

    They are evenmix's own in the versions that are installed here, since equal inputs must give
    equal bytes, and workers unpickle what was pickled here. Beam is in every image of workers.
    """
    extras = ["", "pipeline", "gcp", *_EXTRAS.get(command_of(stage_name), [])]
    wanted = set()
    for requirement in map(Requirement, metadata.requires("evenmix") or []):
        marker = requirement.marker
        if marker and not any(marker.evaluate({"extra": extra}) for extra in extras):
            continue
        if requirement.name != "apache-beam":
            installed = Version(metadata.version(requirement.name)).public
            wanted.add(f"{requirement.name}=={installed}\n")
    return "".join(sorted(wanted))
