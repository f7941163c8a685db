"""What is asked about one picture: which of its captions, with which prompts, from which seeds.

A caption that the parent set has is taken over, unless its outcome is to be redone or its prompt is
another one now. What is redone begins from a new seed, since the old one would give the same again.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from captioning.outcomes import CaptionOutcome
from captioning.prompts import Prompt, PromptRule
from pipeline.records import uniform_hash

NOT_ASKED: Mapping[str, Any] = {"outcome": CaptionOutcome.NOT_ASKED}
"""The one caption of a picture that is not asked for."""


@dataclass(frozen=True)
class Ask:
    """A caption to be asked for: its number, the prompt, and the seed of the model's draws."""

    number: int
    prompt: Prompt
    seed: int


def captions_of(
    picture: Mapping[str, Any], rule: PromptRule, captions_per_image: int, seed: int
) -> list[Ask]:
    """Return what is asked about a picture, an index row, that no other set speaks of."""
    key = picture["key"]
    return [
        Ask(
            number,
            rule.prompt(picture, uniform_hash(seed, key, f"prompt-{number}")),
            _sampling_seed(seed, key, f"caption-{number}"),
        )
        for number in range(captions_per_image)
    ]


def after_parent(
    asks: Sequence[Ask],
    key: str,
    parent: Sequence[Mapping[str, Any]],
    redo: Collection[str],
) -> tuple[dict[int, Mapping[str, Any]], list[Ask]]:
    """Return which of a picture's captions are taken over, by number, and which are asked for.

    ``parent`` are those of the parent set, ``redo`` the outcomes that are not taken over.
    """
    if parent[0]["outcome"] == CaptionOutcome.NOT_ASKED and CaptionOutcome.NOT_ASKED not in redo:
        return {0: parent[0]}, []
    taken: dict[int, Mapping[str, Any]] = {}
    asked = []
    for ask in asks:
        old = parent[ask.number] if ask.number < len(parent) else NOT_ASKED
        if old.get("prompt_sha256") != ask.prompt.sha256:
            asked.append(ask)
        elif old["outcome"] in redo:
            asked.append(replace(ask, seed=_sampling_seed(old["seed"], key, "redo")))
        else:
            taken[ask.number] = old
    return taken, asked


def _sampling_seed(seed: int, key: str, purpose: str) -> int:
    """Return 31 random bits: engines take a signed 32-bit seed at the least."""
    return uniform_hash(seed, key, purpose) >> 33
