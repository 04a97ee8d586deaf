"""Untrusted text made safe for a terminal."""

import re

# Control characters except tab and newline, surrogates, and bidirectional controls.
# Joiners, variation selectors and tags stay: emoji and Persian need them.
CONTROL_CHARS = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\u061c\u200e\u200f\u202a-\u202e\u2066-\u206f]"
)


def sanitize(text: str) -> str:
    r"""Replaces characters that control a terminal by U+FFFD.

    Chunks of a stream may be split anywhere.

    >>> sanitize("a\r\nb\x1b[2J")
    'a\nb�[2J'
    """
    return CONTROL_CHARS.sub("\ufffd", text.replace("\r\n", "\n"))
