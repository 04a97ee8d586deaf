"""Pre-tokenizers: patterns that split text into words before byte-pair encoding.

Merges never cross the boundary of a word, so that other splits of the same text give
other tokens. Names are those of llama.cpp, which GGUF files contain. Quantifiers are
possessive (++) where possible, so that a long run cannot exhaust a regex engine.
"""

import dataclasses
import functools
import operator
import unicodedata
from collections.abc import Iterator
from itertools import pairwise

import regex

# tiktoken's regex engine panics on a million whitespace characters before a word.
# Longer runs are encoded separately, without the last character if the pattern splits
# there anyway.
MAX_WHITESPACE_RUN = 100_000


@dataclasses.dataclass(frozen=True)
class PreTokenizer:
    """Split of text into words."""

    pattern: str
    # Where a run of whitespace is split before its last character; elsewhere, the
    # pattern matches a whole run without backtracking.
    run_end: str = r"\s\S"
    is_nfc: bool = False  # text is normalized to NFC first [Unicode annex 15]

    def normalize(self, text: str) -> str:
        """Normalizes text."""
        return unicodedata.normalize("NFC", text) if self.is_nfc else text

    def words(self, text: str) -> Iterator[str]:
        """Splits text into words."""
        return map(operator.itemgetter(0), compile_pattern(self.pattern).finditer(text))

    def split_long_whitespace(self, text: str, limit: int = MAX_WHITESPACE_RUN) -> list[str]:
        """Splits text inside whitespace runs of `limit` characters or more."""
        blocks = (text[i : i + limit] for i in range(0, len(text), limit))
        if not any(block.isspace() for block in blocks):
            return [text]
        runs = regex.finditer(rf"(?<!\s)\s{{{limit},}}(?={self.run_end})", text)
        return [text[a:b] for a, b in pairwise([0, *(run.end() for run in runs), len(text)])]


compile_pattern = functools.cache(regex.compile)

# Contractions; letters, digits or other symbols with one space before them; whitespace,
# whose last character belongs to the next word. Part of every tokenizer's hash.
GPT2_PATTERN = (
    r"'(?:s|t|re|ve|m|ll|d)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++"
    r"|\s++$|\s+(?!\S)|\s"
)
# Contractions in any case; letters with one character before them; groups of digits;
# line breaks at the end of what precedes them.
LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}++|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s*[\r\n]|\s++$|\s+(?!\S)|\s"
)
PRE_TOKENIZERS = {
    "gpt-2": PreTokenizer(GPT2_PATTERN),
    "llama-bpe": PreTokenizer(LLAMA3_PATTERN, r"[^\S\r\n]\S"),
    "qwen2": PreTokenizer(LLAMA3_PATTERN.replace("{1,3}", ""), r"[^\S\r\n]\S", is_nfc=True),
    # GPT-2's words, with each digit alone.
    "smollm": PreTokenizer(
        GPT2_PATTERN.replace(r" ?\p{N}++", r"\p{N}").replace(r"\s++$", r"\s++(?=\p{N}|$)"),
        r"\s[^\s\p{N}]",
    ),
}
