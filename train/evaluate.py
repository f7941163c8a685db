"""Does the model use its captions? The held-out loss with right and with swapped captions.

Noise and times are fixed, so that two checkpoints, and two captions, are compared on equal terms.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from statistics import NormalDist
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from train.config import TrainConfig
from train.data import Sample
from train.encoders import LatentCodec, TextEncoder
from train.flow import Draws, losses, shift_time
from train.model import Params, Velocity

# The quarters' midpoints of the distribution of training times.
TIME_QUANTILES = (1 / 8, 3 / 8, 5 / 8, 7 / 8)
PICTURES_AT_A_TIME = 64


@dataclass(frozen=True)
class Evaluation:
    """Mean losses over the held-out pictures.

    ``caption_margin`` is (swapped_loss - loss) / loss: how much worse another picture's caption
    (of the same dataset) explains a picture. ``loss_at_time`` is the loss at the middle of each
    quarter of the training times; its mean is ``loss``.
    """

    num_samples: int
    loss: float
    swapped_loss: float
    caption_margin: float
    loss_at_time: dict[str, float]


def make_evaluation(
    velocity: Velocity,
    *,
    held_out: dict[str, list[Sample]],
    encoder: TextEncoder,
    codec: LatentCodec,
    config: TrainConfig,
) -> Callable[[Params], dict[str, Evaluation]]:
    """Return a function of the weights, to be compiled once, whatever the number of its calls.

    It evaluates each dataset with two held-out pictures or more, and ``all`` of them together.
    """
    usable = {name: samples for name, samples in held_out.items() if len(samples) > 1}
    quantiles = [NormalDist().inv_cdf(quantile) for quantile in TIME_QUANTILES]
    times = shift_time(jax.nn.sigmoid(jnp.array(quantiles)), config.time_shift)
    key = jax.random.key(config.seed)

    @jax.jit
    def losses_at_times(
        params: Params, data: jax.Array, caption: jax.Array, mask: jax.Array, index: jax.Array
    ) -> jax.Array:
        def noise_of(sample: jax.Array) -> jax.Array:
            return jax.random.normal(jax.random.fold_in(key, sample), data.shape[1:])

        noise = jax.vmap(noise_of)(index)
        never = jnp.zeros(len(data), bool)

        def at_time(t: jax.Array) -> jax.Array:
            draws = Draws(noise, jnp.full(len(data), t), never)
            return losses(velocity, params, data, caption=caption, mask=mask, draws=draws)

        of_all_times: jax.Array = jax.lax.map(at_time, times)
        return of_all_times

    def per_sample(params: Params, samples: list[Sample], captions: list[str]) -> np.ndarray:
        found = []
        for first in range(0, len(samples), PICTURES_AT_A_TIME):
            number = (first + np.arange(PICTURES_AT_A_TIME)) % len(samples)
            data = codec.encode(jnp.asarray(np.stack([samples[i].picture for i in number])))
            caption, mask = encoder([captions[i] for i in number])
            found.append(np.asarray(losses_at_times(params, data, caption, mask, number)))
        losses_of_all: np.ndarray = np.concatenate(found, axis=1)[:, : len(samples)]
        return losses_of_all

    def evaluate(params: Params) -> dict[str, Evaluation]:
        right, swapped = {}, {}
        for name, samples in usable.items():
            captions = [sample.caption for sample in samples]
            right[name] = per_sample(params, samples, captions)
            swapped[name] = per_sample(params, samples, captions[1:] + captions[:1])
        if usable:
            right["all"] = np.concatenate(list(right.values()), axis=1)
            swapped["all"] = np.concatenate(list(swapped.values()), axis=1)
        return {name: _summary(right[name], swapped[name], times) for name in right}

    return evaluate


def _summary(right: np.ndarray, swapped: np.ndarray, times: jax.Array) -> Evaluation:
    """Sum up losses, each (times, samples)."""
    loss, swapped_loss = float(right.mean()), float(swapped.mean())
    at_time = {f"{t:.2f}": float(of_time.mean()) for t, of_time in zip(times, right, strict=True)}
    return Evaluation(right.shape[1], loss, swapped_loss, (swapped_loss - loss) / loss, at_time)


def as_json(evaluations: dict[str, Evaluation]) -> dict[str, dict[str, Any]]:
    """Return evaluations as plain dicts."""
    return {name: asdict(evaluation) for name, evaluation in evaluations.items()}
