"""Short prompts become long ones, and those that do not say why and stay as they are."""
# ruff: noqa: RUF001  # quotation marks of many languages

import fcntl
import json
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from captioning.engine import conversation
from captioning.engine.questions import Answer, Ending
from captioning.rewriting.answers import RewriteOutcome, Rewriting, judge
from captioning.rewriting.command import META_PROMPT
from captioning.rewriting.journal import Journal
from captioning.rewriting.quotations import quoted_texts
from pipeline.cli import main
from pipeline.errors import EvenmixError
from tests.chat_server import ChatServer, Reply, prompt_of

LONG = (
    "A photograph of a red cube that stands to the left of a glossy blue sphere on a wooden table. "
    "Soft daylight falls in from a window on the right, so both throw pale shadows across the "
    "grain of the oak. The wall behind them is plain, cream-coloured and slightly out of focus."
)
META = META_PROMPT.read_text(encoding="utf-8").strip()


@pytest.mark.parametrize(
    ("prompt", "quoted"),
    [
        # Straight and curly marks.
        ('a shop window with "OPEN 24 HOURS" in neon', ["OPEN 24 HOURS"]),
        ("a cake that says “Happy Birthday, Anna!” in pink icing", ["Happy Birthday, Anna!"]),
        ("a chalkboard reading 'Soup of the Day'", ["Soup of the Day"]),
        ("a badge with ‘Hello’ on it", ["Hello"]),
        ('two signs, "Yes" and "No", on one door', ["Yes", "No"]),
        ('a sign ("WET PAINT") on a bench', ["WET PAINT"]),
        ('a poster reading"SALE"in red', ["SALE"]),
        ('a label with " padded " text', ["padded"]),
        ('a stone carved with “STOP" in red', ["STOP"]),
        ('the word "a" on a tile, then ""', ["a"]),
        # Other languages.
        ("ein Schild mit „Straße gesperrt“ vor einem Haus", ["Straße gesperrt"]),
        ("ein Schild mit „Zimmer frei” am Zaun", ["Zimmer frei"]),
        ('ein Schild mit „Hier parken" daneben', ["Hier parken"]),
        ("ein Plakat mit »Heute Ruhetag« an der Tür", ["Heute Ruhetag"]),
        ("une enseigne « Chez Amélie » au-dessus de la porte", ["Chez Amélie"]),
        ("une enseigne « Café » au coin", ["Café"]),
        ("вывеска «Хлеб и молоко» над входом", ["Хлеб и молоко"]),
        ("en skylt där det står ”Kaffe” i rött", ["Kaffe"]),
        ('un cartel que dice "¡Hola, niño!"', ["¡Hola, niño!"]),
        ("「営業中」と書かれた赤い提灯", ["営業中"]),
        ("『吾輩は猫である』という本の表紙", ["吾輩は猫である"]),
        ("一块写着“小心地滑”的黄色牌子", ["小心地滑"]),
        ('一块写着"你好"的牌子', ["你好"]),
        ("一块写着'你好'的牌子", ["你好"]),
        ("'안녕하세요'라고 적힌 간판", ["안녕하세요"]),
        ('شاي مكتوب عليه "مرحبا"', ["مرحبا"]),
        # Apostrophes and other signs quote nothing.
        ("a cat's bowl and a dog's bed", []),
        ("the dogs' bowls beside the cats' beds", []),
        ("it’s the children’s room, and it isn’t tidy", []),
        ("a rock 'n' roll singer from the '50s, in '60s clothes", []),
        ("a rock ’n’ roll band in the ’90s", []),
        ("'Tis the season: get 'em while they're hot, boys' choir in front", []),
        ("O'Brien's pub and the l'Étoile bistro aujourd'hui", []),
        ('a 12" pizza beside a 6" sub', []),
        ("a man 6'2\" tall beside a 5'4\" woman", []),
        ("a 5′ 10″ surfboard", []),
        ("a red cube", []),
        # Quotations with apostrophes in them and beside them.
        ("a sign with 'Don't walk' over the dogs' bowls", ["Don't walk"]),
        ("a sign with 'Farmers' Market' over a gate", ["Farmers' Market"]),
        ("'GAS' and the owners' names", ["GAS"]),
        ("'BOSS' next to 'STOP'", ["BOSS", "STOP"]),
        ("a mug with ‘World’s Best Dad’ on it", ["World’s Best Dad"]),
        ("the cat's tag reads \"Mr. O'Malley\"", ["Mr. O'Malley"]),
        ("the \"STOP\"'s red paint and the dogs' marks", ["STOP"]),
        ('a 12" vinyl record titled "Blue"', ["Blue"]),
        # Nested: the outer one is what can be read.
        ("a page with \"She said 'hi' to me\" on it", ["She said 'hi' to me"]),
        ("a page with “She said “hi” to me” on it", ["She said “hi” to me"]),
        ("a page with 'say \"cheese\" now'", ['say "cheese" now']),
        ("「彼は『はい』と言った」という看板", ["彼は『はい』と言った"]),
        ("「外「内」外」の看板", ["外「内」外"]),
        ("« un « mot » ici » sur un mur", ["un « mot » ici"]),
        # Unbalanced.
        ('a sign with "OPEN on a door', []),
        ("a sign with OPEN” on a door", []),
        ("a sign with “OPEN on a door", []),
        ("a sign with 'OPEN on a door", []),
        ("“A and “B” on two doors", ["B"]),
        ('"A" and "B on two doors', ["A"]),
        ("「開く と「閉じる」", ["閉じる"]),
    ],
)
def test_quoted_texts_are_found(prompt: str, quoted: list[str]) -> None:
    assert quoted_texts(prompt) == quoted


def _answer(text: str, ending: Ending = Ending.STOP, detail: str = "") -> Answer:
    return Answer("0", ending, datetime.now(UTC), 0.1, text, 5, 7, detail)


@pytest.mark.parametrize(
    ("prompt", "text"),
    [
        ('a sign with "OPEN"', "The sign reads “OPEN” in white."),
        ("a sign with “OPEN”", 'The sign reads "OPEN" in white.'),
        ("a sign with 'OPEN'", "The sign reads «OPEN» in white."),
        ("a sign with « Chez Amélie »", "The sign reads “Chez Amélie”, in white."),
        ("「営業中」の提灯", "The lantern reads “営業中” in black."),
        ("a sign with 'Farmers' Market'", "The sign reads “Farmers' Market” in white."),
        ("a mug with “World’s Best Dad”", "The dog's mug reads 'World’s Best Dad' in white."),
        ('two doors, "A" and "B"', 'The right one says "B", the left one "A".'),
    ],
)
def test_other_quotation_marks_are_no_change(prompt: str, text: str) -> None:
    rewritten = f"{LONG} {text}"
    assert judge(prompt, _answer(rewritten), META) == Rewriting(rewritten, RewriteOutcome.OK)


@pytest.mark.parametrize(
    ("prompt", "text", "lost"),
    [
        ('a sign with "OPEN"', "The sign reads “Open”.", "OPEN"),
        ('a sign with "OPEN"', "The sign reads “OPENING”.", "OPEN"),
        ('a sign with "OPEN"', "The sign reads “OPEN.”", "OPEN"),
        ('a sign with "OPEN"', "The sign reads OPEN in white.", "OPEN"),
        ('a sign with "OPEN"', "The sign glows in white.", "OPEN"),
        ('a sign with "WE  ARE OPEN"', "The sign reads “WE ARE OPEN”.", "WE  ARE OPEN"),
        ('a sign with "Don\'t"', "The sign reads “Don’t”.", "Don't"),
        ('a sign with "recieve"', "The sign reads “receive”.", "recieve"),
        ('a sign with "Cafe\u0301"', "The sign reads “Caf\u00e9”.", "Cafe\u0301"),
        ("「営業中」の提灯", "The lantern reads “Open for business”.", "営業中"),
        ("ein Schild mit „Straße“", "The sign reads “Strasse”.", "Straße"),
        ('doors: "A", "B", "C"', 'The doors read "A" and "D".', "B | C"),
        ('"and" on a wall', 'The wall reads "LOVE" and "PEACE".', "and"),
    ],
)
def test_quoted_text_that_is_changed_is_a_reason(prompt: str, text: str, lost: str) -> None:
    assert judge(prompt, _answer(f"{LONG} {text}"), META) == Rewriting(
        prompt, RewriteOutcome.QUOTED_TEXT_CHANGED, f"not in the answer: {lost}"
    )


@pytest.mark.parametrize(
    ("text", "outcome", "detail"),
    [
        ("", RewriteOutcome.EMPTY, ""),
        (" \n", RewriteOutcome.EMPTY, ""),
        ("<think>A cube.</think>\n", RewriteOutcome.EMPTY, ""),
        (f"<think>Let me see. {LONG}", RewriteOutcome.THINKING, ""),
        ("I'm sorry, but I can't help with that request.", RewriteOutcome.REFUSED, ""),
        (META, RewriteOutcome.ECHO, ""),
        (LONG + " The cube is red." * 60, RewriteOutcome.REPEATING, ""),
        ("A red cube on a table.", RewriteOutcome.TOO_SHORT, "22 characters"),
        (f"Here is the rewritten prompt: {LONG}", RewriteOutcome.NOT_PLAIN, "an introduction"),
        (f"Here’s a detailed caption:\n\n{LONG}", RewriteOutcome.NOT_PLAIN, "an introduction"),
        (f"Sure! {LONG}", RewriteOutcome.NOT_PLAIN, "an introduction"),
        (f"**Prompt:** {LONG}", RewriteOutcome.NOT_PLAIN, "an introduction"),
        (f"以下是改写后的提示词：{LONG}", RewriteOutcome.NOT_PLAIN, "an introduction"),
        (
            f"{LONG}\n\nNote: I kept all details.",
            RewriteOutcome.NOT_PLAIN,
            "line breaks or control characters",
        ),
        (f"{LONG}\x1fA", RewriteOutcome.NOT_PLAIN, "line breaks or control characters"),
        (f"## {LONG}", RewriteOutcome.NOT_PLAIN, "Markdown"),
        (f"- {LONG}", RewriteOutcome.NOT_PLAIN, "Markdown"),
        (LONG.replace("red", "**red**"), RewriteOutcome.NOT_PLAIN, "Markdown"),
        (f'"{LONG}"', RewriteOutcome.NOT_PLAIN, "quotation marks around the answer"),
        (f"“{LONG}”", RewriteOutcome.NOT_PLAIN, "quotation marks around the answer"),
    ],
)
def test_an_answer_of_no_use_says_why(text: str, outcome: RewriteOutcome, detail: str) -> None:
    assert judge("a red cube", _answer(text), META) == Rewriting("a red cube", outcome, detail)


@pytest.mark.parametrize(
    "text",
    [
        "<think>\n\n</think>\n\n" + LONG,
        "<think>The cube must be red.</think>" + LONG,
        "The cube must be red.\n</think>\n" + LONG,  # the template has opened the thoughts
        f"  {LONG}\n",
    ],
)
def test_only_what_follows_the_thoughts_is_the_answer(text: str) -> None:
    assert judge("a red cube", _answer(text), META) == Rewriting(LONG, RewriteOutcome.OK)


@pytest.mark.parametrize(
    "text",
    [
        f'A sign reads "Prompt: 2 * 3" and "**bold**". {LONG}',
        f"Here are two cats beside a cube. {LONG}",
        f"Okapis graze beside the cube. {LONG}",
        f"“OPEN” shines above the door, “EXIT” below it. {LONG} “STOP”",
        f"A poem in chalk reads “roses\nare red”. {LONG}",
        f"A tall sign says ‘I'm sorry, I can't help you’. {LONG}",
    ],
)
def test_captions_that_look_odd_are_captions(text: str) -> None:
    assert judge("a red cube", _answer(text), META) == Rewriting(text, RewriteOutcome.OK)


def test_endings_of_the_engine_are_outcomes() -> None:
    def outcome(ending: Ending, text: str = "", detail: str = "") -> tuple[RewriteOutcome, str]:
        rewriting = judge("a red cube", _answer(text, ending, detail), META)
        assert rewriting.prompt == "a red cube"
        return rewriting.outcome, rewriting.detail

    assert outcome(Ending.LENGTH, LONG) == (RewriteOutcome.TRUNCATED, "")
    assert outcome(Ending.LENGTH, f"<think>{LONG}") == (RewriteOutcome.THINKING, "")
    assert outcome(Ending.LENGTH, "cube " * 200) == (RewriteOutcome.REPEATING, "")
    assert outcome(Ending.NOT_TAKEN, "", "too long") == (RewriteOutcome.NOT_TAKEN, "too long")
    assert outcome(Ending.FAILED, "", "it died") == (RewriteOutcome.ENGINE_FAILED, "it died")
    assert outcome(Ending.WITHHELD, LONG) == (RewriteOutcome.REFUSED, "")


def test_a_rewriting_is_no_shorter_than_a_short_prompt() -> None:
    caption = LONG[:200]
    assert judge("x" * 200, _answer(caption), META).outcome is RewriteOutcome.OK
    assert judge("x" * 201, _answer(caption), META).outcome is RewriteOutcome.TOO_SHORT
    essay = (
        LONG + " " + "The shelf above them holds seven small brass bells in a row, unpolished. "
        "A folded newspaper, a pair of reading glasses and a cup of black coffee stand behind "
        "the sphere, and a thin line of steam rises from it into the cold light."
    )
    assert len(essay) >= 500
    assert judge("x" * 5000, _answer(essay), META).outcome is RewriteOutcome.OK


# The command, with a server whose answers are decided here.


def _write(path: Path, *lines: Any) -> Path:
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    path.write_text("".join(f"{text}\n" for text in texts), encoding="utf-8")
    return path


def _read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _rewrite(server: ChatServer, prompts: Path, output: Path, *options: str) -> int:
    command = ["rewrite", str(prompts), f"--output={output}", "--model=tiny"]
    return main([*command, f"--endpoint={server.url}", *options])


def _asked(server: ChatServer) -> list[str]:
    """Return the prompts of the requests, the trial of a single token left out."""
    return [prompt_of(body) for body in server.bodies if body["max_tokens"] > 1]


def test_the_command_writes_a_line_for_each_prompt(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = _write(
        tmp_path / "prompts.jsonl",
        {"prompt": "a red cube", "tag": "colour", "count": 1},
        "",
        {"prompt": 'a sign with "ÖFFNUNG"'},
        {"prompt": "a blue sphere"},
        {"id": 7, "prompt": "a lost cube"},
    )

    def respond(body: dict[str, Any]) -> Reply:
        prompt = prompt_of(body)
        if prompt == "a lost cube":
            return Reply("not for us", status=400)
        return Reply(f"{LONG} It reads “Öffnung”.", prompt_tokens=len(prompt))

    output = tmp_path / "long" / "prompts.jsonl"
    with ChatServer(respond) as server:
        assert _rewrite(server, prompts, output) == 0
        bodies = server.bodies
    rows = _read(output)
    rewritten = f"{LONG} It reads “Öffnung”."
    assert [
        (row["prompt"], row["rewritten"], row["outcome"], row["prompt_tokens"]) for row in rows
    ] == [
        ("a red cube", rewritten, "ok", 10),
        ('a sign with "ÖFFNUNG"', 'a sign with "ÖFFNUNG"', "quoted_text_changed", 21),
        ("a blue sphere", rewritten, "ok", 13),
        ("a lost cube", "a lost cube", "not_taken", 0),
    ]
    assert rows[0] == {
        "prompt": "a red cube",
        "tag": "colour",
        "count": 1,
        "rewritten": rewritten,
        "outcome": "ok",
        "detail": "",
        "answer": rewritten,
        "seed": rows[0]["seed"],
        "prompt_tokens": 10,
        "completion_tokens": 7,
        "model": "tiny",
        "revision": None,
        "meta_prompt_sha256": rows[0]["meta_prompt_sha256"],
    }
    assert (rows[1]["answer"], rows[1]["detail"]) == (rewritten, "not in the answer: ÖFFNUNG")
    assert (rows[3]["id"], rows[3]["detail"]) == (7, "HTTP 400: not for us")
    assert "ÖFFNUNG" in output.read_text(encoding="utf-8")  # to be read, not \\u00d6
    assert [path.name for path in output.parent.iterdir()] == ["prompts.jsonl"]

    bodies = [body for body in bodies if body["max_tokens"] == 512]  # without the trial
    body = next(body for body in bodies if prompt_of(body) == "a red cube")
    assert body["messages"][0] == {"role": "system", "content": META}
    sampling = {"temperature": 0.6, "top_p": 0.95, "top_k": 20}
    assert sampling.items() <= body.items()
    assert body["chat_template_kwargs"] == {"enable_thinking": False}
    seeds = {prompt_of(body): body["seed"] for body in bodies}
    assert seeds == {row["prompt"]: row["seed"] for row in rows}
    assert len(set(seeds.values())) == 4

    shown = capsys.readouterr().err
    assert f"rewrite: {output}" in shown
    for line in [
        "ok 2 the rewriting",
        "quoted_text_changed 1 the prompt",
        "not_taken 1 the prompt",
    ]:
        assert line in " ".join(shown.split())


def test_lines_of_text_are_prompts(tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_bytes("\ufeff  a red cube \r\n\r\n{a blue sphere}\n".encode())
    own = _write(tmp_path / "meta.txt", "Make it long.", "Make it good.")
    output = tmp_path / "long.jsonl"
    with ChatServer(lambda body: Reply(LONG)) as server:
        assert _rewrite(server, prompts, output, f"--meta-prompt={own}", "--seed=3") == 0
        (system,) = {body["messages"][0]["content"] for body in server.bodies}
    assert system == "Make it long.\nMake it good."
    assert [row["prompt"] for row in _read(output)] == ["a red cube", "{a blue sphere}"]


def test_prompts_should_be_utf_8(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_bytes("café".encode("latin-1"))
    with ChatServer(lambda body: Reply(LONG)) as server:
        assert _rewrite(server, prompts, tmp_path / "long.jsonl") == 1
    assert f"{prompts} is not UTF-8" in capsys.readouterr().err


def _run_in_child(server_url: str, prompts: Path, output: Path) -> None:
    command = ["rewrite", str(prompts), f"--output={output}", "--model=tiny"]
    main([*command, f"--endpoint={server_url}"])


def _eventually(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_killed_run_goes_on_where_it_was(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = [f"cube number {number}" for number in range(40)]
    prompts = _write(tmp_path / "prompts.txt", *names)
    output, journal = tmp_path / "long.jsonl", tmp_path / "long.jsonl.partial"
    killed = False

    def respond(body: dict[str, Any]) -> Reply:
        if not killed and prompt_of(body) in names[30:]:
            time.sleep(60)
        return Reply(f"{LONG} This is {prompt_of(body)}.")

    with ChatServer(respond) as server:
        child = multiprocessing.get_context("spawn").Process(
            target=_run_in_child, args=(server.url, prompts, output)
        )
        child.start()
        _eventually(lambda: journal.exists() and journal.read_bytes().count(b"\n") == 31)

        # Two at once would write each answer twice.
        assert _rewrite(server, prompts, output) == 1
        assert "another process writes" in capsys.readouterr().err

        assert child.pid is not None
        os.kill(child.pid, signal.SIGKILL)
        child.join()
        killed = True
        assert not output.exists()
        with journal.open("ab") as file:
            file.write(b'{"number": 30, "resu')  # as a kill may leave it

        # Neither other settings nor other prompts go on with it.
        assert _rewrite(server, prompts, output, "--seed=1") == 1
        assert "is from a run with other settings (seed)" in capsys.readouterr().err
        others = _write(tmp_path / "others.txt", "a cone")
        assert _rewrite(server, others, output) == 1
        assert "other settings (prompts_sha256)" in capsys.readouterr().err

        server.bodies.clear()
        assert _rewrite(server, prompts, output) == 0
        assert sorted(_asked(server)) == sorted(names[30:])
        rows = _read(output)
        assert [row["prompt"] for row in rows] == names
        assert all(row["rewritten"] == f"{LONG} This is {row['prompt']}." for row in rows)
        assert not journal.exists()

        # A finished output is never overwritten.
        before = output.read_bytes()
        server.bodies.clear()
        assert _rewrite(server, prompts, output) == 1
        assert f"{output} exists already" in capsys.readouterr().err
        assert (output.read_bytes(), server.bodies) == (before, [])


@pytest.mark.parametrize(
    "data",
    [b"notes", b"first line\nsecond", b'["settings"]\nx', b'{"settings": 1}\nx', b"\xff\n\n", b"{"],
)
def test_another_file_with_the_name_of_the_journal_stays_as_it_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], data: bytes
) -> None:
    prompts = _write(tmp_path / "prompts.txt", "a red cube")
    output, journal = tmp_path / "long.jsonl", tmp_path / "long.jsonl.partial"
    journal.write_bytes(data)
    with ChatServer(lambda body: Reply(LONG)) as server:
        assert _rewrite(server, prompts, output) == (0 if data == b"{" else 1)
    message = f"{journal} is where answers would be kept, but it is another file; name another"
    if data == b"{":  # a kill may have left that of the first line
        assert not journal.exists()
    else:
        assert journal.read_bytes() == data
        assert message in capsys.readouterr().err


def test_a_damaged_journal_stays_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    Journal(path, {"seed": 1}).close()
    data = path.read_bytes() + b'{"number": 1}\n{"numb'
    path.write_bytes(data)
    with pytest.raises(EvenmixError, match=r"is damaged .* remove it, and its results are made"):
        Journal(path, {"seed": 1})
    assert path.read_bytes() == data


def test_a_journal_that_is_removed_as_another_opens_it_is_begun_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "journal"
    first = Journal(path, {"seed": 1})
    first.keep(0, {"outcome": "ok"})
    flock, num_locks = fcntl.flock, 0

    def after_the_first_has_ended(file: Any, operation: int) -> None:
        nonlocal num_locks
        num_locks += 1
        if num_locks == 1:
            first.remove()
            first.close()
        flock(file, operation)

    monkeypatch.setattr(fcntl, "flock", after_the_first_has_ended)
    second = Journal(path, {"seed": 1})
    assert (num_locks, second.results) == (2, {})
    second.keep(3, {"outcome": "ok"})
    with pytest.raises(EvenmixError, match="another process writes"):
        Journal(path, {"seed": 1})
    second.close()
    third = Journal(path, {"seed": 1})
    assert third.results == {3: {"outcome": "ok"}}
    third.close()


def test_what_another_process_has_just_finished_is_not_asked_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = _write(tmp_path / "prompts.txt", "a red cube")
    output = tmp_path / "long.jsonl"
    flock = fcntl.flock

    def after_the_other_has_ended(file: Any, operation: int) -> None:
        if not output.exists():
            output.write_text("the other's")
            (tmp_path / "long.jsonl.partial").unlink()
        flock(file, operation)

    monkeypatch.setattr(fcntl, "flock", after_the_other_has_ended)
    with ChatServer(lambda body: Reply(LONG)) as server:
        assert _rewrite(server, prompts, output) == 1
        assert server.bodies == []
    assert f"{output} exists already" in capsys.readouterr().err
    assert sorted(tmp_path.iterdir()) == [output, prompts]
    assert output.read_text() == "the other's"


def test_what_the_engine_failed_at_is_asked_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first run ends early; its journal has an answer, and a failure that may be mended."""
    monkeypatch.setattr(conversation, "BACKOFF_S", 0.01)
    names = ["a red cube", "a blue sphere", "a green cone"]
    prompts = _write(tmp_path / "prompts.txt", *names)
    output, journal = tmp_path / "long.jsonl", tmp_path / "long.jsonl.partial"
    is_well = False

    def respond(body: dict[str, Any]) -> Reply:
        if is_well or body["max_tokens"] == 1 or prompt_of(body) == "a red cube":
            return Reply(LONG)
        if prompt_of(body) == "a blue sphere":
            return Reply("no luck", status=500)
        _eventually(lambda: journal.read_text().count("\n") == 3)
        return Reply("who are you", status=401)

    with ChatServer(respond) as server:
        assert _rewrite(server, prompts, output) == 1
        assert "who are you" in capsys.readouterr().err
        assert "engine_failed" in journal.read_text()
        is_well = True
        server.bodies.clear()
        assert _rewrite(server, prompts, output) == 0
        assert sorted(_asked(server)) == ["a blue sphere", "a green cone"]
    assert [(row["prompt"], row["outcome"]) for row in _read(output)] == [
        (name, "ok") for name in names
    ]


@pytest.mark.parametrize(
    ("name", "lines", "message"),
    [
        ("p.txt", ["", "  "], "p.txt has no prompts; write one a line"),
        ("p.jsonl", [{"prompt": "x"}, "{"], "p.jsonl, line 2 is not JSON"),
        ("p.jsonl", ['{"prompt": "\\ud800"}'], "p.jsonl, line 1 is not JSON"),
        ("p.jsonl", ['{"prompt": "x", "n": NaN}'], "p.jsonl, line 1 is not JSON"),
        ("p.jsonl", ["[" * 100_000], "p.jsonl, line 1 is not JSON"),
        ("p.jsonl", [{"text": "x"}], 'p.jsonl, line 1 should be an object such as {"prompt"'),
        ("p.jsonl", ["", {"prompt": " "}], "p.jsonl, line 2 should be an object"),
        ("p.jsonl", [["x"]], "p.jsonl, line 1 should be an object"),
        ("p.jsonl", [{"prompt": "x", "seed": 1}], "p.jsonl, line 1 has seed, which the output"),
    ],
)
def test_mistakes_in_the_prompts_stop_before_any_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, lines: list[Any], message: str
) -> None:
    prompts = _write(tmp_path / name, *lines)
    with ChatServer(lambda body: Reply(LONG)) as server:
        assert _rewrite(server, prompts, tmp_path / "long.jsonl") == 1
        assert server.bodies == []
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [prompts]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--arguments=max_model_len"], "--arguments max_model_len is not JSON"),
        (["--arguments=[1]"], "--arguments [1] is no object such as"),
        (["--meta-prompt=absent.txt"], "cannot read absent.txt"),
        (["--output=gs://bucket/long.jsonl"], "--output gs://bucket/long.jsonl should be a local"),
    ],
)
def test_mistakes_in_the_options_stop_before_any_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    prompts = _write(tmp_path / "prompts.txt", "a red cube")
    with ChatServer(lambda body: Reply(LONG)) as server:
        assert _rewrite(server, prompts, tmp_path / "long.jsonl", *options) == 1
        assert server.bodies == []
    assert message in capsys.readouterr().err
