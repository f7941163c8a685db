"""`evenmix rewrite`: long prompts from short ones, for models that are trained on long captions.

Answers are kept in a journal beside the output as they come, so that a run which is killed goes on
where it was. The output appears, whole, when every prompt has its outcome.
"""

import argparse
import hashlib
import json
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from captioning.engine.arguments import check_arguments
from captioning.engine.client import Engine
from captioning.engine.models import resolve
from captioning.engine.questions import Answer, EngineConfig, Request, Sampling
from captioning.rewriting.answers import RewriteOutcome, judge
from captioning.rewriting.journal import Journal
from pipeline import storage
from pipeline.errors import EvenmixError
from pipeline.progress import console
from pipeline.records import uniform_hash

DEFAULT_MODEL = "Qwen/Qwen3-30B-A3B"
SAMPLING = Sampling(max_tokens=512, temperature=0.6, top_p=0.95, top_k=20)
"""i1's, as is the model, without thinking. ``max_tokens`` is ours: about twice what the meta-prompt
asks for, so what reaches it has gone astray."""
META_PROMPT = Path(__file__).with_name("meta_prompt.txt")

_JSON_LINES = (".jsonl", ".ndjson")
_RESULT_KEYS = (
    "rewritten",
    "outcome",
    "detail",
    "answer",
    "seed",
    "prompt_tokens",
    "completion_tokens",
    "model",
    "revision",
    "meta_prompt_sha256",
)
_LINE_EVERY_S = 15.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    prompts_help = "text file with one prompt a line; .jsonl: objects with the key `prompt`"
    parser.add_argument("prompts", metavar="PROMPTS", help=prompts_help)
    output_help = "JSON lines in the order of PROMPTS; `rewritten` is the prompt to use"
    parser.add_argument("--output", required=True, metavar="FILE", help=output_help)
    parser.add_argument("--model", default=DEFAULT_MODEL, help="name or folder (%(default)s)")
    revision_help = "commit, branch or tag of a model on the Hugging Face Hub"
    parser.add_argument("--revision", help=revision_help)
    endpoint_help = "of a server with the model that runs already (http://host:8000/v1)"
    parser.add_argument("--endpoint", metavar="URL", help=endpoint_help)
    meta_prompt_help = "what the model is told to do (default: evenmix's own words)"
    parser.add_argument(
        "--meta-prompt", default=str(META_PROMPT), metavar="FILE", help=meta_prompt_help
    )
    parser.add_argument("--seed", type=int, default=0, help="of the model's draws (%(default)s)")
    arguments_help = """vLLM's engine arguments, such as '{"max_model_len": 4096}'"""
    parser.add_argument("--arguments", default="{}", metavar="JSON", help=arguments_help)


def run(args: argparse.Namespace) -> int:
    """Rewrite the prompts of a file."""
    if "://" in args.output:
        raise EvenmixError(
            f"--output {args.output} should be a local file; copy it when it is there"
        )
    output = Path(args.output)
    _require_free(output)
    records = read_records(Path(args.prompts))
    meta_prompt = _read_text(Path(args.meta_prompt)).strip()
    engine_arguments = _engine_arguments(args.arguments)
    check_arguments(engine_arguments)
    model = resolve(args.model, args.revision, args.endpoint)
    config = EngineConfig(
        model=model.location,
        revision=model.hub_commit,
        arguments=engine_arguments,
        sampling=SAMPLING,
        chat_template={"enable_thinking": False},
        endpoint=args.endpoint,
    )
    made_with = {
        "model": model.name,
        "revision": model.revision,
        "meta_prompt_sha256": _sha256(meta_prompt),
    }
    prompts = [record["prompt"] for record in records]
    settings = made_with | {
        "arguments": engine_arguments,
        "seed": args.seed,
        "prompts_sha256": _sha256(json.dumps(prompts)),
    }
    with closing(Journal(output.with_name(f"{output.name}.partial"), settings)) as journal:
        if not journal.results and output.exists():
            journal.remove()  # another process has just finished
        _require_free(output)
        requests = [
            Request(str(number), prompt, _seed(args.seed, prompt), system=meta_prompt)
            for number, prompt in enumerate(prompts)
            if not _is_settled(journal.results.get(number))
        ]
        if requests:
            _ask(config, requests, meta_prompt, journal, total=len(prompts))
        _publish(output, records, journal.results, made_with)
        journal.remove()
    _print_counts(output, journal.results)
    return 0


def _require_free(output: Path) -> None:
    if output.exists():
        raise EvenmixError(f"{output} exists already; name another output, or remove it first")


def read_records(path: Path) -> list[dict[str, Any]]:
    """Read prompts: JSON objects with the key ``prompt`` if the name ends so, else lines of text.

    Empty lines are passed over.

    Raises:
        EvenmixError: the file cannot be read, has no prompts, or a line is not as it should be.
    """
    lines = [
        (number, line.strip())
        for number, line in enumerate(_read_text(path).split("\n"), start=1)
        if line.strip()
    ]
    if not lines:
        raise EvenmixError(f"{path} has no prompts; write one a line")
    if path.suffix.lower() not in _JSON_LINES:
        return [{"prompt": line} for _, line in lines]
    return [_record(f"{path}, line {number}", line) for number, line in lines]


def _record(place: str, line: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
        # Half a surrogate pair is no text, and NaN no JSON.
        json.dumps(record, ensure_ascii=False, allow_nan=False).encode()
    except (ValueError, RecursionError) as error:
        raise EvenmixError(f"{place} is not JSON: {error}") from error
    prompt = record.get("prompt") if isinstance(record, dict) else None
    if not isinstance(prompt, str) or not prompt.strip():
        raise EvenmixError(f'{place} should be an object such as {{"prompt": "a red cube"}}')
    if taken := sorted(record.keys() & set(_RESULT_KEYS)):
        raise EvenmixError(f"{place} has {', '.join(taken)}, which the output needs; rename it")
    return dict(record)


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise EvenmixError(f"cannot read {path}: {error}") from error
    except UnicodeDecodeError as error:
        raise EvenmixError(f"{path} is not UTF-8 ({error}); convert it") from error


def _engine_arguments(text: str) -> dict[str, Any]:
    try:
        arguments = json.loads(text)
    except ValueError as error:
        raise EvenmixError(f"--arguments {text} is not JSON: {error}") from error
    if not isinstance(arguments, dict):
        raise EvenmixError(
            f"""--arguments {text} is no object such as '{{"max_model_len": 4096}}'"""
        )
    return arguments


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _seed(seed: int, prompt: str) -> int:
    """Return 31 random bits: engines take a signed 32-bit seed at the least."""
    return uniform_hash(seed, prompt, "rewriting") >> 33


def _is_settled(result: Mapping[str, Any] | None) -> bool:
    """Tell whether a prompt need not be asked about again."""
    return result is not None and result["outcome"] != RewriteOutcome.ENGINE_FAILED


def _ask(
    config: EngineConfig,
    requests: Sequence[Request],
    meta_prompt: str,
    journal: Journal,
    total: int,
) -> None:
    """Ask the model, and keep each answer with its outcome as it comes."""
    by_id = {request.id: request for request in requests}
    with closing(Engine(config)) as engine:
        engine.start()
        engine.check_fits(min(requests, key=lambda request: len(request.prompt)))
        for answer in _with_progress(engine.answers(requests), len(requests), total):
            request = by_id[answer.id]
            rewriting = judge(request.prompt, answer, meta_prompt)
            result = {
                "rewritten": rewriting.prompt,
                "outcome": rewriting.outcome,
                "detail": rewriting.detail,
                "answer": answer.text,
                "seed": request.seed,
                "prompt_tokens": answer.prompt_tokens,
                "completion_tokens": answer.completion_tokens,
            }
            journal.keep(int(answer.id), result)


def _with_progress(answers: Iterator[Answer], expected: int, total: int) -> Iterator[Answer]:
    """Pass answers on, and print a line on them now and then."""
    started = time.monotonic()
    next_line = started + _LINE_EVERY_S
    for done, answer in enumerate(answers, start=1):
        yield answer
        now = time.monotonic()
        if now >= next_line:
            next_line = now + _LINE_EVERY_S
            per_s = done / (now - started)
            console.print(
                f"rewrite: {total - expected + done:,}/{total:,} prompts ({per_s:,.1f}/s), "
                f"{(expected - done) / per_s:,.0f} s left",
                soft_wrap=True,
            )


def _publish(
    output: Path,
    records: Sequence[Mapping[str, Any]],
    results: Mapping[int, Mapping[str, Any]],
    made_with: Mapping[str, Any],
) -> None:
    lines = [
        json.dumps({**record, **results[number], **made_with}, ensure_ascii=False)
        for number, record in enumerate(records)
    ]
    if not storage.publish(str(output), "".join(f"{line}\n" for line in lines).encode()):
        raise EvenmixError(f"{output} has appeared meanwhile; move it away and start again")


def _print_counts(output: Path, results: Mapping[int, Mapping[str, Any]]) -> None:
    counts = Counter(result["outcome"] for result in results.values())
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("outcome")
    table.add_column("prompts", justify="right")
    table.add_column("used")
    for outcome in RewriteOutcome:
        if outcome in counts:
            used = "the rewriting" if outcome is RewriteOutcome.OK else "the prompt as it was"
            table.add_row(outcome, f"{counts[outcome]:,}", used)
    console.print(table)
    console.print(f"rewrite: {output}", soft_wrap=True, markup=False)
