"""vLLM's engine arguments: those that may be given, and how they stand on its command line.

A recipe may be a stranger's, and its arguments stand in the records of what was made with them and
in the machine's list of processes. So what is a secret, runs code, or opens this machine to
requests is refused.
"""

import json
import re
from collections.abc import Mapping
from typing import Any

from pipeline.errors import EvenmixError

_SET_HERE = "evenmix sets it itself"
_CODE = "it would run code that comes with a checkpoint or a file"
_REACH = "it would change how the server is reached, which is a socket for this user alone"

FORBIDDEN: Mapping[str, str] = {
    **dict.fromkeys(["model", "revision", "uds", "served_model_name"], _SET_HERE),
    **dict.fromkeys(
        [
            "trust_remote_code", "tool_parser_plugin", "reasoning_parser_plugin",
            "io_processor_plugin", "logits_processors", "middleware", "worker_cls",
            "worker_extension_cls", "scheduler_cls", "kv_transfer_config",
            "logging_config", "log_config_file",
        ],
        _CODE,
    ),
    **dict.fromkeys(
        [
            "host", "port", "grpc", "grpc_port", "headless", "root_path",
            "ssl_keyfile", "ssl_certfile", "ssl_ca_certs", "ssl_cert_reqs", "ssl_ciphers",
        ],
        _REACH,
    ),
    "allowed_local_media_path": "it would let requests read files of this machine",
    "tool_server": "it would let the model use tools",
    "lora_modules": "it would serve further models, which are not asked",
    "hf_token": "a secret would be seen by others; set HF_TOKEN in the environment",
    "api_key": "a secret would be seen by others, and a server of our own needs none",
    "config": "it would hide arguments in a file; write them in its place",
}  # fmt: skip
"""The arguments that may not be given, and why."""

_ALLOWED_BEGINNINGS = {"reasoning_parser"}  # arguments themselves
_NAME = re.compile(r"[a-z][a-z0-9]*(_[a-z0-9]+)*")


def check_arguments(arguments: Mapping[str, Any]) -> None:
    """Check the names of engine arguments; whether it has them, vLLM says itself.

    It takes abbreviations, so what a forbidden name begins with is forbidden as well.

    Raises:
        EvenmixError: one is forbidden, or is no name.
    """
    for given in arguments:
        name = _snake(given)
        if not _NAME.fullmatch(name):
            raise EvenmixError(f"the engine argument {given!r} is no name such as max_model_len")
        for forbidden, reason in FORBIDDEN.items():
            if forbidden.startswith(name) and name not in _ALLOWED_BEGINNINGS:
                short = "" if name == forbidden else f", short for {forbidden},"
                raise EvenmixError(
                    f"the engine argument {name}{short} is not allowed: {reason}; remove it"
                )


def flags(arguments: Mapping[str, Any]) -> list[str]:
    """Write arguments, given by their Python names, as words of vLLM's command line.

    True and False become ``--name`` and ``--no-name``, a mapping or list JSON. Each is one word, so
    that no value is taken for a flag.
    """
    words = []
    for name, value in arguments.items():
        flag = _snake(name).replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        elif isinstance(value, Mapping | list | tuple):
            words.append(f"--{flag}={json.dumps(value)}")
        else:
            words.append(f"--{flag}={value}")
    return words


def _snake(name: str) -> str:
    return name.lstrip("-").replace("-", "_")
