"""A configuration is checked as a whole, and its errors help."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import EvenmixError
from train.config import Flux2Config, TrainConfig, load_config
from train.flux2_vae import REPOSITORY, REVISION
from train.sampling import SamplingConfig

DEMO = Path(__file__).parent.parent / "demo/train.toml"
TEXT = {"encoder": "bytes", "num_tokens": 4, "embed_dim": 8}
SAMPLES = {"every_steps": 5, "prompts": ["a"]}


def settings(**changes: Any) -> dict[str, Any]:
    """A small configuration."""
    return {
        "mixture": "m",
        "output": "o",
        "resolution": 8,
        "steps": 10,
        "batch_size": 4,
        "model": {"hidden_size": 16, "depth": 3, "num_heads": 2},
        "text": TEXT,
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
    assert shape.dtype == "float32"
    halved = TrainConfig.model_validate(settings(precision="bfloat16"))
    assert halved.model_config_for(halved.latent_codec()) == replace(shape, dtype="bfloat16")


def test_a_baseline_may_have_a_single_block() -> None:
    model = {"kind": "single_stream", "hidden_size": 16, "depth": 1, "num_heads": 2}
    assert TrainConfig.model_validate(settings(model=model)).model.depth == 1


def test_a_resumed_run_may_change_what_does_not_change_its_weights() -> None:
    free: dict[str, Any] = {
        "output": "p",
        "steps": 20,
        "accumulate": 2,
        "rematerialise": "full",
        "mesh": {"fsdp": 2},
        "samples": SAMPLES,
        "text": TEXT | {"trim_to": [2]},
    }
    usual = TrainConfig.model_validate(settings()).identity()
    assert TrainConfig.model_validate(settings(**free)).identity() == usual
    for changes in ({"precision": "bfloat16"}, {"text": TEXT | {"dropout": 0.2}}, {"seed": 1}):
        assert TrainConfig.model_validate(settings(**changes)).identity() != usual


def test_the_vae_is_i1s_at_its_commit_unless_another_is_named() -> None:
    def latent(**said: str) -> tuple[str, str | None]:
        table = {"encoder": "flux2"} | said
        found = TrainConfig.model_validate(settings(latent=table, resolution=16)).latent
        assert isinstance(found, Flux2Config)
        return found.weights, found.revision

    assert latent() == (REPOSITORY, REVISION)
    assert latent(revision="another") == (REPOSITORY, "another")
    assert latent(weights="a/folder") == ("a/folder", None)


def test_grids_are_drawn_as_evenmix_sample_draws() -> None:
    samples = TrainConfig.model_validate(settings(samples=SAMPLES)).samples
    assert samples is not None
    assert samples.load() == ["a"]
    settings_of_both = samples.model_dump(exclude={"every_steps", "prompts"})
    assert SamplingConfig(**settings_of_both) == SamplingConfig()


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
    assert "model.i1.depth: Input should be greater than or equal to 3" in message
    assert "batch_size: Field required" in message


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": {"hidden_size": 16, "depth": 4, "num_heads": 2}}, "depth must be odd"),
        ({"model": {"hidden_size": 16, "depth": 1, "num_heads": 2}}, "than or equal to 3"),
        ({"model": {"hidden_size": 16, "depth": 3, "num_heads": 3}}, "num_heads times a multiple"),
        ({"resolution": 10}, "resolution 10 is no multiple"),
        ({"keep_every_steps": 1500}, "must be a multiple of checkpoint_every_steps, 1000"),
        ({"output": "gs://bucket/run"}, "output must be a local folder"),
        ({"text": TEXT | {"trim_to": [2, 2]}}, "trim_to must be increasing"),
        ({"text": TEXT | {"trim_to": [0, 2]}}, "each length above 0"),
        ({"text": TEXT | {"trim_to": [2, 4]}}, "below num_tokens"),
        ({"samples": SAMPLES | {"rescale": 1.5}}, "less than or equal to 1"),
        ({"samples": SAMPLES | {"shift": 0}}, "greater than 0"),
    ],
)
def test_impossible_settings_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainConfig.model_validate(settings(**changes))


def test_a_file_that_is_missing_or_no_toml_is_named(tmp_path: Path) -> None:
    with pytest.raises(EvenmixError, match=r"absent\.toml does not exist"):
        load_config(str(tmp_path / "absent.toml"))
    path = tmp_path / "train.toml"
    path.write_text("steps = ")
    with pytest.raises(EvenmixError, match=r"train\.toml is not TOML"):
        load_config(str(path))
