"""Engine `vllm`: captions from a vision-language model, which is shown each picture as i1 shows it.

A shard's pictures are prepared as the engine has room for them, and its answers are kept in slices
as they come (:mod:`captioning.slices`), in any order. No picture waits for another.
"""

import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from time import monotonic
from typing import Any

import numpy as np

from captioning import ask, checks
from captioning.ask import NOT_ASKED, Ask
from captioning.engine.client import Engine
from captioning.engine.models import ModelIdentity
from captioning.engine.questions import Answer, EngineConfig, Request, Sampling
from captioning.outcomes import CaptionOutcome
from captioning.prompts import PromptRule, rule_for
from captioning.slices import SLICE_CAPTIONS, Captions, keep_slice, read_slices
from captioning.tables import caption_output
from captioning.wanted import Wanted
from pipeline import images, originals, storage
from pipeline.dataset import Dataset
from pipeline.errors import EvenmixError
from pipeline.images import Pixels
from pipeline.originals import DamagedPictureError, read_original
from pipeline.receipts import fingerprint
from pipeline.recipe import VllmCaptions
from pipeline.records import IMAGES, captions_folder
from pipeline.stage import Output, WorkItem, item_identity
from pipeline.summary import dataset_url, read_shard

MAX_ASPECT = 4
"""A picture that is shown whole has a longer edge of at most so many times ``short_edge_px``."""

MAX_FAILURES_IN_A_ROW = 32
"""So many failures of the engine in a row are not the pictures'."""

ARGUMENTS_OF_SPEED = frozenset(
    {
        "cpu_offload_gb", "data_parallel_size", "distributed_executor_backend",
        "enable_chunked_prefill", "enable_expert_parallel", "enable_prefix_caching",
        "enforce_eager", "gpu_memory_utilization", "kv_cache_memory_bytes", "limit_mm_per_prompt",
        "max_model_len", "max_num_batched_tokens", "max_num_seqs", "mm_processor_cache_gb",
        "pipeline_parallel_size", "skip_mm_profiling", "swap_space", "tensor_parallel_size",
    }
)  # fmt: skip
"""vLLM's arguments that decide how fast answers come, or whether at all, but not what they say.

They may differ between the runs of a caption set, which the others may not."""

_INDEX_COLUMNS = [*originals.COLUMNS, "text", "fields"]


@dataclass(frozen=True)
class VllmCaptioning:
    """The stage that makes a caption set with a model behind vLLM.

    ``wanted`` are the pictures that are asked for (None: all); ``processes`` are the workers of a
    machine (None: one a core).
    """

    root: str
    captions: str
    settings: VllmCaptions
    model: ModelIdentity
    datasets: Mapping[str, Dataset]
    seed: int
    wanted: Wanted | None = None
    processes: int | None = None
    name: str = "caption"
    version: int = 2
    items_at_once: int = 2

    @property
    def folder(self) -> str:
        """The folder below R."""
        return captions_folder(self.captions)

    @property
    def resource_hints(self) -> Mapping[str, str]:
        """The accelerator that the recipe wants for the model."""
        accelerator = self.settings.accelerator
        return {"accelerator": accelerator} if accelerator else {}

    @property
    def engine_config(self) -> EngineConfig:
        """What the engine is told: the model, its arguments, and how tokens are drawn."""
        settings = self.settings
        return EngineConfig(
            model=self.model.location,
            revision=self.model.hub_commit,
            arguments=settings.arguments,
            sampling=Sampling(
                settings.max_tokens, settings.temperature, settings.top_p, settings.top_k
            ),
            chat_template=settings.chat_template,
            endpoint=settings.endpoint,
            max_in_flight=-(-settings.in_flight // (self.processes or os.cpu_count() or 1)),
            request_timeout_s=settings.timeout_s,
        )

    def config(self, dataset: str) -> Mapping[str, Any]:
        """Return what decides the captions of a dataset."""
        settings = self.settings
        config: dict[str, Any] = {
            "engine": "vllm",
            "model": self.model.name,
            "revision": self.model.revision,
            "arguments": {
                name: value
                for name, value in settings.arguments.items()
                if name not in ARGUMENTS_OF_SPEED
            },
            "prompt": self._rule(dataset).identity,
            "max_tokens": settings.max_tokens,
            "temperature": settings.temperature,
            "top_p": settings.top_p,
            "top_k": settings.top_k,
            "captions_per_image": settings.captions_per_image,
            "short_edge_px": settings.short_edge_px,
            "crop": settings.crop,
            "scripts": sorted(settings.scripts),
            "seed": self.seed,
        }
        if settings.chat_template:
            config["chat_template"] = dict(settings.chat_template)
        if settings.parent is not None:
            config |= {"parent": settings.parent, "redo": sorted(settings.redo)}
        if self.wanted is not None:
            config["wanted"] = self.wanted.config(dataset)
        return config

    def _rule(self, dataset: str) -> PromptRule:
        return rule_of(self.captions, self.settings, dataset, self.datasets[dataset])

    def process(self, item: WorkItem) -> Output:
        """Caption the pictures of one image shard."""
        folder = dataset_url(self.root, self.folder, item.dataset)
        identity = fingerprint(item_identity(self, item))
        index = read_shard(self.root, IMAGES, item.dataset, item.shard, _INDEX_COLUMNS).to_pylist()
        captions, asks = self._divide(item, index)
        captions |= read_slices(folder, item.shard, identity)
        remaining = {
            (key, each.number): each
            for key, each_picture in asks.items()
            for each in each_picture
            if (key, each.number) not in captions
        }
        fresh: Captions = {}
        failures = 0
        for place, caption in self._answers(item, index, remaining):
            captions[place] = caption
            has_failed = caption["outcome"] == CaptionOutcome.ENGINE_FAILED
            failures = failures + 1 if has_failed else 0
            if failures == MAX_FAILURES_IN_A_ROW:
                raise EvenmixError(
                    f"{item.dataset}/{item.shard}: the engine has failed at {failures} captions in "
                    f"a row, the last with: {caption['detail']}. Nothing that was published is "
                    "lost; correct the engine and start the same command again."
                )
            if not has_failed:
                fresh[place] = caption
            if len(fresh) == SLICE_CAPTIONS:
                keep_slice(folder, item.shard, identity, fresh)
                fresh.clear()
        by_key: dict[str, list[Mapping[str, Any]]] = {row["key"]: [] for row in index}
        for (key, _), caption in sorted(captions.items(), key=lambda entry: entry[0]):
            by_key[key].append(caption)
        return caption_output([{"key": key, "captions": found} for key, found in by_key.items()])

    def _divide(
        self, item: WorkItem, index: Sequence[Mapping[str, Any]]
    ) -> tuple[Captions, dict[str, list[Ask]]]:
        """Return the captions that are settled without the model, and what is asked for, by key."""
        wanted = None if self.wanted is None else self.wanted.keys(item.dataset, item.shard)
        parent = self._parent(item, index)
        rule = self._rule(item.dataset)
        redo = {*self.settings.redo, *([] if wanted is None else [CaptionOutcome.NOT_ASKED])}
        settled: Captions = {}
        asked: dict[str, list[Ask]] = {}
        for row, picture in enumerate(index):
            key = picture["key"]
            if wanted is not None and key not in wanted:
                found: Sequence[Mapping[str, Any]] = parent[row] if parent else [NOT_ASKED]
                settled |= {(key, number): dict(each) for number, each in enumerate(found)}
                continue
            asked[key] = ask.captions_of(picture, rule, self.settings.captions_per_image, self.seed)
            if parent:
                taken, asked[key] = ask.after_parent(asked[key], key, parent[row], redo)
                settled |= {(key, number): dict(each) for number, each in taken.items()}
        return settled, asked

    def _parent(
        self, item: WorkItem, index: Sequence[Mapping[str, Any]]
    ) -> list[list[dict[str, Any]]]:
        """Return the captions of the parent set by row; empty if it does not have the shard."""
        parent = self.settings.parent
        if parent is None or "parent" not in item.inputs:
            return []
        folder = captions_folder(parent)
        rows = read_shard(self.root, folder, item.dataset, item.shard).to_pylist()
        if [row["key"] for row in rows] != [picture["key"] for picture in index]:
            raise EvenmixError(
                f"{item.dataset}/{item.shard}: its index and {folder} speak of different pictures; "
                "`evenmix verify` tells which file is damaged"
            )
        return [row["captions"] for row in rows]

    def _answers(
        self,
        item: WorkItem,
        index: Sequence[Mapping[str, Any]],
        asks: Mapping[tuple[str, int], Ask],
    ) -> Iterator[tuple[tuple[str, int], dict[str, Any]]]:
        """Ask the model; yield captions by key and number as they come."""
        if not asks:
            return
        damaged: Captions = {}
        places = {_request_id(place): place for place in asks}
        engine = _engine(self.engine_config, self.settings.short_edge_px, self._longest_prompt())
        for answer in engine.answers(self._requests(item, index, asks, damaged)):
            place = places[answer.id]
            yield place, self._row(asks[place], answer)
        yield from damaged.items()

    def _requests(
        self,
        item: WorkItem,
        index: Sequence[Mapping[str, Any]],
        asks: Mapping[tuple[str, int], Ask],
        damaged: Captions,
    ) -> Iterator[Request]:
        """Prepare pictures, one ahead of another; those that cannot be read go to ``damaged``."""
        url = storage.join(dataset_url(self.root, IMAGES, item.dataset), f"{item.shard}.tar")
        for picture in index:
            key = picture["key"]
            places = [(key, n) for n in range(self.settings.captions_per_image) if (key, n) in asks]
            if not places:
                continue
            try:
                pixels = self._prepare(read_original(url, picture))
            except DamagedPictureError as error:
                for place in places:
                    damaged[place] = self._row(asks[place], None, str(error))
                continue
            for place in places:
                each = asks[place]
                yield Request(_request_id(place), each.prompt.text, each.seed, pixels)

    def _longest_prompt(self) -> str:
        """Return a prompt as long as those of any dataset may be."""
        return max((self._rule(name).longest for name in self.datasets), key=len)

    def _prepare(self, pixels: Pixels) -> Pixels:
        """Bring the shorter edge down to ``short_edge_px``, never up; crop if that is wanted."""
        shorter, longer = sorted(pixels.shape[:2])
        short_edge_px = min(self.settings.short_edge_px, shorter)
        if self.settings.crop == "none":
            fitting_px = MAX_ASPECT * self.settings.short_edge_px * shorter // longer
            short_edge_px = max(1, min(short_edge_px, fitting_px))
            return images.resize_short_edge(pixels, short_edge_px, "bicubic")
        return images.resize_and_crop_square(pixels, short_edge_px, "bicubic")[0]

    def _row(self, each: Ask, answer: Answer | None, damage: str = "") -> dict[str, Any]:
        """Return a caption as its table has it; without an answer the picture was ``damage``-d."""
        row = {
            "outcome": CaptionOutcome.PICTURE_FAILED,
            "model": self.model.name,
            "prompt_kind": each.prompt.kind,
            "prompt": each.prompt.text,
            "prompt_sha256": each.prompt.sha256,
            "seed": each.seed,
            "detail": damage or None,
        }
        if answer is not None:
            row |= {
                "text": answer.text or None,
                "outcome": checks.judge(
                    answer.ending, answer.text, each.prompt.text, self.settings.scripts
                ),
                "prompt_tokens": answer.prompt_tokens,
                "completion_tokens": answer.completion_tokens,
                "asked": answer.asked,
                "answer_s": answer.answer_s,
                "detail": answer.detail or None,
            }
        return row

    def sample_requests(self, items: Sequence[WorkItem], count: int) -> list[Request]:
        """Return what the model is asked about the first ``count`` captions of some shards."""

        def requests() -> Iterator[Request]:
            for item in items:
                index = read_shard(
                    self.root, IMAGES, item.dataset, item.shard, _INDEX_COLUMNS
                ).to_pylist()
                _, asks = self._divide(item, index)
                places = {(key, each.number): each for key in asks for each in asks[key]}
                yield from self._requests(item, index, places, {})

        return list(islice(requests(), count))


def _request_id(place: tuple[str, int]) -> str:
    key, number = place
    return f"{key}/{number}"


def rule_of(captions: str, settings: VllmCaptions, name: str, dataset: Dataset) -> PromptRule:
    """Return how a caption set makes its prompts for the pictures of a dataset.

    Raises:
        EvenmixError: the prompt asks for what the dataset does not have.
    """
    try:
        return rule_for(dataset, settings.prompts.get(name))
    except EvenmixError as error:
        raise EvenmixError(f"captions.{captions}, dataset {name}: {error}") from error


_STARTING = threading.Lock()
_ENGINES: dict[str, Engine] = {}
"""The engine of this process, by its configuration; one at most."""
_FAILED: dict[str, tuple[float, EvenmixError]] = {}
"""When an engine last failed to start (on the monotonic clock), and why."""


def _engine(config: EngineConfig, short_edge_px: int, longest_prompt: str) -> Engine:
    """Return this process's engine, which lasts as long as it and serves all its threads.

    Raises:
        EvenmixError: it does not start, or a picture and its caption do not fit into its context.
    """
    name, asked_s = repr((config, short_edge_px, longest_prompt)), monotonic()
    with _STARTING:
        if name in _FAILED and _FAILED[name][0] > asked_s:
            raise _FAILED[name][1]  # while this thread waited; it would wait as long again
        if name not in _ENGINES:
            while _ENGINES:
                _ENGINES.popitem()[1].close()
            engine = Engine(config)
            try:
                engine.start()
                square = np.zeros((short_edge_px, short_edge_px, 3), np.uint8)
                engine.check_fits(Request("largest", longest_prompt, 0, square))
            except EvenmixError as error:
                engine.close()
                _FAILED[name] = (monotonic(), error)
                raise
            except BaseException:
                engine.close()
                raise
            _ENGINES[name] = engine
        return _ENGINES[name]
