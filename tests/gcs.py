"""A Google Cloud Storage for the tests: the emulator behind a proxy that keeps preconditions.

`gcp-storage-emulator` stores and lists objects well but ignores `ifGenerationMatch`, and a build on
gs:// commits by exactly that: an upload that succeeds only if the object does not exist. So the
emulator listens on a private port, the clients are pointed at a small proxy in front of it, and the
proxy checks and forwards every write under one lock. The emulator answers one request at a time
anyway, so one lock for all objects loses nothing. What the proxy cannot enforce it refuses.

A test asks for `gcs_bucket`; tests/conftest.py loads this plugin.
"""

import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlsplit

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa

BUCKET = "evenmix-test"
PROJECT = "evenmix-test"
HOST = "127.0.0.1"
REQUEST_TIMEOUT_S = 60
STARTUP_TIMEOUT_S = 30

# The object that a request acts on; of a copy or rewrite, the destination, which comes last.
OBJECT_PATH = re.compile(r"/b/(?P<bucket>[^/]+)/o/(?P<name>[^/]+)(?:/compose)?$")
UPLOAD_PATH = re.compile(r"/upload/storage/v1/b/(?P<bucket>[^/]+)/o$")
# Headers about the one connection, which a proxy does not hand on; it sets its own lengths.
CONNECTION_HEADERS = {"connection", "content-length", "date", "server", "transfer-encoding"}


@dataclass(frozen=True)
class Precondition:
    """`ifGenerationMatch`: the object's generation must be this one; 0 means it must not exist."""

    bucket: str
    name: str
    generation: int


class Proxy(ThreadingHTTPServer):
    """Enforces `ifGenerationMatch` before an emulator on `emulator_port` that ignores it."""

    daemon_threads = True

    def __init__(self, emulator_port: int) -> None:
        super().__init__((HOST, 0), ProxyHandler)
        self.emulator_port = emulator_port
        self.write_lock = threading.Lock()
        self.resumable: dict[str, Precondition] = {}  # by upload id

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self.server_port}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Be silent when a client went away: gcsfs cancels requests it no longer needs."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)

    def forward(
        self, method: str, path: str, headers: dict[str, str], body: bytes = b""
    ) -> tuple[int, dict[str, str], bytes]:
        """Ask the emulator; return status, headers and body."""
        connection = HTTPConnection(HOST, self.emulator_port, timeout=REQUEST_TIMEOUT_S)
        try:
            connection.request(method, path, body=body, headers=headers)
            response = connection.getresponse()
            return response.status, dict(response.getheaders()), response.read()
        finally:
            connection.close()

    def generation(self, bucket: str, name: str) -> int:
        """Return the object's generation, 0 if there is none."""
        path = f"/storage/v1/b/{quote(bucket, safe='')}/o/{quote(name, safe='')}"
        status, _, body = self.forward("GET", path, {})
        if status == 404:
            return 0
        return int(json.loads(body)["generation"])


class ProxyHandler(BaseHTTPRequestHandler):
    """One client's requests."""

    server: Proxy
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_GET(self) -> None:
        body = self._read_body()
        query = {name: values[0] for name, values in parse_qs(urlsplit(self.path).query).items()}
        path = urlsplit(self.path).path
        if path == "/token":
            token = {"access_token": "emulator", "expires_in": 3600, "token_type": "Bearer"}
            self._reply_json(200, token)
        elif unknown := self._unknown_preconditions(query, body):
            self._reply_error(400, "invalid", f"the test proxy does not enforce {unknown}")
        elif self.command == "GET" and "ifGenerationMatch" not in query:
            self._reply(*self._forward(body))
        elif self.command == "DELETE" and "upload_id" in query:
            # The emulator cannot cancel a resumable upload. 499 is how GCS says that it did.
            self._reply(499, {}, b"")
        else:
            self._reply_to_conditional(path, query, body)

    do_POST = do_PUT = do_PATCH = do_DELETE = do_GET

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing: a test's output is the test's."""

    def _reply_to_conditional(self, path: str, query: dict[str, str], body: bytes) -> None:
        """Forward a request that may carry a precondition if that holds, else reply 412.

        A resumable upload's precondition is given when the upload starts and must hold then and
        when it ends, whatever happened to the object in between.
        """
        starts_upload = query.get("uploadType") == "resumable" and "upload_id" not in query
        with self.server.write_lock:
            if "upload_id" in query:
                condition = self.server.resumable.get(query["upload_id"])
                must_hold = self._ends_upload()
            else:
                condition = self._precondition(path, query, body)
                must_hold = True
            if condition is not None and must_hold:
                current = self.server.generation(condition.bucket, condition.name)
                absent_is_404 = current == 0 and self.command in ("GET", "DELETE")
                if current != condition.generation and not absent_is_404:
                    message = "At least one of the pre-conditions you specified did not hold."
                    self._reply_error(412, "conditionNotMet", message)
                    return
            status, headers, content = self._forward(body)
            if starts_upload and condition is not None and status == 200:
                upload_id = parse_qs(urlsplit(headers["Location"]).query)["upload_id"][0]
                self.server.resumable[upload_id] = condition
        self._reply(status, headers, content)

    def _precondition(self, path: str, query: dict[str, str], body: bytes) -> Precondition | None:
        if "ifGenerationMatch" not in query:
            return None
        generation = int(query["ifGenerationMatch"])
        if upload := UPLOAD_PATH.search(path):
            name = query.get("name") or self._name_in_metadata(body)
            return Precondition(unquote(upload["bucket"]), name, generation)
        if target := OBJECT_PATH.search(path):
            return Precondition(unquote(target["bucket"]), unquote(target["name"]), generation)
        raise ValueError(f"ifGenerationMatch on {self.command} {path}, which names no object")

    def _name_in_metadata(self, body: bytes) -> str:
        """Read the object's name in the JSON that is an upload's whole body or its first part."""
        if self.headers.get_content_maintype() == "multipart":
            boundary = b"--" + str(self.headers.get_param("boundary")).encode()
            part = body.split(boundary, 2)[1]
            body = part[part.index(b"{") :]
        return str(json.loads(body)["name"])

    def _ends_upload(self) -> bool:
        """Tell whether this part of an upload is its last: only that one knows the end."""
        content_range = self.headers.get("Content-Range", "")
        known_end = re.fullmatch(r"bytes (?:\d+-(\d+)|\*)/(\d+)", content_range)
        if known_end is None:
            return not content_range
        last, total = known_end.groups()
        return last is None or int(last) + 1 == int(total)

    def _unknown_preconditions(self, query: dict[str, str], body: bytes) -> str:
        """Name the conditions that were asked for and that this proxy would not keep."""
        unknown = [name for name in query if name.startswith("if") and name != "ifGenerationMatch"]
        unknown += [name for name in self.headers if name.lower().startswith("x-goog-if-")]
        if self.path.startswith("/batch/") and re.search(rb"[?&]if\w*Match=", body):
            unknown.append("preconditions in a batch")
        return ", ".join(unknown)

    def _read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        chunks = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        while self.rfile.readline().strip():
            pass  # trailers
        return b"".join(chunks)

    def _forward(self, body: bytes) -> tuple[int, dict[str, str], bytes]:
        """Forward this request. Its Host stays: the upload URLs made from it lead back here."""
        headers = {k: v for k, v in self.headers.items() if k.lower() not in CONNECTION_HEADERS}
        return self.server.forward(self.command, self.path, headers, body)

    def _reply(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.send_response(status)
        for name, value in headers.items():
            if name.lower() not in CONNECTION_HEADERS:
                self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _reply_json(self, status: int, content: dict[str, object]) -> None:
        self._reply(status, {"Content-Type": "application/json"}, json.dumps(content).encode())

    def _reply_error(self, status: int, reason: str, message: str) -> None:
        """Reply with an error in the form of the JSON API."""
        errors = [{"domain": "global", "reason": reason, "message": message}]
        self._reply_json(status, {"error": {"code": status, "message": message, "errors": errors}})


@contextmanager
def run_emulator() -> Iterator[int]:
    """Run the emulator, empty and in memory, with the bucket `BUCKET`; yield its port."""
    with socket.create_server((HOST, 0)) as probe:
        port = probe.getsockname()[1]
    options = [f"--host={HOST}", f"--port={port}", "--in-memory", f"--default-bucket={BUCKET}"]
    command = [sys.executable, "-m", "gcp_storage_emulator", "start", "--quiet", *options]
    emulator = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + STARTUP_TIMEOUT_S
        while True:
            try:
                socket.create_connection((HOST, port)).close()
                break
            except ConnectionRefusedError:
                if emulator.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"the emulator did not start: {command}") from None
                time.sleep(0.05)
        yield port
    finally:
        emulator.terminate()
        emulator.wait()


@contextmanager
def run_proxy(emulator_port: int) -> Iterator[Proxy]:
    """Run the proxy in threads of this process."""
    with Proxy(emulator_port) as proxy:
        thread = threading.Thread(target=proxy.serve_forever, daemon=True)
        thread.start()
        try:
            yield proxy
        finally:
            proxy.shutdown()
            thread.join()


def write_credentials(path: Path, token_url: str) -> None:
    """Write a service account whose tokens come from `token_url`.

    With it every Google client, here and in child processes, finds its default credentials at once;
    without any, Beam searches for 17 to 27 s, metadata server and retries included.
    """
    key = rsa.generate_private_key(public_exponent=65537, key_size=2048).private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    account = {
        "type": "service_account",
        "project_id": PROJECT,
        "client_email": f"tests@{PROJECT}.iam.gserviceaccount.com",
        "private_key": key.decode(),
        "token_uri": token_url,
    }
    path.write_text(json.dumps(account))


@pytest.fixture(scope="session")
def gcs_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Proxy]:
    """The storage that gs:// means in this process and in its children until the session ends."""
    credentials = tmp_path_factory.mktemp("gcs") / "credentials.json"
    with (
        run_emulator() as emulator_port,
        run_proxy(emulator_port) as proxy,
        pytest.MonkeyPatch.context() as patch,
    ):
        write_credentials(credentials, f"{proxy.url}/token")
        patch.setenv("STORAGE_EMULATOR_HOST", proxy.url)
        patch.setenv("GOOGLE_APPLICATION_CREDENTIALS", os.fspath(credentials))
        patch.setenv("GOOGLE_CLOUD_PROJECT", PROJECT)
        # Else gcsfs asks Google over gRPC, 60 s for each bucket, what kind of bucket it is.
        patch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
        import gcsfs

        if gcsfs.GCSFileSystem.__module__ != "gcsfs.core":
            raise RuntimeError("gcsfs was imported before gcs_server: import it where it is used")
        yield proxy


@pytest.fixture
def gcs_bucket(gcs_server: Proxy) -> str:
    """A gs:// URL under which nothing is stored yet."""
    return f"gs://{BUCKET}/{uuid.uuid4().hex}"
