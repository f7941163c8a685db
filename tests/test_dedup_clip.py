"""An image tower of open_clip: a real one, tiny, prepared as open_clip does it."""

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dedup import clip
from dedup.clip import clip_tower
from dedup.descriptors import descriptor_of
from pipeline.errors import EvenmixError
from pipeline.recipe import Dedup
from tests import pictures
from tests.vllm_shim import sitecustomize  # noqa: F401 - lets torchvision be imported

TINY = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 64, "layers": 2, "width": 32, "head_width": 16, "patch_size": 16},
    "text_cfg": {"context_length": 8, "vocab_size": 64, "width": 16, "heads": 2, "layers": 1},
}
BATCH = [pictures.smooth(64, 96), 255 - pictures.smooth(200, 70), pictures.smooth(30, 40)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Teach open_clip an architecture, and return a model of it with random weights."""
    import open_clip  # type: ignore[import-untyped]
    import torch

    config = tmp_path_factory.mktemp("architectures") / "evenmix-tiny.json"
    config.write_text(json.dumps(TINY))
    open_clip.add_model_config(config)
    torch.manual_seed(0)
    return open_clip.create_model("evenmix-tiny").eval()


@pytest.fixture
def weights(model: Any, tmp_path: Path) -> Path:
    from safetensors.torch import save_file

    save_file(model.state_dict(), tmp_path / "tiny.safetensors")
    return tmp_path / "tiny.safetensors"


@pytest.fixture(autouse=True)
def nothing_is_loaded() -> None:
    clip._load.cache_clear()


def test_vectors_are_those_of_open_clip(model: Any, weights: Path) -> None:
    import open_clip
    import torch

    tower = clip_tower("evenmix-tiny", str(weights))
    prepare = open_clip.image_transform(64, is_train=False)
    with torch.inference_mode():
        inputs = torch.stack([prepare(Image.fromarray(picture)) for picture in BATCH])
        expected = model.encode_image(inputs, normalize=True).numpy()
    vectors = tower.embed(BATCH)
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(vectors, expected, atol=1e-6)
    assert tower.embed([]).shape == (0, 16)


def test_identity_has_architecture_weights_and_preparation(weights: Path) -> None:
    tower = clip_tower("evenmix-tiny", str(weights))
    identity = tower.identity()
    assert len(identity.pop("weights_sha256")) == 64
    assert identity == {
        "descriptor": "open_clip",
        "architecture": "evenmix-tiny",
        "dimension": 16,
        "input": {
            "size": [64, 64],
            "mode": "RGB",
            "mean": [0.48145466, 0.4578275, 0.40821073],
            "std": [0.26862954, 0.26130258, 0.27577711],
            "interpolation": "bicubic",
            "resize_mode": "shortest",
            "fill_color": 0,
        },
        "jpeg_reduced_to_px": 64,
    }
    assert json.loads(json.dumps(tower.identity())) == tower.identity()
    assert pickle.loads(pickle.dumps(tower)) == tower
    assert tower.short_edge_px == 64


def test_the_hash_is_of_the_towers_weights_and_not_of_their_file(
    model: Any, weights: Path, tmp_path: Path
) -> None:
    import torch

    torch.save(model.state_dict(), tmp_path / "tiny.pt")
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state["visual.proj"][0, 0] += 1
    torch.save(state, tmp_path / "other.pt")
    files = [weights, tmp_path / "tiny.pt", tmp_path / "other.pt"]
    a, b, c = (clip_tower("evenmix-tiny", str(file)).weights_sha256 for file in files)
    assert a == b != c


def test_a_recipe_can_ask_for_it(weights: Path) -> None:
    document = {"model": "open_clip", "open_clip_model": "evenmix-tiny", "weights": str(weights)}
    descriptor = descriptor_of(Dedup.model_validate(document))
    assert descriptor == clip_tower("evenmix-tiny", str(weights))


def test_a_worker_with_other_weights_stops(model: Any, tmp_path: Path) -> None:
    import torch

    path = tmp_path / "tiny.pt"
    torch.save(model.state_dict(), path)
    planned = clip_tower("evenmix-tiny", str(path))
    torch.save({name: tensor + 1 for name, tensor in model.state_dict().items()}, path)
    clip._load.cache_clear()
    with pytest.raises(EvenmixError, match="not the weights that this run was planned with"):
        planned.embed(BATCH)


def test_a_file_is_prepared_as_the_published_weights_of_its_architecture() -> None:
    import open_clip

    tags = open_clip.list_pretrained_tags_by_model("ViT-B-16-SigLIP")
    assert clip._common_preparation(open_clip, "ViT-B-16-SigLIP", tags) == {
        "mean": (0.5, 0.5, 0.5),
        "std": (0.5, 0.5, 0.5),
        "interpolation": "bicubic",
        "resize_mode": "squash",
    }
    tags = open_clip.list_pretrained_tags_by_model("ViT-L-14")  # MetaCLIP's and others' differ
    agreed = clip._common_preparation(open_clip, "ViT-L-14", tags)
    assert agreed == {"interpolation": "bicubic", "resize_mode": "shortest"}


@pytest.mark.usefixtures("model")
@pytest.mark.parametrize(
    ("architecture", "weights", "message"),
    [
        ("evenmix-tinny", "x.pt", r"no architecture 'evenmix-tinny'; did you mean 'evenmix-tiny'"),
        ("evenmix-tiny", None, r"evenmix-tiny of open_clip needs dedup\.weights, .* has no tags"),
        ("ViT-B-32", None, r"ViT-B-32 of open_clip needs .*; its tags are openai, laion400m_e31"),
        ("ViT-B-32", "laion2b_s34b_b79", r"neither a tag .*; did you mean 'laion2b_s34b_b79k'"),
        ("evenmix-tiny", "gone.pt", r"'gone\.pt', neither a tag of evenmix-tiny nor a file"),
        ("evenmix-tiny", __file__, r"must be a file \.safetensors, \.pt, \.pth, \.bin"),
    ],
)
def test_what_is_not_there_is_named(architecture: str, weights: str | None, message: str) -> None:
    with pytest.raises(EvenmixError, match=message):
        clip_tower(architecture, weights)


class Intruder:
    """Would write a file as soon as it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.write_text, (self.target, "was here")


def test_a_pickle_is_not_run(model: Any, tmp_path: Path) -> None:
    import torch

    path, trace = tmp_path / "tiny.pt", tmp_path / "trace"
    torch.save(model.state_dict() | {"visual.proj": Intruder(trace)}, path)
    with pytest.raises(EvenmixError, match=r"tiny\.pt is damaged, or holds more than weights"):
        clip_tower("evenmix-tiny", str(path))
    assert not trace.exists()


def test_weights_of_another_architecture_are_refused(model: Any, tmp_path: Path) -> None:
    import torch

    state = {name: t for name, t in model.state_dict().items() if name != "visual.proj"}
    torch.save(state, tmp_path / "part.pt")
    with pytest.raises(EvenmixError, match=r"(?s)part\.pt .*visual\.proj.* of this architecture"):
        clip_tower("evenmix-tiny", str(tmp_path / "part.pt"))


@pytest.mark.usefixtures("model")
def test_without_a_network_a_tag_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(EvenmixError, match=r"without a network let dedup\.weights name a file"):
        clip_tower("ViT-B-32", "laion2b_s34b_b79k")


def test_the_package_is_optional(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "open_clip", None)
    with pytest.raises(EvenmixError, match=r"needs open_clip: pip install 'evenmix\[openclip\]'"):
        clip_tower("ViT-B-32", "openai")
