"""Engine `vllm`: captions from a vision-language model, shown each picture as i1 shows it."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from captioning import prompts
from captioning.tables import caption_output
from captioning.vllm_engine import Caption, CaptionRequest, EngineConfig, Sampling, VllmEngine
from pipeline import images, originals, storage
from pipeline.originals import read_original
from pipeline.recipe import VllmCaptions
from pipeline.records import IMAGES, uniform_hash
from pipeline.stage import Output, WorkItem
from pipeline.summary import dataset_url, read_shard

CAPTIONER_SHORT_EDGE_PX = 512
"""The captioner sees the shorter edge brought down to this, never up, and cropped square (i1)."""


@dataclass(frozen=True)
class VllmCaptioning:
    """The stage that makes a caption set with a model behind vLLM."""

    root: str
    captions: str
    settings: VllmCaptions
    seed: int
    name: str = "caption"
    version: int = 1
    items_at_once: int = 1

    @property
    def folder(self) -> str:
        """The folder below R."""
        return f"captions/{self.captions}"

    @property
    def resource_hints(self) -> Mapping[str, str]:
        """The accelerator that the recipe wants for the model."""
        accelerator = self.settings.accelerator
        return {"accelerator": accelerator} if accelerator else {}

    def config(self, dataset: str) -> Mapping[str, Any]:
        """Return what decides the captions: model, prompt, sampling, and how pictures are shown."""
        settings = self.settings
        return {
            "engine": "vllm",
            "model": settings.model,
            "arguments": dict(settings.arguments),
            "prompt_sha256": prompts.BY_KIND[settings.prompt].sha256,
            "max_tokens": settings.max_tokens,
            "temperature": settings.temperature,
            "captions_per_image": settings.captions_per_image,
            "short_edge_px": CAPTIONER_SHORT_EDGE_PX,
            "seed": self.seed,
        }

    def process(self, item: WorkItem) -> Output:
        """Caption the pictures of one image shard."""
        table = read_shard(self.root, IMAGES, item.dataset, item.shard, originals.COLUMNS)
        index = table.to_pylist()
        settings = self.settings
        engine = _engine(
            settings.model,
            json.dumps(settings.arguments, sort_keys=True),
            Sampling(settings.max_tokens, settings.temperature),
        )
        found: dict[str, list[dict[str, Any]]] = {picture["key"]: [] for picture in index}
        for caption in engine.caption(self._requests(item, index)):
            found[caption.key].append(self._row(caption))
        return caption_output(
            [{"key": key, "captions": captions} for key, captions in found.items()]
        )

    def _requests(
        self, item: WorkItem, index: Sequence[Mapping[str, Any]]
    ) -> Iterator[CaptionRequest]:
        """Prepare the pictures of a shard, one ahead of another, as the engine takes them."""
        url = storage.join(dataset_url(self.root, IMAGES, item.dataset), f"{item.shard}.tar")
        prompt = prompts.BY_KIND[self.settings.prompt].text
        for picture in index:
            pixels = read_original(url, picture)
            short_edge_px = min(CAPTIONER_SHORT_EDGE_PX, *pixels.shape[:2])
            square, _ = images.resize_and_crop_square(pixels, short_edge_px, "bicubic")
            for number in range(self.settings.captions_per_image):
                seed = uniform_hash(self.seed, picture["key"], f"caption-{number}") >> 33
                yield CaptionRequest(picture["key"], square, prompt, seed)

    def _row(self, caption: Caption) -> dict[str, Any]:
        prompt = prompts.BY_KIND[self.settings.prompt]
        return {
            "text": caption.text or None,
            "outcome": caption.outcome,
            "model": self.settings.model,
            "prompt_kind": prompt.kind,
            "prompt_sha256": prompt.sha256,
            "seed": caption.seed,
            "prompt_tokens": caption.prompt_tokens,
            "completion_tokens": caption.completion_tokens,
            "detail": caption.detail or None,
        }


@lru_cache(maxsize=1)
def _engine(model: str, arguments: str, sampling: Sampling) -> VllmEngine:
    """Return this process's connection to the machine's server, which lasts as long as it.

    ``arguments`` are JSON, so that they can be a key.
    """
    engine = VllmEngine(EngineConfig(model, json.loads(arguments), sampling))
    engine.start()
    return engine
