"""A stage as a Beam pipeline: what the process of a job runs.

The command itself, which only starts that process and waits, does without Beam: it takes a second
to import, and 80 MB.
"""

import argparse
import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from multiprocessing.process import BaseProcess

import apache_beam as beam
from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.runners.portability.fn_api_runner import FnApiRunner
from apache_beam.transforms.environments import EmbeddedPythonEnvironment

from pipeline.beam_job import RunnerOptions
from pipeline.beam_worker import FORKED, Worker, give_to_beam
from pipeline.errors import EvenmixError
from pipeline.publishing import publish_item
from pipeline.secrets import provide_hf_token
from pipeline.stage import Line, Stage, lines_of_work_list, read_line

_CARRIED = "evenmix could not go on: "


def run_to_end(stage: Stage, work_list_urls: Sequence[str], options: RunnerOptions) -> None:
    """Run a stage's work lists; see :func:`failure_of` for what is raised.

    Raises:
        EvenmixError: Beam's runner lacks something and cannot start the job.
    """
    pipeline = empty_pipeline(options)
    build(pipeline, stage, work_list_urls)
    try:
        result = pipeline.run()
    except RuntimeError as error:
        # Some runners begin the job here, and some end it, with the error of a step.
        if options.is_local or is_of_step(error):
            raise
        raise EvenmixError(f"Beam's runner cannot start the job: {error}") from error
    result.wait_until_finish()


def fork_workers(options: RunnerOptions) -> list[BaseProcess]:
    """Fork the workers of a local job from this process, which must not have threads yet.

    One alone is not forked: it runs in the job's own process.
    """
    workers = [Worker() for _ in range(options.workers if options.workers > 1 else 0)]
    give_to_beam(iter(workers))
    return [worker.process for worker in workers]


def empty_pipeline(options: RunnerOptions) -> beam.Pipeline:
    """Return an empty pipeline.

    Raises:
        EvenmixError: Beam's runner lacks an option that it needs.
    """
    # Beam would pickle the main module by default; nothing of ours lives there.
    args = [*options.beam_args, "--no_save_main_session"]
    if not options.is_local:
        try:
            return beam.Pipeline(options=PipelineOptions(args))
        except ValueError as error:
            raise EvenmixError(f"Beam refuses its options: {error}") from error
    environment = FORKED if options.workers > 1 else EmbeddedPythonEnvironment.default()
    return beam.Pipeline(
        runner=FnApiRunner(default_environment=environment),
        options=PipelineOptions([*args, f"--direct_num_workers={options.workers}"]),
    )


def build(
    pipeline: beam.Pipeline,
    stage: Stage,
    work_list_urls: Sequence[str],
    hf_token_secret: str | None = None,
    resource_hints: Mapping[str, str] | None = None,
) -> beam.PCollection:
    """Add a stage to a pipeline. Only references travel between its steps, never pictures.

    Workers without HF_TOKEN read it from the secret of that name (:mod:`pipeline.secrets`).
    ``resource_hints`` are what the runner is told in place of the stage's own.
    """
    hints = stage.resource_hints if resource_hints is None else resource_hints
    publish = beam.ParDo(PublishItems(stage, hf_token_secret))
    # Beam's local runner would start workers of their own for steps with hints.
    if hints and not isinstance(pipeline.runner, FnApiRunner):
        publish = publish.with_resource_hints(**hints)
    return (
        pipeline
        | "WorkLists" >> beam.Create(work_list_urls)
        | "ReadWorkList" >> beam.FlatMap(_lines_of)
        | "SpreadOverWorkers" >> beam.Reshuffle()
        | "PublishItems" >> publish
    )


def _lines_of(work_list_url: str) -> list[Line]:
    with _carry_message():
        return lines_of_work_list(work_list_url)


class PublishItems(beam.DoFn):  # type: ignore[misc]
    """Publishes work items of one stage, ``stage.items_at_once`` at a time, from their work lists.

    So the last downloads of an item, which wait for slow servers, leave nothing idle. An item that
    fails ends the bundle with its error, when the others that have begun are done; nothing
    outlives a bundle.
    """

    def __init__(self, stage: Stage, hf_token_secret: str | None = None) -> None:
        self._stage = stage
        self._hf_token_secret = hf_token_secret

    def setup(self) -> None:
        """Read on the worker what no job description may hold."""
        if self._hf_token_secret is not None:
            with _carry_message():
                provide_hf_token(self._hf_token_secret)

    def start_bundle(self) -> None:
        """Begin without items."""
        self._threads = ThreadPoolExecutor(self._stage.items_at_once, "item")
        self._begun = set[Future[None]]()

    def process(self, element: Line) -> None:
        """Begin an item, as soon as there is a place for it."""
        if len(self._begun) == self._stage.items_at_once:
            self._wait_for_one()
        self._begun.add(self._threads.submit(self._publish, element))

    def _publish(self, line: Line) -> None:
        item = read_line(line)
        if item is not None:
            publish_item(self._stage, item)

    def finish_bundle(self) -> None:
        """Bring all items to their end."""
        while self._begun:
            self._wait_for_one()
        self._threads.shutdown()

    def _wait_for_one(self) -> None:
        """Wait until an item is done; raise its error when no other is under way."""
        done, self._begun = wait(self._begun, return_when=FIRST_COMPLETED)
        with _carry_message():
            try:
                for item in done:
                    item.result()
            except BaseException:
                self._threads.shutdown()
                raise


@contextlib.contextmanager
def _carry_message() -> Iterator[None]:
    """Put the message of an EvenmixError in a form that :func:`failure_of` finds again.

    Beam turns exceptions into tracebacks, in which the end of a message of several lines cannot be
    told from what follows it: as JSON it is one line with an end.
    """
    try:
        yield
    except EvenmixError as error:
        raise RuntimeError(_CARRIED + json.dumps(str(error))) from None


def is_of_step(error: Exception) -> bool:
    """Tell whether Beam says that a step has raised this, and it is none of the runner's own."""
    return "[while running" in str(error)


def failure_of(error: Exception) -> Exception:
    """Recover the message of an EvenmixError that Beam has wrapped into a worker's traceback."""
    if isinstance(error, EvenmixError):
        return error
    text = str(error)
    start = text.rfind(_CARRIED)
    if start < 0:
        return RuntimeError(text)
    try:
        message, _ = json.JSONDecoder().raw_decode(text, start + len(_CARRIED))
    except json.JSONDecodeError:
        # A service has cut a long trace.
        message = text[start + len(_CARRIED) :]
    return EvenmixError(message)


def beam_option_names() -> list[str]:
    """Return the names of all options that Beam knows, such as ``--runner``."""
    parser = argparse.ArgumentParser(add_help=False, conflict_handler="resolve")
    for options in (PipelineOptions, *PipelineOptions.__subclasses__()):
        if "_add_argparse_args" in vars(options):
            options._add_argparse_args(parser)
    return [name for action in parser._actions for name in action.option_strings]
