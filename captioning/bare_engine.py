"""What the engine alone reaches: vLLM's `LLM.chat` with everything in one batch.

It never waits for a picture, a network or a disk, so its rate is the measure of a captioning run
(efficiency.py). It has a process of its own, which ends with the measurement and gives all memory
back.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import psutil
from PIL import Image

from captioning.engine import keeper
from captioning.engine.copies import on_this_machine
from captioning.engine.questions import EngineConfig, Request
from captioning.engine.server import (
    LOG_LINES_SHOWN,
    SERVER_ENVIRONMENT,
    meeting_folder,
    server_command,
)
from pipeline.errors import EvenmixError

WARM_UP_REQUESTS = 4
SERVER_END_TIMEOUT_S = 60.0
"""How long a run's server, which takes most of the memory, has to end after its last worker."""

_COMMAND_WORDS = 3  # python -m MODULE


@dataclass(frozen=True)
class BareRate:
    """What the bare engine made of a batch; ``seconds`` are without its start and warm-up."""

    captions: int
    output_tokens: int
    seconds: float


def measure(config: EngineConfig, requests: Sequence[Request]) -> BareRate:
    """Answer all ``requests`` in one batch, each with its own seed, as the server would.

    Raises:
        EvenmixError: the engine cannot be started here, its server is still in use, or it does not
            take one of the requests.
    """
    if config.endpoint is not None:
        raise EvenmixError(
            f"the bare engine of {config.endpoint} cannot be measured from here; leave out "
            "--bare-engine"
        )
    _wait_for_end_of_server(config)
    with tempfile.TemporaryDirectory(prefix="bare-engine-") as name:
        folder = Path(name)
        _write_task(folder, config, requests)
        try:
            with _log(folder).open("wb") as log:
                process = subprocess.run(
                    [sys.executable, "-P", "-m", __name__, name],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env=os.environ | SERVER_ENVIRONMENT | {keeper.MARK: name},
                    check=False,
                )
        finally:
            keeper.kill_marked(folder)  # if it was killed, vLLM's own processes go on
        if process.returncode:
            lines = _log(folder).read_text(errors="replace").splitlines()[-LOG_LINES_SHOWN:]
            raise EvenmixError(
                f"the bare engine of {config.model} failed with status {process.returncode}:\n"
                + "\n".join(f"  {line}" for line in lines)
            )
        return BareRate(**json.loads(_rate(folder).read_bytes()))


def _wait_for_end_of_server(config: EngineConfig) -> None:
    folder = meeting_folder(on_this_machine(config.model), config.arguments, config.revision)
    deadline_s = time.monotonic() + SERVER_END_TIMEOUT_S
    while keeper.marked_processes(folder):
        if time.monotonic() > deadline_s:
            raise EvenmixError(
                f"vLLM serves {config.model} to another run on this machine; measure the bare "
                "engine when that has ended"
            )
        time.sleep(keeper.POLL_INTERVAL_S)


def _write_task(folder: Path, config: EngineConfig, requests: Sequence[Request]) -> None:
    for number, request in enumerate(requests):
        if request.picture is not None:
            np.save(_picture(folder, number), request.picture)
    command = server_command(
        on_this_machine(config.model), config.arguments, Path("socket"), config.revision
    )
    task = {
        "flags": command[_COMMAND_WORDS:],
        "sampling": asdict(config.sampling),
        "chat_template": dict(config.chat_template),
        "requests": [
            {
                "prompt": request.prompt,
                "system": request.system,
                "seed": request.seed,
                "has_picture": request.picture is not None,
            }
            for request in requests
        ],
    }
    _task(folder).write_text(json.dumps(task), encoding="utf-8")


def _task(folder: Path) -> Path:
    return folder / "task.json"


def _picture(folder: Path, number: int) -> Path:
    return folder / f"{number}.npy"


def _log(folder: Path) -> Path:
    return folder / "log"


def _rate(folder: Path) -> Path:
    return folder / "rate.json"


# In the process of its own


def end_with_parent() -> None:
    """Have this process end, with all that it has started, when the one that started it does."""
    signal.signal(signal.SIGTERM, _end)
    keeper.die_with_parent(signal.SIGTERM)


def _end(signum: int, frame: object) -> NoReturn:
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    os._exit(128 + signum)


def _measure_here(folder: Path) -> BareRate:
    from vllm import LLM, SamplingParams  # noqa: PLC0415  # takes seconds

    task = json.loads(_task(folder).read_bytes())
    engine = LLM.from_engine_args(_engine_arguments(task["flags"]))
    conversations: list[Any] = [
        _conversation(folder, number, request) for number, request in enumerate(task["requests"])
    ]
    sampling = [
        SamplingParams(**task["sampling"], seed=request["seed"]) for request in task["requests"]
    ]

    def chat(count: int) -> list[Any]:
        answers: list[Any] = engine.chat(
            conversations[:count],
            sampling[:count],
            chat_template_kwargs=task["chat_template"],
            use_tqdm=False,
        )
        return answers

    chat(WARM_UP_REQUESTS)
    engine.reset_mm_cache()
    engine.reset_prefix_cache()
    started = time.perf_counter()
    answers = chat(len(conversations))
    seconds = time.perf_counter() - started
    tokens = sum(len(answer.outputs[0].token_ids) for answer in answers)
    return BareRate(len(answers), tokens, seconds)


def _engine_arguments(flags: Sequence[str]) -> Any:
    """Read the server's command line, but for what concerns only its HTTP side, as it would."""
    from vllm.engine.arg_utils import EngineArgs  # noqa: PLC0415
    from vllm.utils.argparse_utils import FlexibleArgumentParser  # noqa: PLC0415

    make_parser: Any = FlexibleArgumentParser
    parser: Any = EngineArgs.add_cli_args(make_parser())
    parsed, _ = parser.parse_known_args(flags)
    arguments = EngineArgs.from_cli_args(parsed)
    arguments.disable_log_stats = True  # as LLM has it
    return arguments


def _conversation(folder: Path, number: int, request: dict[str, Any]) -> list[dict[str, Any]]:
    content = [{"type": "text", "text": request["prompt"]}]
    if request["has_picture"]:
        picture = Image.fromarray(np.load(_picture(folder, number)))
        content.insert(0, {"type": "image_pil", "image_pil": picture})
    user = {"role": "user", "content": content}
    if request["system"] is None:
        return [user]
    return [{"role": "system", "content": request["system"]}, user]


if __name__ == "__main__":
    end_with_parent()
    its_folder = Path(sys.argv[1])
    _rate(its_folder).write_text(json.dumps(asdict(_measure_here(its_folder))), encoding="utf-8")
