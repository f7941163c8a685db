"""The held-out losses against the sums they are, on one device and on eight."""

import json
from dataclasses import asdict
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from tests.eight_devices import on_eight_devices
from train.config import TrainConfig
from train.data import Sample
from train.encoders import ByteTextEncoder, PixelCodec
from train.evaluate import PICTURES_AT_A_TIME, Evaluation, make_evaluation
from train.flow import shift_time
from train.frozen import FrozenEncoders
from train.model import Params
from train.sharding import make_mesh

SEED, SHIFT = 5, 0.5
# Logit-normal times at the middle of each quarter: 0.2404 is sigmoid(-1.1503).
TIMES = np.asarray(shift_time(jax.numpy.array([0.2404, 0.4209, 0.5791, 0.7596]), SHIFT))
CONFIG = TrainConfig.model_validate(
    {
        "mixture": "m",
        "output": "o",
        "resolution": 4,
        "steps": 1,
        "batch_size": 8,
        "seed": SEED,
        "time_shift": SHIFT,
        "model": {"hidden_size": 16, "depth": 3, "num_heads": 2},
        "text": {"encoder": "bytes", "num_tokens": 3, "embed_dim": 8},
        "latent": {"encoder": "pixels", "downsampling": 2},
    }
)
TEXT, CODEC = ByteTextEncoder(3, 8), PixelCodec(2)
RNG = np.random.default_rng(0)
# More than are computed at a time, fewer, and too few to swap captions.
HELD_OUT = {
    name: [
        Sample(RNG.integers(0, 256, (4, 4, 3), np.uint8), f"{number} of {name}")
        for number in range(count)
    ]
    for name, count in {"a": PICTURES_AT_A_TIME + 3, "b": 2, "alone": 1}.items()
}


def velocity(params: Params, x: Any, caption: Any, mask: Any, dropped: Any, t: Any) -> jax.Array:
    """A network that is quickly told: the caption's first number, times the time."""
    per_sample: jax.Array = params["scale"] * t * caption[:, 0, 0]
    return jax.numpy.broadcast_to(per_sample[:, None, None, None], x.shape)


def evaluate(mesh: Mesh) -> dict[str, Evaluation]:
    encoders = FrozenEncoders(TEXT, CODEC, mesh)
    of_params = make_evaluation(velocity, held_out=HELD_OUT, encoders=encoders, config=CONFIG)
    return of_params({"scale": np.float32(2)})


def expected_losses(samples: list[Sample], captions: list[str]) -> np.ndarray:
    """Return the loss at each time."""
    key = jax.random.key(SEED)
    pictures = jax.numpy.asarray(np.stack([sample.picture for sample in samples]))
    data = np.asarray(CODEC.encode({}, pictures))
    noise = [jax.random.normal(jax.random.fold_in(key, i), (2, 2, 12)) for i in range(len(data))]
    predicted = 2 * TIMES[:, None] * TEXT.tokenise(captions)[0][:, 0, 0]
    error = predicted[..., None, None, None] - (data - np.stack(noise))
    losses: np.ndarray = np.mean(error**2, axis=(1, 2, 3, 4))
    return losses


def test_losses_are_those_of_right_and_of_the_next_pictures_captions() -> None:
    found = evaluate(make_mesh(1))
    assert list(found) == ["a", "b", "all"]
    for name in ("a", "b"):
        samples = HELD_OUT[name]
        captions = [sample.caption for sample in samples]
        losses = expected_losses(samples, captions)
        loss = losses.mean()
        swapped = expected_losses(samples, [*captions[1:], captions[0]]).mean()
        assert found[name].num_samples == len(samples)
        assert found[name].loss == pytest.approx(loss, rel=1e-4)
        assert found[name].swapped_loss == pytest.approx(swapped, rel=1e-4)
        assert abs(swapped - loss) > 0.01
        assert found[name].caption_margin == pytest.approx(swapped / loss - 1, rel=1e-3)
        assert list(found[name].loss_at_time) == [f"{time:.2f}" for time in TIMES]
        assert list(found[name].loss_at_time.values()) == pytest.approx(losses, rel=1e-3)
    assert found["all"].num_samples == found["a"].num_samples + found["b"].num_samples
    weighted = [found[name].num_samples * found[name].loss for name in ("a", "b")]
    assert found["all"].loss == pytest.approx(sum(weighted) / found["all"].num_samples, rel=1e-5)


def evaluate_on_eight() -> None:
    print(json.dumps({name: asdict(found) for name, found in evaluate(make_mesh(2)).items()}))


def test_eight_devices_find_the_losses_of_one() -> None:
    eight = json.loads(on_eight_devices(evaluate_on_eight))
    one = evaluate(make_mesh(1))
    assert eight.keys() == one.keys()
    for name, evaluation in one.items():
        assert eight[name]["num_samples"] == evaluation.num_samples
        assert eight[name]["loss"] == pytest.approx(evaluation.loss, rel=1e-5)
        assert eight[name]["swapped_loss"] == pytest.approx(evaluation.swapped_loss, rel=1e-5)
