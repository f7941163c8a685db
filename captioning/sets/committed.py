"""The caption sets of a corpus: which there are, how far they have come, how they were made."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pipeline import storage
from pipeline.errors import EvenmixError
from pipeline.receipts import read_receipt
from pipeline.stage import is_commit
from pipeline.summary import SUMMARY, dataset_url, generation_of, summary_name

CAPTION_SETS = "captions"
"""The folder below R with a folder for each caption set."""


@dataclass(frozen=True)
class CaptionSet:
    """A caption set: the committed shards of each dataset, and the datasets that lack others."""

    name: str
    shards: Mapping[str, Sequence[str]]
    unfinished: Sequence[str]

    @property
    def folder(self) -> str:
        """The folder below R."""
        return f"{CAPTION_SETS}/{self.name}"


def find_sets(root: str) -> dict[str, CaptionSet]:
    """Return the caption sets below a root by name, also those that are still being written.

    Raises:
        EvenmixError: there is none.
    """
    url = storage.join(root, CAPTION_SETS)
    found: dict[str, dict[str, list[str]]] = {}
    for file in storage.list_files(url):
        captions, slash, path = file.name.partition("/")
        dataset, _, name = path.partition("/")
        if slash and name:
            found.setdefault(captions, {}).setdefault(dataset, []).append(name)
    if not found:
        raise EvenmixError(
            f"there are no captions below {url}; if that is the right place, `evenmix caption` "
            "writes some"
        )
    return {captions: _caption_set(captions, names) for captions, names in found.items()}


def _caption_set(captions: str, names: Mapping[str, Sequence[str]]) -> CaptionSet:
    shards = {
        dataset: [name.removesuffix(".parquet") for name in files if is_commit(name)]
        for dataset, files in names.items()
    }
    unfinished = []
    for dataset, files in names.items():
        summaries = {name for name in files if SUMMARY.fullmatch(name)}
        generations = {generation_of(shard) for shard in shards[dataset]} or {0}
        if not summaries.issuperset(map(summary_name, generations)):
            unfinished.append(dataset)
    return CaptionSet(captions, shards, unfinished)


def made_with(root: str, captions: CaptionSet) -> list[str]:
    """Say how a set was made, by its receipts: with which engine and model, from which parent.

    Raises:
        EvenmixError: a shard has no receipt.
    """
    said: dict[str, None] = {}  # as a set that keeps its order
    for dataset, shards in captions.shards.items():
        # All shards of a dataset are made in one way, or the stage would not have gone on.
        for shard in shards[:1]:
            url = storage.join(dataset_url(root, captions.folder, dataset), f"{shard}.parquet")
            config = read_receipt(url).identity["config"]
            said[config["engine"]] = None
            if "model" in config:
                said[config["model"]] = None
            if "parent" in config:
                said[f"parent {config['parent']}"] = None
    return list(said)
