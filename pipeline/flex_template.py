"""The Flex Template: a whole build whose driver runs on Dataflow, too.

`evenmix build` starts one job after another and waits for each, on a machine that has to stay on.
Here a job of a single step is that machine: one small worker runs the build as a process of its own
and hands on what it prints. A step that fails is tried again, and the build goes on where it stood.

Dataflow launches this from the image of cloud/template.Dockerfile, through cloud/launch.py; the
parameters are described in cloud/template.json.
"""

import argparse
import contextlib
import logging
import os
import shlex
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Sequence

import apache_beam as beam
from apache_beam.options.pipeline_options import PipelineOptions

from pipeline.dataflow import Dataflow
from pipeline.dataflow_check import check
from pipeline.errors import EvenmixError
from pipeline.printable import printable
from pipeline.recipe import load_recipe
from pipeline.secrets import provide_hf_token

ONE_SMALL_WORKER = (
    "--num_workers=1",
    "--max_num_workers=1",
    "--autoscaling_algorithm=NONE",
    "--machine_type=n2-standard-2",
)
"""What the driver needs unless the launch says otherwise: it waits, and lists what is published."""

_LINES_SHOWN = 25

_logger = logging.getLogger(__name__)


def main(argv: Sequence[str] | None = None) -> int:
    """Stage the job that runs a build; Dataflow's launcher calls it and starts what it has staged.

    Returns the exit status: 1 if the recipe is wrong, which is found out before any job.
    """
    args, beam_args = parameters().parse_known_args(argv)
    try:
        settings = _dataflow_of(args)
    except EvenmixError as error:
        print(f"error: {printable(str(error))}", file=sys.stderr)
        return 1
    defaults = [*ONE_SMALL_WORKER, f"--sdk_container_image={settings.image}"]
    options = PipelineOptions([*defaults, *beam_args, "--no_save_main_session"])
    run_build = RunBuild(_build_arguments(args), settings.hf_token_secret)
    pipeline = beam.Pipeline(options=options)
    _ = pipeline | beam.Impulse() | "RunBuild" >> beam.ParDo(run_build)
    pipeline.run()
    return 0


def parameters() -> argparse.ArgumentParser:
    """Return the parser of the template's own parameters; all else is Beam's."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--recipe", required=True, help="the recipe, a URL that workers can read")
    parser.add_argument("--root", help="the corpus root R, instead of the recipe's")
    parser.add_argument(
        "--build_options", default="", help="Beam's options for the stages, as in a shell"
    )
    return parser


def _build_arguments(args: argparse.Namespace) -> list[str]:
    """Return the words after `evenmix` that run the build, with Dataflow jobs for each stage."""
    root = [] if args.root is None else [f"--root={args.root}"]
    return ["build", args.recipe, *root, *_stage_options(args)]


def _stage_options(args: argparse.Namespace) -> list[str]:
    try:
        return ["--runner=DataflowRunner", *shlex.split(args.build_options)]
    except ValueError as error:
        raise EvenmixError(f"build_options={args.build_options}: {error}; correct it") from error


def _dataflow_of(args: argparse.Namespace) -> Dataflow:
    """Return the recipe's table `[dataflow]`, having checked that a build can begin with it."""
    recipe = load_recipe(args.recipe, {"root": args.root})
    check(recipe, _stage_options(args))
    if recipe.dataflow.image is None:
        raise EvenmixError(f"{args.recipe}: dataflow.image is missing, in which the build runs")
    return recipe.dataflow


class RunBuild(beam.DoFn):  # type: ignore[misc]
    """Runs an evenmix command to its end, and logs what it prints.

    Raises a RuntimeError with the last lines if it fails. ``hf_token_secret`` is the recipe's.
    """

    def __init__(self, arguments: Sequence[str], hf_token_secret: str | None = None) -> None:
        self.arguments = list(arguments)
        self.hf_token_secret = hf_token_secret
        self._build: subprocess.Popen[str] | None = None

    def setup(self) -> None:
        """Give the command the token, with which it looks for gated sources and models."""
        if self.hf_token_secret is not None:
            provide_hf_token(self.hf_token_secret)

    def process(self, element: bytes) -> None:
        """Run the command, whatever the element is."""
        last_lines = deque[str](maxlen=_LINES_SHOWN)
        with subprocess.Popen(
            [sys.executable, "-m", "pipeline.cli", *self.arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,  # it and what it starts are one group, which ends together
        ) as build:
            self._build = build
            assert build.stdout is not None
            for line in build.stdout:
                _logger.info("%s", line.rstrip())
                last_lines.append(line)
        if build.returncode:
            raise RuntimeError(
                f"`evenmix {shlex.join(self.arguments)}` ended with status {build.returncode}:\n"
                + "".join(last_lines)
            )

    def teardown(self) -> None:
        """End a build that this worker gives up."""
        if self._build is not None and self._build.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._build.pid, signal.SIGTERM)
