"""Exact copies, near-duplicates, accepted and evaluation pictures in one graph.

Random corpora are compared with the plain definition: walk from the best picture to the worst, and
keep what is like none that is kept.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pytest

from dedup.corpus import Search, Shard, group_shards
from dedup.outcome_stages import Everyone, settled_rows
from dedup.pictures import ACCEPTED, EVALUATION, NEW, Facts, who_is_who
from dedup.records import DUPLICATES, keys_from_hex, to_hex
from dedup.removals import CONTAMINATED, EXACT, NEAR, Edges, Graph, choose_removals
from dedup.rules import AGAINST, Rule, Rules
from pipeline import storage

THRESHOLDS = {"exact": 2.0, "loose": 0.75, "off": 3.0, "strict": 0.9, AGAINST: 0.0}
"""The least cosine of copies; 2 stands for exact copies only, 3 for none."""

NUM_CONTENTS = 12
Cosines = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Picture:
    """A picture whose pixels are one of a few contents; ``file`` tells its encodings apart."""

    dataset: str
    key: str
    content: int
    file: int
    num_pixels: int
    level: int = NEW
    settled_for: str = ""

    @property
    def order(self) -> tuple[int, int, int, str]:
        return (self.level, -self.num_pixels, -self.file, self.key)


def rule_of(a: str, b: str) -> Rule:
    threshold = max(THRESHOLDS[a], THRESHOLDS[b])
    if AGAINST in (a, b) and threshold == 3:
        return Rule("exact", 1.0, "none", True)
    if threshold >= 2:
        return Rule("exact" if threshold == 2 else "off", 1.0, "none", True)
    return Rule("near", threshold, "none", True)


NAMES = tuple(THRESHOLDS)
RULES = Rules(NAMES, tuple(tuple(rule_of(a, b) for b in NAMES) for a in NAMES))


def hashes(labels: Sequence[str]) -> npt.NDArray[np.void]:
    digests = b"".join(hashlib.sha256(label.encode()).digest()[:16] for label in labels)
    return np.frombuffer(digests, "V16")


def keys(pictures: Sequence[str]) -> npt.NDArray[np.void]:
    return np.frombuffer(bytes.fromhex("".join(key or "0" * 32 for key in pictures)), "V16")


def facts_of(pictures: Sequence[Picture]) -> Facts:
    return Facts(
        key=keys([picture.key for picture in pictures]),
        num_pixels=np.array([picture.num_pixels for picture in pictures]),
        num_bytes=np.array([picture.file for picture in pictures]),
        sha256=hashes([f"{picture.content} {picture.file}" for picture in pictures]),
        pixels_sha256=hashes([f"{picture.content}" for picture in pictures]),
        dataset=np.array([NAMES.index(picture.dataset) for picture in pictures], np.int16),
        level=np.array([picture.level for picture in pictures], np.int8),
        settled=np.array([bool(picture.settled_for) for picture in pictures]),
        keeper=keys([picture.settled_for for picture in pictures]),
    )


def similarity(a: Picture, b: Picture, cosines: Cosines) -> float | None:
    """Return how alike two pictures are, or None if that does not count: the definition."""
    rule = RULES.between(NAMES.index(a.dataset), NAMES.index(b.dataset))
    if ACCEPTED == a.level == b.level or EVALUATION == a.level == b.level:
        return None
    if a.content == b.content:
        return 1.0 if rule.is_exact else None
    cosine = float(cosines[a.content, b.content])
    return cosine if rule.is_near and cosine >= rule.threshold else None


@dataclass(frozen=True)
class Removed:
    duplicate_of: Picture
    similarity: float
    rule: int


def removed_of(
    pictures: Sequence[Picture], cosines: Cosines, *, remove_contamination: bool = True
) -> Mapping[Picture, Removed]:
    """Do what the stages do, with the search replaced by a look at every pair that is searched."""
    table = who_is_who(facts_of(pictures), RULES, [], seed=0)
    rank = table["rank"].to_numpy()
    at = np.argsort(rank)
    searched = [i for i in at if table["draw"][int(i)].as_py() >= 0]
    near = [
        (rank[a], rank[b], alike)
        for place, b in enumerate(searched)
        for a in searched[:place]
        if (alike := similarity(pictures[a], pictures[b], cosines)) is not None
        if pictures[a].content != pictures[b].content
    ]
    columns = np.array(near, np.float64).reshape(-1, 3)
    nothing = np.empty(0, np.int64)
    graph = Graph(
        stand_in=table["stand_in"].to_numpy()[at],
        copies=table["copies"].to_numpy()[at],
        dataset=np.array([NAMES.index(pictures[i].dataset) for i in at], np.int16),
        accepted=table["accepted"].to_numpy()[at],
        settled=table["settled"].to_numpy()[at],
        near=Edges.near(
            columns[:, 0].astype(np.int64),
            columns[:, 1].astype(np.int64),
            columns[:, 2].astype(np.float32),
        ),
        equal=Edges.near(nothing, nothing, np.empty(0, np.float32)),
        num_evaluation=sum(picture.level == EVALUATION for picture in pictures),
    )
    chosen = choose_removals(graph, RULES, remove_contamination=remove_contamination)
    return {
        pictures[at[removed]]: Removed(pictures[at[keeper]], float(alike), int(rule))
        for removed, keeper, alike, rule in zip(
            chosen.removed, chosen.duplicate_of, chosen.similarity, chosen.rule, strict=True
        )
    }


def some_pictures(rng: np.random.Generator, levels: Sequence[int]) -> list[Picture]:
    sizes = rng.choice([100, 200], NUM_CONTENTS)  # equal pixels have equal sizes
    pictures = []
    for number in range(40):
        level = int(rng.choice(levels))
        content = int(rng.integers(0, NUM_CONTENTS))
        dataset = AGAINST if level == EVALUATION else str(rng.choice(NAMES[:-1]))
        key = hashlib.sha256(b"%d" % number).hexdigest()[:32]
        file = int(rng.integers(1, 3))
        pictures.append(Picture(dataset, key, content, file, int(sizes[content]), level))
    return pictures


def some_cosines(rng: np.random.Generator) -> Cosines:
    cosines = rng.choice(
        np.array([0.1, 0.8, 0.95], np.float32), (NUM_CONTENTS, NUM_CONTENTS), p=[0.8, 0.1, 0.1]
    )
    return np.asarray(np.maximum(cosines, cosines.T), np.float32)


def kept_of(pictures: Sequence[Picture], cosines: Cosines) -> list[Picture]:
    kept: list[Picture] = []
    for picture in sorted(pictures, key=lambda picture: picture.order):
        if all(similarity(other, picture, cosines) is None for other in kept):
            kept.append(picture)
    return kept


@pytest.mark.parametrize("seed", range(25))
def test_random_corpora(seed: int) -> None:
    rng = np.random.default_rng(seed)
    corpus, cosines = some_pictures(rng, [ACCEPTED, NEW, NEW]), some_cosines(rng)
    kept = kept_of(corpus, cosines)
    for order in (corpus, [corpus[i] for i in rng.permutation(len(corpus))]):
        removed = removed_of(order, cosines)
        assert removed.keys() == set(corpus) - set(kept)
        assert not any(picture.level == ACCEPTED for picture in removed)
        for picture, outcome in removed.items():
            keeper = outcome.duplicate_of
            assert keeper in kept
            assert keeper.order < picture.order
            assert outcome.similarity == pytest.approx(similarity(picture, keeper, cosines))
            assert outcome.rule == (EXACT if picture.content == keeper.content else NEAR)


@pytest.mark.parametrize("seed", range(25))
def test_contamination_takes_whole_groups(seed: int) -> None:
    rng = np.random.default_rng(seed)
    corpus, cosines = some_pictures(rng, [EVALUATION, ACCEPTED, *[NEW] * 8]), some_cosines(rng)
    evaluation = [picture for picture in corpus if picture.level == EVALUATION]
    own = [picture for picture in corpus if picture.level != EVALUATION]
    without = removed_of(own, cosines)
    reported = removed_of(corpus, cosines, remove_contamination=False)
    assert reported == without

    def likest(picture: Picture) -> float:
        return max((similarity(e, picture, cosines) or 0 for e in evaluation), default=0)

    def keeper_of(picture: Picture) -> Picture:
        return without[picture].duplicate_of if picture in without else picture

    tainted = {keeper_of(picture) for picture in own if likest(picture)}
    removed = removed_of(corpus, cosines)
    assert removed.keys() == without.keys() | {p for p in own if keeper_of(p) in tainted}
    for picture, outcome in removed.items():
        if keeper_of(picture) not in tainted:
            assert outcome == without[picture]
            continue
        assert outcome.rule == CONTAMINATED
        assert outcome.duplicate_of in evaluation
        if likest(picture):
            assert outcome.similarity == pytest.approx(likest(picture))
        else:
            assert np.isnan(outcome.similarity)


def test_a_million_copies_would_make_no_pairs() -> None:
    copies = [Picture("loose", f"{i:032x}", 0, file=1, num_pixels=9) for i in range(1_000)]
    table = who_is_who(facts_of(copies), RULES, [], seed=0)
    assert [draw for draw in table["draw"].to_pylist() if draw >= 0] == [0]
    removed = removed_of(copies, some_cosines(np.random.default_rng(0)))
    assert len(removed) == 999
    assert {outcome.duplicate_of for outcome in removed.values()} == {copies[0]}


def test_a_dataset_of_exact_copies_only_keeps_what_is_merely_similar() -> None:
    best = Picture("loose", "a" * 32, content=0, file=1, num_pixels=200)
    near = Picture("loose", "b" * 32, content=1, file=2, num_pixels=100)
    copy_of_near = Picture("exact", "c" * 32, content=1, file=1, num_pixels=100)
    removed = removed_of([best, near, copy_of_near], np.full((2, 2), 0.8, np.float32))
    # What its copy lost against is no copy of it.
    assert {p: outcome.duplicate_of for p, outcome in removed.items()} == {near: best}


def test_of_a_repeated_id_the_first_counts() -> None:
    first = Picture("loose", "a" * 32, content=0, file=1, num_pixels=1)
    again = Picture("loose", "a" * 32, content=1, file=9, num_pixels=900)
    alike = Picture("loose", "b" * 32, content=1, file=1, num_pixels=900)
    removed = removed_of([first, again, alike], np.zeros((2, 2), np.float32))
    assert removed == {again: Removed(first, 1.0, EXACT)}


def test_what_an_earlier_search_removed_stays_out_and_takes_no_part() -> None:
    keeper = Picture("loose", "a" * 32, 0, file=1, num_pixels=9, level=ACCEPTED)
    settled = Picture("loose", "b" * 32, 1, 1, 900, level=ACCEPTED, settled_for=keeper.key)
    copy = Picture("loose", "c" * 32, content=1, file=1, num_pixels=900)
    cosines = np.zeros((3, 3), np.float32)
    # It is no keeper of its own copies, and its own row is the earlier search's.
    assert removed_of([keeper, settled, copy], cosines) == {}
    # If what it went for is contaminated, so is it.
    evaluation = Picture(AGAINST, "d" * 32, 0, 1, 9, level=EVALUATION)
    removed = removed_of([keeper, settled, copy, evaluation], cosines)
    assert {p: outcome.rule for p, outcome in removed.items()} == {
        keeper: CONTAMINATED,
        settled: CONTAMINATED,
    }


def test_a_repeat_of_what_an_earlier_search_removed_is_settled_too() -> None:
    kept = Picture("loose", "a" * 32, 0, file=1, num_pixels=9, level=ACCEPTED)
    for keeper in (kept.key, "f" * 32):  # the other is unknown
        settled = Picture("loose", "b" * 32, 1, 1, 900, level=ACCEPTED, settled_for=keeper)
        again = Picture("loose", "b" * 32, content=2, file=1, num_pixels=900)
        table = who_is_who(facts_of([kept, settled, again]), RULES, [], seed=0)
        assert table["settled"].to_pylist() == [False, True, True]
        rank, stand_in = table["rank"].to_pylist(), table["stand_in"].to_pylist()
        assert stand_in == [rank[0], rank[0 if keeper == kept.key else 1], rank[1]]
        assert removed_of([kept, settled, again], np.zeros((3, 3), np.float32)) == {}


def test_a_later_repeat_has_the_row_of_what_the_earlier_search_removed(tmp_path: Path) -> None:
    search = Search(
        root=str(tmp_path), name="later", seed=0, rules=RULES, embeddings="", descriptor={},
        max_neighbours=1, accepted="earlier",
    )  # fmt: skip
    kept = Picture("loose", "a" * 32, 0, file=1, num_pixels=9, level=ACCEPTED)
    known = Picture("loose", "b" * 32, 1, 1, 900, level=ACCEPTED, settled_for=kept.key)
    unknown = Picture("loose", "c" * 32, 2, 1, 900, level=ACCEPTED, settled_for="e" * 32)
    new = [Picture("loose", key * 32, 3, 1, 900) for key in "dcb"]
    earlier = [
        dict(zip(DUPLICATES.names, values, strict=True))
        for values in [
            (kept.key, None, None, kept.key, None),
            (known.key, kept.key, 1.0, kept.key, "exact_copy"),
            (unknown.key, "e" * 32, 0.5, "f" * 32, "contamination"),
        ]
    ]
    table = pa.Table.from_pylist(earlier, schema=DUPLICATES)
    storage.publish(search.accepted_url("loose", "one"), storage.parquet_bytes(table, {}))
    everyone = Everyone(
        [[Shard("loose", "one", 3, True)], [Shard("loose", "one.r1", 3, False)]],
        who_is_who(facts_of([kept, known, unknown, *new]), RULES, [], seed=0),
    )
    rows = pa.concat_tables(settled_rows(search, everyone, np.empty(0, np.int64))).to_pylist()
    place_of_kept = {"keeper_dataset": "loose", "keeper_shard": "one", "keeper_row": 0}
    nowhere = dict.fromkeys(place_of_kept)
    assert sorted(rows, key=lambda row: row["place"]) == [
        {"place": 1} | earlier[1] | place_of_kept,
        {"place": 2} | earlier[2] | nowhere,
        {"place": 4} | earlier[2] | nowhere,
        {"place": 5} | earlier[1] | place_of_kept,
    ]


def test_evaluation_pictures_change_no_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """So the outcome's items are known before evaluation pictures are described."""
    monkeypatch.setattr("dedup.corpus.PICTURES_PER_GROUP", 10)
    shards = [Shard("album", f"{number}", 4, False) for number in range(5)]
    evaluation = [Shard(AGAINST, f"{number}", 9, False) for number in range(2)]
    alone, together = group_shards(shards), group_shards([*shards, *evaluation])
    assert [len(group) for group in alone] == [3, 2]
    assert together[0] == alone[0]
    assert together[1][:2] == alone[1]


def test_the_draw_is_random_and_hangs_on_key_and_seed_alone() -> None:
    names = [hashlib.sha256(b"%d" % number).hexdigest()[:32] for number in range(500)]
    pictures = [Picture("loose", key, i, 1, 900) for i, key in enumerate(names)]

    def draw(pictures: Sequence[Picture], seed: int) -> dict[str, int]:
        table = who_is_who(facts_of(pictures), RULES, [], seed)
        keys = [picture.key for picture in pictures]
        return dict(zip(keys, table["draw"].to_pylist(), strict=True))

    first = draw(pictures, 0)
    assert sorted(first.values()) == list(range(500))
    assert draw(pictures[::-1], 0) == first
    order = [first[key] for key in sorted(names)]
    for other in (list(range(500)), [draw(pictures, 1)[key] for key in sorted(names)]):
        assert abs(np.corrcoef(order, other)[0, 1]) < 0.15


def test_keys_to_hex_and_back() -> None:
    names = [hashlib.sha256(b"%d" % number).hexdigest()[:32] for number in range(9)]
    column = pa.chunked_array([pa.array(names[:4]), pa.array([], pa.string()), pa.array(names[4:])])
    for some in (column, column.slice(2, 5), column.slice(9)):
        assert to_hex(keys_from_hex(some)).to_pylist() == some.to_pylist()


def test_priority_decides_between_equals() -> None:
    one = Picture("loose", "a" * 32, content=0, file=1, num_pixels=9)
    other = replace(one, dataset="strict", key="b" * 32)
    for priority, best in ((["strict"], [1, 0]), (["loose"], [0, 1]), ([], [0, 1])):
        table = who_is_who(facts_of([one, other]), RULES, priority, seed=0)
        assert table["rank"].to_pylist() == best
