"""All twelve public datasets come in through the real command, in miniature and real layouts."""

import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from pipeline import storage
from pipeline.catalog import CATALOG
from tests import replicas
from tests.hub import TOKEN, Hub, serve_hub

PLACES = "places365-challenge2016"

RECIPE = """
root = "{root}"
[images]
min_short_edge_px = 48
records_per_shard = 8
[fetch]
allow_private_addresses = true
attempts = 2
backoff_s = 0.01
{datasets}
[datasets.gptedit-with-instructions]
catalog = "gptedit"
extra_fields = ["instruction"]
[datasets.places-direct]
catalog = "places365-challenge2016"
source = "{folder}/places_direct.tar"
mirror = false
[captions.own]
engine = "source"
[mixture]
name = "small"
resolution = 48
captions = "own"
"""

ELSEWHERE = {
    "inaturalist": 'source = "{url}/2024/train.tar.gz"',
    PLACES: 'source = "{url}/places365/train_large_places365challenge.tar"',
    "yfcc": (
        'source = "{url}/tools/etc/yfcc100m_dataset.sql"\n'
        'image_url = "{url}/data/images/{{downloadurl:multimedia_commons_path}}.jpg"'
    ),
}
"""What a recipe overrides of the datasets that are not on the Hub."""


@dataclass(frozen=True)
class Build:
    """What the commands made, printed, and asked of the server."""

    root: str
    printed: str
    requests: list[str]
    hub_url: str

    def rows(self, dataset: str, suffix: str = ".parquet") -> list[dict[str, Any]]:
        folder = storage.join(self.root, "images", dataset)
        names = [file.name for file in storage.list_files(folder)]
        return [
            row
            for name in names
            if name.endswith(suffix) and name.count(".") == suffix.count(".")
            for row in storage.read_parquet(storage.join(folder, name)).to_pylist()
        ]

    def reasons(self, dataset: str) -> dict[str, int]:
        return dict(Counter(row["reason"] for row in self.rows(dataset, ".rejected.parquet")))


def command(hub: Hub, *arguments: str, token: str | None = TOKEN) -> tuple[int, str]:
    """Run the real command; returns its status and all that it printed."""
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "COLUMNS": "120"}
    environment.pop("HF_TOKEN", None)
    if token is not None:
        environment["HF_TOKEN"] = token
    done = subprocess.run(
        [sys.executable, "-m", "pipeline.cli", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        env=environment,
        timeout=120,
    )
    return done.returncode, done.stdout


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    with serve_hub() as served:
        replicas.publish(served)
        yield served


@pytest.fixture(scope="module")
def build(hub: Hub, tmp_path_factory: pytest.TempPathFactory) -> Build:
    """Mirror what must be, and ingest everything."""
    folder = tmp_path_factory.mktemp("public")
    (folder / "places_direct.tar").write_bytes(replicas.places_direct())
    datasets = "\n".join(
        f'[datasets.{name}]\ncatalog = "{name}"\n' + ELSEWHERE.get(name, "").format(url=hub.url)
        for name in CATALOG
    )
    recipe = folder / "recipe.toml"
    recipe.write_text(RECIPE.format(root=folder / "R", folder=folder, datasets=datasets))
    printed = []
    for name in ELSEWHERE:
        status, text = command(hub, "mirror", name, "--recipe", str(recipe))
        assert status == 0, text
        printed.append(text)
    hub.requests.clear()
    status, text = command(hub, "ingest", str(recipe))
    assert status == 0, text
    return Build(str(folder / "R"), "\n".join([*printed, text]), list(hub.requests), hub.url)


def test_fluxreason(build: Build) -> None:
    rows = build.rows("fluxreason")
    expected = [
        f"{folder}-{number:08}"
        for folder in ("aesthetics-part01", "aesthetics-part02", "imaginative", "text")
        for number in range(6)
        if (folder, number) != ("imaginative", 4)
    ]
    assert sorted(row["source_id"] for row in rows) == expected
    assert all(row["join_id"] == row["source_id"] for row in rows)
    assert rows[0]["text"] == "A detailed description, number 0 of Aesthetics-Part01."
    assert {row["licence"] for row in rows} == {"Apache-2.0"}
    assert build.reasons("fluxreason") == {"truncated": 1}


def test_gptedit(build: Build) -> None:
    rows = build.rows("gptedit")
    expected = {f"hqedit_{number}" for number in range(12)} - {"hqedit_7"}
    assert {row["source_id"] for row in rows} == {row["join_id"] for row in rows} == expected
    assert build.reasons("gptedit") == {"missing_picture": 1}
    with_instructions = build.rows("gptedit-with-instructions")
    assert with_instructions[0]["fields"] == '{"instruction": "Make it warmer, step 0."}'
    assert [row["sha256"] for row in with_instructions] == [row["sha256"] for row in rows]


def test_imagenet22k(build: Build) -> None:
    rows = build.rows("imagenet22k")
    expected = {f"n0000{number % 3}475_{number}" for number in range(12)} - {"n00002475_11"}
    assert {row["source_id"] for row in rows} == {row["join_id"] for row in rows} == expected
    assert build.reasons("imagenet22k") == {"empty_file": 1}


def test_inaturalist(build: Build) -> None:
    rows = build.rows("inaturalist")
    assert {row["source_id"]: row["text"] for row in rows} == {
        replicas.inaturalist_uuid(folder, number): folder.partition("_")[2]
        for folder in replicas.INATURALIST_FOLDERS
        for number in range(8)
    }
    assert all(row["join_id"] == row["source_id"] for row in rows)
    assert build.reasons("inaturalist") == {}


def test_megalith10m(build: Build) -> None:
    rows = build.rows("megalith10m")
    pages = f"{build.hub_url}/live.staticflickr.com/65535"
    expected = {f"{pages}/{number}_b.jpg" for number in range(12) if number not in (4, 7, 9)}
    assert {row["source_id"] for row in rows} == {row["source_url"] for row in rows} == expected
    assert {row["join_id"] for row in rows} == {None}
    assert {
        row["source_id"]: row["reason"] for row in build.rows("megalith10m", ".rejected.parquet")
    } == {
        f"{pages}/4_b.jpg": "http_error",
        f"{pages}/7_b.jpg": "http_error",
        f"{pages}/9_b.jpg": "opted_out",
    }


def test_midjourneyv6(build: Build) -> None:
    rows = build.rows("midjourneyv6")
    assert {row["source_id"] for row in rows} == {
        f"{900_000 + number // 4}:train_{number // 12:03}:{number % 12}" for number in range(24)
    }
    assert len({row["sha256"] for row in rows}) == 24
    assert {row["join_id"] for row in rows} == {None}
    assert build.reasons("midjourneyv6") == {}


def test_pexels(build: Build) -> None:
    rows = build.rows("pexels")
    assert {row["source_id"] for row in rows} == {str(number) for number in range(1_000, 1_012)}
    assert all(row["join_id"] == row["source_id"] for row in rows)
    assert {row["format"] for row in rows} == {"webp"}


@pytest.mark.parametrize("dataset", [PLACES, "places-direct"])
def test_places(build: Build, dataset: str) -> None:
    rows = build.rows(dataset)
    found = {row["source_id"]: (row["join_id"], row["join_ambiguous"], row["text"]) for row in rows}
    expected = {}
    for folder, count in replicas.PLACES.items():
        category, leaf = folder[2:], folder.rpartition("/")[2]
        for number in range(count):
            join_id, ambiguous = f"{leaf}_{number:08}", leaf in ("indoor", "outdoor")
            expected[f"{category}/{number:08}"] = (join_id, ambiguous, category)
    assert found == expected
    assert found["swimming_pool/indoor/00000000"][0] == found["bow_window/indoor/00000000"][0]


def test_redcaps(build: Build) -> None:
    rows = build.rows("redcaps")
    rejected = {"c20175": "placeholder", "i20192": "not_an_image"}
    everything = {f"c2017{number}" for number in range(8)} | {
        f"i2019{number}" for number in range(8)
    }
    assert {row["source_id"] for row in rows} == everything - rejected.keys()
    assert all(row["join_id"] == row["source_id"] for row in rows)
    first = min(rows, key=lambda row: row["source_id"])
    assert first["text"] == "my cats 0"
    assert first["source_url"] == f"{build.hub_url}/i.imgur.com/c20170.jpg"
    assert {
        row["source_id"]: row["reason"] for row in build.rows("redcaps", ".rejected.parquet")
    } == rejected


def test_rendered_text(build: Build) -> None:
    rows = build.rows("rendered_text")
    assert {row["source_id"] for row in rows} == {f"{number:08}" for number in range(12)}
    first = min(rows, key=lambda row: row["source_id"])
    assert '"text": ["line 0", "of text"]' in first["fields"]


def test_textatlas(build: Build) -> None:
    rows = build.rows("textatlas")
    everything = {
        f"{subset}:images/{number}.png"
        for subset in replicas.TEXTATLAS_SUBSETS
        for number in range(3)
    }
    expected = everything - {"StyledTextSynth:images/1.png"}
    assert {row["source_id"] for row in rows} == {row["join_id"] for row in rows} == expected
    assert build.reasons("textatlas") == {"missing_picture": 1}
    texts = {row["source_id"]: row["text"] for row in rows}
    assert texts["CoverBook:images/2.png"] == "The words 'CoverBook says 2' on white."


def test_yfcc(build: Build) -> None:
    rows = build.rows("yfcc")
    first = 6_985_418_911
    kept = set(range(replicas.YFCC_RECORDS)) - replicas.YFCC_FAILURES.keys()
    assert {row["source_id"] for row in rows} == {str(first + number) for number in kept}
    assert all(row["join_id"] == row["source_id"] for row in rows)
    assert {row["licence"] for row in rows} == {"Attribution-NonCommercial License"}
    url = f"http://farm8.staticflickr.com/7205/{first}_df7747990d.jpg"
    (row,) = (row for row in rows if row["source_id"] == str(first))
    assert row["source_url"] == f"{build.hub_url}/data/images/{replicas.yfcc_path(url)}.jpg"
    assert f'"downloadurl": "{url}"' in row["fields"]
    # Bytes below 16 have one digit in the names of the bucket, so most are shorter than an MD5.
    assert min(len(Path(row["source_url"]).stem) for row in rows) < 32
    assert {
        int(row["source_id"]) - first: row["reason"]
        for row in build.rows("yfcc", ".rejected.parquet")
    } == replicas.YFCC_FAILURES


@pytest.mark.parametrize("name", CATALOG)
def test_what_is_kept_says_where_it_comes_from(build: Build, name: str) -> None:
    dataset = CATALOG[name].dataset
    rows = build.rows(name)
    is_on_the_hub = dataset.source.startswith("hf://")
    revision = dataset.revision or (replicas.HEAD if is_on_the_hub else None)
    assert {row["revision"] for row in rows} == {revision}
    (source,) = {row["source"] for row in rows}
    assert source.startswith("hf://datasets/" if is_on_the_hub else build.hub_url)
    assert all(row["licence"] and row["sha256"] and row["locator"] for row in rows)


def test_the_pinned_commit_is_read_and_no_other(build: Build) -> None:
    files = [request for request in build.requests if "/resolve/" in request]
    for name, entry in CATALOG.items():
        repo = entry.dataset.source.removeprefix("hf://datasets/").split("@")[0]
        owner_and_name = "/".join(repo.split("/")[:2])
        revisions = {
            request.partition("/resolve/")[2].partition("/")[0]
            for request in files
            if f"/datasets/{owner_and_name}/" in request
        }
        if entry.dataset.source.startswith("hf://"):
            assert revisions == {entry.dataset.revision or replicas.HEAD}, name


def test_what_is_dead_is_asked_for_once(build: Build) -> None:
    asked = Counter(build.requests)
    assert asked["GET /live.staticflickr.com/65535/4_b.jpg"] == 1
    assert asked["GET /live.staticflickr.com/65535/7_b.jpg"] == 1


def test_the_token_is_nowhere(build: Build) -> None:
    files = [path for path in Path(build.root).rglob("*") if path.is_file()]
    assert len(files) > 50
    assert not [path for path in files if TOKEN.encode() in path.read_bytes()]
    assert TOKEN not in build.printed


def test_verify_finds_nothing(build: Build, hub: Hub) -> None:
    status, printed = command(hub, "verify", build.root)
    assert status == 0, printed


def test_a_gated_dataset_without_a_token(hub: Hub, tmp_path: Path) -> None:
    arguments = ["ingest", "--dataset", "pexels", "--root", str(tmp_path / "R")]
    status, printed = command(hub, *arguments, token=None)
    assert status == 1
    assert printed.splitlines() == [
        "error: hf://datasets/animetimm/pexels-tagger-v0-w640-ws-full is gated: accept its terms "
        "at https://huggingface.co/datasets/animetimm/pexels-tagger-v0-w640-ws-full and set "
        "HF_TOKEN to a token of that account"
    ]
    assert not (tmp_path / "R").exists()


def test_the_first_records_of_a_dataset_of_the_catalogue(hub: Hub, tmp_path: Path) -> None:
    root = str(tmp_path / "R")
    status, printed = command(
        hub, "ingest", "--dataset", "textatlas", "--root", root, "--limit", "5",
        "--min-short-edge", "48", "--workers", "1",
    )  # fmt: skip
    assert status == 0, printed
    assert len(Build(root, "", [], hub.url).rows("textatlas")) == 5
