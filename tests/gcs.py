"""A Google Cloud Storage for the tests: the emulator behind a proxy that keeps preconditions.

`gcp-storage-emulator` stores and lists objects well but ignores `ifGenerationMatch`, and a build on
gs:// commits by exactly that: an upload that succeeds only if the object does not exist. So the
emulator listens on a private port, the clients are pointed at a small proxy in front of it, and the
proxy checks and forwards every write under one lock. The emulator answers one request at a time
anyway, so one lock for all objects loses nothing. What the proxy cannot enforce it refuses.

The proxy also does what the emulator leaves out of listings (pages, offsets, fields) and of uploads
that have ended (their answer can be asked for again), counts requests, and lets a test decide that
some of them go wrong (tests/gcs_faults.py).

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
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from enum import Enum, auto
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlsplit

import psutil
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa

import pipeline.gcs  # noqa: F401  # It configures gcsfs, so it comes before whoever imports that.

BUCKET = "evenmix-test"
PROJECT = "evenmix-test"
HOST = "127.0.0.1"
REQUEST_TIMEOUT_S = 60
STARTUP_TIMEOUT_S = 30

# The object that a request acts on; of a copy or rewrite, the destination, which comes last.
OBJECT_PATH = re.compile(r"/b/(?P<bucket>[^/]+)/o/(?P<name>[^/]+)(?:/compose)?$")
LIST_PATH = re.compile(r"/b/[^/]+/o$")
UPLOAD_PATH = re.compile(r"/upload/storage/v1/b/(?P<bucket>[^/]+)/o$")
# Headers about the one connection, which a proxy does not hand on; it sets its own lengths.
CONNECTION_HEADERS = {"connection", "content-length", "date", "server", "transfer-encoding"}


@dataclass(frozen=True)
class Precondition:
    """`ifGenerationMatch`: the object's generation must be this one; 0 means it must not exist."""

    bucket: str
    name: str
    generation: int


class Fault(Enum):
    """How a request can go wrong."""

    TOO_MANY_REQUESTS = auto()  # 429, to be tried again after a second
    UNAVAILABLE = auto()  # 503
    CUT_REQUEST = auto()  # the connection is dropped half way through the request's body
    LOST_ANSWER = auto()  # the connection is dropped after the request has taken effect
    CUT_ANSWER = auto()  # the connection is dropped half way through the answer's body
    DAMAGED_REQUEST = auto()  # a bit of the request's body is flipped on the way


FaultOf = Callable[[str], Fault | None]
"""Told a request, such as `GET /storage/v1/b/bucket/o?prefix=a`, says how it goes wrong, if so."""


@dataclass
class Upload:
    """A resumable upload: its precondition, what came of it, and the answer to its end."""

    condition: Precondition | None
    num_bytes: int = 0
    answer: tuple[int, dict[str, str], bytes] | None = None


class Proxy(ThreadingHTTPServer):
    """Enforces `ifGenerationMatch` before an emulator that ignores it.

    Attributes:
        requests: all requests but those for tokens, in the form that `fault_of` is told.
        fault_of: decides which of them go wrong.
        page_objects: how many objects a page of a listing has at most.
    """

    daemon_threads = True

    def __init__(self, emulator: "Emulator") -> None:
        super().__init__((HOST, 0), ProxyHandler)
        self.emulator = emulator
        self.write_lock = threading.Lock()
        self.uploads: dict[str, Upload] = {}  # by upload id
        self.requests: list[str] = []
        self.page_objects = 1000
        self.fault_of: FaultOf = lambda request: None

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self.server_port}"

    def restart(self, down_s: float) -> None:
        """Kill the emulator and start it again; objects are kept, uploads under way are lost.

        It is not killed in the midst of a write, which would damage its own files.
        """
        with self.write_lock:
            self.emulator.kill()
            self.uploads.clear()
        time.sleep(down_s)
        self.emulator.start()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Be silent when a client went away: gcsfs cancels requests it no longer needs."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)

    def forward(
        self, method: str, path: str, headers: dict[str, str], body: bytes = b""
    ) -> tuple[int, dict[str, str], bytes]:
        """Ask the emulator; return status, headers and body."""
        connection = HTTPConnection(HOST, self.emulator.port, timeout=REQUEST_TIMEOUT_S)
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
    fault: Fault | None
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        query = {name: values[0] for name, values in parse_qs(url.query).items()}
        request = f"{self.command} {self.path}"
        self.fault = None if url.path == "/token" else self.server.fault_of(request)
        body = self._read_body()
        if url.path == "/token":
            token = {"access_token": "emulator", "expires_in": 3600, "token_type": "Bearer"}
            self._reply_json(200, token)
            return
        self.server.requests.append(request)
        if self.fault is Fault.CUT_REQUEST:
            self._drop_connection()
        elif self.fault is Fault.TOO_MANY_REQUESTS:
            self._reply_error(429, "rateLimitExceeded", "slow down", {"Retry-After": "1"})
        elif self.fault is Fault.UNAVAILABLE:
            self._reply_error(503, "backendError", "try again later")
        elif unknown := self._unknown_preconditions(query, body):
            self._reply_error(400, "invalid", f"the test proxy does not enforce {unknown}")
        elif self.command == "GET" and "ifGenerationMatch" not in query:
            if not self._spell_out_range(url.path):
                self._reply_error(416, "requestedRangeNotSatisfiable", "there are no bytes")
                return
            answer = self._forward(body)
            if LIST_PATH.search(url.path):
                answer = _page(answer, query, self.server.page_objects)
            self._reply(*answer)
        elif self.command == "DELETE" and "upload_id" in query:
            # The emulator cannot cancel a resumable upload. 499 is how GCS says that it did.
            self._reply(499, {}, b"")
        else:
            self._reply_to_conditional(url.path, query, body)

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
                upload = self.server.uploads.get(query["upload_id"])
                if upload is None:
                    self._reply_error(410, "gone", "There is no such upload.")
                    return
                if upload.answer is not None:
                    self._reply(*upload.answer)
                    return
                condition, must_hold = upload.condition, self._ends_upload()
                body = self._skip_kept(upload.num_bytes, body)
            else:
                upload = None
                condition, must_hold = self._precondition(path, query, body), True
            if condition is not None and must_hold:
                current = self.server.generation(condition.bucket, condition.name)
                absent_is_404 = current == 0 and self.command in ("GET", "DELETE")
                if current != condition.generation and not absent_is_404:
                    message = "At least one of the pre-conditions you specified did not hold."
                    self._reply_error(412, "conditionNotMet", message)
                    return
            answer = status, headers, _ = self._forward(body)
            if starts_upload and status == 200:
                upload_id = parse_qs(urlsplit(headers["Location"]).query)["upload_id"][0]
                self.server.uploads[upload_id] = Upload(condition)
            if upload is not None and status == 308:
                upload.num_bytes = int(headers["Range"].rpartition("-")[2]) + 1
            if upload is not None and status == 200:
                upload.answer = answer
        self._reply(*answer)

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

    def _skip_kept(self, num_bytes: int, body: bytes) -> bytes:
        """Leave out what the store has of an upload already, as GCS does; the emulator refuses it.

        "Retries and resending data" in https://cloud.google.com/storage/docs/resumable-uploads.
        """
        place = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+)", self.headers.get("Content-Range", ""))
        if place is None or int(place[1]) >= num_bytes:
            return body
        is_rest = num_bytes <= int(place[2])
        rest = f"{num_bytes}-{place[2]}" if is_rest else "*"
        self.headers.replace_header("Content-Range", f"bytes {rest}/{place[3]}")
        return body[num_bytes - int(place[1]) :]

    def _spell_out_range(self, path: str) -> bool:
        """Turn a range counted from the end, which the emulator ignores, into one from the start.

        Returns whether there is anything in the range.
        """
        last = re.fullmatch(r"bytes=-(\d+)", self.headers.get("Range", ""))
        if last is None:
            return True
        status, _, body = self.server.forward("GET", path.removeprefix("/download"), {})
        if status != 200:
            return True
        size = int(json.loads(body)["size"])
        self.headers.replace_header("Range", f"bytes={max(0, size - int(last[1]))}-")
        return size > 0

    def _unknown_preconditions(self, query: dict[str, str], body: bytes) -> str:
        """Name the conditions that were asked for and that this proxy would not keep."""
        unknown = [name for name in query if name.startswith("if") and name != "ifGenerationMatch"]
        unknown += [name for name in self.headers if name.lower().startswith("x-goog-if-")]
        if self.path.startswith("/batch/") and re.search(rb"[?&]if\w*Match=", body):
            unknown.append("preconditions in a batch")
        return ", ".join(unknown)

    def _read_body(self) -> bytes:
        """Read the body, half of it if the connection is to break then."""
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            length = int(self.headers.get("Content-Length", 0))
            return self.rfile.read(length // 2 if self.fault is Fault.CUT_REQUEST else length)
        chunks = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        while self.rfile.readline().strip():
            pass  # trailers
        return b"".join(chunks)

    def _forward(self, body: bytes) -> tuple[int, dict[str, str], bytes]:
        """Forward this request. Its Host stays: the upload URLs made from it lead back here."""
        if self.fault is Fault.DAMAGED_REQUEST and body:
            body = bytes([body[0] ^ 1]) + body[1:]
        headers = {k: v for k, v in self.headers.items() if k.lower() not in CONNECTION_HEADERS}
        return self.server.forward(self.command, self.path, headers, body)

    def _reply(self, status: int, headers: dict[str, str], body: bytes) -> None:
        if self.fault is Fault.LOST_ANSWER:
            self._drop_connection()
            return
        self.send_response(status)
        for name, value in headers.items():
            if name.lower() not in CONNECTION_HEADERS:
                self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.fault is Fault.CUT_ANSWER:
            self.wfile.write(body[: len(body) // 2])
            self._drop_connection()
        else:
            self.wfile.write(body)

    def _drop_connection(self) -> None:
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def _reply_json(
        self, status: int, content: dict[str, object], headers: dict[str, str] | None = None
    ) -> None:
        headers = {"Content-Type": "application/json", **(headers or {})}
        self._reply(status, headers, json.dumps(content).encode())

    def _reply_error(
        self, status: int, reason: str, message: str, headers: dict[str, str] | None = None
    ) -> None:
        """Reply with an error in the form of the JSON API."""
        errors = [{"domain": "global", "reason": reason, "message": message}]
        error = {"code": status, "message": message, "errors": errors}
        self._reply_json(status, {"error": error}, headers)


def _page(
    answer: tuple[int, dict[str, str], bytes], query: dict[str, str], max_objects: int
) -> tuple[int, dict[str, str], bytes]:
    """Cut the page that was asked for out of a whole listing without delimiter."""
    status, headers, body = answer
    if status != 200 or "delimiter" in query:
        return answer
    start = max(query.get("startOffset", ""), query.get("pageToken", ""))
    items = [
        item
        for item in json.loads(body)["items"]
        if item["name"] >= start and ("endOffset" not in query or item["name"] < query["endOffset"])
    ]
    size = min(int(query.get("maxResults", max_objects)), max_objects)
    page: dict[str, Any] = {"kind": "storage#objects", "items": items[:size]}
    if items[size:]:
        page["nextPageToken"] = items[size]["name"]
    if fields := re.fullmatch(r"nextPageToken,items\(([\w,]+)\)", query.get("fields", "")):
        names = fields[1].split(",")
        del page["kind"]
        page["items"] = [{name: item[name] for name in names} for item in page["items"]]
    return status, headers, json.dumps(page).encode()


def start_on_free_port(
    command: list[str], timeout_s: float, **options: Any
) -> tuple[subprocess.Popen[bytes], int]:
    """Start a server that is told port 0, and wait until it listens; return it and its port.

    A port that was found to be free could be anybody's before the server has it.
    """
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, **options)
    deadline = time.monotonic() + timeout_s
    while (port := _listening_port(process.pid)) is None:
        if process.poll() is not None or time.monotonic() > deadline:
            process.kill()
            process.wait()
            raise RuntimeError(f"the server did not start: {command}")
        time.sleep(0.05)
    return process, port


def _listening_port(pid: int) -> int | None:
    with suppress(psutil.Error):  # it has just ended
        for each in psutil.Process(pid).net_connections("tcp"):
            if each.status == psutil.CONN_LISTEN:
                return int(each.laddr.port)
    return None


class Emulator:
    """The emulator, with the bucket `BUCKET`: in memory, or in a folder that outlives it."""

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder
        self.port = 0

    def start(self) -> None:
        """Start it on a free port, and wait until it listens."""
        where = ["start", "--in-memory"]
        if self._folder is not None:
            where = [f"--data-dir={self._folder}", "start"]
        options = [f"--host={HOST}", "--port=0", f"--default-bucket={BUCKET}", "--quiet"]
        command = [sys.executable, "-m", "gcp_storage_emulator", *where, *options]
        self._process, self.port = start_on_free_port(command, STARTUP_TIMEOUT_S)

    def kill(self) -> None:
        """End it at once."""
        self._process.kill()
        self._process.wait()


@contextmanager
def run_proxy(emulator: Emulator) -> Iterator[Proxy]:
    """Run the emulator, and before it the proxy in threads of this process."""
    emulator.start()
    with Proxy(emulator) as proxy:
        thread = threading.Thread(target=proxy.serve_forever, daemon=True)
        thread.start()
        try:
            yield proxy
        finally:
            proxy.shutdown()
            thread.join()
            emulator.kill()


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


@contextmanager
def serve_gcs(emulator: Emulator, folder: Path) -> Iterator[Proxy]:
    """Make an emulator the storage that gs:// means in this process and in its children.

    `folder` takes the credentials.
    """
    with run_proxy(emulator) as proxy, pytest.MonkeyPatch.context() as patch:
        write_credentials(folder / "credentials.json", f"{proxy.url}/token")
        patch.setenv("STORAGE_EMULATOR_HOST", proxy.url)
        patch.setenv("GOOGLE_APPLICATION_CREDENTIALS", os.fspath(folder / "credentials.json"))
        patch.setenv("GOOGLE_CLOUD_PROJECT", PROJECT)
        import gcsfs

        if gcsfs.GCSFileSystem.__module__ != "gcsfs.core":
            raise RuntimeError("gcsfs was imported before pipeline.gcs, which configures it")
        yield proxy


@pytest.fixture(scope="session")
def gcs_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Proxy]:
    """The storage that gs:// means until the session ends."""
    with serve_gcs(Emulator(), tmp_path_factory.mktemp("gcs")) as proxy:
        yield proxy


@pytest.fixture
def gcs_bucket(gcs_server: Proxy) -> str:
    """A gs:// URL under which nothing is stored yet."""
    return f"gs://{BUCKET}/{uuid.uuid4().hex}"
