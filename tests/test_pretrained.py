"""A model's files, from a folder or a hub that is played by a local server."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from pydantic import BaseModel
from safetensors.numpy import save, save_file

from pipeline.errors import EvenmixError
from tests.hub import TOKEN, Hub, Page, point_at, serve_hub
from train.pretrained import Pretrained

COMMIT = "ab" * 20
ENCODER = re.compile(r"encoder\.(?P<name>.+)")
A, B = np.arange(6, dtype=np.float32).reshape(2, 3), np.ones(4, np.float16)
FILES = {
    "model.safetensors.index.json": json.dumps(
        {
            "weight_map": {
                "encoder.a": "model-1.safetensors",
                "encoder.b": "model-2.safetensors",
                "decoder.c": "model-3.safetensors",
            }
        }
    ).encode(),
    "model-1.safetensors": save({"encoder.a": A}),
    "model-2.safetensors": save({"encoder.b": B, "decoder.b": A}),
    "model-3.safetensors": save({"decoder.c": A}),
}


class Sizes(BaseModel):
    width: int
    depth: int


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """A hub with the files at a commit, and an empty cache."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with serve_hub() as served:
        point_at(served, monkeypatch)
        for name, data in FILES.items():
            served.pages[_path(name)] = Page(data, headers={"X-Repo-Commit": COMMIT})
        yield served


def _path(name: str) -> str:
    return f"/org/model/resolve/{COMMIT}/{name}"


def test_tensors_come_from_the_files_that_the_index_names(tmp_path: Path) -> None:
    for name, data in FILES.items():
        (tmp_path / name).write_bytes(data)
    (tmp_path / "model-3.safetensors").unlink()
    with Pretrained(str(tmp_path)).tensors(ENCODER) as tensors:
        assert set(tensors.places) == {"a", "b"}
        tensors.check("a", (2, 3))
        np.testing.assert_array_equal(tensors.read("a"), A)
        np.testing.assert_array_equal(tensors.read("b"), B)


def test_of_a_model_on_the_hub_only_the_files_asked_for_are_fetched(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Pretrained("org/model", COMMIT)
    with model.tensors(ENCODER) as tensors:
        np.testing.assert_array_equal(tensors.read("a"), A)
    fetched = {name for name in FILES if f"GET {_path(name)}" in hub.requests}
    assert fetched == FILES.keys() - {"model-3.safetensors"}
    # Once fetched, the hub is not needed.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    hub.requests.clear()
    with model.tensors(ENCODER) as tensors:
        np.testing.assert_array_equal(tensors.read("b"), B)
    assert not hub.requests
    with pytest.raises(EvenmixError, match=r"^config.json of the model org/model is neither"):
        model.path("config.json")


@pytest.mark.parametrize(
    ("code", "status", "message"),
    [
        ("EntryNotFound", 404, "^org/model has no config.json; give all files of the model$"),
        ("RevisionNotFound", 404, f"^the model org/model has no revision {COMMIT}; correct it$"),
        ("GatedRepo", 403, "accept its terms at https://huggingface.co/org/model and set HF_TOKEN"),
        ("RepoNotFound", 401, "^config.json of the model org/model is neither in the Hugging Face"),
    ],
)
def test_what_the_hub_refuses_is_explained(hub: Hub, code: str, status: int, message: str) -> None:
    hub.pages[_path("config.json")] = Page(b"{}", status, {"X-Error-Code": code})
    with pytest.raises(EvenmixError, match=message) as caught:
        Pretrained("org/model", COMMIT).path("config.json")
    assert TOKEN not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "revision", "message"),
    [
        ("/no/such/folder", None, "the folder /no/such/folder does not exist"),
        ("org/model", None, "set revision to a commit of it, all 40 digits"),
        ("org/model", "main", "set revision to a commit of it"),
        (".", COMMIT, r"\. is a folder: remove the revision"),
    ],
)
def test_a_model_is_a_folder_or_a_commit(name: str, revision: str | None, message: str) -> None:
    with pytest.raises(EvenmixError, match=message):
        Pretrained(name, revision)


def test_a_missing_file_and_a_missing_tensor_are_named(tmp_path: Path) -> None:
    model = Pretrained(str(tmp_path))
    with (
        pytest.raises(EvenmixError, match=f"^{tmp_path} has no model.safetensors; give all files"),
        model.tensors(ENCODER),
    ):
        pass
    save_file({"encoder.a": A.astype(np.int8)}, tmp_path / "model.safetensors")
    with model.tensors(ENCODER) as tensors:
        with pytest.raises(EvenmixError, match="has no tensor b; give all files"):
            tensors.check("b", (4,))
        with pytest.raises(EvenmixError, match=r"encoder.a is I8 \(2, 3\), not floats of \(2, 3\)"):
            tensors.check("a", (2, 3))


@pytest.mark.parametrize(
    "damage", [lambda data: data[:-1], lambda data: b"", lambda data: b"\xff" * 99]
)
def test_a_damaged_file_is_named(tmp_path: Path, damage: object) -> None:
    assert callable(damage)
    (tmp_path / "model.safetensors").write_bytes(damage(FILES["model-1.safetensors"]))
    with (
        pytest.raises(EvenmixError, match=r"model\.safetensors is damaged or no safetensors file"),
        Pretrained(str(tmp_path)).tensors(ENCODER),
    ):
        pass


@pytest.mark.parametrize("file", ["../model-1.safetensors", "/model-1.safetensors", "weights.bin"])
def test_an_index_names_only_files_beside_it(tmp_path: Path, file: str) -> None:
    index = {"weight_map": {"encoder.a": file}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with (
        pytest.raises(EvenmixError, match=f"names '{re.escape(file)}', which is no file of it"),
        Pretrained(str(tmp_path)).tensors(ENCODER),
    ):
        pass


def test_all_mistakes_of_a_json_file_are_told(tmp_path: Path) -> None:
    model = Pretrained(str(tmp_path))
    (tmp_path / "config.json").write_text('{"width": 3, "depth": 4, "more": 5}')
    assert model.parse("config.json", Sizes) == Sizes(width=3, depth=4)
    (tmp_path / "config.json").write_text('{"width": "wide"}')
    with pytest.raises(EvenmixError, match=r"model: width: .*valid integer.*; depth: Field"):
        model.parse("config.json", Sizes)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(EvenmixError, match="the file: Invalid JSON"):
        model.parse("config.json", Sizes)
