"""Calls of the libraries behind fsspec: what may pass is tried again, what stays is explained.

Every store (a disk, gs://, s3://, hf://, http) fails with exceptions of its own library, none of
which need be installed. They are told apart here, in one place, by the HTTP status they carry.
"""

import logging
import math
import re
import threading
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

from pipeline.errors import EvenmixError

Result = TypeVar("Result")

RETRY_WAITS_S = (0.5, 2.0, 8.0)
"""Seconds before the second, third and fourth attempt."""

OUTAGE_WAITS_S = (0.5, 2.0, 8.0, 30.0, 60.0, 60.0, 60.0)
"""The same for Google Cloud Storage and the Hugging Face Hub, where corpora and sources are. gcsfs
tries six times at each attempt, over about 35 s where connections are refused (huggingface_hub for
about 25 s), so an outage of eight minutes (six) passes: as long as services take to recover from
most, and cheaper for a cluster than to begin its bundles again."""

OUTAGE_S = 600.0
"""No further attempt begins this long after the first, where each takes its time to fail."""

_TOLD_WAIT_S = 30.0
_TRANSIENT_STATUSES = {408, 425, 429}
_HTTP_LIBRARIES = {"aiohttp", "httpx", "httpx2", "requests"}
_USER_INFO = re.compile(r"//[^/@]*@")

_logger = logging.getLogger(__name__)


def ask(url: str, call: Callable[[], Result], purpose: str = "read") -> Result:
    """Return what ``call``, a call of a store's library about ``url``, returns.

    ``purpose`` is what the call does, for the error: the file is to be ``read``, ``written`` or
    ``removed``.

    Raises:
        EvenmixError: it failed, and again where that could help.
    """
    begun = time.monotonic()
    for wait_s in (*(OUTAGE_WAITS_S if url.startswith(("gs:", "hf:")) else RETRY_WAITS_S), None):
        try:
            return call()
        except Exception as error:
            # The libraries raise any type, and nothing else runs here.
            if wait_s is None or not _may_pass(error) or time.monotonic() - begun > OUTAGE_S:
                raise EvenmixError(_explanation(url, error, purpose)) from error
            if wait_s >= _TOLD_WAIT_S and _is_news():
                _logger.warning(
                    "%s is out of reach (%s); trying again in %.0f s", url, _reason(error), wait_s
                )
        time.sleep(wait_s)
    raise AssertionError("the last attempt returns or raises")


_told = threading.Lock()
_told_at = -math.inf


def _is_news() -> bool:
    """Tell whether nobody was told of an outage a moment ago: all threads of a process meet it."""
    global _told_at  # noqa: PLW0603
    with _told:
        now = time.monotonic()
        is_news = now - _told_at >= _TOLD_WAIT_S
        _told_at = now if is_news else _told_at
        return is_news


def is_absence(error: BaseException) -> bool:
    """Tell whether an error says that there is no such file, and not that it is out of reach."""
    status = status_of(error)
    if status is not None:
        return status in (404, 410)
    return isinstance(error, FileNotFoundError) and error.__cause__ is None


def no_ranges(url: str) -> str:
    """Return what to say of a server that gives a file only as a whole."""
    return (
        f"{url} cannot be read in parts: its server tells no size or ignores ranges; download it "
        "and give the local path as the source"
    )


def _chain(error: BaseException) -> Iterator[BaseException]:
    """Yield an error and what caused it: fsspec says "not found" of servers out of reach too."""
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__


def status_of(error: BaseException) -> int | None:
    """Return the HTTP status that the server answered, if it did."""
    for cause in _chain(error):
        # Each under the name that its library gives it.
        name = {"aiohttp": "status", "gcsfs": "code"}.get(_library(cause), "")
        status = getattr(cause, name, None) or getattr(
            getattr(cause, "response", None), "status_code", None
        )
        if isinstance(status, int):
            return status
    return None


def _may_pass(error: BaseException) -> bool:
    if any(_is_of_signing_in(cause) for cause in _chain(error)):
        return True
    status = status_of(error)
    if status is not None:
        return status in _TRANSIENT_STATUSES or status >= 500
    return any(_is_of_the_network(cause) for cause in _chain(error))


def _is_of_signing_in(error: BaseException) -> bool:
    """Tell whether a token could not be had for a moment, which gcsfs takes for a refusal (401)."""
    if _library(error) != "google":
        return False
    return getattr(error, "retryable", False) or type(error).__name__ == "TransportError"


def _is_of_the_network(error: BaseException) -> bool:
    return isinstance(error, ConnectionError | TimeoutError) or (
        _library(error) in _HTTP_LIBRARIES and not isinstance(error, ValueError)
    )


def _library(error: BaseException) -> str:
    return type(error).__module__.partition(".")[0]


def _explanation(url: str, error: BaseException, purpose: str) -> str:
    """Say what went wrong and what helps, without secrets.

    Those may be in the texts of HTTP errors, as signed URLs, and in a URL with a password.
    """
    status, url = status_of(error), _USER_INFO.sub("//", url, count=1)
    if is_absence(error):
        return (
            f"{url} does not exist" if purpose == "read" else f"{url} is in no bucket that exists"
        )
    is_refused = status in (401, 403) and not _may_pass(error)
    if is_refused and url.startswith("hf://"):
        return (
            f"{url} is not open to you (HTTP {status}), or there is no such repository: accept the "
            "dataset's terms on its page and set HF_TOKEN to a token of that account"
        )
    if is_refused:
        return f"{url} is not open to you (HTTP {status}); check the address and the credentials"
    if status is not None:
        advice = "start the same command again later" if _may_pass(error) else "check the address"
        return f"{url} cannot be {purpose} (HTTP {status}); {advice}"
    if type(error) is ValueError and url.startswith("http"):
        return no_ranges(url)  # so fsspec says it
    if _may_pass(error):
        return f"{url} is out of reach ({_reason(error)}); start the same command again later"
    *_, root = _chain(error)
    return f"{url} cannot be {purpose}: {root}"


def _reason(error: BaseException) -> str:
    """Say in one line what a store, or the way to it, failed with."""
    status = status_of(error)
    *_, root = _chain(error)
    return f"HTTP {status}" if status else f"{type(root).__name__}: {root}".splitlines()[0]
