"""What `evenmix sample` is given. (Its pictures are in test_train_loop.py, and those of files of
weights in test_train_weights.py.)"""

import json
from pathlib import Path

import pytest

from pipeline.cli import main
from pipeline.errors import EvenmixError
from train.prompts import read_prompts


def test_prompts_are_the_lines_of_a_text_file(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("a cat\n\n  a sign that says “A\u2028B” \n", encoding="utf-8")
    assert read_prompts(path) == ["a cat", "a sign that says “A\u2028B”"]


def test_prompts_are_those_that_were_rewritten(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    lines = [{"prompt": "a cat", "rewritten": "A grey cat."}, {"prompt": "b", "rewritten": "b"}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    assert read_prompts(path) == ["A grey cat.", "b"]


@pytest.mark.parametrize(
    ("name", "text", "problem"),
    [
        ("prompts.txt", " \n", "has no prompts"),
        ("prompts.jsonl", "a cat\n", "'a cat' is no JSON object"),
        ("prompts.jsonl", '{"prompt": "a cat"}\n', 'is no JSON object with "rewritten"'),
        ("prompts.jsonl", "[1]\n", "is no JSON object"),
    ],
)
def test_what_is_no_file_of_prompts_is_an_error(
    tmp_path: Path, name: str, text: str, problem: str
) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(EvenmixError, match=problem):
        read_prompts(tmp_path / name)


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ("--checkpoint run --prompt a --config a.toml", "run is a run, which has its own config"),
        ("--checkpoint run --prompt a", "/run/checkpoints holds no checkpoint; give the output"),
        ("--checkpoint run --prompts none.txt", "cannot read prompts from none.txt"),
        ("--checkpoint run --prompt a --steps 0 --shift 0", "steps 0 is below 1; shift 0.0 is not"),
        ("--checkpoint w.pt --prompt a --config none.toml", "none.toml does not exist"),
        ("--checkpoint w.pt --prompt a", "w.pt is a file of weights; say by --config how"),
    ],
)
def test_mistakes_are_told(
    tmp_path: Path,
    given: str,
    problem: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "w.pt").touch()
    assert main(["sample", *given.split(), "--output", "pictures"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert problem in line
    assert not (tmp_path / "pictures").exists()
