"""HTTP to the server of a model: one exchange at a time, and what each way of failing means."""

import asyncio
import io
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import aiohttp

from captioning.engine.chat import (
    Completion,
    CutOff,
    TimedOut,
    Trouble,
    Unreachable,
    check_status,
    one_line,
    read_completion,
)

_MAX_RESPONSE_BYTES = 4 << 20
_CONNECT_TIMEOUT_S = 30.0
# Less than the 5 s for which vLLM keeps an idle connection: a request on a connection that is being
# closed would look like one that killed the server.
_KEEP_CONNECTIONS_S = 2.0


@dataclass(frozen=True)
class Place:
    """Where a server is: its name for people, the URL that the API's paths follow, the model.

    ``socket`` is the Unix socket on which it listens, if it is one of this machine.
    """

    name: str
    url: str
    model: str
    key: str | None = None
    socket: Path | None = None


class Connection:
    """Speaks with a server, in one event loop."""

    def __init__(self, place: Place, session: aiohttp.ClientSession) -> None:
        self.place = place
        self._session = session

    async def complete(self, body: bytes, timeout_s: float, max_chars: int) -> Completion:
        """Send one request for a chat completion, of ``max_chars`` characters at most.

        Raises:
            NotTakenError: the server does not take it, and perhaps no other.
            Trouble: there is no answer.
            EvenmixError: the server refuses every request.
        """
        answer = await self._exchange("POST", "/chat/completions", body, timeout_s)
        return read_completion(answer, max_chars)

    async def models(self, timeout_s: float) -> bytes:
        """Ask for the list of the models; raises what :meth:`complete` raises."""
        return await self._exchange("GET", "/models", None, timeout_s)

    async def _exchange(
        self, method: str, path: str, body: bytes | None, timeout_s: float
    ) -> bytes:
        """Send an HTTP request and return the body of the response, whose status is 200."""
        url = self.place.url + path
        data = None if body is None else io.BytesIO(body)  # so that it is written bit by bit
        try:
            async with (
                asyncio.timeout(timeout_s),
                self._session.request(method, url, data=data, allow_redirects=False) as response,
            ):
                content = await _read(response)
        except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError) as error:
            raise Unreachable(f"no connection: {error}") from error
        except aiohttp.ClientError as error:
            # Not its repr(), which may have our headers, and so the key.
            what = one_line(f"{type(error).__name__}: {error}")
            raise CutOff(f"the connection broke: {what}") from error
        except TimeoutError as error:
            raise TimedOut(f"no answer within {timeout_s:g} s") from error
        check_status(response.status, response.headers.get("Retry-After"), content)
        return content


async def _read(response: aiohttp.ClientResponse) -> bytes:
    """Read a response, of which there may be more than anybody wants."""
    content = bytearray()
    async for chunk in response.content.iter_any():
        content += chunk
        if len(content) > _MAX_RESPONSE_BYTES:
            raise Trouble(f"an answer of more than {_MAX_RESPONSE_BYTES:,} bytes")
    return bytes(content)


@asynccontextmanager
async def connect(place: Place) -> AsyncIterator[Connection]:
    """Open a connection, which is made when it is used."""
    connector: aiohttp.BaseConnector
    # How many requests are sent at once is for the caller to say.
    if place.socket is not None:
        connector = aiohttp.UnixConnector(
            str(place.socket), limit=0, keepalive_timeout=_KEEP_CONNECTIONS_S
        )
    else:
        connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=_KEEP_CONNECTIONS_S)
    headers = {"Content-Type": "application/json", "Accept-Encoding": "identity"}
    if place.key is not None:
        headers["Authorization"] = f"Bearer {place.key}"
    async with aiohttp.ClientSession(
        connector=connector,
        # The one limit that matters is on the whole of a request, and set there.
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_TIMEOUT_S),
        headers=headers,
        auto_decompress=False,
        cookie_jar=aiohttp.DummyCookieJar(),
    ) as session:
        yield Connection(place, session)
