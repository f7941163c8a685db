"""An OpenAI-compatible chat server whose every answer a test decides, failures included."""

import json
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

POLL_S = 0.02  # how soon the server notices that it shall stop


@dataclass(frozen=True)
class Reply:
    """What the server answers to one request; ``status`` other than 200 makes ``text`` an error."""

    text: str = ""
    finish_reason: str = "stop"
    status: int = 200
    prompt_tokens: int = 5
    completion_tokens: int = 7


class ChatServer:
    """Serves /v1/models and /v1/chat/completions on a free port of this machine.

    ``respond`` gets the JSON body of each request, in a thread of its own, and may sleep or raise
    ``ConnectionAbortedError``, upon which the connection is cut without an answer. ``bodies`` are
    the requests so far.
    """

    def __init__(
        self,
        respond: Callable[[dict[str, Any]], Reply],
        models: Sequence[str] = ("tiny",),
        max_model_len: int | None = None,
    ) -> None:
        self.bodies: list[dict[str, Any]] = []
        served: list[dict[str, Any]] = [{"id": name, "object": "model"} for name in models]
        if max_model_len is not None:  # as vLLM says it
            served = [model | {"max_model_len": max_model_len} for model in served]
        bodies = self.bodies

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                known = {"/v1/models": {"object": "list", "data": served}}
                found = known.get(self.path)
                self._send(200 if found else 404, found or {"error": {"message": "not found"}})

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                bodies.append(body)
                try:
                    reply = respond(body)
                except ConnectionAbortedError:
                    self.close_connection = True
                    return
                if reply.status != 200:
                    self._send(reply.status, {"error": {"message": reply.text}})
                    return
                choice = {
                    "message": {"role": "assistant", "content": reply.text},
                    "finish_reason": reply.finish_reason,
                }
                usage = {
                    "prompt_tokens": reply.prompt_tokens,
                    "completion_tokens": reply.completion_tokens,
                }
                self._send(200, {"choices": [choice], "usage": usage})

            def _send(self, status: int, body: Any) -> None:
                data = json.dumps(body).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *args: object) -> None:
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 256

            def handle_error(self, request: Any, client_address: Any) -> None:
                """Be silent: a client may leave in the middle."""

        self._server = Server(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(POLL_S,), daemon=True
        )

    @property
    def url(self) -> str:
        """The base URL, such as ``http://127.0.0.1:8000/v1``."""
        return f"http://127.0.0.1:{self._server.server_address[1]}/v1"

    def __enter__(self) -> "ChatServer":
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def prompt_of(body: dict[str, Any]) -> str:
    """Return the text of a request's user message."""
    content = body["messages"][-1]["content"]
    if isinstance(content, str):
        return content
    return "".join(part["text"] for part in content if part["type"] == "text")
