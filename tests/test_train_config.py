"""A configuration is checked as a whole, and its errors help."""

from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import EvenmixError
from train.config import TrainConfig, load_config

DEMO = Path(__file__).parent.parent / "demo/train.toml"


def settings(**changes: Any) -> dict[str, Any]:
    """A small configuration."""
    return {
        "mixture": "m",
        "output": "o",
        "resolution": 8,
        "steps": 10,
        "batch_size": 4,
        "model": {"hidden_size": 16, "depth": 3, "num_heads": 2},
        "text": {"encoder": "bytes", "num_tokens": 4, "embed_dim": 8},
        "latent": {"encoder": "pixels", "downsampling": 2},
    } | changes


def test_the_demos_configuration_is_valid_and_can_be_overridden() -> None:
    config = load_config(str(DEMO), mixture="gs://bucket/m", output=None, steps=7)
    assert (config.mixture, config.steps) == ("gs://bucket/m", 7)
    assert config.output == load_config(str(DEMO)).output


def test_the_model_is_shaped_by_all_sections() -> None:
    config = TrainConfig.model_validate(settings())
    shape = config.model_config_for(config.latent_codec())
    assert (shape.input_size, shape.image_resolution, shape.in_channels) == (4, 8, 12)
    assert (shape.text_num_tokens, shape.text_embed_dim, shape.head_dim) == (4, 8, 8)


def test_all_mistakes_are_told_at_once_with_suggestions(tmp_path: Path) -> None:
    path = tmp_path / "train.toml"
    path.write_text(
        DEMO.read_text()
        .replace("batch_size", "batchsize")
        .replace("learning_rate", "learning_rat")
        .replace("depth = ", "depth = -")
    )
    with pytest.raises(EvenmixError) as caught:
        load_config(str(path))
    message = str(caught.value)
    assert "batchsize: unknown key; did you mean 'batch_size'?" in message
    assert "optimiser.learning_rat: unknown key; did you mean 'learning_rate'?" in message
    assert "model.i1.depth: Input should be greater than 0" in message
    assert "batch_size: Field required" in message


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": {"hidden_size": 16, "depth": 2, "num_heads": 2}}, "depth must be odd"),
        ({"model": {"hidden_size": 16, "depth": 3, "num_heads": 3}}, "num_heads times a multiple"),
        ({"resolution": 10}, "resolution 10 is no multiple"),
        ({"output": "gs://bucket/run"}, "output must be a local folder"),
    ],
)
def test_impossible_shapes_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainConfig.model_validate(settings(**changes))


def test_a_file_that_is_missing_or_no_toml_is_named(tmp_path: Path) -> None:
    with pytest.raises(EvenmixError, match=r"absent\.toml does not exist"):
        load_config(str(tmp_path / "absent.toml"))
    path = tmp_path / "train.toml"
    path.write_text("steps = ")
    with pytest.raises(EvenmixError, match=r"train\.toml is not TOML"):
        load_config(str(path))
