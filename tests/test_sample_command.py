"""Where `evenmix sample` takes its prompts from. (Its pictures are in test_train_loop.py.)"""

import json
from pathlib import Path

import pytest

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
