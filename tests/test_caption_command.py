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


@pytest.mark.parametrize("model", [[], ["--model", "some/model"]])
def test_a_set_that_the_recipe_lacks_is_named(tmp_path: Path, model: list[str]) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(RECIPE)
    parser = argparse.ArgumentParser()
    caption.add_arguments(parser)
    with pytest.raises(EvenmixError, match=r"has no caption set 'newer', only own; add a table"):
        caption.run(parser.parse_args([str(recipe), "--captions", "newer", *model]))
