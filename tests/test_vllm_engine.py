"""The real vLLM on a CPU captions real photographs with a tiny Qwen3-VL, through every death."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq
import pytest
from skimage import data

from captioning import keeper, server
from captioning.outcomes import CaptionOutcome
from captioning.prompts import DESCRIBE
from captioning.vllm_engine import (
    Caption,
    CaptionRequest,
    EngineConfig,
    EngineTrouble,
    Sampling,
    VllmEngine,
    read_answer,
    request_body,
)
from pipeline.errors import EvenmixError
from tests import corpora

ARGUMENTS = {
    "dtype": "float32",  # what else is in flight must not tip a draw between two tokens
    "enforce_eager": True,
    "limit_mm_per_prompt": {"image": 1, "video": 0},
    "max_model_len": 1024,
    "max_num_seqs": 16,
    "skip_mm_profiling": True,
}
MAX_TOKENS = 24
SHIM = Path(__file__).parent / "vllm_shim"
API_SERVER = "vllm.entrypoints.openai.api_server"


def _config(model: Path) -> EngineConfig:
    return EngineConfig(
        model=str(model),
        arguments=ARGUMENTS,
        sampling=Sampling(max_tokens=MAX_TOKENS),
        start_timeout_s=240,
    )


def _photographs() -> list[npt.NDArray[np.uint8]]:
    """Eight crops of the photographs that scikit-image carries, no two alike."""
    load: Any = data
    pictures = [load.astronaut(), load.coffee(), load.chelsea(), load.rocket()]
    return [picture[top : top + 250, 50:350] for picture in pictures for top in (0, 50)]


def _requests(rounds: int = 1) -> list[CaptionRequest]:
    return [
        CaptionRequest(f"{seed}-{number}", picture, DESCRIBE.text, seed)
        for seed in range(rounds)
        for number, picture in enumerate(_photographs())
    ]


def _work(config: EngineConfig, channel: Connection) -> None:
    """A worker process: starts the engine, then captions as many rounds as it is told."""
    engine = VllmEngine(config)
    engine.start()
    channel.send("started")
    while True:
        channel.send(engine.caption(_requests(channel.recv())))


class Worker:
    """A worker process and the channel to it."""

    def __init__(self, config: EngineConfig):
        spawn = multiprocessing.get_context("spawn")
        self.channel, other_end = spawn.Pipe()
        self.process = spawn.Process(target=_work, args=(config, other_end), daemon=True)
        self.process.start()
        other_end.close()

    def receive(self) -> Any:
        assert self.channel.poll(240), "the worker does not answer"
        return self.channel.recv()

    def kill(self) -> None:
        self.process.kill()
        self.process.join()


@pytest.fixture(scope="module")
def environment() -> Iterator[None]:
    """Where vLLM's processes run: offline, on one core, with a short path for the socket."""
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory(prefix="ev") as folder:
        patch.setenv("TMPDIR", folder)
        patch.setattr(tempfile, "tempdir", None)
        patch.setenv("PYTHONPATH", str(SHIM), prepend=os.pathsep)
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
        yield


@pytest.fixture(scope="module")
def model(environment: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    command = [sys.executable, "-m", "tests.tiny_vlm", str(folder)]
    subprocess.run(command, cwd=SHIM.parent.parent, check=True)
    return folder


def _api_servers(folder: Path) -> list[int]:
    return [p.pid for p in keeper.marked_processes(folder) if API_SERVER in p.cmdline()]


def _eventually(condition: Callable[[], object], timeout_s: float = 60) -> bool:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.05)
    return False


def _check(captions: list[Caption], requests: list[CaptionRequest]) -> None:
    """Every request has its own caption, with an outcome that fits its text and tokens."""
    assert [(c.key, c.seed) for c in captions] == [(r.key, r.seed) for r in requests]
    for caption in captions:
        if not caption.text:
            assert caption.outcome is CaptionOutcome.EMPTY
        elif caption.completion_tokens == MAX_TOKENS:
            assert caption.outcome is CaptionOutcome.TRUNCATED
        else:
            assert caption.outcome is CaptionOutcome.OK
        assert 1 <= caption.completion_tokens <= MAX_TOKENS
        assert caption.prompt_tokens > 64  # a 250 x 300 picture alone takes 8 x 9 of them


def test_one_server_serves_all_workers_and_survives_every_death(model: Path) -> None:
    # One story, since each start of the server takes half a minute.
    requests = _requests(rounds=8)
    folder = server.meeting_folder(str(model), ARGUMENTS)
    first, second = (Worker(_config(model)) for _ in range(2))
    assert first.receive() == second.receive() == "started"
    (api_server,) = _api_servers(folder)

    # Equal seeds give equal captions, whichever worker asks and whatever else is in flight.
    for worker in (first, second):
        worker.channel.send(8)
    captions = first.receive()
    _check(captions, requests)
    assert second.receive() == captions
    assert len({caption.text for caption in captions}) > len(captions) // 2

    # A picture that the context cannot hold is refused, and no other; a third process shares too.
    engine = VllmEngine(_config(model))
    engine.start()
    too_large = CaptionRequest("large", np.zeros((2048, 2048, 3), np.uint8), DESCRIBE.text, 0)
    answers = engine.caption(iter([requests[0], too_large, requests[1]]))
    engine.close()
    assert [answers[0], answers[2]] == captions[:2]
    assert (answers[1].key, answers[1].outcome) == ("large", CaptionOutcome.PICTURE_FAILED)
    assert "maximum context length" in answers[1].detail
    assert _api_servers(folder) == [api_server]

    # The server is killed while both have requests in flight: another comes, nothing is lost.
    for worker in (first, second):
        worker.channel.send(8)
    assert not first.channel.poll(0.3)
    before = keeper.marked_processes(folder)
    assert any(process.name().startswith("VLLM::Engine") for process in before)
    os.kill(api_server, signal.SIGKILL)
    assert first.receive() == captions
    assert second.receive() == captions
    (successor,) = _api_servers(folder)
    assert not any(process.is_running() for process in before)

    # A killed worker takes nothing with it; the last one takes the server.
    first.kill()
    second.channel.send(1)
    assert second.receive() == captions[:8]
    assert _api_servers(folder) == [successor]
    second.kill()
    assert _eventually(lambda: not keeper.marked_processes(folder), timeout_s=20)


def test_arguments_that_vllm_refuses_are_an_error_with_its_words(model: Path) -> None:
    engine = VllmEngine(EngineConfig(str(model), {"no_such_argument": 1}, start_timeout_s=120))
    with pytest.raises(EvenmixError, match="unrecognized arguments: --no-such-argument"):
        engine.start()


def test_the_command_captions_a_corpus_with_a_model(model: Path, tmp_path: Path) -> None:
    corpora.write_sources(tmp_path / "sources")
    recipe = corpora.write_recipe(tmp_path, tmp_path / "sources")
    arguments = json.dumps(ARGUMENTS).replace(":", " =")  # as TOML has it
    recipe.write_text(
        recipe.read_text()
        + f"""
[captions.tiny]
engine = "vllm"
model = "{model}"
max_tokens = {MAX_TOKENS}
captions_per_image = 2
arguments = {arguments}
"""
    )
    corpora.finish(corpora.evenmix("ingest", str(recipe)))
    caption = ("caption", str(recipe), "--captions=tiny", "--workers=2")
    corpora.finish(corpora.evenmix(*caption))
    folder = server.meeting_folder(str(model), ARGUMENTS)
    assert _eventually(lambda: not keeper.marked_processes(folder), timeout_s=20)

    seeds = set()
    for dataset, (read, rejected) in corpora.COUNTS.items():
        url = tmp_path / "corpus" / "captions" / "tiny" / dataset
        rows = [row for path in url.glob("*.parquet") for row in pq.read_table(path).to_pylist()]
        assert len(rows) == read - sum(rejected.values())
        for row in rows:
            assert len(row["captions"]) == 2
            for found in row["captions"]:
                assert found["outcome"] in ("ok", "truncated", "empty")
                assert found["completion_tokens"] >= 1
                assert (found["model"], found["prompt_kind"]) == (str(model), "describe")
                seeds.add(found["seed"])
    assert len(seeds) == 2 * sum(n - sum(bad.values()) for n, bad in corpora.COUNTS.values())
    assert "nothing to do" in corpora.finish(corpora.evenmix(*caption))


# Speaks the protocol, and fails on demand as vLLM cannot be made to.
UNRELIABLE_SERVER = """
import http.server, json, socketserver, time
asked = set()
class Handler(http.server.BaseHTTPRequestHandler):
    def answer(self, status, body):
        self.send_response(status)
        self.end_headers()
        self.wfile.write(json.dumps(body).encode())
    def do_GET(self):
        self.answer(200, {})
    def do_POST(self):
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        how = request["messages"][0]["content"][1]["text"]
        if how == "hang":
            time.sleep(60)
        elif how == "fail" or (how == "fail once" and request["seed"] not in asked):
            asked.add(request["seed"])
            self.answer(500, {"error": {"message": "no luck"}})
        elif how == "unauthorised":
            self.answer(401, {"error": "who are you"})
        else:
            choice = {"message": {"content": f" text {request['seed']} "}, "finish_reason": "stop"}
            usage = {"prompt_tokens": 5, "completion_tokens": 7}
            self.answer(200, {"choices": [choice], "usage": usage})
    def log_message(self, *args):
        pass
class Server(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    daemon_threads = True
    request_queue_size = 64
Server("run/socket", Handler).serve_forever()
"""


@pytest.fixture
def unreliable_engine(
    environment: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[VllmEngine]:
    (tmp_path / "config.json").write_text("{}")
    command = [sys.executable, "-c", UNRELIABLE_SERVER]
    monkeypatch.setattr(server, "server_command", lambda *_: command)
    engine = VllmEngine(
        EngineConfig(str(tmp_path), max_in_flight=3, max_attempts=2, request_timeout_s=1)
    )
    engine.start()
    yield engine
    engine.close()


def _asking(prompts: list[str]) -> list[CaptionRequest]:
    picture = np.zeros((8, 8, 3), np.uint8)
    return [CaptionRequest(f"k{i}", picture, prompt, i) for i, prompt in enumerate(prompts)]


def test_every_picture_has_its_own_outcome(unreliable_engine: VllmEngine) -> None:
    prompts = ["well", "fail once", "fail", "hang", "well", "fail once", "well"]
    captions = unreliable_engine.caption(_asking(prompts))
    failed = CaptionOutcome.ENGINE_FAILED
    expected = [
        Caption(f"k{i}", CaptionOutcome.OK, i, f"text {i}", prompt_tokens=5, completion_tokens=7)
        for i in range(len(prompts))
    ]
    expected[2] = Caption("k2", failed, 2, detail="EngineTrouble: status 500: no luck")
    expected[3] = Caption("k3", failed, 3, detail="no answer within 1 s")
    assert captions == expected


def test_what_is_wrong_with_all_requests_is_an_error(unreliable_engine: VllmEngine) -> None:
    with pytest.raises(EvenmixError, match=r"refused picture k1 with status 401: .*who are you"):
        unreliable_engine.caption(_asking(["well", "unauthorised", "well"]))


def test_an_error_in_the_requests_is_raised_as_it_is(unreliable_engine: VllmEngine) -> None:
    def requests() -> Iterator[CaptionRequest]:
        yield from _asking(["well"])
        raise EvenmixError("the tar ends early")

    with pytest.raises(EvenmixError, match="the tar ends early"):
        unreliable_engine.caption(requests())


def test_requests_are_read_only_as_there_is_room(unreliable_engine: VllmEngine) -> None:
    read = []

    def requests() -> Iterator[CaptionRequest]:
        for request in _asking(["hang", "hang", "hang", "well", "fail"]):
            read.append((request.key, time.monotonic()))
            yield request

    unreliable_engine.caption(requests())
    times = [seconds for _, seconds in read]
    assert times[2] - times[0] < 1 < times[3] - times[0]


def test_a_request_asks_for_what_the_caption_set_records() -> None:
    (request,) = _asking(["Describe."])
    body = request_body(request, Sampling(max_tokens=9, temperature=0.5))
    picture, prompt = body["messages"][0]["content"]
    assert prompt == {"type": "text", "text": "Describe."}
    assert picture["image_url"]["url"].startswith("data:image/png;base64,")
    assert (body["seed"], body["max_tokens"], body["temperature"]) == (0, 9, 0.5)


@pytest.mark.parametrize(
    ("content", "finish_reason", "outcome"),
    [
        ("A cat.", "stop", CaptionOutcome.OK),
        ("A cat on", "length", CaptionOutcome.TRUNCATED),
        (" \n", "stop", CaptionOutcome.EMPTY),
        (None, "length", CaptionOutcome.EMPTY),
    ],
)
def test_an_answer_is_judged_by_its_text_and_end(
    content: str | None, finish_reason: str, outcome: CaptionOutcome
) -> None:
    (request,) = _asking(["Describe."])
    assert read_answer(request, _answer(content, finish_reason)).outcome is outcome


def test_an_aborted_answer_is_asked_for_again() -> None:
    (request,) = _asking(["Describe."])
    with pytest.raises(EngineTrouble, match="abort"):
        read_answer(request, _answer("A c", "abort"))


def _answer(content: str | None, finish_reason: str) -> httpx.Response:
    choice = {"message": {"content": content}, "finish_reason": finish_reason}
    usage = {"prompt_tokens": 1, "completion_tokens": 1}
    return httpx.Response(200, json={"choices": [choice], "usage": usage})


def test_captioning_before_start_is_a_mistake_of_the_caller(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="start"):
        VllmEngine(EngineConfig(str(tmp_path))).caption([])
