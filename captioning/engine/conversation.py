"""Requests to one server until each has its answer, however often the server fails meanwhile.

Requests are in flight up to a bound, and each is settled for itself; there are no batches. One that
fails is asked again, but only once the server has been seen to work: after each failure a request
that it has answered before is put to it, unless it has answered another in the meantime. While it
does not work, nothing is sent but that control question. So an outage, however long, costs a
request one attempt at most, and three failures mean that it is the request that cannot be answered.
In the same way a refusal is a request's own only if the control question is not refused as well.

A request that was in flight when the server died may have killed it. Such suspects are asked one at
a time, beside all others, so that a deadly request takes no other down with it more than once or
twice.
"""

import asyncio
import logging
import random
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, nullcontext
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from time import monotonic
from typing import TypeVar

from pydantic import ValidationError

from captioning.engine.chat import (
    Completion,
    CutOff,
    NotTakenError,
    ServedModels,
    TimedOut,
    Trouble,
    TurnedAway,
    Unreachable,
    data_url,
    refusal_of_all,
    request_body,
)
from captioning.engine.connection import Connection, Place, connect
from captioning.engine.questions import Answer, Ending, EngineConfig, Request, Sampling
from captioning.engine.server import POLL_INTERVAL_S, ServerLease
from pipeline.errors import EvenmixError

T = TypeVar("T")

MAX_FAILURES = 3
MAX_TIMEOUTS = 3
BACKOFF_S = 0.5
MAX_BACKOFF_S = 10.0
NEWS_AFTER_S = 10.0
"""How long a server does not work before that is told: it may only be busy for a moment."""
CHARS_A_TOKEN = 64
MIN_MAX_CHARS = 4096
"""A text of more characters a token, and more than these, is no answer to what was asked."""
START_PATIENCE_S = 30.0
"""How long an endpoint may be out of reach at the start; more is rather a wrong address."""

logger = logging.getLogger(__name__)


@dataclass
class _Asked:
    """A request on its way, and how it has fared; times are on the monotonic clock."""

    request: Request
    body: bytes
    first_s: float = 0.0
    sent_s: float = 0.0
    sent: datetime = datetime.min
    is_suspect: bool = False
    failures: int = 0
    timeouts: int = 0
    attempts: int = 0
    waited_s: float = 0.0

    def begin_attempt(self) -> None:
        self.sent, self.sent_s = datetime.now(UTC), monotonic()
        self.first_s = self.first_s or self.sent_s
        self.attempts += 1

    def end(self, ending: Ending, detail: str) -> Answer:
        return Answer(self.request.id, ending, self.sent, monotonic() - self.sent_s, detail=detail)


class Conversation:
    """One process's requests to a server, on one event loop; all calls share its bounds."""

    def __init__(
        self,
        config: EngineConfig,
        connection: Connection,
        lease: ServerLease | None,
        threads: ThreadPoolExecutor,
    ) -> None:
        self._config = config
        self._connection = connection
        self._place = connection.place
        self._lease = lease
        self._threads = threads
        # Our own server may have to be started again before it can answer anything.
        self._patience_s = config.patience_s + (config.start_timeout_s if lease else 0.0)
        # As many again as are in flight are prepared, or wait for another attempt.
        self._room = asyncio.Semaphore(2 * config.max_in_flight)
        self._slots = asyncio.Semaphore(config.max_in_flight)
        self._one_suspect = asyncio.Lock()
        self._one_check = asyncio.Lock()
        self._works = asyncio.Event()
        self._works.set()
        self._told_down_s = 0.0  # when it was told that the server does not work; 0: not now
        self._max_chars = max(CHARS_A_TOKEN * config.sampling.max_tokens, MIN_MAX_CHARS)
        self._control = Request("control", "Say yes.", 0)  # then one that has been answered
        # On the monotonic clock: the last answer; the sending of the last request that was answered
        # (what was in flight already may be answered by a server that takes no more); the last time
        # that the server was seen to be down.
        self._answered_s = 0.0
        self._worked_s = 0.0
        self._died_s = 0.0

    async def context_tokens(self) -> int | None:
        """Return how many tokens the model takes at a time, None where the server does not say.

        Raises:
            EvenmixError: the server is out of reach, or does not serve the model.
        """
        deadline_s = monotonic() + START_PATIENCE_S
        while True:
            try:
                listed = await self._connection.models(START_PATIENCE_S)
                served = {each.id: each for each in ServedModels.model_validate_json(listed).data}
                break
            except NotTakenError as refusal:
                raise refusal_of_all(str(refusal)) from refusal
            except ValidationError as error:
                raise EvenmixError(
                    f"{self._place.name} is not the API of an OpenAI-compatible server; correct "
                    "the endpoint, which mostly ends with /v1"
                ) from error
            except Trouble as trouble:
                if monotonic() > deadline_s:
                    raise EvenmixError(
                        f"{self._place.name} does not list its models ({trouble}); start the "
                        "server, or correct the endpoint"
                    ) from trouble
            await asyncio.sleep(BACKOFF_S)
        if self._place.model not in served:
            raise EvenmixError(
                f"{self._place.name} does not serve the model {self._place.model}, but "
                f"{', '.join(sorted(served)) or 'none'}; name one that it serves"
            )
        return served[self._place.model].max_model_len

    async def answer_all(
        self, requests: Iterable[Request], deliver: Callable[[Answer], None]
    ) -> None:
        """Answer requests; ``deliver`` gets the answers as they come, on the event loop.

        ``requests`` is advanced in a thread, as there is room. Its exceptions are raised as they
        are.

        Raises:
            EvenmixError: the server is gone for good, or refuses every request.
        """
        bodies = self._prepare(requests, self._config.sampling)
        error = None
        try:
            async with asyncio.TaskGroup() as group:
                while (drawn := await self._draw(bodies)) is not None:
                    task = group.create_task(self._answer_and_deliver(*drawn, deliver))
                    task.add_done_callback(lambda _: self._room.release())
        except BaseExceptionGroup as errors:
            error = errors.exceptions[0]
        if error is not None:
            raise error  # here, where it keeps its cause

    async def ask_for_one_token(self, request: Request) -> Answer:
        """Answer one request with one token, which tells how long it is and whether it is taken."""
        sampling = replace(self._config.sampling, max_tokens=1)
        drawn = await self._in_thread(lambda: next(self._prepare([request], sampling)))
        return await self._answer(*drawn)

    def _prepare(
        self, requests: Iterable[Request], sampling: Sampling
    ) -> Iterator[tuple[Request, bytes]]:
        """Write requests; the same picture twice in a row is encoded once."""
        picture, url = None, None
        for request in requests:
            if request.picture is not picture:
                picture = request.picture
                url = None if picture is None else data_url(picture)
            model, chat_template = self._place.model, self._config.chat_template
            yield request, request_body(request, url, model, sampling, chat_template)

    async def _draw(self, bodies: Iterator[tuple[Request, bytes]]) -> tuple[Request, bytes] | None:
        """Wait until there is room for one more request and prepare it; None if it was the last."""
        await self._room.acquire()
        drawn = None
        try:
            drawn = await self._in_thread(lambda: next(bodies, None))
        finally:
            if drawn is None:
                self._room.release()
        return drawn

    async def _in_thread(self, call: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, call)

    async def _answer_and_deliver(
        self, request: Request, body: bytes, deliver: Callable[[Answer], None]
    ) -> None:
        deliver(await self._answer(request, body))

    async def _answer(self, request: Request, body: bytes) -> Answer:
        """Ask until there is an answer, or it is plain that there will be none."""
        asked = _Asked(request, body)
        while True:
            try:
                return await self._attempt(asked)
            except NotTakenError as refusal:
                not_taken = asked.end(Ending.NOT_TAKEN, str(refusal))
                await self._wait_until_it_works(asked, monotonic())
                return not_taken
            except Trouble as error:
                trouble = error
            failed = asked.end(Ending.FAILED, f"{trouble} (attempt {asked.attempts})")
            if await self._is_hopeless(asked, trouble):
                return failed

    async def _attempt(self, asked: _Asked) -> Answer:
        suspects = self._one_suspect if asked.is_suspect else nullcontext()
        async with suspects, self._slots:
            await self._works.wait()
            asked.begin_attempt()
            completion = await self._complete(asked.body, self._timeout_s(asked))
        self._control = asked.request
        return Answer(
            asked.request.id,
            completion.ending,
            asked.sent,
            monotonic() - asked.sent_s,
            completion.text,
            completion.usage.prompt_tokens,
            completion.usage.completion_tokens,
        )

    def _timeout_s(self, asked: _Asked) -> float:
        """Return how long an answer may take: longer than it took in vain, if the server is slow.

        At the last attempt it is four times as long as at the first.
        """
        return self._config.request_timeout_s * 2.0 ** min(asked.timeouts, MAX_TIMEOUTS - 1)

    async def _complete(self, body: bytes, timeout_s: float) -> Completion:
        sent_s = monotonic()
        completion = await self._connection.complete(body, timeout_s, self._max_chars)
        self._answered_s, self._worked_s = monotonic(), max(sent_s, self._worked_s)
        if 0 < self._told_down_s < sent_s:
            self._told_down_s = 0.0
            logger.warning("%s works again", self._place.name)
        return completion

    async def _is_hopeless(self, asked: _Asked, trouble: Trouble) -> bool:
        """Wait until the server works; return whether it makes no sense to ask once more."""
        failed_s = monotonic()
        longest_s = min(BACKOFF_S * 2 ** min(asked.attempts - 1, 16), MAX_BACKOFF_S)
        wait_s = longest_s * random.uniform(0.5, 1)
        if isinstance(trouble, TurnedAway):
            wait_s = max(wait_s, trouble.retry_after_s)
        asked.waited_s += wait_s
        asked.timeouts += isinstance(trouble, TimedOut)
        await asyncio.sleep(wait_s)
        await self._wait_until_it_works(asked, failed_s)
        if not isinstance(trouble, TimedOut | TurnedAway):
            asked.failures += 1
            asked.is_suspect |= isinstance(trouble, CutOff) or asked.sent_s < self._died_s
        return (
            asked.failures >= MAX_FAILURES
            or asked.timeouts >= MAX_TIMEOUTS
            or asked.waited_s > self._config.patience_s
        )

    async def _wait_until_it_works(self, asked: _Asked, failed_s: float) -> None:
        """Return when the server has answered something that it was sent after a failure.

        Raises:
            EvenmixError: it refuses the control question, has answered nothing for too long, or
                cannot be started again.
        """
        async with self._one_check:
            wait_s = BACKOFF_S
            try:
                while self._worked_s < failed_s:
                    trouble = await self._ask_control(self._timeout_s(asked))
                    if trouble is None or self._worked_s >= failed_s:
                        return
                    self._works.clear()
                    if not self._told_down_s and monotonic() - failed_s > NEWS_AFTER_S:
                        self._told_down_s = monotonic()
                        logger.warning("%s does not work now: %s", self._place.name, trouble)
                    silent_s = monotonic() - max(self._answered_s, asked.first_s)
                    if silent_s > self._patience_s:
                        raise EvenmixError(
                            f"{self._place.name} has answered nothing for {silent_s:.0f} s "
                            f"({trouble}). Nothing that was published is lost: start the same "
                            "command again when the server works."
                        )
                    if isinstance(trouble, TurnedAway):
                        wait_s = max(wait_s, trouble.retry_after_s)
                    await asyncio.sleep(wait_s)
                    wait_s = min(2 * wait_s, MAX_BACKOFF_S)
            finally:
                # Whoever finds otherwise closes it again; closed, it would have to be watched.
                self._works.set()

    async def _ask_control(self, timeout_s: float) -> Trouble | None:
        """Start our own server if it is down; ask the control question and return what is wrong.

        Raises:
            EvenmixError: it is refused, so any other question would be.
        """
        if self._lease is not None:
            looks = self._lease.looks()
            while not await self._in_thread(lambda: next(looks, True)):
                self._works.clear()
                self._died_s = monotonic()
                await asyncio.sleep(POLL_INTERVAL_S)
        sampling = replace(self._config.sampling, max_tokens=1)
        _, body = await self._in_thread(lambda: next(self._prepare([self._control], sampling)))
        try:
            await self._complete(body, timeout_s)
        except NotTakenError as refusal:
            raise refusal_of_all(str(refusal)) from refusal
        except Trouble as trouble:
            if isinstance(trouble, CutOff | Unreachable):
                self._died_s = monotonic()
            return trouble
        return None


@asynccontextmanager
async def open_conversation(
    config: EngineConfig, place: Place, lease: ServerLease | None
) -> AsyncIterator[Conversation]:
    """Begin a conversation; ``lease`` is that of the server if it is our own."""
    threads = ThreadPoolExecutor(thread_name_prefix="captioning")
    try:
        async with connect(place) as connection:
            yield Conversation(config, connection, lease, threads)
    finally:
        threads.shutdown(wait=False, cancel_futures=True)
