"""The real vLLM on a CPU captions real photographs with a tiny Qwen3-VL, through every death."""

import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import datetime
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from skimage import data

from captioning.engine import keeper, server
from captioning.engine.client import Engine
from captioning.engine.questions import Answer, Ending, EngineConfig, Request, Sampling
from captioning.prompts import DESCRIBE
from pipeline.errors import EvenmixError
from pipeline.images import Pixels
from tests.real_vllm import ARGUMENTS, make_model, vllm_environment

MAX_TOKENS = 24
API_SERVER = "vllm.entrypoints.openai.api_server"


def _config(model: Path) -> EngineConfig:
    return EngineConfig(
        model=str(model),
        arguments=ARGUMENTS,
        sampling=Sampling(max_tokens=MAX_TOKENS),
        start_timeout_s=240,
    )


def _photographs() -> list[Pixels]:
    """Eight crops of the photographs that scikit-image carries, no two alike."""
    load: Any = data
    pictures = [load.astronaut(), load.coffee(), load.chelsea(), load.rocket()]
    return [picture[top : top + 250, 50:350] for picture in pictures for top in (0, 50)]


def _requests(rounds: int = 1) -> list[Request]:
    return [
        Request(f"{seed}-{number}", DESCRIBE.text, seed, picture)
        for seed in range(rounds)
        for number, picture in enumerate(_photographs())
    ]


def _answers(engine: Engine, requests: list[Request]) -> list[Answer]:
    """The answers in the order of the requests, without their times."""
    answers = {answer.id: answer for answer in engine.answers(iter(requests))}
    return [
        replace(answers.pop(request.id), asked=datetime.min, answer_s=0.0) for request in requests
    ]


def _work(config: EngineConfig, channel: Connection) -> None:
    """A worker process: starts the engine, then captions as many rounds as it is told."""
    engine = Engine(config)
    engine.start()
    channel.send("started")
    while True:
        channel.send(_answers(engine, _requests(channel.recv())))


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
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("model")
    with vllm_environment():
        yield make_model(folder)


def _api_servers(folder: Path) -> list[int]:
    return [p.pid for p in keeper.marked_processes(folder) if API_SERVER in p.cmdline()]


def _eventually(condition: Callable[[], object], timeout_s: float = 60) -> bool:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.05)
    return False


def _check(answers: list[Answer]) -> None:
    """Every answer has text and tokens, and an ending that fits their number."""
    for answer in answers:
        if answer.ending is Ending.LENGTH:
            assert answer.completion_tokens == MAX_TOKENS
        else:
            assert answer.ending is Ending.STOP
            assert 1 <= answer.completion_tokens <= MAX_TOKENS
        assert answer.prompt_tokens > 64  # a 250 x 300 picture alone takes 8 x 9 of them
        assert answer.detail == ""
    texts = {answer.text for answer in answers}
    assert len(texts) > len(answers) // 2


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
    answers = first.receive()
    _check(answers)
    assert second.receive() == answers

    # A picture that the context cannot hold is refused, and no other; a third process shares too.
    engine = Engine(_config(model))
    engine.start()
    engine.check_fits(requests[0])
    too_large = Request("large", DESCRIBE.text, 0, np.zeros((2048, 2048, 3), np.uint8))
    found = _answers(engine, [requests[0], too_large, requests[1]])
    assert [found[0], found[2]] == answers[:2]
    assert (found[1].id, found[1].ending) == ("large", Ending.NOT_TAKEN)
    with pytest.raises(EvenmixError, match=r"maximum context length(?s:.*)max_model_len"):
        engine.check_fits(too_large)
    engine.close()
    engine = Engine(replace(_config(model), sampling=Sampling(max_tokens=1000)))
    engine.start()
    with pytest.raises(EvenmixError, match=r"an answer up to 1000, .*, and it has 1024\."):
        engine.check_fits(requests[0])
    engine.close()
    assert _api_servers(folder) == [api_server]

    # The server is killed while both have requests in flight: another comes, nothing is lost.
    for worker in (first, second):
        worker.channel.send(8)
    assert not first.channel.poll(0.3)
    before = keeper.marked_processes(folder)
    assert any(process.name().startswith("VLLM::Engine") for process in before)
    os.kill(api_server, signal.SIGKILL)
    assert first.receive() == answers
    assert second.receive() == answers
    (successor,) = _api_servers(folder)
    assert not any(process.is_running() for process in before)

    # A killed worker takes nothing with it; the last one takes the server.
    first.kill()
    second.channel.send(1)
    assert second.receive() == answers[:8]
    assert _api_servers(folder) == [successor]
    second.kill()
    assert _eventually(lambda: not keeper.marked_processes(folder), timeout_s=60)


def test_arguments_that_vllm_refuses_are_an_error_with_its_words(model: Path) -> None:
    engine = Engine(
        EngineConfig(str(model), arguments={"no_such_argument": 1}, start_timeout_s=120)
    )
    with pytest.raises(EvenmixError, match="unrecognized arguments: --no-such-argument"):
        engine.start()
