"""Image towers of open_clip: descriptors of what a picture means, for semantic duplicates.

Pictures are prepared as open_clip does it, and the tower runs in float32, on a GPU where there is
one. Weights are safetensors, or checkpoints that PyTorch reads without running what is in them.
"""

import hashlib
import json
import pickle
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import PurePosixPath
from typing import Any

import numpy as np
from PIL import Image

from dedup.records import Vectors
from dedup.unit_vectors import unit_vectors
from pipeline import storage
from pipeline.errors import EvenmixError, did_you_mean
from pipeline.images import Pixels

_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin")
_PREPARATION = ("mean", "std", "interpolation", "resize_mode")
"""What open_clip records of a published model's preparation of pictures."""


@dataclass(frozen=True)
class ClipTower:
    """The image tower of an architecture with certain weights; see :func:`clip_tower`.

    ``preparation`` is open_clip's description of how a picture becomes the tower's input.
    """

    architecture: str
    weights: str | None
    weights_sha256: str
    dimension: int
    short_edge_px: int
    preparation: Mapping[str, Any]
    name: str = "open_clip"

    def identity(self) -> dict[str, Any]:
        """Return the hash of the tower's weights, its architecture, how files become its input."""
        return {
            "descriptor": self.name,
            "architecture": self.architecture,
            "weights_sha256": self.weights_sha256,
            "dimension": self.dimension,
            "input": dict(self.preparation),
            "jpeg_reduced_to_px": self.short_edge_px,
        }

    def runs_on_gpu(self) -> bool:
        """Tell whether this machine has a GPU that the tower runs on."""
        _, torch = _libraries()
        return bool(torch.cuda.is_available())

    def embed(self, pictures: Iterable[Pixels]) -> Vectors:
        """Describe pictures, all in one batch.

        Raises:
            EvenmixError: the weights here are not those that the run was planned with, or they
                give vectors without a direction.
        """
        tower = _load(self.architecture, self.weights)
        if tower.sha256 != self.weights_sha256:
            raise EvenmixError(
                f"{tower.source} has not the weights that this run was planned with (sha256 "
                f"{tower.sha256[:12]}..., planned {self.weights_sha256[:12]}...); use the same "
                "weights on every machine"
            )
        batch = [tower.prepare(Image.fromarray(picture)) for picture in pictures]
        return tower.embed(batch) if batch else np.zeros((0, self.dimension), np.float32)


def clip_tower(architecture: str, weights: str | None) -> ClipTower:
    """Load an image tower and try it, so that what is missing or unfit is known before any work.

    ``weights`` is a tag of published weights, or a path or URL of a file.

    Raises:
        EvenmixError: open_clip has no such architecture, there are no such weights, or they do not
            fit; or open_clip is not installed.
    """
    tower = _load(architecture, weights)
    grey = Image.new("RGB", (tower.short_edge_px, tower.short_edge_px), "grey")
    dimension = tower.embed([tower.prepare(grey)]).shape[1]
    return ClipTower(
        architecture, weights, tower.sha256, dimension, tower.short_edge_px, tower.preparation
    )


@dataclass(frozen=True)
class _Tower:
    """A tower that is loaded.

    ``prepare`` maps a picture to a tensor, ``forward`` a list of these to a batch of vectors.
    """

    source: str
    sha256: str
    short_edge_px: int
    preparation: Mapping[str, Any]
    prepare: Callable[[Image.Image], Any]
    forward: Callable[[Sequence[Any]], Any]

    def embed(self, batch: Sequence[Any]) -> Vectors:
        """Return the unit vectors of pictures that are prepared."""
        return unit_vectors(self.forward(batch), len(batch), self.source)


@lru_cache(maxsize=1)
def _load(architecture: str, weights: str | None) -> _Tower:
    """Read weights once a process."""
    open_clip, torch = _libraries()
    torch.set_num_threads(1)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    # The other tower, which reads texts, goes at once.
    tower = _create(open_clip, architecture, weights).visual.eval().to(device)
    config = open_clip.transform.PreprocessCfg(**tower.preprocess_cfg)

    def forward(batch: Sequence[Any]) -> Any:
        with torch.inference_mode():
            output = tower(torch.stack(batch).to(device))
        # Some towers give the vectors of their patches as well.
        return (output[0] if isinstance(output, tuple) else output).cpu().numpy()

    return _Tower(
        source=f"{architecture} of open_clip with {weights}",
        sha256=_sha256_of(tower),
        short_edge_px=max(config.input_size[1:]),
        preparation=json.loads(json.dumps(tower.preprocess_cfg)),
        prepare=open_clip.transform.image_transform_v2(config, is_train=False),
        forward=forward,
    )


def _libraries() -> tuple[Any, Any]:
    """Import open_clip and torch, which are large, and which only this kind of descriptor needs."""
    try:
        import open_clip  # type: ignore[import-untyped]  # noqa: PLC0415
        import torch  # noqa: PLC0415
    except ModuleNotFoundError as error:
        raise EvenmixError(
            f"dedup.model = 'open_clip' needs {error.name}: pip install 'evenmix[openclip]'"
        ) from error
    except RuntimeError as error:
        raise EvenmixError(
            f"open_clip does not load ({error}); torch and torchvision must be builds of one kind, "
            "both with CUDA or both without"
        ) from error
    return open_clip, torch


def _create(open_clip: Any, architecture: str, weights: str | None) -> Any:
    """Return the whole model, with its weights."""
    known = open_clip.list_models()
    if architecture not in known:
        hint = did_you_mean(architecture, known, "open_clip.list_models() lists them")
        raise EvenmixError(f"open_clip has no architecture {architecture!r}{hint}")
    tags = open_clip.list_pretrained_tags_by_model(architecture)
    choices = f"its tags are {', '.join(tags)}" if tags else "it has no tags"
    if weights is None:
        raise EvenmixError(
            f"{architecture} of open_clip needs dedup.weights, a tag or a file; {choices}"
        )
    if weights in tags:
        return _create_with(open_clip, architecture, weights, weights, {})
    if not storage.exists(weights):
        hint = did_you_mean(weights, tags, choices)
        raise EvenmixError(
            f"dedup.weights is {weights!r}, neither a tag of {architecture} nor a file{hint}"
        )
    suffix = PurePosixPath(weights).suffix
    if suffix not in _SUFFIXES:
        raise EvenmixError(f"{weights}: dedup.weights must be a file {', '.join(_SUFFIXES)}")
    with tempfile.NamedTemporaryFile(suffix=suffix) as file:
        file.write(storage.read_bytes(weights))
        file.flush()
        preparation = _common_preparation(open_clip, architecture, tags)
        return _create_with(open_clip, architecture, weights, file.name, preparation)


def _create_with(
    open_clip: Any, architecture: str, weights: str, pretrained: str, preparation: dict[str, Any]
) -> Any:
    try:
        return open_clip.create_model(
            architecture,
            pretrained,
            force_preprocess_cfg=preparation,
            require_pretrained=True,
            weights_only=True,
        )
    except pickle.UnpicklingError as error:
        # PyTorch's text says how to run what is in the file.
        raise EvenmixError(
            f"{weights} is damaged, or holds more than weights; only weights are read"
        ) from error
    except Exception as error:  # torch's types, safetensors' and the Hub's have nothing narrower
        raise EvenmixError(
            f"{architecture} of open_clip cannot be made with the weights {weights} ({error}). "
            "Tags are downloaded, so without a network let dedup.weights name a file; a file must "
            "be whole and of this architecture"
        ) from error


def _common_preparation(open_clip: Any, architecture: str, tags: Sequence[str]) -> dict[str, Any]:
    """Return how an architecture's published weights want pictures, where they agree.

    A file does not say it.
    """
    wants = [open_clip.get_pretrained_cfg(architecture, tag) for tag in tags]
    return {
        key: wants[0][key]
        for key in _PREPARATION
        if wants and key in wants[0] and all(want.get(key) == wants[0][key] for want in wants)
    }


def _sha256_of(tower: Any) -> str:
    """Return the SHA-256 (hex) of a tower's weights: equal for copies in other files."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tower.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(np.ascontiguousarray(tensor.cpu().numpy()).data)
    return digest.hexdigest()
