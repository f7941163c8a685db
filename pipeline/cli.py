"""The ``evenmix`` command: a table of sub-commands, each imported when it is called."""

import argparse
import atexit
import contextlib
import importlib
import logging
import os
import sys
from collections.abc import Sequence

from pipeline.errors import EvenmixError
from pipeline.notices import print_notices
from pipeline.printable import printable

COMMANDS = {
    "build": ("pipeline.build", "pipeline,dedup", "run all stages of a recipe"),
    "plan": ("pipeline.plan.command", "pipeline,dedup", "what a recipe costs, and what it did"),
    "datasets": ("pipeline.datasets_command", "pipeline", "show the catalogue of public datasets"),
    "mirror": ("pipeline.mirror", "pipeline", "copy a source that is not read where it is"),
    "ingest": ("pipeline.ingest", "pipeline", "read the sources, keep pictures that are whole"),
    "embed": ("dedup.embed", "pipeline,dedup", "describe pictures, with SSCD or another"),
    "dedup": ("dedup.deduplicate", "pipeline,dedup", "find exact copies and near-duplicates"),
    "caption": ("captioning.caption", "pipeline,vllm", "write a set of captions"),
    "rewrite": (
        "captioning.rewriting.command",
        "pipeline,vllm",
        "write long prompts from short ones",
    ),
    "captions": ("captioning.sets.command", "pipeline", "show and compare sets of captions"),
    "mix": ("mixing.mix", "pipeline", "cut a mixture and write its shards"),
    "tfrecords": ("mixing.export", "pipeline", "write a mixture as the TFRecords that i1 reads"),
    "train": ("train.train_command", "train", "train on a mixture"),
    "sample": ("train.sample_command", "train", "draw pictures from a trained model"),
    "export": ("train.export_command", "train", "write a trained model's weights as one file"),
    "bench": ("train.bench_command", "train", "measure what a training step costs here"),
    "verify": ("pipeline.verify", "pipeline", "recount a corpus and check its files"),
}
"""Each sub-command's module, the extras that it needs, and what it does."""


OWN_PACKAGES = {"pipeline", "captioning", "dedup", "mixing", "train"}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status.

    0 is success, 1 an obstacle that the message explains, 2 a wrong command line, 130 Ctrl-C.
    """
    # Beam warns of missing optional packages through the root logger; see pipeline.beam_worker.
    logging.getLogger().addHandler(logging.NullHandler())
    arguments = list(sys.argv[1:] if argv is None else argv)
    chosen = next((word for word in arguments if word in COMMANDS), None)
    try:
        options = _parse(arguments, chosen)
        with print_notices():
            return int(options.run(options))
    except ModuleNotFoundError as error:
        if chosen is None or (error.name or "").split(".")[0] in OWN_PACKAGES:
            raise
        extras = COMMANDS[chosen][1]
        print(
            f"error: `evenmix {chosen}` needs {error.name}, which is not installed; "
            f"pip install 'evenmix[{extras}]'",
            file=sys.stderr,
        )
        return 1
    except EvenmixError as error:
        print(f"error: {printable(str(error))}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped; start the same command again to go on", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of our output has gone (`| head`); leave quietly.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _parse(arguments: Sequence[str], chosen: str | None) -> argparse.Namespace:
    """Parse a command line; only the chosen sub-command's module is imported.

    So a trainer's machine need not have Beam, nor a worker JAX.
    """
    parser = argparse.ArgumentParser(
        prog="evenmix",
        description="Build, caption, deduplicate and mix a text-to-image corpus; train on it.",
    )
    parser.set_defaults(takes_beam_options=False)
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (module_name, _, help_text) in COMMANDS.items():
        subparser = subparsers.add_parser(
            name, help=help_text, description=help_text, allow_abbrev=False
        )
        if name == chosen:
            module = importlib.import_module(module_name)
            module.add_arguments(subparser)
            subparser.set_defaults(run=module.run)
    options, others = parser.parse_known_args(arguments)
    if others and not options.takes_beam_options:
        parser.error(f"unknown options: {' '.join(others)}")
    options.beam_options = others
    return options


def command() -> None:
    """Run the command line as a program, and end it before C++ libraries clean up.

    When an interpreter ends, pyarrow's or another library's threads can abort it ("terminate called
    without an active exception"): all work was done then, but the exit status said otherwise.
    """
    status: int | str | None = 1

    def end() -> None:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        os._exit(status if isinstance(status, int) else 1)

    # Registered first, it runs last: what others have registered since is done by then.
    atexit.register(end)
    try:
        status = main()
    except SystemExit as leaving:
        status = leaving.code or 0
        raise


if __name__ == "__main__":
    command()
