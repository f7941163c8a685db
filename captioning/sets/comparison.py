"""Caption sets side by side: which pictures are compared, and what the sets say of them.

Pictures are chosen by hash, from as many shards as are asked for, so a few shards are read however
large the corpus is, and the same pictures come up every time.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

from captioning.outcomes import CaptionOutcome
from captioning.sets.committed import CaptionSet
from pipeline import originals, storage
from pipeline.errors import EvenmixError, did_you_mean
from pipeline.images import Pixels
from pipeline.originals import read_original
from pipeline.printable import printable
from pipeline.records import IMAGES, uniform_hash
from pipeline.summary import dataset_url, read_shard

_INDEX_COLUMNS = [*originals.COLUMNS, "source_id"]


@dataclass(frozen=True)
class Compared:
    """A picture with its row of the index, and its captions of each of the compared sets."""

    dataset: str
    shard: str
    index: Mapping[str, Any]
    captions: Sequence[Sequence[Mapping[str, Any]]]


def compare(
    root: str, sets: Sequence[CaptionSet], dataset: str | None, count: int
) -> list[Compared]:
    """Return ``count`` pictures that all of the sets were asked for, or as many as there are.

    As far as possible they are of different shards; those of ``dataset`` if it is given.

    Raises:
        EvenmixError: the sets have no such picture in common, or tables do not fit together.
    """
    by_shard = []
    for shard in _common_shards(sets, dataset):
        if pictures := _pictures(root, sets, *shard)[:count]:
            by_shard.append(pictures)
        if len(by_shard) == count:
            break
    # The first of each shard, then the second of each, and so on.
    in_turn = [picture for turn in zip_longest(*by_shard) for picture in turn if picture]
    if not in_turn:
        raise EvenmixError(
            f"there is no picture that {_and(sets)} were both asked for; `evenmix captions {root}` "
            "tells how many captions of a set are not_asked"
        )
    return in_turn[:count]


def _common_shards(sets: Sequence[CaptionSet], dataset: str | None) -> list[tuple[str, str]]:
    """Return the shards (dataset and name) that all sets have, in the order of a hash."""
    for captions in sets:
        if dataset is not None and dataset not in captions.shards:
            hint = did_you_mean(
                dataset, captions.shards, f"it has {', '.join(sorted(captions.shards))}"
            )
            raise EvenmixError(f"caption set {captions.name} has no dataset {dataset!r}{hint}")
    common = set.intersection(
        *(
            {(name, shard) for name, shards in captions.shards.items() for shard in shards}
            for captions in sets
        )
    )
    if dataset is not None:
        common = {place for place in common if place[0] == dataset}
    if not common:
        has = "; ".join(
            f"{captions.name} has "
            + ", ".join(f"{len(shards)} of {name}" for name, shards in captions.shards.items())
            for captions in sets
        )
        of = f" of {dataset}" if dataset is not None else ""
        raise EvenmixError(
            f"{_and(sets)} have no shard{of} in common ({has}); finish them with `evenmix caption`"
        )
    return sorted(common, key=lambda place: uniform_hash(0, "/".join(place), "compare"))


def _pictures(root: str, sets: Sequence[CaptionSet], dataset: str, shard: str) -> list[Compared]:
    """Return the pictures of a shard that all sets were asked for, in the order of a hash."""
    index = read_shard(root, IMAGES, dataset, shard, _INDEX_COLUMNS).to_pylist()
    columns = []
    for captions in sets:
        table = read_shard(root, captions.folder, dataset, shard, ["key", "captions"])
        if table["key"].to_pylist() != [picture["key"] for picture in index]:
            raise EvenmixError(
                f"{dataset}/{shard}: its index and captions {captions.name} speak of different "
                "pictures; `evenmix verify` tells which file is damaged"
            )
        columns.append(table["captions"].to_pylist())
    found = [
        Compared(dataset, shard, picture, captions)
        for picture, *captions in zip(index, *columns, strict=True)
        if all(map(_is_asked, captions))
    ]
    return sorted(found, key=lambda picture: uniform_hash(0, picture.index["key"], "compare"))


def _is_asked(captions: Sequence[Mapping[str, Any]]) -> bool:
    return any(caption["outcome"] != CaptionOutcome.NOT_ASKED for caption in captions)


def _and(sets: Sequence[CaptionSet]) -> str:
    return " and ".join(captions.name for captions in sets)


def read_picture(root: str, compared: Compared) -> Pixels:
    """Read and decode the original of a picture, uint8 RGB of shape (height, width, 3).

    Raises:
        EvenmixError: its tar is missing or damaged.
    """
    folder = dataset_url(root, IMAGES, compared.dataset)
    return read_original(storage.join(folder, f"{compared.shard}.tar"), compared.index)


def facts(caption: Mapping[str, Any]) -> Iterator[str]:
    """Yield what there is to say of a caption beside its outcome and text: tokens and model."""
    if caption["completion_tokens"] is not None:
        yield f"{caption['completion_tokens']:,} tokens"
    if caption["model"] is not None:
        yield printable(caption["model"])


def said(caption: Mapping[str, Any]) -> str:
    """Return a caption's text or, where it has none, what is known of the reason."""
    return printable(caption["text"] or caption["detail"] or "")
