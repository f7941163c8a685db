"""Downloads that can be trusted: many URLs of strangers, in bounded time and memory.

A URL has a few attempts, an attempt has one deadline and follows a few redirects, and each request
waits for its turn, which bounds those in flight to one host and in all. What cannot pass is asked
for once; what can (a deadline, a broken connection, 429, 5xx) is asked for again after a pause with
jitter, and a host that says for how long it wants to be left alone is. Whether the bytes are a
picture is for the caller to see: servers' Content-Types are often wrong.
"""

import asyncio
import random
import socket
import ssl
import threading
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import partial
from time import monotonic
from typing import TypeVar

import aiohttp
from yarl import URL

from pipeline.addresses import PrivateAddressError, Resolver, is_temporary
from pipeline.opt_out import opted_out
from pipeline.reasons import RejectReason
from pipeline.recipe import Fetch

T = TypeVar("T")
_TakeRoom = Callable[[int], Awaitable[None]]

_REDIRECTS = {301, 302, 303, 307, 308}
_PASSING = {408, 425, 429}  # and all from 500: what may be another answer later
_TOO_MANY_REQUESTS = 429
_MAX_DETAIL_CHARS = 200
# Between requests to one host little time passes, and a list of URLs can name more hosts than a
# process may have open files.
_KEEP_CONNECTIONS_S = 2.0
_SMALL_BYTES = 256 << 10
"""The largest body that is handed over in the event loop, and that takes no room."""
_ROOM_BYTES = 256 << 20
"""What all larger bodies of a client may take at once."""
# What the caller makes of a small body takes milliseconds, or else it is such a body as is made to
# take long: then others must not wait, with their deadlines running.
_SLOW_S = 0.05
_SLOW_SHARE = 0.05
"""The share of the event loop's time that slow bodies may take."""


@dataclass(frozen=True)
class Fetched:
    """What became of one URL.

    ``reason`` is None if it was got; then ``body`` has its bytes, perhaps none. Otherwise the body
    is empty, ``detail`` tells the reader more, and ``retryable`` means that a later run may
    succeed. ``final_url`` is where redirects led, ``status`` the last HTTP status that was seen.
    ``attempts`` counts those that got as far as a request or a look-up; from the start of the first
    (``started``, UTC) to the last byte ``duration_s`` passed, waits included.
    """

    url: str
    final_url: str
    body: bytes
    status: int | None
    reason: RejectReason | None
    detail: str
    retryable: bool
    attempts: int
    started: datetime
    duration_s: float


def fetch_all(
    urls: Sequence[str], policy: Fetch, max_bytes: int, then: Callable[[int, Fetched], T]
) -> list[T]:
    """Fetch all URLs and return what ``then`` made of them, in their order.

    ``then`` is called with the index of each URL and its outcome, in order of arrival, while others
    are still on their way. Two threads call it, one of them for large bodies, so it must be
    thread-safe. Its results are kept, the bodies are not: at most ``policy.concurrency`` of them
    are in memory, and 256 MiB of those above 256 KiB (but one at least). An exception of ``then``
    ends the downloads and is raised here.

    Calls at the same time, in threads of one process, share these bounds, and what is known of
    hosts, if they have the same policy.
    """
    with _shared_client(policy, max_bytes) as shared:
        call = asyncio.run_coroutine_threadsafe(_fetch_all(shared.client, urls, then), shared.loop)
        try:
            return call.result()
        finally:
            call.cancel()  # if this thread was interrupted


async def _fetch_all(
    client: "_Client", urls: Sequence[str], then: Callable[[int, Fetched], T]
) -> list[T]:
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [
                group.create_task(client.fetch(url, partial(then, index)))
                for index, url in enumerate(urls)
            ]
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from None
    return [task.result() for task in tasks]


@dataclass
class _Shared:
    """A client, the event loop that it lives in, and how many calls use it now."""

    client: "_Client"
    loop: asyncio.AbstractEventLoop
    closing: ExitStack
    calls: int = 0


_shared: dict[tuple[str, int], _Shared] = {}
_shared_lock = threading.Lock()


@contextmanager
def _shared_client(policy: Fetch, max_bytes: int) -> Iterator[_Shared]:
    """Give a client that all calls at the same time share; the last of them closes it."""
    key = (policy.model_dump_json(), max_bytes)
    with _shared_lock:
        if key not in _shared:
            with ExitStack() as stack:
                client, loop = stack.enter_context(_client_in_thread(policy, max_bytes))
                _shared[key] = _Shared(client, loop, stack.pop_all())
        shared = _shared[key]
        shared.calls += 1
    try:
        yield shared
    finally:
        with _shared_lock:
            shared.calls -= 1
            if not shared.calls:
                del _shared[key]
                shared.closing.close()


@contextmanager
def _client_in_thread(
    policy: Fetch, max_bytes: int
) -> Iterator[tuple["_Client", asyncio.AbstractEventLoop]]:
    """Open a client in an event loop that runs in a thread of its own."""
    with asyncio.Runner(loop_factory=asyncio.new_event_loop) as runner:
        loop = runner.get_loop()
        thread = threading.Thread(target=loop.run_forever, name="downloads", daemon=True)
        thread.start()
        opening = _open_client(policy, max_bytes)
        try:
            client = asyncio.run_coroutine_threadsafe(opening.__aenter__(), loop).result()
            try:
                yield client, loop
            finally:
                closing = opening.__aexit__(None, None, None)
                asyncio.run_coroutine_threadsafe(closing, loop).result()
        finally:
            loop.call_soon_threadsafe(loop.stop)
            thread.join()


class _Failure(Exception):
    """An attempt that brought nothing."""

    def __init__(
        self,
        reason: RejectReason,
        detail: str,
        *,
        retryable: bool = False,
        retryable_later: bool = False,
        retry_after_s: float = 0.0,
    ) -> None:
        super().__init__(detail)
        self.reason = reason
        self.detail = detail
        self.retryable = retryable
        self.retryable_later = retryable or retryable_later
        self.retry_after_s = retry_after_s


@dataclass
class _Visit:
    """How far the fetching of one URL has come."""

    asked: str
    current: str  # after the redirects so far
    attempts: int = 0
    status: int | None = None
    started: datetime | None = None
    began: float = 0.0  # on the monotonic clock
    duration_s: float = 0.0

    def begin_attempt(self) -> None:
        if self.started is None:
            self.started = datetime.now(UTC)
            self.began = monotonic()
        self.attempts += 1

    def end_request(self) -> None:
        self.duration_s = monotonic() - self.began

    def outcome(self, body: bytes, failure: _Failure | None = None) -> Fetched:
        detail = " ".join(failure.detail.split()) if failure else ""
        return Fetched(
            url=self.asked,
            final_url=self.current,
            body=body,
            status=self.status,
            reason=failure.reason if failure else None,
            # Words of servers may hold what UTF-8 cannot.
            detail=detail.encode(errors="backslashreplace").decode()[:_MAX_DETAIL_CHARS],
            retryable=failure.retryable_later if failure else False,
            attempts=self.attempts,
            started=self.started or datetime.now(UTC),
            duration_s=self.duration_s,
        )


class _Host:
    """One host's part of the requests, and the time until which it wants to be left alone."""

    def __init__(self, concurrency: int) -> None:
        self.turns = asyncio.Semaphore(concurrency)
        self.users = 0  # those that wait for a turn or have one
        self.quiet_until = 0.0  # on the monotonic clock

    @property
    def quiet_s(self) -> float:
        return self.quiet_until - monotonic()


class _Room:
    """The memory that large bodies share, given out in the order of asking."""

    def __init__(self, num_bytes: int) -> None:
        self._free_bytes = num_bytes
        self._first_in_line = asyncio.Lock()
        self._given_back = asyncio.Event()

    async def take(self, num_bytes: int) -> None:
        """Wait until there is room for so many bytes, and take it."""
        async with self._first_in_line:
            while num_bytes > self._free_bytes:
                self._given_back.clear()
                await self._given_back.wait()
            self._free_bytes -= num_bytes

    def give_back(self, num_bytes: int) -> None:
        self._free_bytes += num_bytes
        self._given_back.set()


class _Place:
    """The room of one body, none at first; it is given back at the end of the ``with`` block.

    All of it is taken at once: bodies that had a part each could wait for one another for ever.
    """

    def __init__(self, room: _Room) -> None:
        self._room = room
        self._num_bytes = 0

    def __enter__(self) -> "_Place":
        return self

    def __exit__(self, *exception: object) -> None:
        self._room.give_back(self._num_bytes)

    async def take(self, num_bytes: int, deadline: asyncio.Timeout) -> None:
        """Take so many bytes, if not yet done; the deadline does not run meanwhile."""
        at_s = deadline.when()
        if self._num_bytes or at_s is None:
            return
        loop = asyncio.get_running_loop()
        left_s = at_s - loop.time()
        deadline.reschedule(None)
        await self._room.take(num_bytes)
        self._num_bytes = num_bytes
        deadline.reschedule(loop.time() + left_s)


class _Client:
    """Fetches URLs by one policy in one event loop."""

    def __init__(
        self,
        policy: Fetch,
        max_bytes: int,
        session: aiohttp.ClientSession,
        resolver: Resolver,
        thread: ThreadPoolExecutor,
    ) -> None:
        self._policy = policy
        self._max_bytes = max_bytes
        self._session = session
        self._resolver = resolver
        self._thread = thread
        self._agent = policy.user_agent.split("/")[0].strip()
        self._opt_out = {directive.lower() for directive in policy.opt_out}
        self._turns = asyncio.Semaphore(policy.concurrency)
        self._room = _Room(max(_ROOM_BYTES, max_bytes))
        self._hosts: dict[str, _Host] = {}
        self._in_thread_until = 0.0  # on the monotonic clock

    async def fetch(self, url: str, then: Callable[[Fetched], T]) -> T:
        """Fetch one URL and return what ``then`` makes of the outcome."""
        visit = _Visit(url, url)
        while True:
            try:
                return await self._attempt(visit, then)
            except _Failure as failure:
                if (
                    not failure.retryable
                    or failure.retry_after_s > self._policy.max_wait_s
                    or visit.attempts >= self._policy.attempts
                ):
                    return await self._hand_over(visit.outcome(b"", failure), then)
            longest_s = self._policy.backoff_s * 2 ** (visit.attempts - 1)
            await asyncio.sleep(random.random() * min(longest_s, self._policy.max_wait_s))

    async def _hand_over(self, fetched: Fetched, then: Callable[[Fetched], T]) -> T:
        """Call ``then``: here, which is the quickest, or in a thread if it may take long."""
        begun = monotonic()
        if len(fetched.body) > _SMALL_BYTES or begun < self._in_thread_until:
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(self._thread, then, fetched)
        try:
            return then(fetched)
        finally:
            ended = monotonic()
            if ended - begun > _SLOW_S:
                self._in_thread_until = ended + (ended - begun) / _SLOW_SHARE

    async def _attempt(self, visit: _Visit, then: Callable[[Fetched], T]) -> T:
        """Ask for the URL and for those that it redirects to; hand over the body."""
        url = _checked(visit.asked)
        left_s = self._policy.timeout_s
        for hop in range(self._policy.max_redirects + 1):
            visit.current = str(url)
            async with self._turn(url):
                if hop == 0:
                    visit.begin_attempt()
                begun = monotonic()
                with _Place(self._room) as place:
                    answer = await self._ask(url, visit, left_s, place)
                    if isinstance(answer, bytes):
                        # The turn is not given up before, which holds back the network.
                        return await self._hand_over(visit.outcome(answer), then)
                left_s -= monotonic() - begun
            url = answer
        raise _Failure(
            RejectReason.TOO_MANY_REDIRECTS, f"more than {self._policy.max_redirects} redirects"
        )

    @asynccontextmanager
    async def _turn(self, url: URL) -> AsyncIterator[None]:
        """Wait until one more request may be in flight, to this host and in all."""
        with self._host(url) as host:
            async with host.turns:
                while True:
                    if host.quiet_s > self._policy.max_wait_s:
                        raise _Failure(
                            RejectReason.UNAVAILABLE,
                            f"{url.host} asked for no requests for another {host.quiet_s:.0f} s",
                            retryable=True,
                            retry_after_s=host.quiet_s,
                        )
                    await asyncio.sleep(max(host.quiet_s, 0))
                    async with self._turns:
                        if host.quiet_s <= 0:  # it may have asked for quiet in the meantime
                            yield
                            return

    @contextmanager
    def _host(self, url: URL) -> Iterator[_Host]:
        """Give what is known of a host, which is forgotten when it matters to nobody."""
        name = (url.raw_host or "").rstrip(".")
        host = self._hosts.setdefault(name, _Host(self._policy.per_host))
        host.users += 1
        try:
            yield host
        finally:
            host.users -= 1
            if not host.users and host.quiet_s <= 0:
                del self._hosts[name]

    async def _ask(self, url: URL, visit: _Visit, left_s: float, place: _Place) -> bytes | URL:
        """Send one request and return its answer, the body or where to look for it.

        Raises:
            _Failure: neither came within ``left_s`` seconds.
        """
        try:
            async with asyncio.timeout(left_s) as deadline:
                # aiohttp asks the resolver about names only, not about addresses in URLs.
                await self._resolver.addresses(url.raw_host or "")
                response = await self._session.get(url, allow_redirects=False)
                visit.status = response.status
                try:
                    return await self._answer(url, response, partial(place.take, deadline=deadline))
                finally:
                    _hang_up(response)
        except _Failure as failure:
            self._keep_quiet(url, visit.status, failure.retry_after_s)
            raise
        except PrivateAddressError as error:
            raise _Failure(RejectReason.PRIVATE_ADDRESS, str(error)) from error
        except socket.gaierror as error:
            raise _Failure(
                RejectReason.UNKNOWN_HOST,
                f"{url.host}: {error.strerror}",
                retryable=is_temporary(error),
                # Where there is no network, names seem not to exist.
                retryable_later=True,
            ) from error
        except TimeoutError as error:
            raise _Failure(
                RejectReason.TIMEOUT,
                f"not there after {self._policy.timeout_s:g} s",
                retryable=True,
            ) from error
        except aiohttp.InvalidURL as error:
            raise _Failure(RejectReason.BAD_URL, str(error)) from error
        except aiohttp.ClientResponseError as error:
            raise _Failure(RejectReason.BAD_RESPONSE, f"broken HTTP: {error.message}") from error
        except aiohttp.ClientConnectorCertificateError as error:
            raise _Failure(RejectReason.CONNECTION_FAILED, str(error)) from error
        except (aiohttp.ClientError, OSError) as error:
            raise _connection_failed(error) from error
        finally:
            visit.end_request()

    def _keep_quiet(self, url: URL, status: int | None, retry_after_s: float) -> None:
        """Leave a host alone for as long as it asks.

        429 is about all our requests. Another status may be about one file, for which no other
        has to wait longer than this file itself would.
        """
        if status == _TOO_MANY_REQUESTS or retry_after_s <= self._policy.max_wait_s:
            with self._host(url) as host:
                host.quiet_until = max(host.quiet_until, monotonic() + retry_after_s)

    async def _answer(
        self, url: URL, response: aiohttp.ClientResponse, take_room: _TakeRoom
    ) -> bytes | URL:
        status, headers = response.status, response.headers
        if status in _PASSING or status >= 500:
            raise _Failure(
                RejectReason.UNAVAILABLE,
                f"status {status}",
                retryable=True,
                retry_after_s=_retry_after_s(headers),
            )
        if status >= 400:
            raise _Failure(RejectReason.HTTP_ERROR, f"status {status}")
        if directive := opted_out(headers.getall("X-Robots-Tag", ()), self._agent, self._opt_out):
            raise _Failure(RejectReason.OPTED_OUT, f"X-Robots-Tag: {directive}")
        if status in _REDIRECTS and "Location" in headers:
            return _checked(headers["Location"], url)
        if status != 200:
            raise _Failure(RejectReason.BAD_RESPONSE, f"status {status} without what was asked for")
        if (response.content_length or 0) > self._max_bytes:
            detail = f"{response.content_length:,} bytes announced, more than {self._max_bytes:,}"
            raise _Failure(RejectReason.TOO_MANY_BYTES, detail)
        encoding = headers.get("Content-Encoding", "identity").strip().lower()
        if encoding == "identity":
            return await self._body(response, take_room, response.content_length)
        body = await self._body(response, take_room, None)
        if body:
            await take_room(self._max_bytes)
            # Nobody who reads our Accept-Encoding does this, so it may be slow, but not here.
            body = await asyncio.to_thread(_inflate, body, encoding, self._max_bytes)
        return body

    async def _body(
        self, response: aiohttp.ClientResponse, take_room: _TakeRoom, num_bytes: int | None
    ) -> bytes:
        """Read a body of so many bytes, or up to ``max_bytes``."""
        chunks, read_bytes = list[bytes](), 0
        async for chunk in response.content.iter_any():
            read_bytes += len(chunk)
            if read_bytes > self._max_bytes:
                raise _too_many_bytes(self._max_bytes)
            chunks.append(chunk)
            if read_bytes > _SMALL_BYTES:
                await take_room(num_bytes or self._max_bytes)
        return b"".join(chunks)


@asynccontextmanager
async def _open_client(policy: Fetch, max_bytes: int) -> AsyncIterator[_Client]:
    resolver = Resolver(policy.allow_private_addresses)
    connector = aiohttp.TCPConnector(
        resolver=resolver,
        use_dns_cache=False,  # the resolver's answers are the cache
        limit=0,  # a turn is waited for before the deadline begins to run
        keepalive_timeout=_KEEP_CONNECTIONS_S,
        ssl=ssl.create_default_context(),
    )
    try:
        async with aiohttp.ClientSession(
            connector=connector,
            headers={"User-Agent": policy.user_agent, "Accept-Encoding": "identity"},
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=None),  # _ask has the deadline
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,
            trust_env=False,  # a proxy would look names up by itself
            response_class=_Response,
            middlewares=(_ask_once,),
        ) as session:
            with ThreadPoolExecutor(1, "large bodies") as thread:
                yield _Client(policy, max_bytes, session, resolver, thread)
    finally:
        await resolver.close()


class _Response(aiohttp.ClientResponse):
    """A response that hangs up at once when it is not waited for any longer.

    aiohttp would say goodbye first, for which a silent TLS server has 30 s.
    """

    async def start(self, connection: aiohttp.connector.Connection) -> aiohttp.ClientResponse:
        try:
            return await super().start(connection)
        except BaseException:
            if connection.transport is not None:
                connection.transport.abort()
            raise


async def _ask_once(
    request: aiohttp.ClientRequest, send: aiohttp.ClientHandlerType
) -> aiohttp.ClientResponse:
    """Keep aiohttp from asking again by itself when a connection is closed: attempts are ours."""
    try:
        return await send(request)
    except aiohttp.ClientConnectorError:
        raise
    except (aiohttp.ClientOSError, aiohttp.ServerDisconnectedError) as error:
        raise _connection_failed(error) from error


def _hang_up(response: aiohttp.ClientResponse) -> None:
    """End a response: a connection whose answer was not read to its end serves no further one."""
    if response.connection is not None and response.connection.transport is not None:
        response.connection.transport.abort()
    response.close()


def _checked(text: str, base: URL | None = None) -> URL:
    """Return a URL that may be asked for; ``base`` is what redirected to it.

    Raises:
        _Failure: it is none, or not of http or https, or it has a user name.
    """
    try:
        url = base.join(URL(text)) if base else URL(text)
        has_host = bool(url.host)  # decoded here, which punycode that is none does not survive
    except (ValueError, IndexError) as error:  # IndexError: yarl, of "http://[]@/"
        raise _Failure(RejectReason.BAD_URL, f"no URL: {error}") from error
    if url.scheme not in ("http", "https") or not has_host:
        raise _Failure(RejectReason.BAD_URL, f"not an http or https URL: {text}")
    if url.user is not None or url.password is not None:
        raise _Failure(RejectReason.BAD_URL, "a URL with a user name or password")
    return url


def _retry_after_s(headers: Mapping[str, str]) -> float:
    """Return the seconds of a Retry-After header (RFC 9110, section 10.2.3), 0 without one."""
    value = headers.get("Retry-After", "")
    if value.isascii() and value.isdigit():
        return float(value)
    try:
        return max((parsedate_to_datetime(value) - datetime.now(UTC)).total_seconds(), 0.0)
    except (ValueError, TypeError, OverflowError):  # TypeError: a date without a time zone
        return 0.0


def _inflate(body: bytes, encoding: str, max_bytes: int) -> bytes:
    """Undo a Content-Encoding that was not asked for, up to ``max_bytes``.

    Raises:
        _Failure: another encoding than gzip and deflate, or not of it, or too long.
    """
    if encoding not in ("gzip", "x-gzip", "deflate"):
        raise _Failure(RejectReason.BAD_RESPONSE, f"content encoding {encoding}")
    inflater = zlib.decompressobj(zlib.MAX_WBITS | 32)  # 32: gzip or zlib, by their headers
    try:
        inflated = inflater.decompress(body, max_bytes + 1)
    except zlib.error as error:
        raise _Failure(RejectReason.BAD_RESPONSE, f"not {encoding}: {error}") from error
    if len(inflated) > max_bytes:
        raise _too_many_bytes(max_bytes)
    if not inflater.eof:
        raise _Failure(RejectReason.BAD_RESPONSE, f"the {encoding} data end too early")
    return inflated


def _too_many_bytes(max_bytes: int) -> _Failure:
    return _Failure(RejectReason.TOO_MANY_BYTES, f"more than {max_bytes:,} bytes")


def _connection_failed(error: Exception) -> _Failure:
    detail = f"{type(error).__name__}: {error}"
    return _Failure(RejectReason.CONNECTION_FAILED, detail, retryable=True)
