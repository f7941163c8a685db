"""A small web site for the tests, whose answers change as a test wants them to."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Site:
    """What the site does: by path a status, a body and headers.

    Every answer takes ``delay_s``; a site that ``is_down`` hangs up without one; the paths of
    ``once`` are gone after they were asked for once.
    """

    url: str = ""
    once: set[str] = field(default_factory=set)
    delay_s: float = 0.0
    is_down: bool = False
    answers: dict[str, tuple[int, bytes, dict[str, str]]] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)


@contextmanager
def serve() -> Iterator[Site]:
    site = Site()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            site.asked.append(self.path)
            time.sleep(site.delay_s)
            if site.is_down:
                self.close_connection = True
                return
            gone = self.path in site.once and site.asked.count(self.path) > 1
            there = {} if gone else site.answers
            status, body, headers = there.get(self.path, (404, b"not here", {}))
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            """Be silent."""

    class Server(ThreadingHTTPServer):
        request_queue_size = 64

        def handle_error(self, request: Any, client_address: Any) -> None:
            """Be silent: clients are killed here."""

    server = Server(("127.0.0.1", 0), Handler)
    site.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield site
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
