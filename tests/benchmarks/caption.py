"""Captioning with vLLM, measured beside the engine alone: the same pictures, prompts and seeds.

    python -m tests.benchmarks.caption

Every round runs `evenmix caption` as a user would, server and all, and then vLLM's `LLM.chat` with
everything in one batch. The model is tiny (tests/tiny_vlm.py), so that what evenmix does around it
weighs most. README.md beside this file has the last figures.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table

from captioning.bare_engine import BareRate
from captioning.engine import chat
from captioning.engine.questions import Request, Sampling
from captioning.prompts import DESCRIBE
from pipeline import images
from tests.benchmarks.picture_server import draw_pictures
from tests.real_vllm import ARGUMENTS, make_model, vllm_environment

RECIPE = """
root = "{folder}/corpus"
[images]
records_per_shard = 64
[datasets.photographs]
layout = "folder"
source = "{folder}/photographs"
licence = "CC0 1.0"
[captions.source]
engine = "source"
[mixture]
name = "photographs-256"
resolution = 256
captions = "source"
"""

CAPTION_SET = """
[captions.{name}]
engine = "vllm"
model = "{model}"
max_tokens = {max_tokens}
captions_per_image = {captions_per_image}
in_flight = 128  # twice the engine's max_num_seqs
arguments = {arguments}
"""

ENGINE_ARGUMENTS = ARGUMENTS | {
    "max_num_seqs": 64,
    # Said here, since a server has other defaults for these than LLM.chat.
    "max_num_batched_tokens": 4096,
    "disable_log_stats": True,
    # On a CPU, vLLM 0.32 dies when it takes a prompt that has a seed in parts.
    "enable_chunked_prefill": False,
    # As it is on a machine with one GPU. With vLLM's own choice for a CPU, scheduler and model are
    # two processes, each of which waits for the other by asking without a pause.
    "distributed_executor_backend": "vllm.v1.executor.uniproc_executor.UniProcExecutor",
}
WIDTH_PX, HEIGHT_PX = 1024, 768
SHORT_EDGE_PX = 512
LIMITS = images.Limits(min_short_edge_px=1, max_pixels=1 << 24, max_bytes=1 << 24)

_SAMPLE_S = 0.25

CpuTimes = Mapping[str, float]
"""CPU seconds so far, by what they went into."""


@dataclass(frozen=True)
class Round:
    """What a run of the command brought from its first question to its last answer, and the engine.

    ``cpu_s`` is the CPU time of the run meanwhile.
    """

    captions: int
    output_tokens: int
    seconds: float
    cpu_s: CpuTimes
    bare: BareRate

    @property
    def tokens_per_s(self) -> float:
        """Output tokens per second of the command."""
        return self.output_tokens / self.seconds

    @property
    def bare_tokens_per_s(self) -> float:
        """Output tokens per second of the engine alone."""
        return self.bare.output_tokens / self.bare.seconds

    @property
    def efficiency(self) -> float:
        """The command's rate over the engine's."""
        return self.tokens_per_s / self.bare_tokens_per_s


def main() -> int:
    """Run the benchmark; returns 1 if command and engine did not give the same tokens."""
    options = _options()
    console = Console(highlight=False)
    with vllm_environment():
        folder = Path(tempfile.gettempdir()) / "benchmark"
        pictures = folder / "photographs"
        pictures.mkdir(parents=True)
        for number, picture in enumerate(draw_pictures(options.pictures, WIDTH_PX, HEIGHT_PX)):
            (pictures / f"{number:05d}.jpg").write_bytes(picture)
        recipe = _write_recipe(folder, options)
        subprocess.run(_evenmix("ingest", recipe), check=True, stdout=subprocess.DEVNULL)
        rounds = []
        for number in range(options.rounds):
            rounds.append(_round(recipe, f"round-{number}"))
            console.print(_line(rounds[-1]))
        console.print(_summary(rounds), _cpu_table(rounds))
        console.print(_preparation_table(pictures, options.captions_per_image))
    is_equal = all(
        (each.captions, each.output_tokens) == (each.bare.captions, each.bare.output_tokens)
        for each in rounds
    )
    if not is_equal:
        console.print("The engine alone gave other numbers of tokens; the rates do not compare.")
    return int(not is_equal)


def _write_recipe(folder: Path, options: argparse.Namespace) -> Path:
    """Write a recipe with one caption set, of the same settings, for each round."""
    model = make_model(folder / "model", f"--family={options.family}")
    recipe = folder / "recipe.toml"
    sets = [
        CAPTION_SET.format(
            name=f"round-{number}",
            model=model,
            max_tokens=options.max_tokens,
            captions_per_image=options.captions_per_image,
            arguments=json.dumps(ENGINE_ARGUMENTS).replace(":", " ="),  # as TOML has it
        )
        for number in range(options.rounds)
    ]
    recipe.write_text(RECIPE.format(folder=folder) + "".join(sets), encoding="utf-8")
    return recipe


def _evenmix(command: str, recipe: Path, *options: str) -> list[str]:
    return [sys.executable, "-m", "pipeline.cli", command, str(recipe), *options]


def _round(recipe: Path, name: str) -> Round:
    corpus, log = recipe.parent / "corpus", recipe.parent / "log"
    command = _evenmix("caption", recipe, f"--captions={name}", "--bare-engine=1000000")
    samples: list[tuple[float, CpuTimes]] = []
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        cpu = _CpuClock()
        while process.poll() is None:
            samples.append((time.time(), cpu.read()))
            time.sleep(_SAMPLE_S)
    if process.returncode:
        sys.exit(f"{command} failed:\n{log.read_text(errors='replace')}")
    tables = [pq.read_table(path) for path in corpus.glob(f"captions/{name}/*/[!.]*.parquet")]
    captions = [
        caption for table in tables for found in table["captions"].to_pylist() for caption in found
    ]
    began = min(caption["asked"] for caption in captions)
    ended = max(caption["asked"] + timedelta(seconds=caption["answer_s"]) for caption in captions)
    before = max(sample for sample in samples if sample[0] <= began.timestamp())
    after = min(sample for sample in samples if sample[0] >= ended.timestamp())
    return Round(
        len(captions),
        sum(caption["completion_tokens"] for caption in captions),
        (ended - began).total_seconds(),
        {part: after[1][part] - before[1].get(part, 0) for part in after[1]},
        BareRate(**json.loads((corpus / f"notes/captions/{name}/bare-engine.json").read_bytes())),
    )


# Where the time goes


class _CpuClock:
    """Reads the CPU time of all processes that have this one's folder for temporary files.

    The server is no child of the command, since it may outlive it; but it has its environment.
    """

    def __init__(self) -> None:
        self._seen: dict[psutil.Process, tuple[str, float]] = {}

    def read(self) -> CpuTimes:
        """Return the CPU seconds of each part so far, those of ended processes included."""
        for process in psutil.process_iter():
            try:
                if process.environ().get("TMPDIR") == os.environ["TMPDIR"]:
                    times = process.cpu_times()
                    self._seen[process] = (_part(process), times.user + times.system)
            except (psutil.NoSuchProcess, psutil.ZombieProcess, psutil.AccessDenied):
                continue
        sums: dict[str, float] = {}
        for part, seconds in self._seen.values():
            sums[part] = sums.get(part, 0.0) + seconds
        return sums


def _part(process: psutil.Process) -> str:
    if process.name().startswith("VLLM::"):
        return "vLLM: the engine"
    if "vllm.entrypoints.openai.api_server" in process.cmdline()[:3]:
        return "vLLM: the server around it"
    return "evenmix"


def _preparation_table(pictures: Path, captions_per_image: int) -> Table:
    """Measure in this process what evenmix does to a picture before the server has it."""
    request, sampling = Request("", DESCRIBE.text, 0), Sampling()
    steps: dict[str, Callable[[Any], Any]] = {
        "decode": lambda data: images.read(data, LIMITS)[1],
        "resize": lambda pixels: images.resize_and_crop_square(pixels, SHORT_EDGE_PX, "bicubic")[0],
        "PNG and base64": chat.data_url,
        "JSON": lambda url: [
            chat.request_body(request, url, "captioner", sampling, {})
            for _ in range(captions_per_image)
        ],
    }
    table = Table("", "ms/picture", title="evenmix's work on a picture, measured by itself")
    items: list[Any] = [path.read_bytes() for path in pictures.iterdir()]
    for name, step in steps.items():
        started = time.process_time()
        items = [step(item) for item in items]
        table.add_row(name, f"{1e3 * (time.process_time() - started) / len(items):.1f}")
    return table


# What is printed


def _line(each: Round) -> str:
    return (
        f"evenmix: {each.captions:,} captions, {each.output_tokens:,} tokens in "
        f"{each.seconds:.1f} s, {each.tokens_per_s:,.0f} tokens/s; bare engine: "
        f"{each.bare.output_tokens:,} tokens in {each.bare.seconds:.1f} s, "
        f"{each.bare_tokens_per_s:,.0f} tokens/s; efficiency {each.efficiency:.2f}"
    )


def _summary(rounds: list[Round]) -> Table:
    table = Table("", "evenmix", "bare engine", "efficiency", title="medians of the rounds")
    ours = statistics.median(each.tokens_per_s for each in rounds)
    bare = statistics.median(each.bare_tokens_per_s for each in rounds)
    efficiency = statistics.median(each.efficiency for each in rounds)
    table.add_row("tokens/s", f"{ours:,.0f}", f"{bare:,.0f}", f"{efficiency:.2f}")
    return table


def _cpu_table(rounds: list[Round]) -> Table:
    table = Table("", "ms/caption", "share", title="CPU time of the command (medians)")
    medians = {
        part: statistics.median(each.cpu_s.get(part, 0.0) / each.captions for each in rounds)
        for part in sorted(rounds[0].cpu_s)
    }
    for part, seconds in medians.items():
        table.add_row(part, f"{1e3 * seconds:.1f}", f"{seconds / sum(medians.values()):.0%}")
    return table


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="measure captioning beside the bare engine")
    parser.add_argument("--pictures", type=int, default=160)
    parser.add_argument("--captions-per-image", type=int, default=5, help="i1 has 5")
    parser.add_argument("--max-tokens", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--family", default="qwen3_vl", help="of tests/tiny_vlm.py")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
