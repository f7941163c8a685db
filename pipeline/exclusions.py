"""Pictures to leave out: those taken down, opted out by letter, or known to be harmful.

The list is a text file with one picture a line; what follows a ``#`` is a comment:

    key 3f1c2a…                        a key of this corpus
    source_id redcaps bdzpl1           a dataset's identifier
    url https://i.redd.it/bdzpl1.jpg   where the picture is, or was, on the web
    sha256 9f86d0…                     of its bytes, or of its pixels (see pipeline.images)

Ingest honours it, and so does the cutting of a mixture: a picture that is put on the list when the
corpus stands already is in no mixture that is cut from then on.
"""

import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

from pipeline import storage
from pipeline.errors import EvenmixError
from pipeline.records import EXCLUSIONS, key_of

_LINE = {
    "key": re.compile(r"[0-9a-f]{32}"),
    "source_id": re.compile(r"\S+ .+"),
    "url": re.compile(r"\S+"),
    "sha256": re.compile(r"[0-9a-f]{64}"),
}


@dataclass(frozen=True)
class Exclusions:
    """What is left out. ``digest`` identifies the list; None stands for no list at all."""

    keys: frozenset[str] = frozenset()
    urls: frozenset[str] = frozenset()
    hashes: frozenset[str] = frozenset()
    digest: str | None = None

    def reason(
        self, key: str | None, urls: Iterable[str | None] = (), hashes: Iterable[str] = ()
    ) -> str | None:
        """Return by what a picture is on the list (key, url, sha256), or None if it is not."""
        if key in self.keys:
            return "key"
        if not self.urls.isdisjoint(urls):
            return "url"
        return None if self.hashes.isdisjoint(hashes) else "sha256"


def stored_exclusions(root: str, url: str | None) -> str | None:
    """Check a list, copy it into the corpus, where every worker can read it, and return that URL.

    Raises:
        EvenmixError: as :func:`load_exclusions`.
    """
    if url is None:
        return None
    stored = storage.join(root, EXCLUSIONS, f"{load_exclusions(url).digest}.txt")
    if not storage.exists(stored):
        storage.publish(stored, storage.read_bytes(url))
    return stored


@lru_cache(maxsize=2)
def load_exclusions(url: str | None) -> Exclusions:
    """Read a list; without one nothing is left out. A process reads it once.

    Raises:
        EvenmixError: it is missing, or has lines that say nothing; the text has all of them.
    """
    if url is None:
        return Exclusions()
    data = storage.read_bytes(url)
    found: dict[str, set[str]] = {kind: set() for kind in _LINE}
    mistakes = []
    for number, line in enumerate(data.decode(errors="replace").splitlines(), start=1):
        # A URL may have a '#' inside, so a comment begins a line or follows a space.
        text = re.split(r"(?:^|\s)#", line, maxsplit=1)[0].strip()
        kind, _, value = text.partition(" ")
        value = value.strip()
        if kind in _LINE and _LINE[kind].fullmatch(value):
            found[kind].add(value)
        elif text:
            mistakes.append(f"  line {number}: {text[:80]!r}")
    if mistakes:
        raise EvenmixError(
            "\n".join([f"{url}: not a key, source_id, url or sha256 with its value:", *mistakes])
        )
    by_id = {key_of(*line.split(" ", 1)) for line in found["source_id"]}
    return Exclusions(
        keys=frozenset(found["key"] | by_id),
        urls=frozenset(found["url"]),
        hashes=frozenset(found["sha256"]),
        digest=hashlib.sha256(data).hexdigest(),
    )
