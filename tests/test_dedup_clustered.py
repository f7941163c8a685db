"""The search in many clusters, clusterings, groups, parts, ranges and rounds, by brute force too.

With the sizes that the constants have, a corpus of a test would be one of each.
"""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from math import comb
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pytest

from dedup import clusters, corpus, deduplicate, recall, search_stages, show, steps
from dedup.records import read_vectors
from pipeline import storage
from pipeline.beam_job import RunnerOptions
from pipeline.cli import main
from pipeline.stage import Stage, WorkItem
from pipeline.summary import Summary
from tests.benchmarks import drawn_corpus
from tests.benchmarks.drawn_corpus import DATASET, DESCRIPTOR, DIMENSION
from tests.stages import run_here

NUM_ARCS, NUM_ON_ARC, NUM_ALIKE, NUM_EQUAL = 10, 50, 100, 20
NUM_PICTURES = NUM_ARCS * NUM_ON_ARC + NUM_ALIKE
NUM_CLUSTERINGS, NUM_CLUSTERS = 3, 8
THRESHOLD, MAX_NEIGHBOURS = 0.75, 8

RECIPE = f"""
root = "{{root}}"
[datasets.{DATASET}]
layout = "folder"
source = "nowhere"
licence = "CC0 1.0"
threshold = {THRESHOLD}
[dedup]
name = "{{name}}"
descriptor = "{DESCRIPTOR}"
num_clusters = {NUM_CLUSTERS}
clusterings = {{clusterings}}
min_recall = {{min_recall}}
max_neighbours = {MAX_NEIGHBOURS}
[captions.source]
engine = "source"
[mixture]
name = "m"
resolution = 64
captions = "source"
"""

Floats = npt.NDArray[np.float64]


def here(stage: Stage, items: list[WorkItem], _: RunnerOptions) -> Mapping[str, Summary]:
    return run_here(stage, items)


@contextmanager
def sizes(shard: int = 50, group: int = 200, part: int = 60, ranks: int = 200) -> Iterator[None]:
    """Let each step take many items, and compare all pictures with all in a second round."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (deduplicate, steps):
            patch.setattr(module, "run_stage", here)
        patch.setattr(deduplicate, "draw_largest", partial(show.draw_largest, count=1))
        patch.setattr(drawn_corpus, "_PICTURES_PER_SHARD", shard)
        patch.setattr(corpus, "PICTURES_PER_GROUP", group)
        patch.setattr(clusters, "ROWS_PER_PART", part)
        patch.setattr(search_stages, "RANKS_PER_RANGE", ranks)
        patch.setattr(clusters, "SAMPLE_PER_CLUSTER", 40)
        patch.setattr(recall, "MIN_QUERIES", 100)
        patch.setattr(recall, "ENOUGH_PAIRS", 10**6)
        yield


def draw() -> npt.NDArray[np.float32]:
    """Return vectors along arcs, and those of a swarm of nearly equal and of equal pictures.

    On an arc each is like its neighbours to both sides, so whatever cuts it separates pairs.
    """
    rng = np.random.default_rng(1)
    angle = np.radians(np.linspace(0, 250, NUM_ON_ARC))
    ends = rng.standard_normal((NUM_ARCS, 2, DIMENSION))
    arcs = np.stack([np.cos(angle), np.sin(angle)], axis=1) @ ends
    swarm = rng.standard_normal(DIMENSION) + 0.3 * rng.standard_normal((NUM_ALIKE, DIMENSION))
    swarm[:NUM_EQUAL] = swarm[0]
    vectors = rng.permutation(np.concatenate([*arcs, swarm]))
    return np.asarray(vectors / np.linalg.norm(vectors, axis=1, keepdims=True), np.float32)


def recipe_of(
    root: Path,
    name: str = "drawn",
    clusterings: int = NUM_CLUSTERINGS,
    min_recall: float = 0.5,
) -> Path:
    path = root / f"{name}.toml"
    text = RECIPE.format(root=root, name=name, clusterings=clusterings, min_recall=min_recall)
    path.write_text(text, encoding="utf-8")
    return path


def publish(root: Path, folder: Path) -> None:
    drawn_corpus.publish(str(root), draw(), folder)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root, folder = tmp_path_factory.mktemp("corpus"), tmp_path_factory.mktemp("vectors")
    with sizes():
        publish(root, folder)
        assert main(["dedup", str(recipe_of(root))]) == 0
    return root


def table(root: Path, name: str) -> pa.Table:
    """Read the tables of a folder of the outcome, those of the first shard first."""
    files = storage.list_files(str(root / "duplicates" / "drawn" / name))
    tables = [storage.read_parquet(f.url) for f in files if f.name.endswith(".parquet")]
    return pa.concat_tables(tables).combine_chunks()


@dataclass(frozen=True)
class Expected:
    """What brute force says of a corpus, by the keys of its pictures."""

    graph: dict[tuple[str, str], tuple[float, bool, bool]]  # similarity, equal, truncated
    removed: dict[str, tuple[str, float]]  # in whose favour, similarity
    measures: dict[str, float]


@pytest.fixture(scope="module")
def expected(root: Path) -> Expected:
    """Compare all with all, and count what shares a cluster of any clustering."""
    vectors = draw().astype(np.float16).astype(np.float64)
    index = [
        (-row["num_bytes"], row["key"], int(row["source_id"]))
        for file in storage.list_files(str(root / "images" / DATASET))
        if file.name.endswith(".parquet")
        for row in storage.read_parquet(file.url, ["num_bytes", "key", "source_id"]).to_pylist()
    ]
    index.sort()
    keys = [key for _, key, _ in index]
    vectors = vectors[[row for *_, row in index]]  # from here on by rank
    lengths = np.linalg.norm(vectors, axis=1)
    cosines = (vectors @ vectors.T / np.outer(lengths, lengths)).astype(np.float32)
    homes = home_clusters(root, vectors)
    meets = [own[:, None] == own for own in homes]
    _, first, same = np.unique(vectors, axis=0, return_index=True, return_inverse=True)
    stand_in = first[same.ravel()]

    is_pair = cosines >= THRESHOLD
    is_pair[np.diag_indices(NUM_PICTURES)] = False
    found = is_pair & np.logical_or.reduce(meets)
    neighbours: dict[int, list[int]] = {}
    for worse in np.flatnonzero(stand_in == np.arange(NUM_PICTURES)).tolist():
        better = np.flatnonzero(found[worse, :worse])
        neighbours[worse] = better[stand_in[better] == better].tolist()
    is_cut = np.array(
        [len(neighbours.get(worse, [])) > MAX_NEIGHBOURS for worse in range(NUM_PICTURES)]
    )
    neighbours = {worse: better[:MAX_NEIGHBOURS] for worse, better in neighbours.items()}
    graph = {
        (keys[worse], keys[better]): (float(cosines[worse, better]), False, bool(is_cut[worse]))
        for worse, their in neighbours.items()
        for better in their
    } | {
        (keys[worse], keys[better]): (1.0, True, False)
        for worse, better in enumerate(stand_in.tolist())
        if worse != better
    }

    keeper: dict[int, tuple[int, float]] = {}
    for worse, their in sorted(neighbours.items()):
        kept = [
            (-float(cosines[worse, better]), better) for better in their if better not in keeper
        ]
        if kept:
            keeper[worse] = (min(kept)[1], -min(kept)[0])
    for worse, better in enumerate(stand_in.tolist()):
        if worse != better:
            keeper[worse] = keeper.get(better, (better, 1.0))

    better, worse = (
        np.minimum(*(stand_in[side] for side in np.nonzero(is_pair))),
        np.maximum(*(stand_in[side] for side in np.nonzero(is_pair))),
    )
    is_left = np.array([rank not in keeper for rank in range(NUM_PICTURES)])
    num_compared = sum(comb(int(n), 2) for own in homes for n in np.bincount(own))
    met = np.logical_or.accumulate(meets)
    listed = (better == worse) | ~is_cut[worse]
    measures = {
        **{f"reachable_recall_{s}": float(each[is_pair].mean()) for s, each in enumerate(met, 1)},
        "pair_recall": float(((better == worse) | found[better, worse])[listed].mean()),
        "duplicates_left": float((is_pair[is_left][:, is_left]).any(axis=1).mean()),
        "comparisons_share": num_compared / comb(NUM_PICTURES, 2),
    }
    removed = {keys[rank]: (keys[kept], cosine) for rank, (kept, cosine) in keeper.items()}
    return Expected(graph, removed, measures)


def home_clusters(root: Path, vectors: Floats) -> list[npt.NDArray[np.int64]]:
    """Return the home cluster of each vector in each clustering, by the exact products."""
    folder = root / "exchange" / "duplicates-drawn" / f"{NUM_CLUSTERINGS}x{NUM_CLUSTERS}"
    urls = [str(path) for path in sorted(folder.glob("clusters/*/all.parquet"))]
    centroids = [read_vectors(url, "centroid", DIMENSION)[1].astype(np.float64) for url in urls]
    assert [len(each) for each in centroids] == [NUM_CLUSTERS] * NUM_CLUSTERINGS
    return [(vectors @ each.T).argmax(axis=1) for each in centroids]


def test_there_were_many_of_everything(root: Path) -> None:
    folder = root / "exchange" / "duplicates-drawn" / f"{NUM_CLUSTERINGS}x{NUM_CLUSTERS}"

    def num_files(pattern: str) -> int:
        return len(list(folder.glob(pattern)))

    assert num_files("sample/*/group-*.parquet") == 3
    assert [num_files(f"truth/{name}/group-*.parquet") for name in ("first", "further")] == [3, 3]
    assert num_files("vectors/clustering-*/group-*.parquet") == 9
    for number in range(NUM_CLUSTERINGS):
        parts = num_files(f"pairs/clustering-{number:02}/part-?????.parquet")
        assert parts > NUM_CLUSTERS
        assert num_files(f"pairs/clustering-{number:02}/part-?????-?????.parquet") >= 5
    ranges = sorted((root / "duplicates/drawn/_graph").glob("range-*.parquet"))
    ranks = [storage.read_parquet(str(path), ["rank"])["rank"].to_numpy() for path in ranges]
    assert [set((each // 200).tolist()) for each in ranks] == [{0}, {1}, {2}]


def test_the_graph_is_that_of_brute_force(root: Path, expected: Expected) -> None:
    rows = table(root, "_graph").to_pylist()
    found = {
        (row["key"], row["neighbour"]): (row["similarity"], row["equal"], row["truncated"])
        for row in rows
    }
    assert found == expected.graph
    assert len(rows) == len(found)
    kinds = list(expected.graph.values())
    assert sum(equal for _, equal, _ in kinds) == NUM_EQUAL - 1
    assert sum(truncated for *_, truncated in kinds) > 50 * MAX_NEIGHBOURS


def test_who_goes_is_what_brute_force_says(root: Path, expected: Expected) -> None:
    removed = {row["key"]: row for row in table(root, "_removed").to_pylist()}
    assert {
        key: (row["duplicate_of"], row["similarity"]) for key, row in removed.items()
    } == expected.removed
    assert {row["rule"] for row in removed.values()} == {"near_duplicate"}
    # Each shard's outcome says the same, at the places that the report names.
    for file in storage.list_files(str(root / "duplicates" / "drawn" / DATASET)):
        if not file.name.endswith(".parquet"):
            continue
        shard = file.name.removesuffix(".parquet")
        for number, row in enumerate(storage.read_parquet(file.url).to_pylist()):
            gone = removed.pop(row["key"], None)
            if gone is None:
                assert row["duplicate_of"] is None
                continue
            assert {name: gone[name] for name in row} == row
            assert (gone["dataset"], gone["shard"], gone["row"]) == (DATASET, shard, number)
    assert removed == {}


def test_measures_are_those_of_brute_force(root: Path, expected: Expected) -> None:
    rows = table(root, "_recall").to_pylist()
    assert {row["measure"]: row["value"] for row in rows} == pytest.approx(
        expected.measures, abs=1e-12
    )
    # In two rounds all pictures were queries.
    assert all(row["low"] == row["value"] == row["high"] for row in rows)
    assert rows[0]["num_queries"] == NUM_PICTURES
    values = [row["value"] for row in rows]
    assert 0.5 < values[0] < values[1] < values[2] < 1


def test_other_shards_groups_parts_and_ranges_give_the_same(root: Path, tmp_path: Path) -> None:
    with sizes(shard=37, group=300, part=90, ranks=300):
        publish(tmp_path, tmp_path)
        assert main(["dedup", str(recipe_of(tmp_path))]) == 0
    assert table(tmp_path, "_graph").equals(table(root, "_graph"))
    assert table(tmp_path, "_recall").equals(table(root, "_recall"))
    columns = ["key", "duplicate_of", "similarity", "group", "rule"]
    for name in ("_removed", DATASET):
        one, other = (table(each, name).select(columns).sort_by("key") for each in (root, tmp_path))
        assert one.equals(other), name


def test_a_refused_search_runs_with_the_number_that_it_advises(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = recipe_of(root, "refused", clusterings=2, min_recall=0.994)
    with sizes():
        assert main(["dedup", str(recipe)]) == 1
        advice = re.search(
            r"error: dedup\.clusterings = 2 can find 0\.\d+ of .* less than dedup\.min_recall = "
            r"0\.994; dedup\.clusterings = (\d+) would reach about 0\.9",
            capsys.readouterr().err,
        )
        assert advice is not None
        assert not (root / "duplicates" / "refused").exists()
        assert main(["dedup", str(recipe), "--clusterings", advice[1]]) == 0
    rows = storage.read_parquet(str(root / "duplicates/refused/_recall/all.parquet")).to_pylist()
    reached = {row["measure"]: row["value"] for row in rows}
    assert reached[f"reachable_recall_{advice[1]}"] >= 0.994 > reached["reachable_recall_2"]
