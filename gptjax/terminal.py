"""Text that a terminal shows and does not act on."""

import re

# Controls but tab and line break; what cannot be encoded; what reorders the line.
# Joiners, variation selectors and tags stay: emoji and Persian are written with them.
ACTED_ON = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f"
    "\ud800-\udfff"
    "\u061c\u200e\u200f\u202a-\u202e\u2066-\u206f]"
)


def printable(text: str) -> str:
    r"""The text with U+FFFD for each character that does something to a terminal.

    Pieces of a stream may be cut anywhere.

    >>> printable("a\r\nb\x1b[2J")
    'a\nb�[2J'
    """
    return ACTED_ON.sub("\ufffd", text.replace("\r\n", "\n"))
