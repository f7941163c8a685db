"""A web server that misbehaves on demand, for everything that takes bytes from strangers.

The first part of a path names a behaviour of `BEHAVIOURS`; the rest is free, so that each URL can
be its own. The server speaks in raw bytes, since libraries for servers refuse to do most of this.
"""

import asyncio
import gzip
import socket
import ssl
import threading
import time
import zlib
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from functools import cache
from ipaddress import ip_address
from pathlib import Path
from urllib.parse import unquote

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

GOOD_BODY = b"what was asked for " * 100


@dataclass(frozen=True)
class Request:
    """A request that the server saw; header names are in lower case."""

    path: str
    headers: Mapping[str, str]
    at_s: float  # monotonic
    connection: int


@dataclass
class Server:
    """What the server has seen so far, and where it is."""

    origin: str
    requests: list[Request] = field(default_factory=list)
    in_flight: int = 0
    most_in_flight: int = 0
    connections: int = 0
    times: Counter[str] = field(default_factory=Counter)  # each path was asked for
    tasks: set[asyncio.Task[None]] = field(default_factory=set)

    def url(self, path: str) -> str:
        return f"{self.origin}/{path}"

    def seen(self, path: str) -> list[Request]:
        """Return the requests for one path, in order."""
        return [request for request in self.requests if unquote(request.path) == f"/{path}"]


@dataclass(frozen=True)
class Exchange:
    """One request that waits for its answer."""

    request: Request
    nth: int  # how many times the path has been asked for, from 1
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def answer(self, status: int = 200, body: bytes = b"", *headers: str) -> None:
        lines = [f"HTTP/1.1 {status} X", f"Content-Length: {len(body)}", *headers]
        await self.send("\r\n".join([*lines, "", ""]).encode("latin-1") + body)

    @property
    def rest(self) -> str:
        """What follows the behaviour's name in the path."""
        return unquote(self.request.path.split("/", 2)[2])

    def hang_up(self) -> None:
        """Close the connection; the client sees its end."""
        self.writer.close()

    def reset(self) -> None:
        """Break the connection; the client sees a reset."""
        sock: socket.socket = self.writer.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        self.writer.transport.abort()


async def _good(exchange: Exchange) -> None:
    await exchange.answer(200, GOOD_BODY, "Content-Type: image/jpeg")


async def _slow(exchange: Exchange) -> None:
    await asyncio.sleep(0.05)
    await exchange.answer(200, GOOD_BODY)


async def _empty(exchange: Exchange) -> None:
    await exchange.answer(200)


async def _wrong_type(exchange: Exchange) -> None:
    await exchange.answer(200, GOOD_BODY, "Content-Type: text/html; charset=nonsense")


async def _no_length(exchange: Exchange) -> None:
    await exchange.send(b"HTTP/1.0 200 OK\r\n\r\n" + GOOD_BODY)
    exchange.hang_up()


async def _chunked(exchange: Exchange) -> None:
    await exchange.send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
    for part in (GOOD_BODY[:7], GOOD_BODY[7:]):
        await exchange.send(f"{len(part):x}\r\n".encode() + part + b"\r\n")
    await exchange.send(b"0\r\n\r\n")


async def _status(exchange: Exchange) -> None:
    """Answer with the status in the path."""
    status = int(exchange.rest.split("/")[0])
    await exchange.answer(status, b"" if status in (204, 304) else b"see the status")


async def _silent(exchange: Exchange) -> None:
    await exchange.reader.read()


async def _drip_headers(exchange: Exchange) -> None:
    await exchange.send(b"HTTP/1.1 200 OK\r\n")
    while True:
        await exchange.send(b"X-A: b\r\n")
        await asyncio.sleep(0.1)


async def _drip_body(exchange: Exchange) -> None:
    await exchange.send(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n")
    while True:
        await exchange.send(b"x")
        await asyncio.sleep(0.05)


async def _continue(exchange: Exchange) -> None:
    while True:
        await exchange.send(b"HTTP/1.1 100 Continue\r\n\r\n")
        await asyncio.sleep(0.02)


async def _endless(exchange: Exchange) -> None:
    await exchange.send(b"HTTP/1.1 200 OK\r\n\r\n")
    while True:
        await exchange.send(bytes(65536))


async def _endless_headers(exchange: Exchange) -> None:
    await exchange.send(b"HTTP/1.1 200 OK\r\nX-Long: ")
    while True:
        await exchange.send(b"x" * 65536)


async def _many_headers(exchange: Exchange) -> None:
    await exchange.answer(200, GOOD_BODY, *(f"X-{number}: y" for number in range(10_000)))


async def _huge_length(exchange: Exchange) -> None:
    """Announce a terabyte, and send it to whoever is patient."""
    await exchange.send(b"HTTP/1.1 200 OK\r\nContent-Length: 1099511627776\r\n\r\n")
    while True:
        await exchange.send(bytes(65536))


async def _short(exchange: Exchange) -> None:
    """Announce more than comes."""
    await exchange.send(b"HTTP/1.1 200 OK\r\nContent-Length: 2000\r\n\r\n" + bytes(1000))
    exchange.hang_up()


async def _long(exchange: Exchange) -> None:
    """Send more than was announced: bytes that look like the answer to a next request."""
    forged = b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\nforged"
    await exchange.send(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nshort" + forged)


async def _short_chunks(exchange: Exchange) -> None:
    await exchange.send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nabcde\r\n")
    exchange.hang_up()


async def _bad_chunks(exchange: Exchange) -> None:
    await exchange.send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\nabcde\r\n")


async def _two_lengths(exchange: Exchange) -> None:
    await exchange.send(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nabcdef")


async def _negative_length(exchange: Exchange) -> None:
    await exchange.send(b"HTTP/1.1 200 OK\r\nContent-Length: -5\r\n\r\nabcdef")


async def _no_http(exchange: Exchange) -> None:
    await exchange.send(b"220 mail.example ESMTP\r\n\r\n")
    exchange.hang_up()


async def _disconnect(exchange: Exchange) -> None:
    exchange.hang_up()


async def _reset(exchange: Exchange) -> None:
    exchange.reset()


async def _reset_half_way(exchange: Exchange) -> None:
    await exchange.send(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n" + bytes(50_000))
    await asyncio.sleep(0.05)
    exchange.reset()


async def _redirect(exchange: Exchange) -> None:
    """Redirect to what follows in the path."""
    await exchange.answer(302, b"", f"Location: {exchange.rest}")


async def _redirect_loop(exchange: Exchange) -> None:
    await exchange.answer(301, b"", f"Location: {exchange.request.path}")


async def _redirect_nowhere(exchange: Exchange) -> None:
    await exchange.answer(302)


async def _count_down(exchange: Exchange) -> None:
    """Redirect as many times as the path says, then answer."""
    left = int(exchange.rest)
    if left == 0:
        await _good(exchange)
    else:
        await exchange.answer(307, b"", f"Location: {left - 1}")


async def _gzip(exchange: Exchange) -> None:
    await exchange.answer(200, gzip.compress(GOOD_BODY), "Content-Encoding: gzip")


@cache
def gzip_bomb() -> bytes:
    """64 MiB of zeros in 64 kB."""
    compressor = zlib.compressobj(wbits=zlib.MAX_WBITS | 16)
    parts = [compressor.compress(bytes(1 << 20)) for _ in range(64)]
    return b"".join([*parts, compressor.flush()])


async def _gzip_bomb(exchange: Exchange) -> None:
    await exchange.answer(200, gzip_bomb(), "Content-Encoding: gzip")


async def _gzip_cut(exchange: Exchange) -> None:
    await exchange.answer(200, gzip.compress(GOOD_BODY)[:-9], "Content-Encoding: gzip")


async def _gzip_lie(exchange: Exchange) -> None:
    await exchange.answer(200, GOOD_BODY, "Content-Encoding: gzip")


async def _brotli(exchange: Exchange) -> None:
    await exchange.answer(200, GOOD_BODY, "Content-Encoding: br")


async def _retry_after(exchange: Exchange) -> None:
    """Answer 429 or 503 with Retry-After as the path says (429/2), then well."""
    status, seconds = exchange.rest.split("/")[:2]
    if exchange.nth == 1:
        await exchange.answer(int(status), b"", f"Retry-After: {seconds}")
    else:
        await _good(exchange)


async def _retry_after_date(exchange: Exchange) -> None:
    """Answer 429 with a date 1 to 2 seconds from now, in the one format without fractions."""
    if exchange.nth == 1:
        date = format_datetime(datetime.now(UTC) + timedelta(seconds=2), usegmt=True)
        await exchange.answer(429, b"", f"Retry-After: {date}")
    else:
        await _good(exchange)


async def _bad_then_good(exchange: Exchange) -> None:
    """Answer with the statuses in the path one after the other (503-500), then well."""
    statuses = exchange.rest.split("/")[0].split("-")
    if exchange.nth <= len(statuses):
        await exchange.answer(int(statuses[exchange.nth - 1]))
    else:
        await _good(exchange)


async def _set_cookie(exchange: Exchange) -> None:
    await exchange.answer(200, GOOD_BODY, "Set-Cookie: id=1; Path=/", "Set-Cookie: \x01;=;\xff")


async def _opt_out(exchange: Exchange) -> None:
    """Send an X-Robots-Tag that says noai, and a body that nobody should read."""
    await exchange.answer(200, GOOD_BODY, "X-Robots-Tag: noindex", "X-Robots-Tag: NoAI, nofollow")


async def _opt_out_of_others(exchange: Exchange) -> None:
    await exchange.answer(200, GOOD_BODY, "X-Robots-Tag: otherbot: noai")


async def _opt_out_redirect(exchange: Exchange) -> None:
    await exchange.answer(302, b"", "Location: /good", "X-Robots-Tag: noimageai")


async def _slow_count_down(exchange: Exchange) -> None:
    """Redirect like count-down, each time after a part of anybody's patience."""
    await asyncio.sleep(0.6)
    await _count_down(exchange)


BEHAVIOURS: dict[str, Callable[[Exchange], Awaitable[None]]] = {
    behaviour.__name__.removeprefix("_").replace("_", "-"): behaviour
    for behaviour in (
        *(_good, _slow, _empty, _wrong_type, _no_length, _chunked, _status),
        *(_silent, _drip_headers, _drip_body, _continue),
        *(_endless, _endless_headers, _many_headers, _huge_length),
        *(_short, _long, _short_chunks, _bad_chunks, _two_lengths, _negative_length, _no_http),
        *(_disconnect, _reset, _reset_half_way),
        *(_redirect, _redirect_loop, _redirect_nowhere, _count_down, _slow_count_down),
        *(_gzip, _gzip_bomb, _gzip_cut, _gzip_lie, _brotli),
        *(_retry_after, _retry_after_date, _bad_then_good),
        *(_set_cookie, _opt_out, _opt_out_of_others, _opt_out_redirect),
    )
}


@contextmanager
def run_server(host: str = "127.0.0.1", tls: ssl.SSLContext | None = None) -> Iterator[Server]:
    """Run the server in a thread of this process; ``host`` is any loopback address."""
    started: list[Server] = []
    loop = asyncio.new_event_loop()
    stop = asyncio.Event()
    is_up = threading.Event()

    async def serve() -> None:
        listener = await asyncio.start_server(
            lambda reader, writer: _serve_connection(server, reader, writer), host, 0, ssl=tls
        )
        port = listener.sockets[0].getsockname()[1]
        server = Server(f"{'https' if tls else 'http'}://{host}:{port}")
        started.append(server)
        is_up.set()
        await stop.wait()
        listener.close()
        for task in server.tasks:
            task.cancel()
        await asyncio.gather(*server.tasks)

    thread = threading.Thread(target=loop.run_until_complete, args=(serve(),), daemon=True)
    thread.start()
    is_up.wait()
    try:
        yield started[0]
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join()
        loop.close()


async def _serve_connection(
    server: Server, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
) -> None:
    task = asyncio.current_task()
    assert task is not None
    server.tasks.add(task)
    task.add_done_callback(server.tasks.discard)
    server.connections += 1
    connection = server.connections
    try:
        while True:
            first_byte = await reader.readexactly(1)
            if first_byte == b"\x16":  # a TLS handshake
                writer.write(b"HTTP/1.1 400 This is plain HTTP\r\n\r\n")
                writer.close()
                return
            head = (first_byte + await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
            first, *lines = head.split("\r\n")[:-2]
            headers = {name.lower(): value for name, value in (i.split(": ", 1) for i in lines)}
            request = Request(first.split(" ")[1], headers, time.monotonic(), connection)
            server.requests.append(request)
            server.times[request.path] += 1
            server.in_flight += 1
            server.most_in_flight = max(server.most_in_flight, server.in_flight)
            try:
                exchange = Exchange(request, server.times[request.path], reader, writer)
                await BEHAVIOURS[request.path.split("/")[1]](exchange)
            finally:
                server.in_flight -= 1
    except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
        pass  # the client has gone, or the test is over
    finally:
        if not writer.is_closing():
            writer.transport.abort()


@contextmanager
def silent_port() -> Iterator[int]:
    """Listen on a port whose connections are taken by the kernel and by nobody else."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield int(listener.getsockname()[1])


@contextmanager
def mute_tls_port(tls: ssl.SSLContext, first_words: bytes) -> Iterator[int]:
    """Listen on a port that shakes hands, says its first words, and never reads nor answers again.

    Unlike the server above, whose event loop answers the end of a TLS connection by itself.
    """
    connections: list[ssl.SSLSocket] = []

    def greet_all() -> None:
        while True:
            try:
                connection, _ = listener.accept()
                connections.append(tls.wrap_socket(connection, server_side=True))
                connections[-1].sendall(first_words)
            except OSError:  # the listener or the client has gone
                if closing.is_set():
                    return

    closing = threading.Event()
    with socket.create_server(("127.0.0.1", 0), backlog=500) as listener:
        thread = threading.Thread(target=greet_all, daemon=True)
        thread.start()
        try:
            yield int(listener.getsockname()[1])
        finally:
            closing.set()
            listener.shutdown(socket.SHUT_RDWR)
            thread.join()
            for connection in connections:
                connection.close()


def make_certificate(folder: Path, host: str) -> tuple[ssl.SSLContext, Path]:
    """Make a self-signed certificate of an address; return a server's context, and the file."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "hostile")])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ip_address(host))]), False)
        .sign(key, hashes.SHA256())
    )
    key_file, certificate_file = folder / "key.pem", folder / "certificate.pem"
    key_file.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    certificate_file.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate_file, key_file)
    return context, certificate_file
