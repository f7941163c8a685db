"""What a training step costs on this machine: the step of a run itself, measured.

Encoders, loader, step and the way in which steps follow one another are those of
:mod:`train.loop`; what is left out is all that a run reads and writes beside them: it begins with
fresh weights, whatever ``init`` says, and leaves nothing behind.
"""

import time
from collections import deque
from collections.abc import Generator
from contextlib import closing, nullcontext
from dataclasses import dataclass, replace
from itertools import cycle

import jax
import numpy as np

from mixing.manifest import load_manifest
from pipeline.errors import EvenmixError
from train.config import Flux2Config, T5GemmaTextConfig, TrainConfig
from train.data import TrainingData, check_mixture
from train.encoders import LatentCodec, TextEncoder
from train.flops import flop_per_picture
from train.flux2_vae import FLUX2_VAE, draw_flux2_codec
from train.frozen import FrozenEncoders
from train.loop import STEPS_AHEAD, Prepared, prepare_ahead
from train.measure import Measured, Meter
from train.memory import StepMemory
from train.profiler import WARM_UP_STEPS
from train.sharding import check_batch, make_mesh
from train.step import NO_STEP, Inputs, TrainingStep
from train.t5gemma import T5GEMMA_2B, draw_t5gemma

# Drawn batches are used again and again: their numbers cost the host nothing then.
NUM_DRAWN_BATCHES = 4
# Of i1's captions it is known that they are a long paragraph each, and were cut at 256 tokens.
CAPTION_WORDS = (80, 200)
WORD_LETTERS = (2, 10)


@dataclass(frozen=True)
class Bench:
    """What was found.

    ``compile_s`` is the step's own; ``first_step_s`` is what the first step took, with the encoders
    compiled on its way. ``measured`` is of the steps after the first WARM_UP_STEPS, ``loss`` and
    ``gradient_norm`` of the last one.
    """

    num_parameters: int
    compile_s: float
    first_step_s: float
    memory: StepMemory
    measured: Measured
    loss: float
    gradient_norm: float


def bench(
    config: TrainConfig,
    num_steps: int,
    *,
    synthetic_data: bool = False,
    random_encoders: bool = False,
) -> Bench:
    """Measure ``num_steps`` steps, at least one, after those that warm up.

    Args:
        config: as for a run.
        num_steps: how many are measured.
        synthetic_data: noise with random captions, drawn ahead, in the place of the mixture.
        random_encoders: random weights in the place of T5Gemma's and the FLUX.2 VAE's; those of
            other kinds have none.

    Raises:
        EvenmixError: the mixture or the encoders cannot be had or do not fit, a step needs more
            memory than there is, or a loss is not finite.
    """
    mesh = make_mesh(config.mesh.fsdp)
    with jax.set_mesh(mesh):
        check_batch(mesh, config.batch_size, config.accumulate)
        data = None if synthetic_data else _open_mixture(config)
        text, codec = (
            draw_encoders(config)
            if random_encoders
            else (config.text_encoder(), config.latent_codec())
        )
        encoders = FrozenEncoders(text, codec, mesh)
        training_step = TrainingStep(config, encoders)
        compile_s, memory = training_step.compile()
        weights, broken = training_step.fresh(), training_step.not_broken()
        num_parameters = sum(x.size for x in jax.tree.leaves(weights[0]))

        prepared = (
            prepare_ahead(data, text, 0, config.loader_threads) if data else _draw(config, text)
        )
        meter = Meter(config.batch_size, flop_per_picture(training_step.model, text, codec))
        under_way = deque[jax.Array]()
        with (
            closing(data) if data else nullcontext(),
            closing(prepared) as batches,
            closing(meter),
        ):
            for step in range(WARM_UP_STEPS + num_steps):
                if step == WARM_UP_STEPS:
                    first_step_s = meter.read().step_s[0]
                asked_s = time.monotonic()
                batch = next(batches)
                got_s = time.monotonic()
                weights, broken, metrics = training_step(weights, broken, step, batch.inputs)
                under_way.append(metrics["loss"])
                if len(under_way) == STEPS_AHEAD:
                    under_way.popleft().block_until_ready()
                mask, num_replaced = batch.inputs.mask, batch.num_replaced
                meter.add(metrics, mask, num_replaced, asked_s=asked_s, got_s=got_s)
            measured = meter.read()
    if int(broken) != NO_STEP:
        raise EvenmixError(
            f"step {int(broken) + 1}: the loss or its gradients are not finite; lower "
            "`optimiser.learning_rate`"
        )
    loss, gradient_norm = float(metrics["loss"]), float(metrics["gradient_norm"])
    return Bench(num_parameters, compile_s, first_step_s, memory, measured, loss, gradient_norm)


def _open_mixture(config: TrainConfig) -> TrainingData:
    manifest = load_manifest(config.mixture)
    check_mixture(config.mixture, manifest, config.resolution)
    threads = config.loader_threads
    return TrainingData(config.mixture, manifest, config.seed, config.batch_size, threads=threads)


def _draw(config: TrainConfig, text: TextEncoder) -> Generator[Prepared]:
    """Yield batches of noise with random captions, the same few without end."""
    rng = np.random.default_rng(config.seed)
    shape = (config.batch_size, config.resolution, config.resolution, 3)

    def draw() -> Prepared:
        pictures = rng.integers(0, 256, shape, np.uint8)
        captions = [_draw_caption(rng) for _ in range(config.batch_size)]
        return Prepared(Inputs(pictures, *text.tokenise(captions)), num_replaced=0)

    yield from cycle([draw() for _ in range(NUM_DRAWN_BATCHES)])


def _draw_caption(rng: np.random.Generator) -> str:
    lengths = rng.integers(*WORD_LETTERS, rng.integers(*CAPTION_WORDS))
    letters = iter(rng.choice(list("abcdefghijklmnopqrstuvwxyz"), lengths.sum()))
    return " ".join("".join(next(letters) for _ in range(length)) for length in lengths)


def draw_encoders(config: TrainConfig) -> tuple[TextEncoder, LatentCodec]:
    """Return the encoders, with random weights where they have any."""
    text: TextEncoder
    codec: LatentCodec
    if isinstance(config.text, T5GemmaTextConfig):
        if config.text.embed_dim != T5GEMMA_2B.hidden_size:
            raise EvenmixError(
                f"text.embed_dim is {config.text.embed_dim}, but T5Gemma is "
                f"{T5GEMMA_2B.hidden_size} wide; correct it"
            )
        drawn = draw_t5gemma(T5GEMMA_2B, config.seed, num_tokens=config.text.num_tokens)
        if config.text.dtype == "float32":
            params = jax.tree.map(lambda weight: weight.astype(np.float32), drawn.params)
            drawn = replace(drawn, params=params)
        text = drawn
    else:
        text = config.text_encoder()
    if isinstance(config.latent, Flux2Config):
        codec = draw_flux2_codec(replace(FLUX2_VAE, dtype=config.latent.dtype), config.seed)
    else:
        codec = config.latent_codec()
    return text, codec
