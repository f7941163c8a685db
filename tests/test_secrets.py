"""The token of gated repositories reaches workers, by the name of a secret, and nothing else."""

import base64
import json
import os
import pickle
import threading
from collections.abc import Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from pipeline import secrets
from pipeline.beam_pipeline import PublishItems, failure_of
from pipeline.errors import EvenmixError
from pipeline.secrets import provide_hf_token
from tests.gcs import write_credentials
from tests.stages import Words

SECRET = "projects/my-project/secrets/hf-token/versions/latest"
TOKEN = "hf_NobodyMaySeeThis"


class GoogleServer(ThreadingHTTPServer):
    """Secret Manager, and where a service account gets its access tokens.

    It answers with ``status``, but first with each of ``refusals``.
    """

    status = 200
    refusals: Sequence[int] = ()

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), GoogleHandler)
        self.reads: list[tuple[str, str]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class GoogleHandler(BaseHTTPRequestHandler):
    server: GoogleServer

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self._reply(200, {"access_token": "of-the-worker", "expires_in": 3600})

    def do_GET(self) -> None:
        self.server.reads.append((self.path, self.headers["Authorization"]))
        if len(self.server.reads) <= len(self.server.refusals):
            return self._reply(self.server.refusals[len(self.server.reads) - 1], {})
        data = base64.b64encode(f"{TOKEN}\n".encode()).decode()
        return self._reply(self.server.status, {"name": SECRET, "payload": {"data": data}})

    def _reply(self, status: int, content: dict[str, Any]) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing: a test's output is the test's."""


@pytest.fixture
def google(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[GoogleServer]:
    """Google's servers for this process, which has a service account and no token."""
    with GoogleServer() as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        write_credentials(tmp_path / "account.json", f"{server.url}/token")
        monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path / "account.json"))
        monkeypatch.setattr(secrets, "ENDPOINT", server.url)
        monkeypatch.setattr(secrets, "RETRY_WAITS_S", (0.0, 0.0, 0.0))
        # Set first, so that what a test puts there is gone afterwards.
        monkeypatch.setenv("HF_TOKEN", "")
        yield server
        server.shutdown()
        thread.join()


def test_a_worker_reads_the_token_with_its_own_credentials(google: GoogleServer) -> None:
    provide_hf_token(SECRET)
    assert os.environ["HF_TOKEN"] == TOKEN
    assert google.reads == [(f"/v1/{SECRET}:access", "Bearer of-the-worker")]


def test_a_token_that_is_there_stays(google: GoogleServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_mine")
    provide_hf_token(SECRET)
    assert os.environ["HF_TOKEN"] == "hf_mine"
    assert google.reads == []


def test_a_rush_of_workers_passes(google: GoogleServer) -> None:
    google.refusals = (429, 503, 500)
    provide_hf_token(SECRET)
    assert os.environ["HF_TOKEN"] == TOKEN
    assert len(google.reads) == 4


@pytest.mark.parametrize(
    ("status", "remedy"),
    [
        (503, "start the same command again"),
        (
            403,
            "enable secretmanager.googleapis.com, and grant the account the role "
            "roles/secretmanager.secretAccessor on the secret",
        ),
        (404, "create the secret, or correct dataflow.hf_token_secret"),
    ],
)
def test_a_secret_that_cannot_be_read_is_a_clear_error(
    google: GoogleServer, status: int, remedy: str
) -> None:
    google.status = status
    bundle = PublishItems(Words("R"), SECRET)
    with pytest.raises(RuntimeError) as caught:
        bundle.setup()
    failure = failure_of(caught.value)
    assert isinstance(failure, EvenmixError)
    assert str(failure) == (
        f"the worker's service account cannot read the secret {SECRET} (status {status}): {remedy}"
    )
    assert os.environ["HF_TOKEN"] == ""


def test_the_step_reads_it_on_the_worker_and_carries_its_name_alone(google: GoogleServer) -> None:
    step = PublishItems(Words("R"), SECRET)
    step.setup()
    assert os.environ["HF_TOKEN"] == TOKEN
    pickled = pickle.dumps(step)
    assert SECRET.encode() in pickled
    assert TOKEN.encode() not in pickled


def test_without_a_secret_nothing_is_asked(google: GoogleServer) -> None:
    PublishItems(Words("R")).setup()
    assert os.environ["HF_TOKEN"] == ""
    assert google.reads == []
