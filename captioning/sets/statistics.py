"""What a caption set is like: outcomes, lengths in tokens and words, vocabulary.

A set can have 160 million captions, so it is read shard by shard and what is kept does not grow
with it: exact counts by length, of which there are some hundreds, and the hashes of the distinct
words (:class:`Vocabulary`). Everything is counted, nothing is estimated.
"""

import math
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from captioning.outcomes import USABLE
from captioning.sets.committed import CaptionSet
from pipeline.summary import read_shard

_SHARDS_AT_ONCE = 1024
_LEAST_MERGE = 1 << 20

# RE2 has the scripts that are written without spaces between words, and classes that Python's own
# `re` lacks: there a Hindi word ends at its first vowel sign.
_LETTER_THAT_IS_A_WORD = r"[\p{Han}\p{Hiragana}\p{Katakana}]"
_BETWEEN_WORDS = r"[^\p{L}\p{M}\p{N}]+"

Hashes = npt.NDArray[np.int64]


class Vocabulary:
    """Counts distinct words by 64-bit hashes, which take 8 bytes a word and up to 40 when merged.

    Model captions of 160M pictures have some 10M distinct words (Heaps' law, 40 n^0.5 of 2.4e10
    words, is 6M): 0.4 GB. The chance that any two of them share a hash, so that the count is one
    short, is n^2 / 2^65, 3e-6 for 10M. Python's own hash of a string is keyed anew in every
    process, so nobody can prepare words that collide.
    """

    def __init__(self) -> None:
        self._known: Hashes = np.empty(0, np.int64)
        self._added: list[Hashes] = []
        self._num_added = 0

    def add(self, hashes: Hashes) -> None:
        """Add the hashes of words, of which some may be known."""
        self._added.append(hashes)
        self._num_added += len(hashes)
        if self._num_added > max(_LEAST_MERGE, len(self._known)):
            self._merge()

    def __len__(self) -> int:
        """Return how many distinct words there are."""
        self._merge()
        return len(self._known)

    def _merge(self) -> None:
        self._known = np.unique(np.concatenate([self._known, *self._added]))
        self._added, self._num_added = [], 0


@dataclass(frozen=True)
class ShardStatistics:
    """What one shard adds to its set; see :class:`SetStatistics`."""

    pictures: int
    outcomes: Counter[str]
    tokens: Counter[int]
    words: Counter[int]
    vocabulary: Hashes


@dataclass
class SetStatistics:
    """The sums over a set. ``tokens`` and ``words`` count usable captions by their length.

    ``outcomes`` are of captions, not of pictures, which may have several.
    """

    pictures: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    tokens: Counter[int] = field(default_factory=Counter)
    words: Counter[int] = field(default_factory=Counter)
    vocabulary: Vocabulary = field(default_factory=Vocabulary)

    def add(self, shard: ShardStatistics) -> None:
        """Add one shard."""
        self.pictures += shard.pictures
        self.outcomes.update(shard.outcomes)
        self.tokens.update(shard.tokens)
        self.words.update(shard.words)
        self.vocabulary.add(shard.vocabulary)


def read_statistics(root: str, captions: CaptionSet) -> Iterator[ShardStatistics]:
    """Yield the statistics of a set's committed shards, which are read by several threads.

    Raises:
        EvenmixError: a shard is damaged.
    """
    places = [(dataset, shard) for dataset, shards in captions.shards.items() for shard in shards]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for begin in range(0, len(places), _SHARDS_AT_ONCE):
            yield from pool.map(
                partial(_read, root, captions.folder), places[begin : begin + _SHARDS_AT_ONCE]
            )


def _read(root: str, folder: str, place: tuple[str, str]) -> ShardStatistics:
    return measure(read_shard(root, folder, *place, ["captions"]))


def measure(table: pa.Table) -> ShardStatistics:
    """Return the statistics of a shard, a table of :data:`captioning.tables.CAPTIONS`."""
    captions = table["captions"].combine_chunks().flatten()
    outcomes = pc.struct_field(captions, "outcome")
    usable = captions.filter(pc.is_in(outcomes, pa.array(sorted(USABLE))))
    num_words, words = count_words(pc.struct_field(usable, "text").fill_null(""))
    return ShardStatistics(
        pictures=table.num_rows,
        outcomes=_counts(outcomes),
        tokens=_counts(pc.struct_field(usable, "completion_tokens").drop_null()),
        words=_counts(pa.array(num_words)),
        vocabulary=np.fromiter(map(hash, words.to_pylist()), np.int64, len(words)),
    )


def _counts(values: pa.Array) -> Counter[Any]:
    return Counter({item["values"]: item["counts"] for item in pc.value_counts(values).to_pylist()})


def count_words(texts: pa.Array) -> tuple[npt.NDArray[np.int64], pa.Array]:
    """Count the words of each text; returns the numbers, and the distinct words in lower case.

    A word is a run of letters, marks and digits, so `well-lit` and `dog's` are two each. Chinese
    and Japanese do not part words by spaces: there each letter is one (Korean has spaces; Thai has
    none, and a run is one). ``texts`` are strings without nulls.
    """
    # Few of the pieces between spaces are distinct, and only these are looked at letter by letter.
    pieces = pc.split_pattern(texts, " ")
    encoded = pieces.flatten().dictionary_encode()
    parted = pc.replace_substring_regex(encoded.dictionary, _LETTER_THAT_IS_A_WORD, r" \0 ")
    parted = pc.replace_substring_regex(parted, _BETWEEN_WORDS, " ")
    parted = pc.utf8_trim_whitespace(pc.utf8_lower(parted))
    words = pc.split_pattern(parted, " ")
    # An empty text is split into one empty string.
    num_in_piece = pc.if_else(pc.equal(parted, ""), 0, pc.list_value_length(words)).to_numpy()
    up_to_piece = np.concatenate([[0], np.cumsum(num_in_piece[encoded.indices.to_numpy()])])
    ends = np.cumsum(pc.list_value_length(pieces).to_numpy())
    num_words = np.diff(up_to_piece[ends], prepend=0)
    distinct = pc.unique(words.flatten())
    return num_words, distinct.filter(pc.not_equal(distinct, ""))


def mean(lengths: Counter[int]) -> float:
    """Return the mean of lengths that are counted by length."""
    return sum(length * number for length, number in lengths.items()) / lengths.total()


def percentiles(lengths: Counter[int], percents: Sequence[int]) -> Iterable[int]:
    """Return for each percentage the least length that so many of the lengths do not exceed.

    This is the nearest rank, so it is a length that occurs. ``lengths`` are counted by length.
    """
    in_order = sorted(lengths)
    reached = np.cumsum([lengths[length] for length in in_order])
    for percent in percents:
        rank = max(1, math.ceil(lengths.total() * percent / 100))
        yield in_order[int(np.searchsorted(reached, rank))]
