"""Byte-pair encoding from scratch (chapter 2, bonus 05), on strings.

A word starts as a sequence of characters. Training repeatedly merges the most frequent
pair of adjacent symbols into a new symbol (Sennrich et al. 2016); encoding applies the
merges to new text. From text to words, symbols and ids:

    ids = encode_words(spaced_words(text), train_merges(text, 1000))
    ids = encode_words(gpt2_words(text), gpt2_merge_table())

The production version works on bytes: see `gptjax.tokenizer`.
"""

import dataclasses
import functools
import re
from collections import Counter
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from itertools import pairwise

from gptjax.errors import ConfigError, DataError
from gptjax.tokenizer import tokenizer
from gptjax.tokenizer.bpe import encode_utf8
from gptjax.tokenizer.pre_tokenizer import PRE_TOKENIZERS

Pair = tuple[str, str]
Symbols = tuple[str, ...]

SPACE_MARK = "Ġ"  # represents a space within a symbol
SPACED_WORD = re.compile(r" ?\S+|\s")  # white space, or a word with a space before it


@dataclasses.dataclass(frozen=True, repr=False)
class MergeTable:
    """Trained vocabulary and merge ranks."""

    symbols: Symbols  # by id
    ranks: Mapping[Pair, int]  # 0 = merged first

    @functools.cached_property
    def ids(self) -> dict[str, int]:
        """Maps each symbol to its id."""
        return {symbol: i for i, symbol in enumerate(self.symbols)}


# Text to words and back


def spaced_words(text: str) -> list[str]:
    """Splits text at white space, as the book does; merges do not cross words.

    >>> spaced_words("art and life.")
    ['art', 'Ġand', 'Ġlife.']

    Raises:
        DataError: the text contains `Ġ`, which is reserved for spaces.
    """
    if SPACE_MARK in text:
        raise DataError(
            f"the text contains {SPACE_MARK!r}, which is reserved for spaces. Replace "
            "it, or use gpt2_words."
        )
    return [word.replace(" ", SPACE_MARK) for word in SPACED_WORD.findall(text)]


def spaced_text(symbols: Iterable[str]) -> str:
    """Joins symbols to text; the inverse of `spaced_words`.

    >>> spaced_text(["art", "Ġan", "d"])
    'art and'
    """
    return "".join(symbols).replace(SPACE_MARK, " ")


def gpt2_words(text: str) -> list[str]:
    """Splits text with GPT-2's pattern; each byte becomes one character.

    >>> gpt2_words("art, café")
    ['art', ',', 'ĠcafÃ©']

    Raises:
        DataError: the text contains a lone surrogate.
    """
    encode_utf8(text)  # raises an error with the position of a surrogate
    return [
        tokenizer.bytes_to_unicode(word.encode()) for word in PRE_TOKENIZERS["gpt-2"].words(text)
    ]


def gpt2_text(symbols: Iterable[str]) -> str:
    """Joins symbols to text; incomplete UTF-8 sequences become U+FFFD.

    >>> gpt2_text(["Ġcaf", "Ã©"])
    ' café'
    """
    data = bytes(map(tokenizer.CHAR_TO_BYTE.__getitem__, "".join(symbols)))
    return data.decode("utf-8", errors="replace")


# Merges


def merge_pairs(symbols: Symbols, pairs: Container[Pair]) -> Symbols:
    """Merges adjacent symbols that form one of the pairs.

    Works from left to right; a newly merged symbol is not merged again.

    >>> merge_pairs(("a", "b", "a", "b", "c"), {("a", "b"), ("b", "c")})
    ('ab', 'ab', 'c')
    """
    merged: list[str] = []
    remaining = list(reversed(symbols))
    while remaining:
        symbol = remaining.pop()
        if remaining and (symbol, remaining[-1]) in pairs:
            symbol += remaining.pop()
        merged.append(symbol)
    return tuple(merged)


def count_symbol_pairs(words: Mapping[Symbols, int]) -> Counter[Pair]:
    """Counts adjacent symbol pairs, in order of first occurrence."""
    counts: Counter[Pair] = Counter()
    for symbols, count in words.items():
        for pair in pairwise(symbols):
            counts[pair] += count
    return counts


def train_merges(text: str, vocab_size: int) -> MergeTable:
    """Trains a merge table as in the book's bonus notebook.

    The first ids are chr(0) to chr(255), the other characters of the text, `Ġ` and
    <|endoftext|>. Each merge adds the most frequent pair, on ties the one that occurs
    first in the text. Training ends early if no pair is left.

    >>> train_merges("low lower lowest", 261).symbols[258:]
    ('lo', 'low', 'Ġlow')

    Raises:
        ConfigError: `vocab_size` is smaller than the initial vocabulary.
        DataError: the text contains `Ġ`, which is reserved for spaces.
    """
    words: Mapping[Symbols, int] = Counter(map(tuple, spaced_words(text)))
    byte_symbols = list(map(chr, range(256)))
    symbols = [*byte_symbols, *sorted({*text} - {*byte_symbols}), SPACE_MARK, tokenizer.ENDOFTEXT]
    if vocab_size < len(symbols):
        raise ConfigError(
            f"vocab_size={vocab_size} must be at least {len(symbols)} for the "
            f"characters of the text, {SPACE_MARK!r} and {tokenizer.ENDOFTEXT}."
        )
    ranks: dict[Pair, int] = {}
    while len(symbols) < vocab_size and (counts := count_symbol_pairs(words)):
        pair = max(counts, key=counts.__getitem__)  # the first of equals
        ranks[pair] = len(ranks)
        symbols.append("".join(pair))
        words = {  # most words do not contain the pair
            merge_pairs(word, {pair}) if pair[0] in word else word: count
            for word, count in words.items()
        }
    return MergeTable(tuple(symbols), ranks)


@functools.cache
def gpt2_merge_table() -> MergeTable:
    """GPT-2's table: 50,257 symbols, 50,000 merges."""
    lines = tokenizer.read_gpt2_merges()
    ranked_tokens = tokenizer.load_tokenizer("gpt2").ranks  # in order of ids
    symbols = map(tokenizer.bytes_to_unicode, ranked_tokens)
    ranks = {(a, b): rank for rank, (a, b) in enumerate(map(str.split, lines))}
    return MergeTable((*symbols, tokenizer.ENDOFTEXT), ranks)


# Words to ids and back


def merge_by_rank(word: str, table: MergeTable) -> Symbols:
    """Applies the merges to a word, in the order of training.

    >>> merge_by_rank("Ġlower", train_merges("low lower lowest", 261))
    ('Ġlow', 'e', 'r')
    """
    symbols = tuple(word)
    while candidates := [pair for pair in pairwise(symbols) if pair in table.ranks]:
        symbols = merge_pairs(symbols, {min(candidates, key=table.ranks.__getitem__)})
    return symbols


def merge_by_sweeps(word: str, table: MergeTable) -> Symbols:
    """Applies the merges to a word as the book does with its own tables.

    A word that is a symbol is not split. In other words, sweeps from left to right
    apply every possible merge regardless of its rank, until none is left. This is
    simpler than `merge_by_rank`, but differs from the order of training:

    >>> ranks = {("b", "c"): 0, ("a", "b"): 1}
    >>> table = MergeTable(("a", "b", "c", "bc", "ab"), ranks)
    >>> merge_by_rank("abc", table), merge_by_sweeps("abc", table)
    (('a', 'bc'), ('ab', 'c'))
    """
    if word in table.ids:
        return (word,)
    symbols = tuple(word)
    while (merged := merge_pairs(symbols, table.ranks)) != symbols:
        symbols = merged
    return symbols


def encode_words(
    words: Iterable[str],
    table: MergeTable,
    merge_fn: Callable[[str, MergeTable], Symbols] = merge_by_rank,
) -> list[int]:
    """Encodes words as symbol ids.

    >>> encode_words(gpt2_words("This is some text"), gpt2_merge_table())
    [1212, 318, 617, 2420]

    Args:
        words: split by the same function as the training text.
        table: merge table.
        merge_fn: merges one word: `merge_by_rank` or `merge_by_sweeps`.

    Raises:
        DataError: a character is not in the table.
    """
    symbols = [symbol for word in words for symbol in merge_fn(word, table)]
    for symbol in symbols:
        if symbol not in table.ids:
            raise DataError(
                f"the character {symbol!r} is not in the table. Train on text that "
                "contains it, or use gpt2_words with gpt2_merge_table."
            )
    return [table.ids[symbol] for symbol in symbols]


def decode_ids(ids: Sequence[int], table: MergeTable) -> list[str]:
    """Decodes ids to symbols, for `spaced_text` or `gpt2_text`.

    >>> spaced_text(decode_ids([258, 260], train_merges("low lower lowest", 261)))
    'lo low'

    Raises:
        DataError: an id is not in the table.
    """
    size = len(table.symbols)
    for i in ids:
        if not 0 <= i < size:
            raise DataError(
                f"the id {i} must be between 0 and {size - 1}. Use the table that encoded the text."
            )
    return [table.symbols[i] for i in ids]
