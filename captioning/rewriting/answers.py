"""What makes a long prompt, written by a model from a short one, fit to be used.

Models trained on long captions want prompts of that length and style (i1, prompt rewriting). But
a rewriting that loses the text to be drawn, or is no caption at all, is worse than a short prompt:
then the prompt itself is used, and the outcome says why.
"""

import re
from dataclasses import dataclass
from enum import StrEnum

from captioning.checks import is_echo, is_empty, is_refusal, is_repeating
from captioning.engine.questions import Answer, Ending
from captioning.rewriting.quotations import quoted_texts

MIN_CHARS = 100
"""No rewriting is shorter: that is a sentence, where i1's captions are a paragraph."""
LONG_PROMPT_CHARS = 500
"""A shorter prompt may not become shorter still. A longer one is a caption already, which may lose
some words on its way."""


class RewriteOutcome(StrEnum):
    """What became of one prompt. All but ``OK`` mean that the prompt is used as it was."""

    OK = "ok"
    EMPTY = "empty"
    """The model answered without text."""
    THINKING = "thinking"
    """The model was still thinking when its answer ended."""
    REFUSED = "refused"
    """The model declined."""
    ECHO = "echo"
    """The answer repeats the meta-prompt."""
    REPEATING = "repeating"
    """The answer says the same again and again."""
    TRUNCATED = "truncated"
    """The answer reached the token limit."""
    NOT_PLAIN = "not_plain"
    """The answer is more than a paragraph of text: it has an introduction, several lines, Markdown,
    or quotation marks around it."""
    QUOTED_TEXT_CHANGED = "quoted_text_changed"
    """Text that is quoted in the prompt is not quoted letter for letter in the answer."""
    TOO_SHORT = "too_short"
    """The answer is too short for a caption, or shorter than the prompt."""
    NOT_TAKEN = "not_taken"
    """The server does not take this prompt, which may be too long for the model's context."""
    ENGINE_FAILED = "engine_failed"
    """The engine failed at every attempt; asking again may help."""


@dataclass(frozen=True)
class Rewriting:
    """The prompt to use, which is the model's if ``outcome`` is OK and the original if not."""

    prompt: str
    outcome: RewriteOutcome
    detail: str = ""


def judge(prompt: str, answer: Answer, meta_prompt: str) -> Rewriting:
    """Take a model's answer for the prompt, or say why not.

    Nothing is repaired: of what a model wrote, only its thoughts are left out. The first outcome
    that holds counts; what explains another comes before it.
    """
    text = _after_thoughts(answer.text)
    if answer.ending is Ending.NOT_TAKEN:
        return Rewriting(prompt, RewriteOutcome.NOT_TAKEN, answer.detail)
    if answer.ending is Ending.FAILED:
        return Rewriting(prompt, RewriteOutcome.ENGINE_FAILED, answer.detail)
    if answer.ending is Ending.WITHHELD:
        return Rewriting(prompt, RewriteOutcome.REFUSED, answer.detail)
    if text is None:
        return Rewriting(prompt, RewriteOutcome.THINKING)
    if is_empty(text):
        return Rewriting(prompt, RewriteOutcome.EMPTY)
    if is_refusal(text):
        return Rewriting(prompt, RewriteOutcome.REFUSED)
    if is_echo(text, meta_prompt):
        return Rewriting(prompt, RewriteOutcome.ECHO)
    if is_repeating(text):
        return Rewriting(prompt, RewriteOutcome.REPEATING)
    if answer.ending is Ending.LENGTH:
        return Rewriting(prompt, RewriteOutcome.TRUNCATED)
    if ornament := _ornament(text):
        return Rewriting(prompt, RewriteOutcome.NOT_PLAIN, ornament)
    kept = quoted_texts(text)
    if lost := [quoted for quoted in quoted_texts(prompt) if quoted not in kept]:
        return Rewriting(
            prompt, RewriteOutcome.QUOTED_TEXT_CHANGED, f"not in the answer: {' | '.join(lost)}"
        )
    if len(text) < max(MIN_CHARS, min(len(prompt), LONG_PROMPT_CHARS)):
        return Rewriting(prompt, RewriteOutcome.TOO_SHORT, f"{len(text)} characters")
    return Rewriting(text, RewriteOutcome.OK)


def _after_thoughts(text: str) -> str | None:
    """Return what follows a model's thoughts, or None if they did not come to an end.

    Qwen3's chat template for thinking begins the thoughts itself, so the first mark may be missing.
    """
    rest = text.rpartition("</think>")[2]
    return None if "<think>" in rest else rest.strip()


_INTRODUCTION = re.compile(
    r"""\W*(?:
        (?:sure|certainly|of\ course|absolutely|okay|ok|got\ it)\b\s*[,.!:;]
        | (?:here(?:\ is|\W?s|\ are)|below\ is|this\ is)\b[^.!?\n]{0,80}
          \b(?:prompt|caption|description|version|rewrit\w+)\b[^.!?\n]{0,60}:
        | (?:\w+\ ){0,3}(?:prompt|caption|description|rewriting|paragraph)\**\s*:
        | 以下是 | 好的 | (?:改写|提示词|描述)\w{0,6}[:\uff1a]
    )""",
    re.IGNORECASE | re.VERBOSE,
)
_MARKDOWN = re.compile(r"\*\*|__|```|^(?:#+|[-*•>]|\d+[.)])\s")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")


def _ornament(text: str) -> str:
    """Return what an answer has that a paragraph has not; what is quoted may have it."""
    quoted = quoted_texts(text)
    if quoted == [text[1:-1].strip()]:
        return "quotation marks around the answer"
    for inside in quoted:
        text = text.replace(inside, "")
    if _INTRODUCTION.match(text):
        return "an introduction"
    if _CONTROL.search(text):
        return "line breaks or control characters"
    if _MARKDOWN.search(text):
        return "Markdown"
    return ""
