"""A model's name becomes an identity, or one clear error, without an engine."""

import hashlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from captioning.engine.models import ModelIdentity, locate, resolve
from pipeline import storage
from pipeline.errors import EvenmixError
from tests.hub import Hub, Page, point_at, serve_hub

COMMIT, OLDER = "ab" * 20, "cd" * 20


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    folder = tmp_path / "checkpoint"
    (folder / "text").mkdir(parents=True)
    (folder / "config.json").write_bytes(b"{}")
    (folder / "text" / "a.safetensors").write_bytes(b"weights")
    return folder


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """A hub with a model of two commits, and an empty cache."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with serve_hub() as served:
        point_at(served, monkeypatch)
        for revision, commit in {"main": COMMIT, COMMIT: COMMIT, "v1": OLDER}.items():
            served.pages[f"/org/model/resolve/{revision}/config.json"] = Page(
                b"{}", headers={"X-Repo-Commit": commit}
            )
        yield served


def _refuse(hub: Hub, revision: str, status: int, code: str) -> None:
    path = f"/org/model/resolve/{revision}/config.json"
    hub.pages[path] = Page(b"{}", status, {"X-Error-Code": code})


def test_a_folder_is_known_by_its_files(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = "config.json\0{}\ntext/a.safetensors\0{}\n".format(
        hashlib.sha256(b"{}").hexdigest(), hashlib.sha256(b"weights").hexdigest()
    )
    revision = f"sha256:{hashlib.sha256(rows.encode()).hexdigest()}"
    identity = resolve(str(checkpoint), None, None)
    assert identity == ModelIdentity(checkpoint.name, revision, str(checkpoint))
    assert identity.hub_commit is None
    # A relative path means the same, and notes of huggingface_hub change nothing.
    (checkpoint / ".cache").mkdir()
    (checkpoint / ".cache" / "times").write_text("now")
    monkeypatch.chdir(checkpoint.parent)
    assert resolve("./checkpoint", None, None) == identity


@pytest.mark.parametrize(
    "change",
    [
        lambda folder: (folder / "text" / "a.safetensors").write_bytes(b"WEIGHTS"),
        lambda folder: (folder / "text").rename(folder / "texts"),
        lambda folder: (folder / "b.safetensors").write_bytes(b""),
    ],
)
def test_another_file_is_another_model(checkpoint: Path, change: object) -> None:
    before = resolve(str(checkpoint), None, None)
    assert callable(change)
    change(checkpoint)
    after = resolve(str(checkpoint), None, None)
    assert (after.name, after.revision == before.revision) == (before.name, False)


@pytest.mark.parametrize(
    ("revision", "commit"), [(None, COMMIT), ("main", COMMIT), (COMMIT, COMMIT), ("v1", OLDER)]
)
def test_a_name_on_the_hub_becomes_a_commit(hub: Hub, revision: str | None, commit: str) -> None:
    identity = resolve("org/model", revision, None)
    assert identity == ModelIdentity("org/model", commit, "org/model")
    assert identity.hub_commit == commit


def test_a_cached_model_is_known_without_the_hub(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    resolve("org/model", None, None)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    hub.requests.clear()
    assert resolve("org/model", None, None).revision == COMMIT
    assert resolve("org/model", COMMIT, None).revision == COMMIT
    with pytest.raises(EvenmixError, match="neither in the Hugging Face cache"):
        resolve("org/model", OLDER, None)
    assert not hub.requests


@pytest.mark.parametrize(
    ("code", "status", "message"),
    [
        ("RevisionNotFound", 404, "^the model org/model has no revision v2; correct it$"),
        ("GatedRepo", 403, "accept its terms at https://huggingface.co/org/model and set HF_TOKEN"),
        ("RepoNotFound", 401, "^config.json of the model org/model is neither in the Hugging Face"),
        ("EntryNotFound", 404, "^the model org/model has no config.json"),
    ],
)
def test_what_the_hub_refuses_is_explained(hub: Hub, code: str, status: int, message: str) -> None:
    _refuse(hub, "v2", status, code)
    with pytest.raises(EvenmixError, match=message):
        resolve("org/model", "v2", None)


def test_a_url_is_known_by_its_listing(gcs_bucket: str) -> None:
    url = f"{gcs_bucket}/model"
    storage.publish(f"{url}/config.json", b"{}")
    storage.publish(f"{url}/a.safetensors", b"weights")
    before = resolve(url, None, None)
    assert before == resolve(url, None, None)
    assert before.name == url
    assert before.revision is not None
    assert before.revision.startswith("listing-sha256:")
    assert before.hub_commit is None
    storage.replace(f"{url}/a.safetensors", b"WEIGHTS")
    assert resolve(url, None, None).revision != before.revision


def test_an_endpoint_says_nothing_of_its_model() -> None:
    identity = resolve("anything", None, "http://host:8000/v1")
    assert identity == ModelIdentity("anything", None, "anything")


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("/no/such/folder", "the model /no/such/folder does not exist; give a folder"),
        ("no-such-folder", "the model no-such-folder does not exist"),
        ("~/no-such-folder", "the model ~/no-such-folder does not exist"),
        (".", r"the model folder \. has no config\.json; name a checkpoint"),
    ],
)
def test_a_missing_model_is_an_error(
    model: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for ask in (locate, lambda model: resolve(model, None, None)):
        with pytest.raises(EvenmixError, match=message):
            ask(model)


def test_only_the_hub_has_revisions(checkpoint: Path) -> None:
    with pytest.raises(EvenmixError, match="has no revision main, since it is not on the Hub"):
        resolve(str(checkpoint), "main", None)


def test_a_url_without_a_model_is_an_error(gcs_bucket: str) -> None:
    with pytest.raises(EvenmixError, match=r"/empty has no config\.json"):
        resolve(f"{gcs_bucket}/empty", None, None)
