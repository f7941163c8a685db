"""The engine against a server that fails in every way: what is lost is nothing, and it says why."""

import asyncio
import base64
import io
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from skimage import data

from captioning.engine import connection, conversation, keeper, server
from captioning.engine.client import Engine
from captioning.engine.questions import Answer, Ending, EngineConfig, Request, Sampling
from pipeline.errors import EvenmixError
from tests.chat_server import ChatServer, Reply, prompt_of

Respond = Callable[[dict[str, Any]], Reply]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conversation, "BACKOFF_S", 0.02)
    monkeypatch.setattr(conversation, "MAX_BACKOFF_S", 0.1)
    monkeypatch.setattr(conversation, "START_PATIENCE_S", 1.0)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


@contextmanager
def asking(respond: Respond, max_model_len: int | None = None, **config: Any) -> Iterator[Engine]:
    """An engine at a server that answers so."""
    with ChatServer(respond, max_model_len=max_model_len) as chat:
        engine = Engine(EngineConfig("tiny", endpoint=chat.url, **config))
        engine.start()
        try:
            yield engine
        finally:
            engine.close()


def requests(*prompts: str) -> list[Request]:
    return [Request(f"{n}", prompt, seed=n) for n, prompt in enumerate(prompts)]


def endings(answers: Iterator[Answer]) -> dict[str, Ending]:
    found = {answer.id: answer.ending for answer in answers}
    return dict(sorted(found.items(), key=lambda entry: int(entry[0])))


def eventually(condition: Callable[[], object], timeout_s: float = 10) -> bool:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.01)
    return False


def echo(body: dict[str, Any]) -> Reply:
    return Reply(f" {prompt_of(body)} ")


def test_an_answer_has_its_text_tokens_and_times() -> None:
    with asking(lambda body: Reply(" A cat.\n", "length", prompt_tokens=9)) as engine:
        (answer,) = engine.answers(requests("Describe."))
    assert (answer.id, answer.ending, answer.text) == ("0", Ending.LENGTH, "A cat.")
    assert (answer.prompt_tokens, answer.completion_tokens, answer.detail) == (9, 7, "")
    assert 0 < answer.answer_s < 5
    assert abs(time.time() - answer.asked.timestamp()) < 10


def test_answers_come_as_they_are_ready() -> None:
    may_end = threading.Event()

    def respond(body: dict[str, Any]) -> Reply:
        if prompt_of(body) == "slow":
            assert may_end.wait(10)
        return echo(body)

    with asking(respond) as engine:
        answers = engine.answers(requests("slow", "quick"))
        assert next(answers).text == "quick"
        may_end.set()
        assert next(answers).text == "slow"
        assert list(answers) == []


@pytest.mark.parametrize("prompt", ["well", "refused", "moderated", "too large", "odd", "worse"])
def test_a_request_is_settled_for_itself(prompt: str) -> None:
    statuses = {"refused": 400, "moderated": 403, "too large": 413, "odd": 422, "worse": 500}

    def respond(body: dict[str, Any]) -> Reply:
        return Reply("words", status=statuses.get(prompt_of(body), 200))

    with asking(respond) as engine:
        answers = {answer.id: answer for answer in engine.answers(requests("well", prompt, "well"))}
    assert answers["0"].ending is answers["2"].ending is Ending.STOP
    status = statuses.get(prompt, 200)
    expected = {200: Ending.STOP, 500: Ending.FAILED}.get(status, Ending.NOT_TAKEN)
    assert answers["1"].ending is expected
    assert answers["1"].detail == {
        200: "",
        500: "HTTP 500: words (attempt 3)",
    }.get(status, f"HTTP {status}: words")


class Unreliable:
    """Does what each prompt says, such as ``500 twice``, and answers after that."""

    def __init__(self) -> None:
        self.asked: dict[str, int] = {}

    def __call__(self, body: dict[str, Any]) -> Reply:
        prompt = prompt_of(body)
        if body["max_tokens"] == 1:  # a control question
            return Reply("well")
        times = self.asked[prompt] = self.asked.get(prompt, 0) + 1
        how, _, often = prompt.partition(" ")
        if times > {"once": 1, "twice": 2, "always": 99}.get(often, 0):
            return Reply("well")
        if how == "cut":
            raise ConnectionAbortedError
        if how == "hang":
            time.sleep(3)  # longer than anybody here waits
        if how == "abort":
            return Reply("half", finish_reason="abort")
        return Reply("words", status=int(how) if how.isdigit() else 200)


def test_what_fails_is_asked_again() -> None:
    once = ["500 once", "cut once", "hang once", "abort once", "429 once", "503 once", "502 once"]
    twice = ["500 twice", "cut twice", "abort twice", "429 twice", "503 twice"]
    respond = Unreliable()
    with asking(respond, request_timeout_s=2) as engine:
        found = endings(engine.answers(requests(*once, *twice, "well")))
    assert list(found.values()) == [Ending.STOP] * 13
    assert {prompt: respond.asked[prompt] for prompt in [*once, *twice, "well"]} == (
        dict.fromkeys(once, 2) | dict.fromkeys(twice, 3) | {"well": 1}
    )


@pytest.mark.parametrize(
    ("prompt", "attempts", "detail"),
    [
        ("500 always", 3, "HTTP 500: words"),
        ("cut always", 3, "the connection broke: ServerDisconnectedError"),
        ("abort always", 3, "the answer ended with abort"),
        ("hang always", 3, "no answer within 2 s"),
    ],
)
def test_what_always_fails_is_given_up(prompt: str, attempts: int, detail: str) -> None:
    """Also when nothing else is asked that would show that the server works."""
    respond = Unreliable()
    with asking(respond, request_timeout_s=0.5 if prompt == "hang always" else 60) as engine:
        (answer,) = engine.answers(requests(prompt))
    assert (answer.ending, respond.asked[prompt]) == (Ending.FAILED, attempts)
    assert answer.detail.startswith(detail)
    assert answer.detail.endswith(f"(attempt {attempts})")


def test_a_slow_server_gets_more_time() -> None:
    """Twice as much after the first timeout, four times as much after the second."""
    asked = Counter[str]()

    def respond(body: dict[str, Any]) -> Reply:
        if body["max_tokens"] > 1:
            asked[prompt_of(body)] += 1
            time.sleep(float(prompt_of(body)))
        return Reply("well")

    with asking(respond, request_timeout_s=1.2) as engine:
        found = endings(engine.answers(requests("0", "1.8", "3.6")))
    assert list(found.values()) == [Ending.STOP] * 3
    assert asked == {"0": 1, "1.8": 2, "3.6": 3}


def test_answers_to_others_show_that_a_slow_server_works() -> None:
    """Also when the control question is not answered in time, as it is the last in a long queue."""

    def respond(body: dict[str, Any]) -> Reply:
        if body["max_tokens"] == 1:
            time.sleep(0.5)
        if prompt_of(body) == "hang":
            time.sleep(0.3)
        time.sleep(0.1)
        return Reply("well")

    with asking(respond, request_timeout_s=0.2, max_in_flight=4, patience_s=0.7) as engine:
        found = endings(engine.answers(requests("hang", *["quick"] * 40)))
    assert list(found.values()) == [Ending.STOP] * 41


def test_a_request_that_is_turned_away_for_ever_is_given_up() -> None:
    with asking(Unreliable(), patience_s=0.3) as engine:
        found = endings(engine.answers(requests("well", "429 always", "well")))
    assert found == {"0": Ending.STOP, "1": Ending.FAILED, "2": Ending.STOP}


@pytest.mark.parametrize("how", ["500", "503", "cut", "nonsense"])
def test_a_server_that_fails_for_a_while_loses_nothing(how: str) -> None:
    began = None
    during = []

    def respond(body: dict[str, Any]) -> Reply:
        nonlocal began
        if prompt_of(body) == "p40" and began is None:
            began = time.monotonic()
        if began is None or time.monotonic() - began > 0.6:
            time.sleep(0.02)
            return echo(body)
        during.append(prompt_of(body))
        if how == "cut":
            raise ConnectionAbortedError
        if how == "nonsense":
            return Reply("half", finish_reason="abort")
        return Reply("words", status=int(how))

    with asking(respond, max_in_flight=8) as engine:
        answers = list(engine.answers(requests(*(f"p{n}" for n in range(120)))))
    assert 1 <= len(during) < 40  # an outage, in which the server was left alone
    assert sorted(int(answer.id) for answer in answers) == list(range(120))
    assert {answer.ending for answer in answers} == {Ending.STOP}
    assert all(answer.text == f"p{answer.id}" for answer in answers)


def test_a_server_that_is_silent_for_too_long_is_an_error() -> None:
    began = time.monotonic()
    with (
        asking(lambda _: Reply("no memory", status=500), patience_s=0.5) as engine,
        pytest.raises(
            EvenmixError,
            match=r"^http://127.* has answered nothing for \d s \(HTTP 500: no memory\)\. Nothing "
            r"that was published is lost: start the same command again",
        ),
    ):
        list(engine.answers(requests("one", "two")))
    assert time.monotonic() - began < 5


def test_a_server_that_is_gone_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    # The server's threads would go on with the connections that they have.
    monkeypatch.setattr(connection, "_KEEP_CONNECTIONS_S", 0.01)
    with ChatServer(echo) as chat:
        engine = Engine(EngineConfig("tiny", endpoint=chat.url, patience_s=0.3))
        engine.start()
    time.sleep(0.1)
    with pytest.raises(EvenmixError, match=r"has answered nothing for .*no connection"):
        list(engine.answers(requests("one", "two")))
    engine.close()


def test_one_refusal_is_the_requests_own() -> None:
    """A server that has answered a request that it was sent later is not asked again."""
    controls = []

    def respond(body: dict[str, Any]) -> Reply:
        if body["max_tokens"] == 1:
            controls.append(prompt_of(body))
        if prompt_of(body) == "bad":
            return Reply("the picture is not appropriate", status=403)
        return echo(body)

    with asking(respond, max_in_flight=1) as engine:
        found = endings(engine.answers(requests("good", "bad", "good", "bad")))
    assert list(found.values()) == [Ending.STOP, Ending.NOT_TAKEN] * 2
    assert controls == ["good", "good"]


# One at a time, so that all that is answered has arrived when the first is refused.
@pytest.mark.parametrize(("answered", "max_in_flight"), [(0, 4), (20, 1)])
def test_a_server_that_begins_to_refuse_all_is_an_error(answered: int, max_in_flight: int) -> None:
    asked = []

    def respond(body: dict[str, Any]) -> Reply:
        asked.append(prompt_of(body))
        return echo(body) if len(asked) <= answered else Reply("budget exceeded", status=400)

    found = []
    with (
        asking(respond, max_in_flight=max_in_flight) as engine,
        pytest.raises(
            EvenmixError,
            match=r"answers HTTP 400: budget exceeded; .* Nothing that was published is lost",
        ),
    ):
        for answer in engine.answers(requests(*(f"p{n}" for n in range(400)))):
            found.append(answer.ending)
    assert found == [Ending.STOP] * answered
    assert len(asked) < answered + 10


def test_a_refusal_during_an_outage_waits_for_its_end() -> None:
    began = time.monotonic()

    def respond(body: dict[str, Any]) -> Reply:
        if prompt_of(body) == "bad":
            return Reply("words", status=403)
        return echo(body) if time.monotonic() - began > 0.5 else Reply("words", status=500)

    with asking(respond) as engine:
        found = endings(engine.answers(requests("bad", "good")))
    assert list(found.values()) == [Ending.NOT_TAKEN, Ending.STOP]
    assert time.monotonic() - began > 0.5


def test_an_outage_is_told_once_and_so_is_its_end(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(conversation, "NEWS_AFTER_S", 1.0)
    failing = [(0.2, 0.3), (1.6, 4.4), (5.2, 8.0)]  # the first is too short to be news
    began = time.monotonic()

    def respond(body: dict[str, Any]) -> Reply:
        now_s = time.monotonic() - began
        if any(start_s < now_s < end_s for start_s, end_s in failing):
            return Reply("no memory", status=500)
        time.sleep(0.04)
        return echo(body)

    with asking(respond, max_in_flight=4) as engine:
        for answer in engine.answers(requests(*(f"p{n}" for n in range(900)))):
            assert answer.ending is Ending.STOP
            if time.monotonic() - began > 8.8:
                break
        name = engine._config.endpoint
    down, up = f"{name} does not work now: HTTP 500: no memory", f"{name} works again"
    assert [record.getMessage() for record in caplog.records] == [down, up, down, up]


def test_a_key_is_in_no_message(monkeypatch: pytest.MonkeyPatch) -> None:
    """aiohttp's errors may hold the headers of the request that they are about."""
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def talk_nonsense() -> None:
            while True:
                try:
                    connection, _ = listening.accept()
                except OSError:
                    return
                with connection:
                    connection.recv(1 << 16)
                    connection.sendall(b"HTTP/1.1 \x1b[2J nonsense\r\n\r\n")

        thread = threading.Thread(target=talk_nonsense)
        thread.start()
        url = f"http://127.0.0.1:{listening.getsockname()[1]}/v1"
        with pytest.raises(EvenmixError, match=r"does not list its models \(.*broke: ") as caught:
            Engine(EngineConfig("tiny", endpoint=url)).start()
        listening.shutdown(socket.SHUT_RDWR)
        thread.join()
    assert "sk-secret" not in str(caught.value)
    assert "\x1b" not in str(caught.value)


@pytest.mark.parametrize("status", [401, 404, 409])
def test_what_is_wrong_with_all_requests_is_an_error(status: int) -> None:
    def respond(body: dict[str, Any]) -> Reply:
        return Reply("who are you", status=status) if prompt_of(body) == "bad" else echo(body)

    with (
        asking(respond) as engine,
        pytest.raises(EvenmixError, match=f"answers HTTP {status}: who are you; check"),
    ):
        list(engine.answers(requests("well", "bad", "well")))


def test_the_requests_error_is_raised_as_it_is_after_the_answers() -> None:
    answered = threading.Event()

    def failing() -> Iterator[Request]:
        yield from requests("well")
        assert answered.wait(10)
        raise KeyError("the tar ends early")

    with asking(echo) as engine:
        answers = engine.answers(failing())
        assert next(answers).text == "well"
        answered.set()
        with pytest.raises(KeyError, match="the tar ends early"):
            next(answers)


def test_the_next_requests_are_prepared_while_the_server_works() -> None:
    prepared = threading.Event()

    def respond(body: dict[str, Any]) -> Reply:
        assert prepared.wait(10)
        return echo(body)

    def preparing() -> Iterator[Request]:
        first, second = requests("first", "second")
        yield first
        prepared.set()
        yield second

    with asking(respond, max_in_flight=1) as engine:
        assert [answer.text for answer in engine.answers(preparing())] == ["first", "second"]


def test_requests_are_read_only_as_there_is_room() -> None:
    read = []
    may_answer = threading.Event()

    def respond(body: dict[str, Any]) -> Reply:
        assert may_answer.wait(10)
        return echo(body)

    def reading() -> Iterator[Request]:
        for request in requests(*"abcdefghijkl"):
            read.append(request.id)
            yield request

    with asking(respond, max_in_flight=3) as engine, ThreadPoolExecutor() as pool:
        answers = pool.submit(lambda: list(engine.answers(reading())))
        assert eventually(lambda: len(read) == 6)
        time.sleep(0.1)
        assert len(read) == 6
        may_answer.set()
        assert len(answers.result()) == len(read) == 12


def test_threads_share_one_bound() -> None:
    lock = threading.Lock()
    in_flight, most = 0, 0

    def respond(body: dict[str, Any]) -> Reply:
        nonlocal in_flight, most
        with lock:
            in_flight += 1
            most = max(most, in_flight)
        time.sleep(0.02)
        with lock:
            in_flight -= 1
        return echo(body)

    with asking(respond, max_in_flight=4) as engine, ThreadPoolExecutor(3) as pool:
        calls = [
            pool.submit(lambda: list(engine.answers(requests(*"abcdefghij")))) for _ in range(3)
        ]
        answers = [call.result() for call in calls]
    assert [sorted(answer.text for answer in each) for each in answers] == [list("abcdefghij")] * 3
    assert most == 4


def test_an_iterator_that_is_left_leaves_nothing() -> None:
    hanging = threading.Event()

    def respond(body: dict[str, Any]) -> Reply:
        if prompt_of(body) == "hang":
            hanging.wait(10)
        return echo(body)

    with asking(respond, max_in_flight=2) as engine:
        answers = engine.answers(requests("well", *["hang"] * 50))
        assert next(answers).text == "well"
        del answers
        running = engine._running
        assert running is not None
        assert eventually(lambda: not asyncio.all_tasks(running.loop))
        # All places are free again.
        assert len(list(engine.answers(requests("a", "b", "c", "d")))) == 4
        hanging.set()


def test_closing_wakes_whoever_waits() -> None:
    arrived, hanging = threading.Event(), threading.Event()

    def respond(body: dict[str, Any]) -> Reply:
        arrived.set()
        hanging.wait(10)
        return echo(body)

    with asking(respond) as engine, ThreadPoolExecutor() as pool:
        call = pool.submit(lambda: list(engine.answers(requests("one", "two"))))
        assert arrived.wait(10)
        engine.close()
        with pytest.raises(RuntimeError, match="closed before all requests were answered"):
            call.result(timeout=5)
        hanging.set()


_ASKING = """
import sys
from captioning.engine.client import Engine
from captioning.engine.questions import EngineConfig, Request
engine = Engine(EngineConfig("tiny", endpoint=sys.argv[1]))
engine.start()
def requests():
    for number in range(1000):
        yield Request(str(number), "hang", number)
for answer in engine.answers(requests()):
    pass
"""


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_at_once(signum: int) -> None:
    arrived, may_end = threading.Event(), threading.Event()

    def respond(body: dict[str, Any]) -> Reply:
        arrived.set()
        may_end.wait(60)
        return echo(body)

    with ChatServer(respond) as chat:
        process = subprocess.Popen(
            [sys.executable, "-c", _ASKING, chat.url], stderr=subprocess.PIPE, text=True
        )
        assert arrived.wait(60)
        process.send_signal(signum)
        _, said = process.communicate(timeout=10)
        may_end.set()
    assert process.returncode in (-signum, 130)
    assert "Error" not in said.replace("KeyboardInterrupt", "")


def test_the_wire_has_what_the_answers_depend_on() -> None:
    load: Any = data
    picture = load.astronaut()[:40, :60]
    asked = []

    def respond(body: dict[str, Any]) -> Reply:
        asked.append(body)
        return echo(body)

    sampling = Sampling(max_tokens=9, temperature=0.5)
    with asking(respond, sampling=sampling) as engine:
        list(engine.answers([Request("a", "Describe.", 7, picture)]))
    (body,) = asked
    url = body["messages"][0]["content"][0]["image_url"].pop("url")
    assert body == {
        "model": "tiny",
        "messages": [
            {
                "role": "user",
                "content": [
                    {"type": "image_url", "image_url": {}},
                    {"type": "text", "text": "Describe."},
                ],
            }
        ],
        "seed": 7,
        "max_tokens": 9,
        "temperature": 0.5,
    }
    kind, _, encoded = url.partition(",")
    assert kind == "data:image/png;base64"
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(base64.b64decode(encoded)))), picture)


def test_settings_away_from_the_defaults_are_sent() -> None:
    asked = []

    def respond(body: dict[str, Any]) -> Reply:
        asked.append(body)
        return echo(body)

    sampling = Sampling(512, 0.6, top_p=0.95, top_k=20)
    with asking(respond, sampling=sampling, chat_template={"enable_thinking": False}) as engine:
        list(engine.answers([Request("a", "A “red” cat.", 7, system="Make it longer.")]))
    (body,) = asked
    assert body == {
        "model": "tiny",
        "messages": [
            {"role": "system", "content": "Make it longer."},
            {"role": "user", "content": "A “red” cat."},
        ],
        "seed": 7,
        "max_tokens": 512,
        "temperature": 0.6,
        "top_p": 0.95,
        "top_k": 20,
        "chat_template_kwargs": {"enable_thinking": False},
    }


PICTURE = np.zeros((32, 48, 3), np.uint8)


def test_what_fits_is_asked_with_one_token() -> None:
    asked = []

    def respond(body: dict[str, Any]) -> Reply:
        asked.append(body["max_tokens"])
        return Reply("A", "length", prompt_tokens=744)

    with asking(respond, max_model_len=1000) as engine:
        engine.check_fits(Request("a", "Describe.", 0, PICTURE))
    assert asked == [1]


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        (
            Reply("A", prompt_tokens=745),
            "the context of the model tiny is too short: a picture of 48 x 32 px and its prompt "
            "take 745 tokens and an answer up to 256, which are 1001, and it has 1000. Raise "
            "arguments.max_model_len, or lower short_edge_px or max_tokens.",
        ),
        (
            Reply("This model's maximum context length is 1000 tokens", status=400),
            "the model tiny does not take a picture of 48 x 32 px and its prompt: HTTP 400: This "
            "model's maximum context length is 1000 tokens. If its context is too short, raise "
            "arguments.max_model_len or lower short_edge_px or max_tokens.",
        ),
    ],
)
def test_what_does_not_fit_is_an_error(reply: Reply, message: str) -> None:
    def respond(body: dict[str, Any]) -> Reply:
        return reply if prompt_of(body) == "Describe." else echo(body)

    with (
        asking(respond, max_model_len=1000) as engine,
        pytest.raises(EvenmixError) as caught,
    ):
        engine.check_fits(Request("a", "Describe.", 0, PICTURE))
    assert str(caught.value) == message


def test_what_is_never_answered_does_not_fit() -> None:
    def respond(body: dict[str, Any]) -> Reply:
        return Reply("words", status=500) if prompt_of(body) == "bad" else echo(body)

    with (
        asking(respond) as engine,
        pytest.raises(EvenmixError, match="does not answer the prompt: HTTP 500: words"),
    ):
        engine.check_fits(Request("a", "bad", 0))


@pytest.mark.parametrize(
    ("model", "change", "message"),
    [
        ("huge", str, "does not serve the model huge, but tiny; name one that it serves"),
        ("tiny", lambda url: url.replace("/v1", "/v2"), "HTTP 404: not found; check the endpoint"),
        ("tiny", lambda url: "http://127.0.0.1:9/v1", r"does not list its models \(no connection"),
        ("tiny", lambda url: "127.0.0.1:8000", "is no URL such as"),
        ("tiny", lambda url: "http://[::1", "is no URL such as"),
        ("tiny", lambda url: "http://host:port/v1", "is no URL such as"),
        ("tiny", lambda url: url + "?api_key=secret", "give the key as OPENAI_API_KEY"),
        ("tiny", lambda url: "me:secret@host/v1", "give the key as OPENAI_API_KEY"),
        ("tiny", lambda url: url.replace("//", "//me:secret@"), "give the key as OPENAI_API_KEY"),
    ],
)
def test_a_wrong_endpoint_is_an_error_at_the_start(
    model: str, change: Callable[[str], str], message: str
) -> None:
    with ChatServer(echo) as chat:
        engine = Engine(EngineConfig(model, endpoint=change(chat.url)))
        with pytest.raises(EvenmixError, match=message) as caught:
            engine.start()
    assert "secret" not in str(caught.value)
    engine.close()


def test_the_key_goes_to_the_endpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-1\r\n")  # from a file
    keys = []
    with ChatServer(echo) as chat:
        handler: Any = chat._server.RequestHandlerClass

        class Recording(handler):  # type: ignore[misc]
            def parse_request(self) -> bool:
                parsed: bool = super().parse_request()
                keys.append(self.headers["Authorization"])
                return parsed

        chat._server.RequestHandlerClass = Recording
        engine = Engine(EngineConfig("tiny", endpoint=chat.url + "/"))
        engine.start()
        list(engine.answers(requests("well")))
        engine.close()
    assert keys == ["Bearer sk-1"] * 2


def test_asking_before_start_is_a_mistake_of_the_caller() -> None:
    with pytest.raises(RuntimeError, match="start"):
        list(Engine(EngineConfig("tiny")).answers([]))


# Stands where vLLM would: it speaks the protocol, and a picture of one pixel kills it.
MORTAL_SERVER = """
import http.server, json, os, socketserver, time
open("starts", "a").write("started\\n")
class Handler(http.server.BaseHTTPRequestHandler):
    def answer(self, body):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps(body).encode())
    def do_GET(self):
        self.answer({"data": [{"id": "captioner"}]})
    def do_POST(self):
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        prompt = request["messages"][0]["content"]
        time.sleep(0.05)
        if prompt == "poison":
            os._exit(1)
        choice = {"message": {"content": prompt}, "finish_reason": "stop"}
        self.answer({"choices": [choice], "usage": {"prompt_tokens": 5, "completion_tokens": 7}})
    def log_message(self, *args):
        pass
class Server(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    daemon_threads = True
    request_queue_size = 64
Server("run/socket", Handler).serve_forever()
"""


@pytest.fixture
def mortal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Engine]:
    """An engine whose own server is a small Python program instead of vLLM."""
    (tmp_path / "config.json").write_text("{}")
    command = [sys.executable, "-S", "-c", MORTAL_SERVER]
    monkeypatch.setattr(server, "server_command", lambda *_: command)
    with tempfile.TemporaryDirectory(prefix="ev") as folder:
        monkeypatch.setattr(tempfile, "tempdir", folder)
        engine = Engine(EngineConfig(str(tmp_path), max_in_flight=8, start_timeout_s=20))
        engine.start()
        yield engine
        engine.close()
        meeting = server.meeting_folder(str(tmp_path), {})
        assert eventually(lambda: not keeper.marked_processes(meeting))
        with (meeting / "lock").open() as lock:  # the keeper ends after its server
            assert eventually(lambda: keeper.nobody_uses(lock.fileno()))


def test_a_request_that_kills_the_server_takes_no_other_with_it(
    mortal: Engine, tmp_path: Path
) -> None:
    answers = {
        answer.id: answer
        for answer in mortal.answers(requests(*["well"] * 20, "poison", *["well"] * 20))
    }
    poison = answers.pop("20")
    assert poison.ending is Ending.FAILED
    assert poison.detail.startswith("the connection broke")
    assert [answer.ending for answer in answers.values()] == [Ending.STOP] * 40
    starts = server.meeting_folder(str(tmp_path), {}) / "starts"
    assert starts.read_text().count("started") == 4


def test_a_server_that_cannot_be_started_again_is_an_error(mortal: Engine, tmp_path: Path) -> None:
    folder = server.meeting_folder(str(tmp_path), {})
    (api_server,) = keeper.marked_processes(folder)
    (folder / "starts").unlink()
    (folder / "starts").mkdir()  # the next one cannot write there
    os.kill(api_server.pid, signal.SIGKILL)
    with pytest.raises(EvenmixError, match=r"exited with status 1(?s:.*)Is a directory"):
        list(mortal.answers(requests(*["well"] * 20)))
