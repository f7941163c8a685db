"""Text that strangers wrote, on a terminal: captions, identifiers, names of models and folders."""

_REPLACED = {
    **dict.fromkeys(
        [
            *range(32),
            127,
            *range(128, 160),
            *range(0x202A, 0x202F),
            *range(0x2066, 0x206A),  # what reverses the text after it
            *range(0xD800, 0xE000),
        ],
        "\N{REPLACEMENT CHARACTER}",
    ),
    ord("\t"): " ",
    ord("\n"): "\n",
    ord("\r"): None,
}


def printable(text: str) -> str:
    """Replace control characters, with which a text could take over a terminal or hide itself.

    The same goes for halves of surrogate pairs, which stand for the bytes of a folder's name that
    are no UTF-8, and cannot be printed at all.
    """
    return text.translate(_REPLACED)
