"""The texts that a prompt puts between quotation marks: they are to be read in the picture."""
# ruff: noqa: RUF001  # every mark means itself

import re
import unicodedata

_CLOSING_MARKS = {
    '"': ('"',),
    "“": ("”", '"'),
    "„": ("“”", '"'),
    "”": ("”",),
    "«": ("»",),
    "»": ("«»",),
    "'": ("'",),
    "‘": ("’",),
    "‚": ("‘’",),
    "‹": ("›",),
    "›": ("‹",),
    "「": ("」",),
    "『": ("』",),
    "｢": ("｣",),
    "＂": ("＂",),
    "〝": ("〟〞",),
}
"""What closes a quotation, by what opens it: the marks that are right, then those that are typed in
their place. From the usage of English, German, French, Nordic, Chinese and Japanese texts."""

_MAX_CHARS = 2000
"""No quotation is longer; so marks without a partner cost little, however many there are."""

_APOSTROPHES = "'‘’"
_ELISION = re.compile(r"(?:\d+s|n|em|tis|twas|til)\b", re.IGNORECASE)
"""What follows an apostrophe at the beginning of a word, as in '90s and rock 'n' roll."""


def quoted_texts(text: str) -> list[str]:
    """Return what stands between quotation marks, in order, without space at its ends.

    French puts spaces inside its marks, and nobody sees those at the ends of a text in a picture.
    Quotations inside quotations belong to the outer one's text. Marks without a partner, signs for
    inches and apostrophes quote nothing.
    """
    found = []
    at = 0
    while at < len(text):
        end = _end_of_quotation(text, at) if _opens(text, at) else None
        if end is None:
            at += 1
            continue
        if inside := text[at + 1 : end].strip():
            found.append(inside)
        at = end + 1
    return found


def _opens(text: str, at: int) -> bool:
    mark, before, after = text[at], text[at - 1 : at], text[at + 1 : at + 2]
    if mark in _APOSTROPHES:
        return (
            mark in _CLOSING_MARKS
            and not _joins(before)
            and before not in _CLOSING_MARKS  # "STOP"'s
            and bool(after.strip())
            and not _ELISION.match(text, at + 1)
        )
    if mark in '"”':
        return not before.isdigit()  # inches
    return mark in _CLOSING_MARKS


def _end_of_quotation(text: str, start: int) -> int | None:
    """Return where the quotation that is opened at ``start`` is closed, None if it is not."""
    stop = min(len(text), start + 1 + _MAX_CHARS)
    for closing in _CLOSING_MARKS[text[start]]:
        plural: int | None = None
        depth = 0
        for at in range(start + 1, stop):
            if text[at] in closing and _closes(text, at):
                if depth:
                    depth -= 1
                elif text[at] not in _APOSTROPHES or text[at - 1] not in "sS":
                    return at
                elif plural is None:
                    plural = at  # 'BOSS', unless it is 'Farmers' Market'
            elif text[at] == text[start] and _opens(text, at):
                if plural is not None:
                    break
                depth += 1
        if plural is not None:
            return plural
    return None


def _closes(text: str, at: int) -> bool:
    if text[at] not in _APOSTROPHES:
        return True
    return not text[at - 1].isspace() and not _joins(text[at + 1 : at + 2])


def _joins(char: str) -> bool:
    """Tell whether an apostrophe beside ``char`` is a part of its word.

    That is so in scripts with spaces between words; in Chinese, Japanese and Korean marks of
    quotation stand right beside letters.
    """
    return (
        char != ""
        and unicodedata.category(char)[0] in "LMN"
        and unicodedata.east_asian_width(char) not in "WF"
    )
