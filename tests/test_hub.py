"""A source on the Hub becomes one with a whole commit in it, or one clear error."""

import io
import zipfile
from collections.abc import Iterator

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import hub as the_hub
from pipeline import readers, storage
from pipeline.errors import EvenmixError
from pipeline.recipe import Images
from tests.hub import TOKEN, Hub, Repository, point_at, serve_hub
from tests.sources import MAX_BYTES, dataset, tar_bytes

HEAD, PINNED = "ab" * 20, "cd" * 20
FILES = {"README.md": b"about"} | {f"data/a/{n}.parquet": bytes(100 * n) for n in range(1, 13)}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with serve_hub() as served:
        point_at(served, monkeypatch)
        served.repositories["someone/data"] = Repository(
            {HEAD: FILES | {"data/later.parquet": b"later"}, PINNED: FILES}
        )
        served.repositories["someone/gated"] = Repository({HEAD: FILES}, gated=True)
        yield served


@pytest.mark.parametrize(
    ("source", "revision", "commit"),
    [
        ("hf://datasets/someone/data/data/*/*.parquet", None, HEAD),
        ("hf://datasets/someone/data/data/*/*.parquet", "main", HEAD),
        ("hf://datasets/someone/data/data/*/*.parquet", PINNED, PINNED),
        ("hf://datasets/someone/data/data/*/*.parquet", PINNED[:12], PINNED),
        (f"hf://datasets/someone/data@{PINNED[:7]}/data/*/*.parquet", None, PINNED),
    ],
)
def test_a_revision_becomes_a_whole_commit(
    hub: Hub, source: str, revision: str | None, commit: str
) -> None:
    assert the_hub.resolve(source, revision) == (
        f"hf://datasets/someone/data@{commit}/data/*/*.parquet",
        commit,
    )


def test_the_files_are_those_of_the_commit(hub: Hub) -> None:
    pattern = "hf://datasets/someone/data/**/*.parquet"
    pinned, _ = the_hub.resolve(pattern, PINNED[:12])
    found = storage.glob_files(pinned)
    assert sorted(f"{file.name} {file.num_bytes}" for file in found) == sorted(
        f"{name} {len(data)}" for name, data in FILES.items() if name.endswith(".parquet")
    )
    assert storage.read_bytes(found[0].url, 5, 20) == bytes(20)
    head, _ = the_hub.resolve(pattern, None)
    assert len(storage.glob_files(head)) == len(found) + 1


def test_sources_elsewhere_stay_as_they_are() -> None:
    assert the_hub.resolve("gs://bucket/*.tar", None) == ("gs://bucket/*.tar", None)


@pytest.mark.parametrize(
    ("source", "revision", "message"),
    [
        (
            "hf://datasets/someone/data/*",
            "0123456",
            "hf://datasets/someone/data: 0 of its 2 commits begin with 0123456; correct the "
            "revision",
        ),
        (
            "hf://datasets/someone/data/*",
            "a-branch",
            "hf://datasets/someone/data has no such revision; correct it",
        ),
        (
            "hf://datasets/someone/data@main/*",
            HEAD,
            f"hf://datasets/someone/data@main/* names a revision, but revision is {HEAD}; remove "
            "one",
        ),
        (
            "hf://datasets/someone/gated/*",
            None,
            "hf://datasets/someone/gated is gated: accept its terms at "
            "https://huggingface.co/datasets/someone/gated and set HF_TOKEN to a token of that "
            "account",
        ),
        (
            "hf://someone/model/*",
            None,
            "hf://someone/model/* is no source on the Hub; write hf://datasets/OWNER/NAME/PATTERN",
        ),
    ],
)
def test_an_obstacle_is_explained(
    hub: Hub, source: str, revision: str | None, message: str
) -> None:
    with pytest.raises(EvenmixError) as caught:
        the_hub.resolve(source, revision)
    assert str(caught.value) == message


def test_what_is_read_is_asked_for_in_few_requests(hub: Hub) -> None:
    """The sizes are known from the listing, and the Hub limits the number of requests."""
    table = io.BytesIO()
    pq.write_table(pa.table({"id": ["1"], "url": ["http://x/1.jpg"]}), table)
    document = io.BytesIO()
    with zipfile.ZipFile(document, "w") as archive:
        archive.writestr("a.json", '[{"id": "1", "url": "http://x/1.jpg"}]')
    files = {
        "a.parquet": table.getvalue(),
        "a.zip": document.getvalue(),
        "a.tar": tar_bytes([(f"{n}.jpg", bytes(1 << 20)) for n in range(40)]),
    }
    hub.repositories["someone/lists"] = Repository({HEAD: files})
    most_requests = {"a.parquet": 2, "a.zip": 4, "a.tar": 3}  # 40 MiB in steps of 16
    for name, most in most_requests.items():
        source = f"hf://datasets/someone/lists@{HEAD}/{name}"
        if name == "a.tar":
            spec = dataset("webdataset", source)
        else:
            spec = dataset("url_list", source, id_rule="{id}", image_url="{url}")
        (item,) = readers.plan("d", spec, Images())
        hub.requests.clear()
        records = list(readers.read(spec, item, MAX_BYTES))
        assert [record.reason for record in records] == [None] * len(records)
        assert set(hub.requests) == {f"GET /datasets/someone/lists/resolve/{HEAD}/{name}"}
        assert len(hub.requests) <= most


def test_an_unknown_repository_is_named(hub: Hub) -> None:
    with pytest.raises(EvenmixError, match=r"^hf://datasets/someone/absent is not open to you"):
        the_hub.resolve("hf://datasets/someone/absent/*", None)


def test_a_token_opens_a_gate(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    source, commit = the_hub.resolve("hf://datasets/someone/gated/data/a/3.parquet", None)
    assert commit == HEAD
    (file,) = storage.glob_files(source)
    assert storage.read_bytes(file.url) == FILES["data/a/3.parquet"]


def test_no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    with serve_hub() as stopped:
        point_at(stopped, monkeypatch)
    monkeypatch.setattr("pipeline.stores.OUTAGE_WAITS_S", ())
    with pytest.raises(EvenmixError, match=r"^hf://datasets/someone/data is out of reach"):
        the_hub.resolve("hf://datasets/someone/data/*", None)
