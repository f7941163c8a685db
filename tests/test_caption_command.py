"""`evenmix caption`: which set it writes, and what it says of one that the recipe does not have."""

import argparse
from pathlib import Path

import pytest

from captioning import caption
from pipeline.errors import EvenmixError

RECIPE = """
root = "corpus"
[datasets.cats]
layout = "folder"
source = "cats"
licence = "CC0 1.0"
[captions.own]
engine = "source"
[mixture]
name = "m"
resolution = 64
captions = "own"
"""


def parse(tmp_path: Path, *options: str) -> argparse.Namespace:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(RECIPE)
    parser = argparse.ArgumentParser()
    caption.add_arguments(parser)
    args = parser.parse_args([str(recipe), *options])
    args.beam_options = []
    return args


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (
            ["--captions", "newer"],
            r"has no caption set 'newer', only own; add .*\[captions.newer\]",
        ),
        (["--model", "a/b"], "--model goes with --captions NAME"),
        (["--captions", "own", "--model", "a/b"], "own of .* is not made with a model"),
        (["--captions", "new", "--model", "nowhere"], "the model nowhere does not exist"),
        (["--captions", "new", "--model", "a/b", "--redo", "empty"], "new.*redo needs a parent"),
        (
            ["--captions", "new", "--model", "a/b", "--parent", "old", "--redo", "emtpy"],
            "redo.*'truncated'",
        ),
        (["--captions", "new", "--parent", "own", "--redo", "empty"], "is not made with a model"),
        (["--captions", "new", "--parent", "new", "--model", "a/b"], "its own parent"),
    ],
)
def test_what_cannot_be_meant_is_an_error(tmp_path: Path, options: list[str], problem: str) -> None:
    with pytest.raises(EvenmixError, match=problem):
        caption.run(parse(tmp_path, *options))


def test_a_recipe_about_another_corpus_is_an_error(tmp_path: Path) -> None:
    other = tmp_path / "other.toml"
    other.write_text(RECIPE.replace('root = "corpus"', 'root = "elsewhere"'))
    options = ("--captions", "new", "--model", "a/b", "--for", str(other))
    with pytest.raises(EvenmixError, match="is about the corpus elsewhere"):
        caption.run(parse(tmp_path, *options))
