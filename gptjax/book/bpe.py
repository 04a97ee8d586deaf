"""Byte-pair encoding from scratch (chapter 2, bonus 05), all of it on strings.

A word is spelled with symbols, first its characters. Training joins the most frequent
pair of neighbours into a new symbol, again and again (Sennrich et al. 2016); encoding
repeats the merges on a new text. A text becomes words, symbols, ids, and back:

    ids = encode(spaced_words(text), train(text, 1000))
    ids = encode(gpt2_words(text), gpt2_table())

What gptjax itself uses, on bytes and fast, is `gptjax.bpe` and `gptjax.tokenizer`.
"""

import dataclasses
import functools
import re
from collections import Counter
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from itertools import pairwise

from gptjax import tokenizer
from gptjax.bpe import WORD, utf8
from gptjax.errors import ConfigError, DataError

Pair = tuple[str, str]
Symbols = tuple[str, ...]

SPACE = "Ġ"  # how a space is written within a symbol
SPACED = re.compile(r" ?\S+|\s")  # what is no white space, with a space before it


@dataclasses.dataclass(frozen=True, repr=False)
class Table:
    """What training leaves: the symbols, and the order in which pairs are merged."""

    symbols: Symbols  # by id
    ranks: Mapping[Pair, int]  # 0 was merged first

    @functools.cached_property
    def ids(self) -> dict[str, int]:
        """The id of each symbol."""
        return {symbol: i for i, symbol in enumerate(self.symbols)}


# Text to words and back


def spaced_words(text: str) -> list[str]:
    """The words that no merge crosses in the book: split at white space alone.

    >>> spaced_words("art and life.")
    ['art', 'Ġand', 'Ġlife.']

    Raises:
        DataError: the text has the letter that stands for a space.
    """
    if SPACE in text:
        raise DataError(
            f"the text has the letter {SPACE!r}, which stands for a space here. "
            "Replace it, or use gpt2_words."
        )
    return [word.replace(" ", SPACE) for word in SPACED.findall(text)]


def spaced_text(symbols: Iterable[str]) -> str:
    """The text that `spaced_words` split.

    >>> spaced_text(["art", "Ġan", "d"])
    'art and'
    """
    return "".join(symbols).replace(SPACE, " ")


def gpt2_words(text: str) -> list[str]:
    """GPT-2's words, which part letters from other signs; a character for each byte.

    >>> gpt2_words("art, café")
    ['art', ',', 'ĠcafÃ©']

    Raises:
        DataError: the text holds a lone surrogate.
    """
    utf8(text)  # names the place of a surrogate
    return [tokenizer.visible(match[0].encode()) for match in WORD.finditer(text)]


def gpt2_text(symbols: Iterable[str]) -> str:
    """The text that `gpt2_words` split; half a character becomes U+FFFD.

    >>> gpt2_text(["Ġcaf", "Ã©"])
    ' café'
    """
    data = bytes(map(tokenizer.BYTE.__getitem__, "".join(symbols)))
    return data.decode("utf-8", errors="replace")


# Merges


def merge(symbols: Symbols, pairs: Container[Pair]) -> Symbols:
    """The symbols after joining neighbours that are one of the pairs.

    From left to right, and a symbol that has just been made is not joined again.

    >>> merge(("a", "b", "a", "b", "c"), {("a", "b"), ("b", "c")})
    ('ab', 'ab', 'c')
    """
    merged: list[str] = []
    rest = list(reversed(symbols))
    while rest:
        symbol = rest.pop()
        if rest and (symbol, rest[-1]) in pairs:
            symbol += rest.pop()
        merged.append(symbol)
    return tuple(merged)


def pair_counts(words: Mapping[Symbols, int]) -> Counter[Pair]:
    """How often each pair of neighbours occurs; those met first come first."""
    counts: Counter[Pair] = Counter()
    for symbols, times in words.items():
        for pair in pairwise(symbols):
            counts[pair] += times
    return counts


def train(text: str, vocab_size: int) -> Table:
    """The table that is learned from a text as the book's bonus notebook does it.

    The first ids are the 256 characters chr(0) to chr(255), other characters of the
    text, `Ġ` and <|endoftext|>. Then each merge adds a symbol: of the pairs that are
    most frequent it takes the one that occurs first in the text. There are fewer
    symbols where no pair is left.

    >>> train("low lower lowest", 261).symbols[258:]
    ('lo', 'low', 'Ġlow')

    Raises:
        ConfigError: the size leaves no room for the first symbols.
        DataError: the text has the letter that stands for a space.
    """
    words: Mapping[Symbols, int] = Counter(map(tuple, spaced_words(text)))
    first = list(map(chr, range(256)))
    symbols = [*first, *sorted({*text} - {*first}), SPACE, tokenizer.ENDOFTEXT]
    if vocab_size < len(symbols):
        raise ConfigError(
            f"vocab_size={vocab_size} is too small: the characters, {SPACE!r} and "
            f"{tokenizer.ENDOFTEXT} need {len(symbols)}. Ask for more."
        )
    ranks: dict[Pair, int] = {}
    while len(symbols) < vocab_size and (counts := pair_counts(words)):
        pair = max(counts, key=counts.__getitem__)  # the first one of several
        ranks[pair] = len(ranks)
        symbols.append("".join(pair))
        words = {  # most words do not have the pair
            merge(word, {pair}) if pair[0] in word else word: times
            for word, times in words.items()
        }
    return Table(tuple(symbols), ranks)


@functools.cache
def gpt2_table() -> Table:
    """What OpenAI's training left: 50,257 symbols, 50,000 merges."""
    lines = tokenizer.gpt2_lines()
    symbols = map(tokenizer.visible, tokenizer.load("gpt2").ranks)  # in order of ids
    ranks = {(a, b): rank for rank, (a, b) in enumerate(map(str.split, lines))}
    return Table((*symbols, tokenizer.ENDOFTEXT), ranks)


# Words to ids and back


def in_order(word: str, table: Table) -> Symbols:
    """The word after all merges, those that were learned first done first.

    >>> in_order("Ġlower", train("low lower lowest", 261))
    ('Ġlow', 'e', 'r')
    """
    symbols = tuple(word)
    while possible := [pair for pair in pairwise(symbols) if pair in table.ranks]:
        symbols = merge(symbols, {min(possible, key=table.ranks.__getitem__)})
    return symbols


def by_sweeps(word: str, table: Table) -> Symbols:
    """The word as the book splits it with a table that it trained itself.

    A word that is a symbol stays whole; in others any possible merge is done on the
    way from left to right, whenever it was learned, until none is left. That is
    simpler than `in_order`, and not what training did:

    >>> ranks = {("b", "c"): 0, ("a", "b"): 1}
    >>> table = Table(("a", "b", "c", "bc", "ab"), ranks)
    >>> in_order("abc", table), by_sweeps("abc", table)
    (('a', 'bc'), ('ab', 'c'))
    """
    if word in table.ids:
        return (word,)
    symbols = tuple(word)
    while (swept := merge(symbols, table.ranks)) != symbols:
        symbols = swept
    return symbols


def encode(
    words: Iterable[str],
    table: Table,
    apply: Callable[[str, Table], Symbols] = in_order,
) -> list[int]:
    """The ids of the symbols of the words.

    >>> encode(gpt2_words("This is some text"), gpt2_table())
    [1212, 318, 617, 2420]

    Args:
        words: from the function that also made the words for training.
        table: of symbols and merges.
        apply: how merges are done: `in_order` or `by_sweeps`.

    Raises:
        DataError: a character is no symbol of the table.
    """
    symbols = [symbol for word in words for symbol in apply(word, table)]
    for symbol in symbols:
        if symbol not in table.ids:
            raise DataError(
                f"the character {symbol!r} is not in the table. Train on a text that "
                "has it, or use gpt2_words with gpt2_table."
            )
    return [table.ids[symbol] for symbol in symbols]


def decode(ids: Sequence[int], table: Table) -> list[str]:
    """The symbols of the ids, for `spaced_text` or `gpt2_text`.

    >>> spaced_text(decode([258, 260], train("low lower lowest", 261)))
    'lo low'

    Raises:
        DataError: an id is not in the table.
    """
    size = len(table.symbols)
    for i in ids:
        if not 0 <= i < size:
            raise DataError(
                f"the id {i} is outside the table, which has 0 to {size - 1}. Use the "
                "table that made the ids."
            )
    return [table.symbols[i] for i in ids]
