"""Calls of the libraries behind fsspec: what may pass is tried again, what stays is explained.

Every store (a disk, gs://, s3://, hf://, http) fails with exceptions of its own library, none of
which need be installed. They are told apart here, in one place, by the HTTP status they carry.
"""

import re
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

from pipeline.errors import EvenmixError

Result = TypeVar("Result")

RETRY_WAITS_S = (0.5, 2.0, 8.0)
"""Seconds before the second, third and fourth attempt. gcsfs and huggingface_hub also try again by
themselves."""

_TRANSIENT_STATUSES = {408, 425, 429}
_HTTP_LIBRARIES = {"aiohttp", "httpx", "httpx2"}
_USER_INFO = re.compile(r"//[^/@]*@")


def ask(url: str, call: Callable[[], Result]) -> Result:
    """Return what ``call``, a call of a store's library about ``url``, returns.

    Raises:
        EvenmixError: it failed, and again where that could help.
    """
    for wait_s in (*RETRY_WAITS_S, None):
        try:
            return call()
        except Exception as error:
            # The libraries raise any type, and nothing else runs here.
            if wait_s is None or not _may_pass(error):
                raise EvenmixError(_explanation(url, error)) from error
        time.sleep(wait_s)
    raise AssertionError("the last attempt returns or raises")


def is_absence(error: BaseException) -> bool:
    """Tell whether an error says that there is no such file, and not that it is out of reach."""
    status = _status(error)
    if status is not None:
        return status == 404
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


def _status(error: BaseException) -> int | None:
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
    status = _status(error)
    if status is not None:
        return status in _TRANSIENT_STATUSES or status >= 500
    return any(_is_of_the_network(cause) for cause in _chain(error))


def _is_of_the_network(error: BaseException) -> bool:
    return isinstance(error, ConnectionError | TimeoutError) or (
        _library(error) in _HTTP_LIBRARIES and not isinstance(error, ValueError)
    )


def _library(error: BaseException) -> str:
    return type(error).__module__.partition(".")[0]


def _explanation(url: str, error: BaseException) -> str:
    """Say what went wrong and what helps, without secrets.

    Those may be in the texts of HTTP errors, as signed URLs, and in a URL with a password.
    """
    status, url = _status(error), _USER_INFO.sub("//", url, count=1)
    if is_absence(error):
        return f"{url} does not exist"
    if status in (401, 403) and url.startswith("hf://"):
        return (
            f"{url} is not open to you (HTTP {status}), or there is no such repository: accept the "
            "dataset's terms on its page and set HF_TOKEN to a token of that account"
        )
    if status in (401, 403):
        return f"{url} is not open to you (HTTP {status}); check the address and the credentials"
    if status is not None:
        advice = "start the same command again later" if _may_pass(error) else "check the address"
        return f"{url} cannot be read (HTTP {status}); {advice}"
    if type(error) is ValueError and url.startswith("http"):
        return no_ranges(url)  # so fsspec says it
    *_, root = _chain(error)
    reason = f"{type(root).__name__}: {root}".splitlines()[0]
    if _may_pass(error):
        return f"{url} is out of reach ({reason}); start the same command again later"
    return f"{url} cannot be read: {root}"
