"""What a server's responses mean."""

import json
from typing import Any

import pytest

from captioning.engine.chat import (
    CutOff,
    NotTakenError,
    Trouble,
    TurnedAway,
    check_status,
    read_completion,
)
from captioning.engine.questions import Ending
from pipeline.errors import EvenmixError

MAX_CHARS = 100
WORDS = b'{"error": {"message": "too  much\\nto do", "type": "x"}}'


@pytest.mark.parametrize(
    ("status", "meaning"),
    [
        *dict.fromkeys([400, 403, 413, 422], NotTakenError).items(),
        *dict.fromkeys([408, 425, 429, 503], TurnedAway).items(),
        *dict.fromkeys([500, 504, 599], Trouble).items(),
        *dict.fromkeys([301, 401, 404, 405], EvenmixError).items(),
        (502, CutOff),
    ],
)
def test_a_status_has_a_meaning(status: int, meaning: type[Exception]) -> None:
    with pytest.raises(meaning, match=f"HTTP {status}: too much to do") as caught:
        check_status(status, None, WORDS)
    assert caught.type is meaning


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b'{"error": "who are you"}', '{"error": "who are you"}'),
        (b"<html>\xff\n</html>", "<html>\ufffd </html>"),
        (b"x" * 100_000, "x" * 500),
        (b"", ""),
        (b'{"error": {"message": "\\u001b[2J\\u0007 busy"}}', "\ufffd[2J\ufffd busy"),
    ],
)
def test_any_words_are_passed_on(body: bytes, words: str) -> None:
    with pytest.raises(Trouble) as caught:
        check_status(500, None, body)
    assert str(caught.value) == f"HTTP 500: {words}"


@pytest.mark.parametrize(
    ("header", "wait_s"),
    [(None, 0), ("7", 7), ("60", 60), ("3600", 60), ("1" * 999, 60), ("-1", 0), ("soon", 0)],
)
def test_a_server_may_ask_for_a_minute_at_most(header: str | None, wait_s: float) -> None:
    with pytest.raises(TurnedAway) as caught:
        check_status(429, header, WORDS)
    assert caught.value.retry_after_s == wait_s


@pytest.mark.parametrize(
    ("choice", "ending", "text"),
    [
        ('{"message": {"content": " A cat.\\n"}, "finish_reason": "stop"}', Ending.STOP, "A cat."),
        ('{"message": {"content": null}, "finish_reason": "length"}', Ending.LENGTH, ""),
        ('{"message": {}, "finish_reason": "stop", "index": 0}', Ending.STOP, ""),
    ],
)
def test_an_answer_is_read(choice: str, ending: Ending, text: str) -> None:
    completion = read_completion(f'{{"choices": [{choice}], "id": 1}}'.encode(), MAX_CHARS)
    assert (completion.ending, completion.text) == (ending, text)


def answer(text: str = "A cat.", reason: str = "stop", **more: Any) -> bytes:
    choice = {"message": {"content": text}, "finish_reason": reason}
    return json.dumps({"choices": [choice], **more}).encode()


@pytest.mark.parametrize(
    ("reason", "ending"),
    [
        *dict.fromkeys(["stop", "eos_token", "eos", "end_turn", "tool_calls"], Ending.STOP).items(),
        *dict.fromkeys(["length", "max_tokens", "model_length"], Ending.LENGTH).items(),
        ("content_filter", Ending.WITHHELD),
    ],
)
def test_servers_have_many_words_for_an_end(reason: str, ending: Ending) -> None:
    assert read_completion(answer(reason=reason), MAX_CHARS).ending is ending


@pytest.mark.parametrize(
    ("usage", "tokens"),
    [
        ({"usage": {"prompt_tokens": 9, "completion_tokens": 2**31 - 1}}, (9, 2**31 - 1)),
        ({"usage": {"prompt_tokens": None, "completion_tokens": 3}}, (0, 3)),
        ({"usage": {}}, (0, 0)),
        ({"usage": None}, (0, 0)),
        ({}, (0, 0)),
    ],
)
def test_a_server_need_not_count_tokens(usage: dict[str, Any], tokens: tuple[int, int]) -> None:
    counted = read_completion(answer(**usage), MAX_CHARS).usage
    assert (counted.prompt_tokens, counted.completion_tokens) == tokens


def test_an_answer_that_is_too_long_is_none() -> None:
    assert read_completion(answer(" " + "é" * MAX_CHARS), MAX_CHARS).text == "é" * MAX_CHARS
    with pytest.raises(Trouble, match="the answer has more than the 100 characters"):
        read_completion(answer("é" * (MAX_CHARS + 1)), MAX_CHARS)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"<html>",
        b"[]",
        b'{"choices": []}',
        b'{"choices": [{"message": {"content": 5}, "finish_reason": "stop"}]}',
        b'{"choices": [{"message": {"content": "\\ud800"}, "finish_reason": "stop"}]}',
        b'{"choices": [{"message": {"content": "a"}, "finish_reason": "stop"}], "usage": 5}',
        answer(usage={"completion_tokens": 10**12}),
        answer(usage={"completion_tokens": 2**31}),
        answer(usage={"prompt_tokens": -1}),
    ],
)
def test_what_is_no_answer_is_trouble(body: bytes) -> None:
    with pytest.raises(Trouble, match="the answer is no chat completion: "):
        read_completion(body, MAX_CHARS)


@pytest.mark.parametrize("reason", ['"abort"', '"error"', "null"])
def test_an_answer_that_was_broken_off_is_trouble(reason: str) -> None:
    choice = f'{{"message": {{"content": "A c"}}, "finish_reason": {reason}}}'
    with pytest.raises(Trouble, match="the answer ended with"):
        read_completion(f'{{"choices": [{choice}]}}'.encode(), MAX_CHARS)
