"""The Hugging Face Hub: which commit of a dataset a source means, and the files of models.

Sources on the Hub are written ``hf://datasets/OWNER/NAME/PATH``. A branch moves and the Hub wants
whole hashes, while people write a branch or the first digits of one; here it becomes the commit.
The token for gated repositories is HF_TOKEN in the environment, which huggingface_hub reads.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from pipeline.errors import EvenmixError
from pipeline.stores import ask

if TYPE_CHECKING:
    from huggingface_hub import HfApi

Answer = TypeVar("Answer")

_SOURCE = re.compile(r"hf://datasets/(?P<repo>[^/@]+/[^/@]+)(?:@(?P<revision>[^/]+))?/(?P<path>.+)")
_DIGITS = re.compile(r"[0-9a-f]{7,39}")
_HASH = re.compile(r"[0-9a-f]{7,40}")


@dataclass(frozen=True)
class Commit:
    """A state of a dataset repository; ``gated``: its files are only for who accepted its terms."""

    repo: str
    sha: str
    gated: bool


def resolve(source: str, revision: str | None) -> tuple[str, str | None]:
    """Return a source with its commit in it, and the full hash of that commit.

    ``revision`` is a commit, the first 7 or more digits of one, a branch or a tag; without it the
    repository's present state is taken. A source elsewhere is returned as it is, without one.

    Raises:
        EvenmixError: no such repository or revision, terms that are not accepted, no network.
    """
    if not source.startswith("hf://"):
        return source, None
    commit = find_commit(source, revision)
    if commit.gated:
        # Anyone may list its files; better to stop here than at the first that is read.
        _ask(commit.repo, lambda api: api.auth_check(commit.repo, repo_type="dataset"))
    path = _parts(source)["path"]
    return f"hf://datasets/{commit.repo}@{commit.sha}/{path}", commit.sha


def is_meant(commit: str, revision: str) -> bool:
    """Tell whether a revision may mean a commit: a name may mean any, digits those they begin."""
    return not _HASH.fullmatch(revision) or commit.startswith(revision)


def find_commit(source: str, revision: str | None) -> Commit:
    """Ask the Hub which commit an hf:// source and a revision mean; see :func:`resolve`."""
    parts = _parts(source)
    repo, written = parts["repo"], parts["revision"]
    if written and revision and written != revision:
        raise EvenmixError(f"{source} names a revision, but revision is {revision}; remove one")
    wanted = revision or written
    if wanted and _DIGITS.fullmatch(wanted):
        wanted = _complete(repo, wanted)
    info = _ask(repo, lambda api: api.dataset_info(repo, revision=wanted, expand=["sha", "gated"]))
    return Commit(repo, str(info.sha), bool(info.gated))


def _parts(source: str) -> dict[str, str]:
    match = _SOURCE.fullmatch(source)
    if match is None:
        raise EvenmixError(
            f"{source} is no source on the Hub; write hf://datasets/OWNER/NAME/PATTERN"
        )
    return match.groupdict()


def _complete(repo: str, digits: str) -> str:
    """Return the commit of the main branch that begins with ``digits``."""
    commits = _ask(repo, lambda api: api.list_repo_commits(repo, repo_type="dataset"))
    found = [commit.commit_id for commit in commits if commit.commit_id.startswith(digits)]
    if len(found) != 1:
        count = f"{len(found)} of its {len(commits)} commits begin with {digits}"
        raise EvenmixError(f"hf://datasets/{repo}: {count}; correct the revision")
    return found[0]


def _ask(repo: str, call: Callable[["HfApi"], Answer]) -> Answer:
    """Ask the Hub about a repository.

    Raises:
        EvenmixError: it refuses, or is out of reach; no token is in the text.
    """
    from huggingface_hub import HfApi  # noqa: PLC0415  # only sources on the Hub need it
    from huggingface_hub.errors import (  # noqa: PLC0415
        GatedRepoError,
        RevisionNotFoundError,
    )

    url = f"hf://datasets/{repo}"
    try:
        return ask(url, lambda: call(HfApi()))
    except EvenmixError as error:
        if isinstance(error.__cause__, GatedRepoError):
            raise EvenmixError(
                f"{url} is gated: accept its terms at https://huggingface.co/datasets/{repo} and "
                "set HF_TOKEN to a token of that account"
            ) from error
        if isinstance(error.__cause__, RevisionNotFoundError):
            raise EvenmixError(f"{url} has no such revision; correct it") from error
        raise


def model_file(model: str, revision: str | None, file: str) -> Path | None:
    """Return a file of a model from the local cache, fetched if need be; None if it has no such.

    ``revision`` is a commit, a branch or a tag; without it the model's present state is taken.

    Raises:
        EvenmixError: no such model or revision, terms that are not accepted, no network.
    """
    from huggingface_hub import hf_hub_download  # noqa: PLC0415  # only models on the Hub need it
    from huggingface_hub.errors import (  # noqa: PLC0415
        GatedRepoError,
        HFValidationError,
        RemoteEntryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        return Path(hf_hub_download(model, file, revision=revision))
    except RemoteEntryNotFoundError:
        return None
    except GatedRepoError as error:
        raise EvenmixError(
            f"the model {model} is gated: accept its terms at https://huggingface.co/{model} and "
            "set HF_TOKEN to a token of that account"
        ) from error
    except RevisionNotFoundError as error:
        raise EvenmixError(f"the model {model} has no revision {revision}; correct it") from error
    except (HFValidationError, OSError) as error:  # the second is what all others are
        raise EvenmixError(
            f"{file} of the model {model} is neither in the Hugging Face cache of this machine nor "
            f"can it be fetched: {' '.join(str(error).split())} Download the model first, or give "
            "a folder."
        ) from error
