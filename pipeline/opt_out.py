"""What X-Robots-Tag headers ask of us: ``[agent:] directive, directive, …``, any number of times.

An agent's name binds the directives after it up to the next name or the end of the header; those
without a name bind everybody. Proxies join several headers into one, so names stand in the middle
too. Sources: Google's "Robots meta tag, data-nosnippet, and X-Robots-Tag specifications", and the
``noai`` and ``noimageai`` directives that DeviantArt began.
"""

import re
from collections.abc import Collection, Iterable

_NAMED = re.compile(r"([^\s:]+)\s*:(.*)", re.DOTALL)
_WITH_VALUE = {"unavailable_after", "max-snippet", "max-image-preview", "max-video-preview"}


def opted_out(headers: Iterable[str], agent: str, honoured: Collection[str]) -> str | None:
    """Return the first honoured directive that binds ``agent``, or None.

    Args:
        headers: the values of all X-Robots-Tag headers of an answer.
        agent: our product token, such as ``evenmix``; case does not matter.
        honoured: the directives that are obeyed, in lower case.
    """
    for header in headers:
        bound = True
        for part in header.lower().split(","):
            directive = part.strip()
            named = _NAMED.fullmatch(directive)
            if named and named[1] not in _WITH_VALUE:
                bound = named[1] in ("*", agent.lower())
                directive = named[2].strip()
            if bound and directive in honoured:
                return directive
    return None
