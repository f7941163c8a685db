"""What a model is asked and what it answers, and how it is reached."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from typing import Any

from pipeline.images import Pixels


@dataclass(frozen=True)
class Sampling:
    """How the model draws its tokens. The defaults are i1's: temperature 1, no top-p, no top-k."""

    max_tokens: int = 256
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0


@dataclass(frozen=True)
class EngineConfig:
    """The model and how to reach it.

    ``model``, ``revision``, ``arguments``, ``sampling`` and ``chat_template`` decide the answers
    and belong in a record of them; the rest decides only how fast and how patiently they are asked
    for. ``revision`` is the commit of a model on the Hub. ``arguments`` are vLLM's engine arguments
    by their Python names, such as ``{"max_model_len": 4096}``; ``chat_template`` are values for the
    model's chat template, such as ``{"enable_thinking": False}``. With ``endpoint``, the URL of an
    OpenAI-compatible server that runs already (``http://host:8000/v1``), no server is started; its
    key is OPENAI_API_KEY in the environment, if that is set.

    ``max_in_flight`` bounds the requests of a process that the server has at any time. It has
    ``request_timeout_s`` for each, and more when it is asked again; after ``patience_s`` without
    any answer, the run ends.
    """

    model: str
    revision: str | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)
    sampling: Sampling = Sampling()
    chat_template: Mapping[str, Any] = field(default_factory=dict)
    endpoint: str | None = None
    max_in_flight: int = 64
    request_timeout_s: float = 600.0
    patience_s: float = 600.0
    start_timeout_s: float = 1800.0


@dataclass(frozen=True)
class Request:
    """What the model is asked once: ``prompt``, with ``picture`` before it if there is one.

    ``id`` is the caller's own; ``picture`` is uint8 RGB of shape (height, width, 3); ``system`` is
    the system message, if any.
    """

    id: str
    prompt: str
    seed: int
    picture: Pixels | None = None
    system: str | None = None


class Ending(StrEnum):
    """How an answer came to its end."""

    STOP = "stop"
    """The model was done."""
    LENGTH = "length"
    """It reached the token limit."""
    WITHHELD = "withheld"
    """The server withheld the answer, or the rest of it: it has a filter for what it may say."""
    NOT_TAKEN = "not_taken"
    """The server does not take this request (HTTP 400, 403, 413, 422); others it does."""
    FAILED = "failed"
    """The server failed, died or was too slow at every attempt; asking again may help."""


@dataclass(frozen=True)
class Answer:
    """The answer to one request. ``detail`` says why it is a failure.

    ``asked`` is when the attempt that counts was sent (UTC), ``answer_s`` how long it took;
    ``text`` has no white space at its ends.
    """

    id: str
    ending: Ending
    asked: datetime
    answer_s: float
    text: str = ""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    detail: str = ""
