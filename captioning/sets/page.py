"""The comparison of caption sets as one HTML page that needs nothing else, pictures included.

Captions and identifiers are anybody's text: all of it is escaped, and the page's own policy forbids
whatever is not its pictures and styles.
"""

import base64
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import numpy as np
from PIL import Image

from captioning.outcomes import USABLE
from captioning.sets.comparison import Compared, facts, read_picture, said
from pipeline import images
from pipeline.images import Pixels
from pipeline.printable import printable

THUMBNAIL_PX = 384
"""The longer edge of a picture on the page, at most."""

_STYLE = """
:root { color-scheme: light dark; --line: #8886; --muted: #666; --good: #1a7f37; --bad: #b42318; }
@media (prefers-color-scheme: dark) {
  :root { --muted: #aaa; --good: #56d364; --bad: #ff8a80; }
}
body { font: 16px/1.5 system-ui, sans-serif; max-width: 90rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.4rem; }
h2 { font-size: 1rem; margin: 0; overflow-wrap: anywhere; }
h3 { font-size: 0.9rem; margin: 0 0 0.5rem; }
article { display: flex; flex-wrap: wrap; gap: 1.5rem; padding: 1.5rem 0;
  border-top: 1px solid var(--line); }
header { flex: 0 1 20rem; min-width: 0; }
header p, .facts { color: var(--muted); font-size: 0.8rem; margin: 0.2rem 0;
  overflow-wrap: anywhere; }
img { max-width: 100%; height: auto; margin-top: 0.5rem; }
section { flex: 1 1 18rem; min-width: 0; }
blockquote { margin: 0 0 1rem; padding-left: 0.75rem; border-left: 3px solid var(--line);
  overflow-wrap: anywhere; white-space: pre-wrap; unicode-bidi: isolate; }
.outcome { font-weight: 600; padding: 0 0.4em; border: 1px solid; border-radius: 0.4em; }
.good { color: var(--good); }
.bad { color: var(--bad); }
.reason { color: var(--muted); font-style: italic; }
"""

_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<h1>{title}</h1>
<main>
{articles}
</main>
</body>
</html>
"""


def comparison_page(root: str, names: Sequence[str], pictures: Sequence[Compared]) -> str:
    """Return the page that shows ``pictures`` with their captions of the sets ``names``.

    Raises:
        EvenmixError: a picture cannot be read.
    """
    title = f"Captions of {root}: {' and '.join(names)}"
    return _PAGE.format(
        title=_text(title),
        style=_STYLE,
        articles="\n".join(_article(root, names, picture) for picture in pictures),
    )


def _article(root: str, names: Sequence[str], picture: Compared) -> str:
    index, name = picture.index, _text(picture.index["source_id"])
    thumbnail = _thumbnail(read_picture(root, picture))
    height, width, _ = thumbnail.shape
    jpeg = base64.b64encode(images.encode(thumbnail, "jpeg")).decode()
    sections = "\n".join(
        f"<section>\n<h3>{_text(captions)}</h3>\n{''.join(map(_caption, found))}</section>"
        for captions, found in zip(names, picture.captions, strict=True)
    )
    return (
        f"<article>\n<header>\n<h2><bdi>{name}</bdi></h2>\n"
        f"<p>{_text(picture.dataset)}, {index['width']} x {index['height']}</p>\n"
        f"<p>{_text(index['key'])}</p>\n"
        f'<img src="data:image/jpeg;base64,{jpeg}" width="{width}" height="{height}" '
        f'alt="{name}">\n</header>\n{sections}\n</article>'
    )


def _caption(caption: Mapping[str, Any]) -> str:
    badge = "good" if caption["outcome"] in USABLE else "bad"
    details = "".join(f" · {_text(fact)}" for fact in facts(caption))
    kind = "" if caption["text"] else ' class="reason"'
    return (
        f'<p class="facts"><span class="outcome {badge}">{_text(caption["outcome"])}</span>'
        f'{details}</p>\n<blockquote dir="auto"{kind}>{_text(said(caption))}</blockquote>\n'
    )


def _text(text: str) -> str:
    return escape(printable(text))


def _thumbnail(pixels: Pixels) -> Pixels:
    image = Image.fromarray(pixels)
    image.thumbnail((THUMBNAIL_PX, THUMBNAIL_PX))
    return np.asarray(image)
