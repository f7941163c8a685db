"""A picture server that is no bottleneck: a few hundred JPEGs in memory, one process.

``/N.jpg`` is picture ``N % DISTINCT_PICTURES``; one URL in a hundred fails instead, always the same
ones and in the same way. The server answers at once, so that what is measured is the work of the
tool that asks, not its patience.

    python -m tests.benchmarks.picture_server    prints its port, then serves until it is ended
"""

import asyncio
import contextlib
import io
from collections.abc import Iterator
from http import HTTPStatus

import numpy as np
import skimage.data
from PIL import Image

HOSTS = [f"127.0.0.{number}" for number in range(1, 17)]
"""Addresses of this machine: URLs come from several hosts, as in every real list."""

DISTINCT_PICTURES = 300
_PHOTOGRAPHS = ["astronaut", "chelsea", "coffee", "rocket"]
_JPEG_QUALITY = 85
_NOISE = 6.0  # standard deviation in grey levels; with it those of 512 x 384 are 40 to 60 KB
_BACKLOG = 2048


def urls(count: int, port: int) -> list[str]:
    """Return ``count`` URLs in an order that goes round the hosts."""
    return [f"http://{HOSTS[n % len(HOSTS)]}:{port}/{n}.jpg" for n in range(count)]


def failure(number: int) -> HTTPStatus | None:
    """Say how URL ``number`` fails: of every thousand nine are gone, and one is a server error."""
    if number % 100 != 37:
        return None
    return HTTPStatus.INTERNAL_SERVER_ERROR if number % 1000 == 537 else HTTPStatus.NOT_FOUND


def draw_pictures(
    count: int = DISTINCT_PICTURES, width_px: int = 512, height_px: int = 384
) -> Iterator[bytes]:
    """Draw distinct pictures: crops of photographs with a camera's noise, as JPEGs."""
    random = np.random.default_rng(0)
    photographs = [Image.fromarray(getattr(skimage.data, name)()) for name in _PHOTOGRAPHS]
    for number in range(count):
        photograph = photographs[number % len(photographs)]
        scale = random.uniform(0.5, 1.0)
        width = scale * min(photograph.width, photograph.height * width_px / height_px)
        height = width * height_px / width_px
        left = random.uniform(0, photograph.width - width)
        top = random.uniform(0, photograph.height - height)
        crop = photograph.resize(
            (width_px, height_px),
            Image.Resampling.BICUBIC,
            box=(left, top, left + width, top + height),
        )
        noisy = np.asarray(crop) + random.normal(0, _NOISE, (height_px, width_px, 1))
        buffer = io.BytesIO()
        picture = Image.fromarray(noisy.clip(0, 255).astype(np.uint8))
        picture.save(buffer, "JPEG", quality=_JPEG_QUALITY)
        yield buffer.getvalue()


def _response(status: HTTPStatus, body: bytes) -> bytes:
    kind = "image/jpeg" if status is HTTPStatus.OK else "text/plain"
    head = f"HTTP/1.1 {status.value} {status.phrase}\r\nContent-Type: {kind}\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


class _Connection(asyncio.Protocol):
    """One client's connection; of HTTP it knows what the tools under test ask for, GET."""

    def __init__(self, pictures: list[bytes]) -> None:
        self._pictures = pictures
        self._received = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._received += data
        while b"\r\n\r\n" in self._received:
            request, self._received = self._received.split(b"\r\n\r\n", 1)
            _, path, _ = request.split(b" ", 2)
            self._transport.write(self._answer(int(path[1 : -len(b".jpg")])))
            if b"connection: close" in request.lower():
                self._transport.close()

    def _answer(self, number: int) -> bytes:
        if status := failure(number):
            return _response(status, status.phrase.encode())
        return self._pictures[number % len(self._pictures)]


async def _serve() -> None:
    pictures = [_response(HTTPStatus.OK, picture) for picture in draw_pictures()]
    loop = asyncio.get_running_loop()
    # The first host is given any free port; the others have to have the same.
    port = 0
    for host in HOSTS:
        server = await loop.create_server(
            lambda: _Connection(pictures), host, port, backlog=_BACKLOG
        )
        port = server.sockets[0].getsockname()[1]
    print(port, flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(_serve())
