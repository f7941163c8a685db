"""Answers from a model behind vLLM: requests in, an answer with its ending for each of them.

An engine is a process's way to the model. The requests of all its threads meet in one event loop,
which has a thread of its own (conversation.py); the next ones are prepared in further threads while
the model works.
"""

import asyncio
import atexit
import os
import threading
from collections.abc import Coroutine, Iterable, Iterator
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any, TypeVar
from urllib.parse import urlsplit

from captioning.engine.connection import Place
from captioning.engine.conversation import Conversation, open_conversation
from captioning.engine.questions import Answer, Ending, EngineConfig, Request
from captioning.engine.server import SERVED_MODEL_NAME, ServerLease
from pipeline.errors import EvenmixError

T = TypeVar("T")


class Engine:
    """This process's way to the model. Its methods may be called from several threads at once."""

    def __init__(self, config: EngineConfig) -> None:
        self._config = config
        self._lock = threading.Lock()
        self._running: _Running | None = None

    def start(self) -> None:
        """Wait for the model's server; on a machine without one, start it.

        Raises:
            EvenmixError: the server does not come up or cannot be reached, or lacks the model.
        """
        with self._lock:
            if self._running is None:
                self._running = _start(self._config)
                atexit.register(self.close)

    def check_fits(self, request: Request) -> None:
        """Ask the model one request, briefly, to see whether its context has room for its like.

        Raises:
            EvenmixError: it does not take the request, or could not answer it in full.
        """
        running = self._started()
        answer = running.run(running.conversation.ask_for_one_token(request)).result()
        what = "the prompt"
        if request.picture is not None:
            height, width, _ = request.picture.shape
            what = f"a picture of {width} x {height} px and its prompt"
        if answer.ending is Ending.NOT_TAKEN:
            raise EvenmixError(
                f"the model {self._config.model} does not take {what}: {answer.detail}. If its "
                "context is too short, raise arguments.max_model_len or lower short_edge_px or "
                "max_tokens."
            )
        if answer.ending is Ending.FAILED:
            raise EvenmixError(
                f"the model {self._config.model} does not answer {what}: {answer.detail}"
            )
        context, max_tokens = running.context_tokens, self._config.sampling.max_tokens
        needed = answer.prompt_tokens + max_tokens
        if context is not None and needed > context:
            raise EvenmixError(
                f"the context of the model {self._config.model} is too short: {what} take "
                f"{answer.prompt_tokens} tokens and an answer up to {max_tokens}, which are "
                f"{needed}, and it has {context}. Raise arguments.max_model_len, or lower "
                "short_edge_px or max_tokens."
            )

    def answers(self, requests: Iterable[Request]) -> Iterator[Answer]:
        """Answer requests, in order of completion.

        ``requests`` may be a generator that does work: it is advanced in a thread, one request at a
        time, only as there is room: ``max_in_flight`` requests of the process are in flight and as
        many more prepared. Its exceptions are raised here as they are. When the iterator is left
        early, its requests are abandoned.

        Raises:
            EvenmixError: the server is gone for good, or refuses every request.
        """
        running = self._started()
        answers: SimpleQueue[Answer | None] = SimpleQueue()
        call = running.run(running.conversation.answer_all(requests, answers.put))
        call.add_done_callback(lambda _: answers.put(None))
        try:
            while (answer := answers.get()) is not None:
                yield answer
            if call.cancelled():
                raise RuntimeError("the engine was closed before all requests were answered")
            call.result()
        finally:
            call.cancel()

    def close(self) -> None:
        """Abandon all requests and give the server up, which ends with its last user."""
        with self._lock:
            if self._running is not None:
                atexit.unregister(self.close)
                self._running.closing.close()
                self._running = None

    def _started(self) -> "_Running":
        if self._running is None:
            raise RuntimeError("start() comes before questions")
        return self._running


@dataclass(frozen=True)
class _Running:
    """A conversation with a server, the loop that it lives in, and how to end both.

    ``context_tokens`` is how many tokens the model takes at a time, None if the server does not
    say.
    """

    conversation: Conversation
    loop: asyncio.AbstractEventLoop
    context_tokens: int | None
    closing: ExitStack

    def run(self, coroutine: Coroutine[Any, Any, T]) -> Future[T]:
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop)


def _start(config: EngineConfig) -> _Running:
    with ExitStack() as stack:
        if config.endpoint is None:
            lease = ServerLease(
                config.model,
                config.arguments,
                config.revision,
                start_timeout_s=config.start_timeout_s,
            )
            stack.callback(lease.release)
            lease.wait_until_ready()
            name = f"vLLM (its log is {lease.log_path})"
            place = Place(name, "http://vllm/v1", SERVED_MODEL_NAME, socket=lease.socket_path)
        else:
            lease, place = None, _place(config.endpoint, config.model)
        loop = stack.enter_context(_loop_in_thread())

        def run(coroutine: Coroutine[Any, Any, T]) -> T:
            return asyncio.run_coroutine_threadsafe(coroutine, loop).result()

        opening = open_conversation(config, place, lease)
        conversation = run(opening.__aenter__())
        stack.callback(lambda: run(opening.__aexit__(None, None, None)))
        context_tokens = run(conversation.context_tokens())
        stack.callback(lambda: run(_cancel_all_others()))
        return _Running(conversation, loop, context_tokens, stack.pop_all())


def _place(endpoint: str, model: str) -> Place:
    if not {"@", "?", "#"}.isdisjoint(endpoint):
        raise EvenmixError(
            "the endpoint's URL has a user name, a password or a query in it; remove it, and give "
            "the key as OPENAI_API_KEY in the environment"
        )
    if not _is_url(endpoint):
        raise EvenmixError(
            f"the endpoint {endpoint} is no URL such as http://host:8000/v1; correct it"
        )
    key = os.environ.get("OPENAI_API_KEY", "").strip()  # of a file with a line end, say
    if not (key.isascii() and key.isprintable()):
        raise EvenmixError("OPENAI_API_KEY has characters that no key has; correct it")
    url = endpoint.rstrip("/")
    return Place(url, url, model, key=key or None)


def _is_url(endpoint: str) -> bool:
    try:
        parts = urlsplit(endpoint)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # brackets that do not match, or a port that is no number
        return False


@contextmanager
def _loop_in_thread() -> Iterator[asyncio.AbstractEventLoop]:
    """Run an event loop in a thread of its own."""
    with asyncio.Runner(loop_factory=asyncio.new_event_loop) as runner:
        loop = runner.get_loop()
        thread = threading.Thread(target=loop.run_forever, name="captioning", daemon=True)
        thread.start()
        try:
            yield loop
        finally:
            loop.call_soon_threadsafe(loop.stop)
            thread.join()


async def _cancel_all_others() -> None:
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)
