"""Does the model use its captions? The held-out loss with right and with swapped captions.

Noise and times are fixed, so that two checkpoints, and two captions, are compared on equal terms.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from statistics import NormalDist
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from train.config import TrainConfig
from train.data import Sample
from train.flow import Draws, losses, shift_time
from train.frozen import FrozenEncoders
from train.model import Params, Velocity

# The quarters' midpoints of the distribution of training times.
TIME_QUANTILES = (1 / 8, 3 / 8, 5 / 8, 7 / 8)
# Or a few more, as many on each device.
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
    encoders: FrozenEncoders,
    config: TrainConfig,
) -> Callable[[Params], dict[str, Evaluation]]:
    """Return a function of the weights, to be compiled once, whatever the number of its calls.

    It evaluates each dataset with two held-out pictures or more, and ``all`` of them together. All
    processes have the same ``held_out``, and get the same numbers.
    """
    usable = {name: samples for name, samples in held_out.items() if len(samples) > 1}
    quantiles = [NormalDist().inv_cdf(quantile) for quantile in TIME_QUANTILES]
    times = np.asarray(shift_time(jax.nn.sigmoid(jnp.array(quantiles)), config.time_shift))
    rows = encoders.rows_for(PICTURES_AT_A_TIME)

    @partial(jax.jit, out_shardings=NamedSharding(encoders.mesh, PartitionSpec()))
    def losses_at_times(
        params: Params, data: jax.Array, caption: jax.Array, mask: jax.Array, index: jax.Array
    ) -> jax.Array:
        key = jax.random.key(config.seed)

        def noise_of(sample: jax.Array) -> jax.Array:
            return jax.random.normal(jax.random.fold_in(key, sample), data.shape[1:])

        noise = jax.vmap(noise_of)(index)
        never = jnp.zeros(len(data), bool)

        def at_time(t: jax.Array) -> jax.Array:
            draws = Draws(noise, jnp.full(len(data), t), never)
            return losses(velocity, params, data, caption=caption, mask=mask, draws=draws)

        of_all_times: jax.Array = jax.lax.map(at_time, times)
        return of_all_times

    def per_sample(params: Params, samples: list[Sample]) -> np.ndarray:
        """Return the losses with right and with swapped captions, (2, times, samples)."""
        found = []
        for first in range(0, len(samples), rows):
            number = (first + np.arange(rows)) % len(samples)
            pictures = np.stack([samples[i].picture for i in number])
            tokens, mask = encoders.text.tokenise([samples[i].caption for i in number])
            data, caption = encoders.encode(pictures, tokens, mask)
            right = losses_at_times(params, data, caption, mask, number)
            others = [samples[(i + 1) % len(samples)].caption for i in number]
            tokens, mask = encoders.text.tokenise(others)
            swapped = losses_at_times(params, data, encoders.caption(tokens, mask), mask, number)
            found.append(np.stack([right, swapped]))
        losses_of_all: np.ndarray = np.concatenate(found, axis=2)[:, :, : len(samples)]
        return losses_of_all

    def evaluate(params: Params) -> dict[str, Evaluation]:
        found = {name: per_sample(params, samples) for name, samples in usable.items()}
        if usable:
            found["all"] = np.concatenate(list(found.values()), axis=2)
        return {name: _summary(right, swapped, times) for name, (right, swapped) in found.items()}

    return evaluate


def _summary(right: np.ndarray, swapped: np.ndarray, times: np.ndarray) -> Evaluation:
    """Sum up losses, each (times, samples)."""
    loss, swapped_loss = float(right.mean()), float(swapped.mean())
    at_time = {f"{t:.2f}": float(of_time.mean()) for t, of_time in zip(times, right, strict=True)}
    return Evaluation(right.shape[1], loss, swapped_loss, (swapped_loss - loss) / loss, at_time)


def as_json(evaluations: dict[str, Evaluation]) -> dict[str, dict[str, Any]]:
    """Return evaluations as plain dicts."""
    return {name: asdict(evaluation) for name, evaluation in evaluations.items()}
