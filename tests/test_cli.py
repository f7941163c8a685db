"""A mistake at the command line is answered with one clear line and the right exit status."""

import subprocess
import sys
from pathlib import Path

import pytest

RECIPE = """
root = "R"
sead = 1
[datasets.cats]
layout = "folder"
source = "cats"
licence = "CC0 1.0"
[captions.own]
engine = "source"
[mixture]
name = "small"
resolution = 256
captions = "own"
"""
REPOSITORY = Path(__file__).parents[1]


def evenmix(folder: Path, *arguments: str) -> tuple[int, list[str]]:
    """Return the exit status and what is said on stderr."""
    done = subprocess.run(
        [sys.executable, "-m", "pipeline.cli", *arguments],
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
        check=False,
        env={"PATH": "", "HOME": str(folder), "COLUMNS": "1000"},
    )
    assert "Traceback" not in done.stderr
    return done.returncode, done.stderr.splitlines()


@pytest.fixture
def recipe(tmp_path: Path) -> str:
    path = tmp_path / "recipe.toml"
    path.write_text(RECIPE.replace("sead", "seed").replace('"R"', f'"{tmp_path}/R"'))
    return str(path)


def test_an_unknown_command(tmp_path: Path) -> None:
    status, lines = evenmix(tmp_path, "biuld")
    assert status == 2
    assert lines[-1].startswith("evenmix: error: argument COMMAND: invalid choice: 'biuld'")


def test_no_command(tmp_path: Path) -> None:
    status, lines = evenmix(tmp_path)
    assert status == 2
    assert lines[-1] == "evenmix: error: the following arguments are required: COMMAND"


def test_an_unknown_option_of_a_command_without_beam(tmp_path: Path) -> None:
    status, lines = evenmix(tmp_path, "verify", "R", "--depe")
    assert status == 2
    assert lines[-1] == "evenmix: error: unknown options: --depe"


def test_no_corpus(tmp_path: Path) -> None:
    assert evenmix(tmp_path, "verify", f"{tmp_path}/absent") == (
        1,
        [f"error: there is no finished work below {tmp_path}/absent; is it a corpus root?"],
    )


def test_a_missing_recipe(tmp_path: Path) -> None:
    assert evenmix(tmp_path, "ingest", "absent.toml") == (1, ["error: absent.toml does not exist"])


def test_a_recipe_with_a_mistake(tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_text(RECIPE)
    assert evenmix(tmp_path, "build", f"{tmp_path}/recipe.toml") == (
        1,
        [
            f"error: {tmp_path}/recipe.toml has 1 mistake:",
            "  sead: unknown key; did you mean 'seed'?",
        ],
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--max_num_wokers=3"],
            "--max_num_wokers is an option of neither evenmix nor Beam; did you mean "
            "'--max_num_workers'?",
        ),
        (["other.toml"], "'other.toml' belongs to no option; there is one recipe a command"),
        (["--workers", "0"], "--workers 0: at least one is needed"),
    ],
)
def test_options_that_do_not_fit(
    tmp_path: Path, recipe: str, arguments: list[str], message: str
) -> None:
    assert evenmix(tmp_path, "ingest", recipe, *arguments) == (1, [f"error: {message}"])


def test_sources_that_are_not_there(tmp_path: Path, recipe: str) -> None:
    assert evenmix(tmp_path, "ingest", recipe) == (
        1,
        ["error: dataset cats: no records at cats; correct datasets.cats.source"],
    )


def test_help_names_every_command(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pipeline.cli", "--help"],
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
        check=True,
    )
    for command in ["build", "ingest", "embed", "dedup", "caption", "mix", "train", "sample"]:
        assert f"\n    {command} " in done.stdout


def test_what_cannot_be_written_is_named(tmp_path: Path, recipe: str) -> None:
    """The root is below a file."""
    (tmp_path / "cats").mkdir()
    (tmp_path / "cats/a.jpg").write_bytes(b"x")
    text = Path(recipe).read_text().replace('"cats"', f'"{tmp_path}/cats"')
    Path(recipe).write_text(text)
    (tmp_path / "R").write_text("a file")
    status, (line,) = evenmix(tmp_path, "ingest", recipe)
    assert status == 1
    assert line.startswith(f"error: cannot write {tmp_path}/R/images/cats/")
