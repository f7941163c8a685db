"""Prompts and caption templates, as data: a caption set records which text it was made with."""

import hashlib
from dataclasses import dataclass


@dataclass(frozen=True)
class Prompt:
    """A text put to the model, or a template of the source engine with ``{text}`` in it."""

    kind: str
    text: str

    @property
    def sha256(self) -> str:
        """The hex digest of the text, by which a change of prompt is noticed."""
        return hashlib.sha256(self.text.encode()).hexdigest()

    def fill(self, text: str) -> str:
        """Put a dataset's text into a template; braces in the text mean nothing."""
        return self.text.replace("{text}", text)


DESCRIBE = Prompt("describe", "Describe the image in detail using one paragraph.")
"""One long description, i1's prompt for plain pictures."""

BY_KIND = {prompt.kind: prompt for prompt in [DESCRIBE]}
"""The prompts that a recipe can name."""

OWN_TEXT = Prompt("own_text", "{text}")
"""The dataset's own text as it is."""
