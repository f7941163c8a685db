"""Captions from a vision-language model behind vLLM: pictures in, a caption with its outcome each.

Requests are kept in flight up to a bound, with no barrier between batches, so that the server
always has the next one to schedule. A picture that the server refuses, or a server that dies, is
the outcome of the pictures concerned and of no other.
"""

import asyncio
import base64
import io
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import httpx
import numpy as np
import numpy.typing as npt
from PIL import Image

from captioning.outcomes import CaptionOutcome
from captioning.server import SERVED_MODEL_NAME, ServerLease
from pipeline.errors import EvenmixError

RETRY_WAIT_S = 0.5
PNG_COMPRESS_LEVEL = 1  # lossless, and the server decodes it on the same machine

logger = logging.getLogger(__name__)
logging.getLogger("httpx").setLevel(logging.WARNING)  # it would log every request


@dataclass(frozen=True)
class Sampling:
    """How the model draws its tokens. The defaults are i1's: temperature 1, no top-p, no top-k."""

    max_tokens: int = 256
    temperature: float = 1.0


@dataclass(frozen=True)
class EngineConfig:
    """The model and how to reach it.

    `model`, `arguments` and `sampling` decide the captions and belong in a caption set's record;
    the rest decides only how fast and how patiently they are asked for. `arguments` are vLLM's
    engine arguments by their Python names, such as {"max_model_len": 4096}.
    """

    model: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    sampling: Sampling = Sampling()
    max_in_flight: int = 64
    max_attempts: int = 3
    request_timeout_s: float = 600.0
    start_timeout_s: float = 1800.0


@dataclass(frozen=True)
class CaptionRequest:
    """One picture, uint8 RGB of shape (height, width, 3), to be captioned once."""

    key: str
    picture: npt.NDArray[np.uint8]
    prompt: str
    seed: int


@dataclass(frozen=True)
class Caption:
    """The answer to one request. `detail` says why an outcome is a failure."""

    key: str
    outcome: CaptionOutcome
    seed: int
    text: str = ""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    detail: str = ""


class VllmEngine:
    """This process's way to the vLLM server of this machine (server.py)."""

    def __init__(self, config: EngineConfig):
        self.config = config
        self._lease: ServerLease | None = None

    def start(self) -> None:
        """Wait for a healthy server, starting it if this process is the first to need it.

        Raises EvenmixError if the model does not exist or the server does not come up.
        """
        lease = ServerLease(
            self.config.model, self.config.arguments, start_timeout_s=self.config.start_timeout_s
        )
        try:
            lease.wait_until_ready()
        except BaseException:
            lease.release()
            raise
        self._lease = lease

    def close(self) -> None:
        """Give the server up; it ends with its last user."""
        if self._lease is not None:
            self._lease.release()
            self._lease = None

    def caption(self, requests: Iterable[CaptionRequest]) -> list[Caption]:
        """Caption pictures; the result has their order and number.

        `requests` may be a generator: it is advanced, in a thread, only as far as there is room
        in flight, so the next pictures are prepared while the engine works. Raises EvenmixError
        if the server cannot be started again or refuses requests as such.
        """
        if self._lease is None:
            raise RuntimeError("start() comes before caption()")
        return asyncio.run(_Conversation(self.config, self._lease).caption(requests))


class _Conversation:
    """The requests of one call, on one event loop."""

    def __init__(self, config: EngineConfig, lease: ServerLease):
        self._config = config
        self._lease = lease
        self._restarting = asyncio.Lock()
        self._slots = asyncio.Semaphore(config.max_in_flight)

    async def caption(self, requests: Iterable[CaptionRequest]) -> list[Caption]:
        iterator = iter(requests)
        tasks: list[asyncio.Task[Caption]] = []
        try:
            async with self._client() as client, asyncio.TaskGroup() as group:
                while True:
                    await self._slots.acquire()
                    request = await asyncio.to_thread(next, iterator, None)
                    if request is None:
                        break
                    tasks.append(group.create_task(self._caption_one(client, request)))
        except BaseExceptionGroup as failures:
            raise failures.exceptions[0] from None
        return [task.result() for task in tasks]

    def _client(self) -> httpx.AsyncClient:
        transport = httpx.AsyncHTTPTransport(
            uds=str(self._lease.socket_path),
            limits=httpx.Limits(max_connections=self._config.max_in_flight),
        )
        # _ask sets the one time limit that matters, on the whole of a request.
        return httpx.AsyncClient(transport=transport, base_url="http://vllm/v1", timeout=None)

    async def _caption_one(self, client: httpx.AsyncClient, request: CaptionRequest) -> Caption:
        """Ask until there is an answer or the attempts are used up, and free the slot."""
        try:
            body = await asyncio.to_thread(request_body, request, self._config.sampling)
            detail = ""
            for attempt in range(self._config.max_attempts):
                if attempt:
                    await asyncio.sleep(RETRY_WAIT_S * 2 ** (attempt - 1))
                    await self._ensure_server()
                try:
                    async with asyncio.timeout(self._config.request_timeout_s):
                        response = await client.post("/chat/completions", json=body)
                    return read_answer(request, response)
                except TimeoutError:
                    detail = f"no answer within {self._config.request_timeout_s:g} s"
                except (httpx.TransportError, EngineTrouble) as error:
                    detail = f"{type(error).__name__}: {error}"
                logger.warning("picture %s, attempt %d: %s", request.key, attempt + 1, detail)
            return Caption(request.key, CaptionOutcome.ENGINE_FAILED, request.seed, detail=detail)
        finally:
            self._slots.release()

    async def _ensure_server(self) -> None:
        """Wait until the server is healthy: at once if it is, after a restart if it had died."""
        async with self._restarting:
            await asyncio.to_thread(self._lease.wait_until_ready)


class EngineTrouble(Exception):
    """The server answered, but not with a caption or a refusal: it may if asked again."""


def request_body(request: CaptionRequest, sampling: Sampling) -> dict[str, Any]:
    """Write a request as OpenAI's chat completions have it, the picture as a PNG data URL."""
    png = io.BytesIO()
    Image.fromarray(request.picture).save(png, format="PNG", compress_level=PNG_COMPRESS_LEVEL)
    url = "data:image/png;base64," + base64.b64encode(png.getvalue()).decode("ascii")
    return {
        "model": SERVED_MODEL_NAME,
        "messages": [
            {
                "role": "user",
                "content": [
                    {"type": "image_url", "image_url": {"url": url}},
                    {"type": "text", "text": request.prompt},
                ],
            }
        ],
        "max_tokens": sampling.max_tokens,
        "temperature": sampling.temperature,
        "seed": request.seed,
    }


def read_answer(request: CaptionRequest, response: httpx.Response) -> Caption:
    """Turn the server's answer into a caption.

    Raises EngineTrouble if asking again may help, and EvenmixError if every request would be
    answered like this one.
    """
    status = response.status_code
    if status == httpx.codes.BAD_REQUEST:
        return Caption(
            request.key, CaptionOutcome.PICTURE_FAILED, request.seed, detail=_message(response)
        )
    if status >= httpx.codes.INTERNAL_SERVER_ERROR or status == httpx.codes.TOO_MANY_REQUESTS:
        raise EngineTrouble(f"status {status}: {_message(response)}")
    if status != httpx.codes.OK:
        raise EvenmixError(
            f"the captioning server refused picture {request.key} with status {status}: "
            f"{_message(response)}; check the model and its arguments"
        )
    answer = response.json()
    choice = answer["choices"][0]
    text = (choice["message"]["content"] or "").strip()
    if choice["finish_reason"] not in ("stop", "length"):
        raise EngineTrouble(f"the answer ended with {choice['finish_reason']}")
    if not text:
        outcome = CaptionOutcome.EMPTY
    elif choice["finish_reason"] == "length":
        outcome = CaptionOutcome.TRUNCATED
    else:
        outcome = CaptionOutcome.OK
    return Caption(
        request.key,
        outcome,
        request.seed,
        text,
        prompt_tokens=answer["usage"]["prompt_tokens"],
        completion_tokens=answer["usage"]["completion_tokens"],
    )


def _message(response: httpx.Response) -> str:
    """Return the server's own words, which are JSON where vLLM wrote them."""
    try:
        return str(response.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return response.text
