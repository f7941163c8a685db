"""What became of one caption: a closed list, so that every picture is accounted for."""

from enum import StrEnum


class CaptionOutcome(StrEnum):
    """The outcome of one caption of one picture."""

    OK = "ok"
    TRUNCATED = "truncated"
    """The caption reached the token limit; its text is kept."""
    EMPTY = "empty"
    """The model answered without text."""
    REFUSED = "refused"
    """The model declined to describe the picture."""
    REPEATING = "repeating"
    """The caption says the same again and again."""
    ECHO = "echo"
    """The caption is the prompt, or begins with it."""
    WRONG_SCRIPT = "wrong_script"
    """The caption is in another script than those expected."""
    THINKING = "thinking"
    """The answer has the model's thinking in it; `chat_template` may turn that off."""
    PICTURE_FAILED = "picture_failed"
    """The picture could not be decoded, or the engine refused it."""
    ENGINE_FAILED = "engine_failed"
    """The engine died, failed or was too slow at every attempt; asking again may help."""
    SOURCE_MISSING = "source_missing"
    """The dataset has no text for this picture (engines `source`,
    `published`)."""
    NOT_ASKED = "not_asked"
    """No caption was wanted for this picture."""


USABLE = frozenset({CaptionOutcome.OK, CaptionOutcome.TRUNCATED})
"""The outcomes whose text a mixture takes; i1 too trains on captions that reached the limit."""
