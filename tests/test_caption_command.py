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
        (
            ["--captions", "new", "--parent", "own", "--redo", "empty"],
            "own is .* cannot be a parent",
        ),
        (["--captions", "new", "--model", "a/b", "--margin", "inf"], "margin: .* less than"),
        (["--captions", "new", "--parent", "new", "--model", "a/b"], "its own parent"),
        (["--captions", "new", "--model", "a/b", "--bare-engine", "0"], "at least one caption"),
        (["--bare-engine", "9"], "which own does not have"),
        (["--captions", "n", "--model", "m", "--endpoint", "host:8000/v1"], "is no URL such as"),
        (
            ["--captions", "n", "--model", "m", "--endpoint", "http://me:pw@host/v1"],
            "user name or a password",
        ),
        (["--captions", "n", "--model", "s3://key:secret@b/m"], "user name or a password"),
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


def test_a_mixture_of_other_datasets_is_an_error(tmp_path: Path) -> None:
    other = tmp_path / "other.toml"
    other.write_text(RECIPE.replace("[datasets.cats]", "[datasets.dogs]"))
    options = ("--captions", "new", "--model", "a/b", "--for", str(other))
    with pytest.raises(EvenmixError, match=r"has datasets that .* lacks: dogs"):
        caption.run(parse(tmp_path, *options))


def test_a_child_of_a_set_in_the_recipe_has_its_settings(tmp_path: Path) -> None:
    args = parse(tmp_path, "--captions", "new-2", "--parent", "new", "--redo", "truncated,empty")
    parent = '[captions.new]\nengine = "vllm"\nmodel = "a/b"\ncaptions_per_image = 5\n'
    Path(args.recipe).write_text(RECIPE + parent)
    recipe, captions = caption._recipe_and_set(args)
    assert captions == "new-2"
    table = {"engine": "vllm", "model": "a/b", "captions_per_image": 5}
    assert recipe.captions["new"].model_dump(exclude_unset=True) == table
    child = table | {"parent": "new", "redo": ["truncated", "empty"]}
    assert recipe.captions["new-2"].model_dump(exclude_unset=True) == child
