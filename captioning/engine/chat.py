"""OpenAI's chat completions on the wire: requests as JSON, and what a server's responses mean.

A picture travels as a PNG that is not compressed. Such a PNG is lossless, every server takes it,
and for 512 x 512 pixels writing it, sending it in base64 and reading it take 10 ms in all; deflated
at level 1, as Pillow does it, 38 ms. (Two thirds of that would be spent on the machine whose
accelerator waits.)
"""

import base64
import struct
import zlib
from collections.abc import Mapping
from typing import Annotated, Any

import numpy as np
from pydantic import BaseModel, BeforeValidator, Field, ValidationError
from pydantic_core import to_json

from captioning.engine.questions import Ending, Request, Sampling
from pipeline.errors import EvenmixError
from pipeline.images import Pixels
from pipeline.printable import printable

MAX_RETRY_AFTER_S = 60.0

_AT_TOKEN_LIMIT = {"length", "max_tokens", "model_length"}
_WITHHELD = {"content_filter"}
_BROKEN_OFF = {None, "abort", "error"}
_NOT_TAKEN = {400, 403, 413, 422}
_BUSY = {408, 425, 429, 503}
_BAD_GATEWAY = 502
_MAX_WORDS_CHARS = 500
_MAX_TOKENS = 2**31 - 1  # as a caption set has them


class NotTakenError(Exception):
    """The server does not take this request; perhaps it takes none."""


class Trouble(Exception):
    """There is no answer, but there may be one if the request is sent again."""


class TurnedAway(Trouble):
    """The model never saw the request: the server has too much to do, or cannot be reached."""

    def __init__(self, detail: str, retry_after_s: float = 0.0) -> None:
        super().__init__(detail)
        self.retry_after_s = retry_after_s


class Unreachable(TurnedAway):
    """There is no connection to the server."""


class TimedOut(Trouble):
    """There was no answer in time."""


class CutOff(Trouble):
    """The connection broke, perhaps because the request killed the server."""


class _Message(BaseModel):
    content: str | None = None


class _Choice(BaseModel):
    message: _Message
    finish_reason: str | None = None


_Count = Annotated[int, Field(ge=0, le=_MAX_TOKENS), BeforeValidator(lambda count: count or 0)]


class _Usage(BaseModel):
    prompt_tokens: _Count = 0
    completion_tokens: _Count = 0


class Completion(BaseModel):
    """An answer as the server gives it; one that does not count tokens has 0 of them."""

    choices: list[_Choice] = Field(min_length=1)
    usage: Annotated[_Usage, BeforeValidator(lambda usage: usage or _Usage())] = _Usage()

    @property
    def text(self) -> str:
        """The text, without white space at its ends."""
        return (self.choices[0].message.content or "").strip()

    @property
    def ending(self) -> Ending:
        """How it ended; servers have many words for a model that was done."""
        reason = self.choices[0].finish_reason
        if reason in _AT_TOKEN_LIMIT:
            return Ending.LENGTH
        return Ending.WITHHELD if reason in _WITHHELD else Ending.STOP


class _Served(BaseModel):
    id: str
    max_model_len: int | None = None


class ServedModels(BaseModel):
    """The models of a server; vLLM says how long their contexts are, in tokens."""

    data: list[_Served]


class _Words(BaseModel):
    message: str


class _Refusal(BaseModel):
    error: _Words


def request_body(
    request: Request,
    picture_url: str | None,
    model: str,
    sampling: Sampling,
    chat_template: Mapping[str, Any],
) -> bytes:
    """Write a request; ``picture_url`` is the :func:`data_url` of its picture.

    What only some servers understand (``top_k``, ``chat_template_kwargs``) is left out unless it is
    set, so that any of them can be asked.
    """
    content: str | list[dict[str, Any]] = request.prompt
    if picture_url is not None:
        content = [
            {"type": "image_url", "image_url": {"url": picture_url}},
            {"type": "text", "text": request.prompt},
        ]
    messages = [{"role": "user", "content": content}]
    if request.system is not None:
        messages.insert(0, {"role": "system", "content": request.system})
    body: dict[str, Any] = {
        "model": model,
        "messages": messages,
        "seed": request.seed,
        "max_tokens": sampling.max_tokens,
        "temperature": sampling.temperature,
    }
    if sampling.top_p != 1:
        body["top_p"] = sampling.top_p
    if sampling.top_k != 0:
        body["top_k"] = sampling.top_k
    if chat_template:
        body["chat_template_kwargs"] = dict(chat_template)
    return to_json(body)


def data_url(picture: Pixels) -> str:
    """Write a picture, uint8 RGB of shape (height, width, 3), as a PNG in a data URL."""
    return "data:image/png;base64," + base64.b64encode(_png(picture)).decode("ascii")


def _png(picture: Pixels) -> bytes:
    """Write a PNG without compression and without filters (ISO 15948), which Pillow cannot."""
    height, width, _ = picture.shape
    rows = np.zeros((height, 1 + 3 * width), np.uint8)  # each begins with its filter: 0, none
    rows[:, 1:] = picture.reshape(height, -1)
    bit_depth, rgb = 8, 2
    header = struct.pack(">IIBBBBB", width, height, bit_depth, rgb, 0, 0, 0)
    chunks = {b"IHDR": header, b"IDAT": zlib.compress(rows.data, level=0), b"IEND": b""}
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks.items()
    )


def read_completion(body: bytes, max_chars: int) -> Completion:
    """Read an answer, which cannot have more than ``max_chars`` characters.

    Raises:
        Trouble: it is none, or was broken off.
    """
    try:
        completion = Completion.model_validate_json(body)
    except ValidationError as error:
        problem = error.errors()[0]
        raise Trouble(f"the answer is no chat completion: {problem['msg']}") from error
    reason = completion.choices[0].finish_reason
    if reason in _BROKEN_OFF:
        raise Trouble(f"the answer ended with {reason}")
    if len(completion.text) > max_chars:
        raise Trouble(f"the answer has more than the {max_chars:,} characters that were asked for")
    return completion


def check_status(status: int, retry_after: str | None, body: bytes) -> None:
    """Return if the server says 200; ``retry_after`` is the header of that name.

    Raises:
        NotTakenError: it does not take this request, and perhaps no other.
        Trouble: it may answer if asked again.
        EvenmixError: it would say this of every request.
    """
    if status == 200:
        return
    detail = f"HTTP {status}: {_words(body)}"
    if status in _NOT_TAKEN:
        raise NotTakenError(detail)
    if status in _BUSY:
        raise TurnedAway(detail, _retry_after_s(retry_after))
    if status == _BAD_GATEWAY:
        raise CutOff(detail)  # by the server behind it
    if status >= 500:
        raise Trouble(detail)
    raise refusal_of_all(detail)


def refusal_of_all(detail: str) -> EvenmixError:
    """Return the error of a server that refuses whatever it is asked."""
    return EvenmixError(
        f"the model's server answers {detail}; check the endpoint, which mostly ends with /v1, the "
        "model's name, and OPENAI_API_KEY. Nothing that was published is lost: start the same "
        "command again when it works."
    )


def _words(body: bytes) -> str:
    """Return the server's own words, which are in JSON where it is one for models."""
    try:
        words = _Refusal.model_validate_json(body).error.message
    except ValidationError:
        words = body.decode(errors="replace")
    return one_line(words)


def one_line(words: str) -> str:
    """Return a stranger's words on one line, without what could take over a terminal."""
    return printable(" ".join(words.split())[:_MAX_WORDS_CHARS])


def _retry_after_s(header: str | None) -> float:
    """Return the seconds of a Retry-After header, a minute at most; 0 if it has none."""
    if header is None or not header.isascii() or not header.isdigit():
        return 0.0
    return min(float(header), MAX_RETRY_AFTER_S)
