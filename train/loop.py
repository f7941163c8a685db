"""A training run from first to last: data, step, log, checkpoints, evaluation.

The output folder holds ``checkpoints/``, what :class:`train.log.RunLog` writes and, at the end,
``evaluation.json``. The loop waits for the devices only where it logs, validates, draws samples or
writes a checkpoint, and where they are STEPS_AHEAD steps behind.
"""

import hashlib
import json
import threading
import time
from collections import deque
from collections.abc import Generator
from contextlib import closing, nullcontext
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import jax

from mixing.manifest import load_manifest
from pipeline.errors import EvenmixError
from train.agreement import check_agreement, check_shared
from train.checkpoint import Checkpoints, TrainState
from train.config import TrainConfig
from train.data import TrainingData, check_mixture, prefetch, read_validation
from train.encoders import TextEncoder
from train.evaluate import Evaluation, as_json, make_evaluation
from train.flops import flop_per_picture
from train.frozen import FrozenEncoders
from train.grid import draw_grid
from train.log import RunLog
from train.model import Params, velocity_fn
from train.output import writing_to
from train.profiler import Profiler
from train.sampling import sample
from train.sharding import check_batch, make_mesh, stop_asked
from train.start import begin_from, keep_unused
from train.step import NO_STEP, Inputs, TrainingStep

# So the next batch is on the devices when they are done with one, and no more than that.
STEPS_AHEAD = 2


@dataclass(frozen=True)
class Prepared:
    """A batch before its step; ``num_replaced`` of its samples stand in for broken ones."""

    inputs: Inputs
    num_replaced: int


def prepare_ahead(
    data: TrainingData, text: TextEncoder, first_step: int, threads: int
) -> Generator[Prepared]:
    """Yield the batches of ``first_step`` and those after it, read and tokenised in threads."""

    def prepare(step: int) -> Prepared:
        batch = data.batch(step)
        inputs = Inputs(batch.pictures, *text.tokenise(batch.captions))
        return Prepared(inputs, batch.num_replaced)

    return prefetch(prepare, first_step, threads)


def check_finite(broken: jax.Array, data: TrainingData) -> None:
    """Wait for the device, and stop the run if one of the steps since the last time was broken.

    Raises:
        EvenmixError: it was; the message has the keys of its samples (those of this process).
    """
    step = int(broken)
    if step != NO_STEP:
        raise EvenmixError(
            f"step {step + 1}: the loss or its gradients are not finite; weights and checkpoints "
            f"are those of before. Look at its samples ({', '.join(data.keys(step))}), or begin a "
            "new run with a lower `optimiser.learning_rate`"
        )


def first_state(config: TrainConfig, training_step: TrainingStep, like: TrainState) -> TrainState:
    """Return what a run begins with: that of ``init``, or else fresh weights.

    Raises:
        EvenmixError: ``init`` does not fit, or has done all steps.
    """
    if config.init is None:
        return TrainState(0, *training_step.fresh())
    state = begin_from(config.init, training_step.model, like, training_step.begin)
    if state.step >= config.steps:
        raise EvenmixError(
            f"{config.init} has done {state.step} steps, from which this run counts on, "
            f"but `steps` is {config.steps}; set it higher"
        )
    if jax.process_index() == 0:
        keep_unused(config.init, Path(config.output))
    return state


def train(
    config: TrainConfig, stop: threading.Event, profile_steps: int = 0
) -> dict[str, Evaluation] | None:
    """Train, or resume training, to ``config.steps``; evaluate at the end.

    When ``stop`` is set, the step at hand is finished (with several processes: a few more), a
    checkpoint written, and None returned. ``profile_steps`` steps are traced; see
    :mod:`train.profiler`.

    Raises:
        EvenmixError: the mixture is not whole or does not fit, the output is another run's, or a
            step needs more memory than there is, all before the first step; or a loss is not
            finite.
    """
    mesh = make_mesh(config.mesh.fsdp)
    with jax.set_mesh(mesh):
        manifest = load_manifest(config.mixture)
        check_mixture(config.mixture, manifest, config.resolution)
        check_batch(mesh, config.batch_size, config.accumulate)
        prompts = config.samples.load() if config.samples else []
        data = TrainingData(
            config.mixture,
            manifest,
            config.seed,
            config.batch_size,
            process_index=jax.process_index(),
            num_processes=jax.process_count(),
            threads=config.loader_threads,
        )
        encoders = FrozenEncoders(config.text_encoder(), config.latent_codec(), mesh)
        held_out = read_validation(config.mixture, manifest, config.evaluation_samples)
        training_step = TrainingStep(config, encoders)

        # One process speaks and writes for all.
        first = jax.process_index() == 0

        def say(text: str) -> None:
            if first:
                print(text, flush=True)

        mixture_sha256 = hashlib.sha256(manifest.model_dump_json().encode()).hexdigest()
        checkpoints = Checkpoints(config.output, config, training_step.model, mixture_sha256)
        check_shared(Path(config.output))
        check_agreement(
            configuration=config.model_dump(exclude={"mixture", "output"}),
            mixture=mixture_sha256,
            prompts=prompts,
            newest_checkpoint=checkpoints.newest_step,
        )
        like = TrainState(0, *training_step.like)
        resumed = checkpoints.resume(like)
        state = resumed or first_state(config, training_step, like)
        resumed_at = resumed.step if resumed else None
        del resumed  # it would hold memory that new weights are to have
        num_parameters = sum(x.size for x in jax.tree.leaves(state.params))
        of_steps = f"from step {state.step} of {config.steps}"
        say(f"{num_parameters:,} parameters on {mesh.size} devices, {of_steps}")
        if config.validate_every_steps and not any(len(some) > 1 for some in held_out.values()):
            say("this mixture holds nothing out (mixture.validation_fraction): no validation")

        velocity = velocity_fn(training_step.model)
        evaluate = make_evaluation(velocity, held_out=held_out, encoders=encoders, config=config)
        flop = flop_per_picture(training_step.model, encoders.text, encoders.codec)
        log = RunLog(config, resumed_at, flop) if first else None
        profiler = Profiler(config, state.step, profile_steps)

        def look(step: int, ema: Params) -> dict[str, Evaluation] | None:
            """Validate, and draw samples, where they are due after this step."""
            evaluations = None
            if config.validate_every_steps and step % config.validate_every_steps == 0:
                evaluations = evaluate(ema)
                if evaluations and log:
                    say(log.write_evaluation(step, evaluations))
            if config.samples and step % config.samples.every_steps == 0:
                drawn = sample(
                    velocity,
                    ema,
                    prompts,
                    encoders=encoders,
                    resolution=config.resolution,
                    config=config.samples.settings(config.seed),
                )
                if log:
                    log.write_samples(step, draw_grid(drawn, prompts))
            return evaluations

        step, weights = state.step, (state.params, state.ema, state.opt_state)
        del state  # its memory becomes that of new weights
        broken, under_way = training_step.not_broken(), deque[jax.Array]()
        with (
            closing(data),
            closing(prepare_ahead(data, encoders.text, step, config.loader_threads)) as prepared,
            closing(checkpoints),
            closing(log) if log else nullcontext(),
            closing(profiler),
        ):
            if step < config.steps:
                # What is wrong with the samples is told before the minutes of compiling.
                batches = chain([next(prepared)], prepared)
                compile_s, memory = training_step.compile()
                say(f"compiled in {compile_s:.0f} s; a step needs {memory}")
            # Already here, so that what has no room beside the state is found out at once, and what
            # a run was stopped before is made up for.
            evaluations = look(step, weights[1])
            while step < config.steps:
                asked_s = time.monotonic()
                batch = next(batches)
                got_s = time.monotonic()
                profiler.before(step)
                weights, broken, metrics = training_step(weights, broken, step, batch.inputs)
                step += 1
                under_way.append(metrics["loss"])
                if len(under_way) == STEPS_AHEAD:
                    under_way.popleft().block_until_ready()
                profiler.after(step, metrics["loss"])
                if log:
                    mask, num_replaced = batch.inputs.mask, batch.num_replaced
                    log.meter.add(metrics, mask, num_replaced, asked_s=asked_s, got_s=got_s)
                at_log = step % config.log_every_steps == 0 or step == config.steps
                at_checkpoint = step % config.checkpoint_every_steps == 0
                stopping = stop_asked(stop, step)
                if at_log or at_checkpoint or stopping:
                    check_finite(broken, data)
                if at_log:
                    checkpoints.check()
                    if log:
                        say(log.write(step))
                # Before all that takes long: who is told to stop is soon killed.
                if at_checkpoint or stopping:
                    checkpoints.save(TrainState(step, *weights))
                    if log:
                        log.draw()
                if stopping and step < config.steps:
                    break
                evaluations = look(step, weights[1])
            checkpoints.save(TrainState(step, *weights))
        if log:
            log.draw()
        if step < config.steps:
            say(f"stopped after step {step}; the same command goes on from there")
            return None
        evaluations = evaluations or evaluate(weights[1])

    report = {"step": step, "datasets": as_json(evaluations)}
    if first:
        with writing_to(Path(config.output)):
            (Path(config.output) / "evaluation.json").write_text(
                json.dumps(report, indent=2) + "\n"
            )
    return evaluations
