"""A small web for the tests: a Hugging Face Hub, and pages such as any server has.

Of the Hub's API it speaks what huggingface_hub's file system asks for: commits, trees (in pages,
as the Hub gives them), files by range, and gates that a token opens. A client is pointed at it by
HF_ENDPOINT. Pages have ETags and ranges; what a server does beyond that is said by each page.
"""

import hashlib
import json
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlencode, urlsplit

import pytest

TOKEN = "hf_token-of-someone-who-accepted-the-terms"
LFS_SUFFIXES = (".parquet", ".tar", ".zip")
ENTRIES_PER_PAGE = 5
POLL_S = 0.02  # how soon a server notices that it shall stop

_API = re.compile(
    r"/api/datasets/(?P<repo>[^/]+/[^/]+)"
    r"(?:/(?P<what>revision|tree|commits|auth-check)(?:/(?P<revision>[^/]+))?(?:/(?P<path>.+))?)?"
)
_FILE = re.compile(r"/datasets/(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)")
_RANGE = re.compile(r"bytes=(\d+)-(\d*)")


@dataclass(frozen=True)
class Repository:
    """A dataset repository: its files at each commit, the newest first."""

    commits: Mapping[str, Mapping[str, bytes]]
    gated: bool = False


@dataclass(frozen=True)
class Page:
    """What a server answers under one path."""

    body: bytes = b""
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)


NOT_FOUND = Page(b"<html>nothing here</html>", 404)


class Hub(ThreadingHTTPServer):
    """Serves ``repositories`` by their names and ``pages`` by their paths, as they are by then."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories: dict[str, Repository] = {}
        self.pages: dict[str, Page] = {}
        self.requests: list[str] = []
        self.num_bytes_sent = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Be silent: a client may leave in the middle."""


@contextmanager
def serve_hub() -> Iterator[Hub]:
    """Serve from threads of this process."""
    with Hub() as hub:
        thread = threading.Thread(target=hub.serve_forever, args=(POLL_S,), daemon=True)
        thread.start()
        try:
            yield hub
        finally:
            hub.shutdown()
            thread.join()


def point_at(hub: Hub, patch: pytest.MonkeyPatch) -> None:
    """Make a server the Hub, for this process (which has read HF_ENDPOINT) and its children."""
    template = f"{hub.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    patch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
    patch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
    patch.setenv("HF_ENDPOINT", hub.url)
    patch.delenv("HF_TOKEN", raising=False)


class _Refused(Exception):
    """An answer of the Hub other than success: status and X-Error-Code."""


class _Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_GET(self) -> None:
        self.server.requests.append(f"{self.command} {self.path}")
        path = urlsplit(self.path).path
        try:
            if match := _API.fullmatch(path):
                self._reply_json(self._api(**match.groupdict()))
            elif match := _FILE.fullmatch(path):
                repository = self._repository(match["repo"])
                self._require_access(repository)
                files = self._files(repository, match["revision"])
                name = unquote(match["path"])
                if name not in files:
                    raise _Refused(404, "EntryNotFound")
                self._reply_range(Page(files[name]))
            else:
                self._reply_range(self.server.pages.get(unquote(path), NOT_FOUND))
        except _Refused as refused:
            status, code = refused.args
            self._reply(status, {"X-Error-Code": code}, b"{}")

    do_HEAD = do_GET

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing: a test's output is the test's."""

    def _api(
        self, repo: str, what: str | None, revision: str | None, path: str | None
    ) -> dict[str, Any] | list[dict[str, Any]]:
        repository = self._repository(repo)
        files = self._files(repository, revision)
        if what == "auth-check":
            self._require_access(repository)
            return {}
        if what == "commits":
            return [
                {"id": sha, "authors": [], "date": "2026-01-01T00:00:00.000Z", "title": "",
                 "message": ""}
                for sha in repository.commits
            ]  # fmt: skip
        if what == "tree":
            return self._tree(files, unquote(path or ""))
        sha = next(sha for sha, held in repository.commits.items() if held is files)
        return {"id": repo, "sha": sha, "gated": "auto" if repository.gated else False}

    def _tree(self, files: Mapping[str, bytes], folder: str) -> list[dict[str, Any]]:
        prefix = f"{folder}/" if folder else ""
        below = [name for name in files if name.startswith(prefix)]
        if not below:
            raise _Refused(404, "EntryNotFound")
        folders = {
            name[:end]
            for name in below
            for end in range(len(prefix), len(name))
            if name[end] == "/"
        }
        entries = [{"type": "directory", "path": name, "size": 0, "oid": ""} for name in folders]
        entries += [_file_entry(name, files[name]) for name in below]
        query = parse_qs(urlsplit(self.path).query)
        if query.get("recursive", ["false"])[0].lower() != "true":
            entries = [entry for entry in entries if "/" not in str(entry["path"])[len(prefix) :]]
        return sorted(entries, key=lambda entry: str(entry["path"]))

    def _repository(self, repo: str) -> Repository:
        if repo not in self.server.repositories:
            raise _Refused(401, "RepoNotFound")
        return self.server.repositories[repo]

    def _files(self, repository: Repository, revision: str | None) -> Mapping[str, bytes]:
        """Return the files of a commit; as on the Hub, the first digits of its hash are no name."""
        if revision in (None, "main"):
            return next(iter(repository.commits.values()))
        if revision not in repository.commits:
            raise _Refused(404, "RevisionNotFound")
        return repository.commits[revision]

    def _require_access(self, repository: Repository) -> None:
        if repository.gated and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            raise _Refused(403, "GatedRepo")

    def _reply_json(self, content: dict[str, Any] | list[dict[str, Any]]) -> None:
        headers = {"Content-Type": "application/json"}
        if isinstance(content, list):
            address = urlsplit(self.path)
            query = {name: values[0] for name, values in parse_qs(address.query).items()}
            start = int(query.get("cursor", 0))
            end = start + ENTRIES_PER_PAGE
            if end < len(content):
                following = urlencode(query | {"cursor": str(end)})
                headers["Link"] = f'<{self.server.url}{address.path}?{following}>; rel="next"'
            content = content[start:end]
        self._reply(200, headers, json.dumps(content).encode())

    def _reply_range(self, page: Page) -> None:
        headers = {"ETag": f'"{hashlib.md5(page.body).hexdigest()}"', "Accept-Ranges": "bytes"}
        headers |= page.headers
        wanted = _RANGE.fullmatch(self.headers.get("Range", ""))
        if page.status != 200 or wanted is None:
            self._reply(page.status, headers, page.body)
            return
        start, last = int(wanted[1]), int(wanted[2] or len(page.body))
        if start >= len(page.body):
            self._reply(416, {"Content-Range": f"bytes */{len(page.body)}"}, b"")
            return
        part = page.body[start : last + 1]
        end = start + len(part) - 1
        headers["Content-Range"] = f"bytes {start}-{end}/{len(page.body)}"
        self._reply(206, headers, part)

    def _reply(self, status: int, headers: Mapping[str, str], body: bytes) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.server.num_bytes_sent += len(body)
            self.wfile.write(body)


def _file_entry(name: str, data: bytes) -> dict[str, Any]:
    oid = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
    entry = {"type": "file", "path": name, "size": len(data), "oid": oid}
    if name.endswith(LFS_SUFFIXES):
        sha256 = hashlib.sha256(data).hexdigest()
        entry["lfs"] = {"oid": sha256, "size": len(data), "pointerSize": 134}
    return entry
