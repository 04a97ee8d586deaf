"""Pre-tokenizers: patterns that split text into words before byte-pair encoding.

Merges never cross the boundary of a word, so that other splits of the same text give
other tokens. Names are those of llama.cpp, which GGUF files contain. Quantifiers are
possessive (++) where possible, so that a long run cannot exhaust a regex engine.
"""

import dataclasses
import functools
import operator
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

import regex

# tiktoken's regex engine panics on a million whitespace characters before a word.
# Longer runs are encoded separately, without the last character if the pattern splits
# there anyway.
MAX_WHITESPACE_RUN = 100_000


@dataclasses.dataclass(frozen=True)
class PreTokenizer:
    """Split of text into words."""

    pattern: str
    hf_steps: Sequence[Mapping[str, Any]]  # the same in a tokenizer.json
    # Where a run of whitespace is split before its last character; elsewhere, the
    # pattern matches a whole run without backtracking.
    run_end: str = r"\s\S"
    is_nfc: bool = False  # normalizes text to NFC first [Unicode annex 15]

    @property
    def hf_normalizer(self) -> dict[str, str] | None:
        """Normalizer in a tokenizer.json."""
        return {"type": "NFC"} if self.is_nfc else None

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
# Contractions in any case; letters with one character before them; digits; line breaks
# at the end of what precedes them. Groups of up to three digits, or single ones.
LLAMA3_PATTERN, QWEN2_PATTERN = (
    rf"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}++|{digits}"
    r"| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s*[\r\n]|\s++$|\s+(?!\S)|\s"
    for digits in (r"\p{N}{1,3}", r"\p{N}")
)
# GPT-2's words between digits, and each digit alone.
SMOLLM_PATTERN = (
    r"\p{N}|'(?:s|t|re|ve|m|ll|d)| ?\p{L}++| ?[^\s\p{L}\p{N}]++"
    r"|\s++(?=\p{N}|$)|\s+(?!\S)|\s"
)


def hf_split(digits: str) -> dict[str, Any]:
    """Split of a tokenizer.json into Llama 3's words, with this pattern of digits."""
    pattern = (
        rf"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
BYTE_LEVEL_ONLY = {**BYTE_LEVEL, "use_regex": False}
PRE_TOKENIZERS = {
    "gpt-2": PreTokenizer(GPT2_PATTERN, (BYTE_LEVEL,)),
    "llama-bpe": PreTokenizer(
        LLAMA3_PATTERN, (hf_split(r"\p{N}{1,3}"), BYTE_LEVEL_ONLY), run_end=r"[^\S\r\n]\S"
    ),
    "qwen2": PreTokenizer(
        QWEN2_PATTERN, (hf_split(r"\p{N}"), BYTE_LEVEL_ONLY), run_end=r"[^\S\r\n]\S", is_nfc=True
    ),
    "smollm": PreTokenizer(
        SMOLLM_PATTERN,
        ({"type": "Digits", "individual_digits": True}, BYTE_LEVEL),
        run_end=r"\s[^\s\p{N}]",
    ),
}
