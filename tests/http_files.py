"""A web server for a folder of large files, with ranges and ETags, that can be told to fail."""

import hashlib
import re
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

_RANGE = re.compile(r"bytes=(\d+)-(\d*)")


class FileServer(ThreadingHTTPServer):
    """Serves the files of ``folder`` as they are by then.

    ``ranges`` are the ranges, as (first, last), of all GET requests so far that were answered in
    full; the next ``unavailable`` GET requests get status 503, the next ``dropped`` ones half
    their bytes. After ``held_after`` ranges every further GET request waits for ever, after
    ``gone_after`` every one gets status 503.
    """

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder = folder
        self.ranges: list[tuple[int, int]] = []
        self.num_requests = 0
        self.unavailable = 0
        self.dropped = 0
        self.held_after = self.gone_after = sys.maxsize
        self.num_held = 0
        self.has_ranges = True
        self.tells_size = True
        self.claimed_bytes: int | None = None
        self.lock = threading.Lock()
        self.closing = threading.Event()

    def url(self, name: str) -> str:
        return f"http://127.0.0.1:{self.server_port}/{name}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Be silent: clients are killed here."""


@contextmanager
def serve_files(folder: Path) -> Iterator[FileServer]:
    """Serve a folder from threads of this process."""
    with FileServer(folder) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.closing.set()
            server.shutdown()
            thread.join()


class _Handler(BaseHTTPRequestHandler):
    server: FileServer
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        server, path = self.server, self.server.folder / self.path.lstrip("/")
        with server.lock:
            server.num_requests += 1
        if not path.is_file():
            self._answer(404, {}, b"")
            return
        data = path.read_bytes()
        headers = {"ETag": f'"{hashlib.md5(data).hexdigest()}"'}
        if self.command == "HEAD":
            self._answer(200, headers, data)
            return
        wanted = _RANGE.fullmatch(self.headers.get("Range", "")) if server.has_ranges else None
        first, last = 0, len(data) - 1
        if wanted:
            first, last = int(wanted[1]), min(int(wanted[2] or last), last)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
        body = data[first : last + 1]
        with server.lock:
            unavailable, dropped = server.unavailable > 0, server.dropped > 0
            server.unavailable -= unavailable
            server.dropped -= dropped and not unavailable
            unavailable |= len(server.ranges) >= server.gone_after
            held = len(server.ranges) >= server.held_after
            server.num_held += held
            if not (unavailable or dropped or held):
                server.ranges.append((first, last))
        if held:
            server.closing.wait()
        elif unavailable:
            self._answer(503, {}, b"come back later")
        else:
            self._answer(206 if wanted else 200, headers, body, len(body) // (1 + dropped))

    def log_message(self, format: str, *args: object) -> None:
        pass

    def _answer(
        self, status: int, headers: dict[str, str], body: bytes, sent_bytes: int | None = None
    ) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        if self.server.tells_size:
            claimed = self.server.claimed_bytes if self.command == "HEAD" else None
            self.send_header("Content-Length", str(claimed or len(body)))
        else:
            self.send_header("Connection", "close")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[:sent_bytes])
        # A connection that owes bytes is of no further use.
        self.close_connection = sent_bytes is not None and sent_bytes < len(body)
