"""A model in a bucket is copied once to a machine, whole or not at all."""

import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFile

from captioning.engine.copies import on_this_machine
from pipeline import storage
from pipeline.errors import EvenmixError

FILES = {
    "config.json": b"{}",
    "a.safetensors": bytes(range(256)) * 4096,
    "parts/b.safetensors": b"b" * 1000,
}


@pytest.fixture(autouse=True)
def own_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


@pytest.fixture
def model(gcs_bucket: str) -> str:
    for name, data in FILES.items():
        storage.publish(f"{gcs_bucket}/model/{name}", data)
    return f"{gcs_bucket}/model"


def files_of(folder: str) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in Path(folder).rglob("*")
        if path.is_file()
    }


def test_processes_share_one_copy(model: str) -> None:
    with ThreadPoolExecutor(4) as pool:
        (folder,) = set(pool.map(on_this_machine, [model] * 4))
    assert files_of(folder) == FILES
    # What is there is not fetched again.
    (Path(folder) / "config.json").write_bytes(b"seen")
    assert on_this_machine(model) == folder
    assert files_of(folder)["config.json"] == b"seen"
    storage.replace(f"{model}/config.json", b'{"other": 1}')
    other = on_this_machine(model)
    assert other != folder
    assert files_of(other) == FILES | {"config.json": b'{"other": 1}'}


def test_a_copy_that_was_cut_off_begins_anew(model: str) -> None:
    folder = Path(on_this_machine(model))
    partial = folder.with_suffix(".partial")
    folder.rename(partial)
    (partial / "a.safetensors").write_bytes(b"cut")
    assert on_this_machine(model) == str(folder)
    assert files_of(str(folder)) == FILES


def test_a_name_that_leads_elsewhere_is_refused() -> None:
    store = fsspec.filesystem("memory")
    store.store["/model/config.json"] = MemoryFile(store, "/model/config.json", b"{}")
    store.store["/model/../outside"] = MemoryFile(store, "/model/../outside", b"x")
    with pytest.raises(EvenmixError, match="leads out of its folder"):
        on_this_machine("memory://model")


def test_what_cannot_be_written_says_what_helps(model: str) -> None:
    folder = Path(on_this_machine(model))
    folder.rename(folder.with_suffix(".moved"))
    folder.with_suffix(".partial").write_text("in the way")
    with pytest.raises(EvenmixError, match=r"cannot be copied to .*resources\.caption\.disk_gb"):
        on_this_machine(model)


def test_other_models_stay_where_they_are(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert on_this_machine(str(tmp_path)) == str(tmp_path)
    assert on_this_machine("Qwen/Qwen3-VL-4B-Instruct") == "Qwen/Qwen3-VL-4B-Instruct"
