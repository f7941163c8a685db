"""Engine `source`: captions from the datasets' own texts, as they are or in a template."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from captioning import prompts
from captioning.outcomes import CaptionOutcome
from captioning.tables import caption_output
from pipeline.recipe import SourceCaptions
from pipeline.records import IMAGES, captions_folder
from pipeline.stage import Output, WorkItem
from pipeline.summary import read_shard


@dataclass(frozen=True)
class SourceCaptioning:
    """The stage that makes a caption set from the datasets' own texts."""

    root: str
    captions: str
    settings: SourceCaptions
    name: str = "caption"
    version: int = 1
    resource_hints: Mapping[str, str] = field(default_factory=dict)
    items_at_once: int = 1

    @property
    def folder(self) -> str:
        """The folder below R."""
        return captions_folder(self.captions)

    def config(self, dataset: str) -> Mapping[str, Any]:
        """Return what decides the captions."""
        return {"engine": "source", "template": self._template(dataset).text}

    def _template(self, dataset: str) -> prompts.Prompt:
        given = self.settings.templates.get(dataset)
        return prompts.Prompt("template", given) if given else prompts.OWN_TEXT

    def process(self, item: WorkItem) -> Output:
        """Write the captions of one image shard."""
        template = self._template(item.dataset)
        rows = []
        index = read_shard(self.root, IMAGES, item.dataset, item.shard, ["key", "text"])
        for picture in index.to_pylist():
            text = (picture["text"] or "").strip()
            caption: dict[str, Any] = {"text": None, "outcome": CaptionOutcome.SOURCE_MISSING}
            if text:
                caption = {"text": template.fill(text), "outcome": CaptionOutcome.OK}
            caption |= {"prompt_kind": template.kind, "prompt_sha256": template.sha256}
            rows.append({"key": picture["key"], "captions": [caption]})
        return caption_output(rows)
