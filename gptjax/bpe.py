"""Byte-pair encoding as arithmetic: how text is split, merges learned and found again.

A token is a byte string; its rank is its id, and of two merges that are possible the
one that makes the lower rank happens first (Sennrich et al. 2016; on bytes, with the
split below, Radford et al. 2019, sec. 2.2). What runs the merges is `gptjax.tokenizer`.
"""

import heapq
import operator
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from itertools import pairwise

import regex

from gptjax.errors import DataError

# GPT-2's split into words: contractions, letters, digits or other signs with the one
# space before them, and blanks, of which a run leaves its last one to the next word.
# Possessive (++), so that no long run of one kind can exhaust a regex engine. It is
# part of every tokenizer's hash.
PATTERN = (
    r"'(?:s|t|re|ve|m|ll|d)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++"
    r"|\s++$|\s+(?!\S)|\s"
)
WORD = regex.compile(PATTERN)

MAX_TOKEN_BYTES = 256  # twice GPT-2's longest; bounds what one odd text can cost
MIN_COUNT = 2  # a pair seen once teaches a model nothing


def learn(texts: Iterable[str], merges: int) -> list[bytes]:
    """The tokens that at most `merges` merges make, in the order of the merges.

    Each merge joins the most frequent pair of neighbours; of equally frequent pairs
    the one whose first token, then whose second token has the smaller id (bytes are
    their own id, merges count on from 256). Only the distinct words are held in
    memory. Fewer tokens come back when no pair is left that occurs twice.

    >>> learn(["low lower lowest"], 3)
    [b'lo', b'low', b' low']
    """
    counts = word_counts(texts)
    words, times = list(counts), list(counts.values())
    pairs: defaultdict[str, int] = defaultdict(int)
    places: defaultdict[str, list[int]] = defaultdict(list)  # words with the pair
    for place, word in enumerate(words):
        for pair in neighbours(word):
            pairs[pair] += times[place]
            places[pair].append(place)
    queue = [(-count, pair) for pair, count in pairs.items()]
    heapq.heapify(queue)
    tokens = [bytes([byte]) for byte in range(256)]
    while queue and len(tokens) < 256 + merges:
        count, pair = heapq.heappop(queue)
        if pairs[pair] < MIN_COUNT:
            continue
        if pairs[pair] != -count:  # other merges took some since it was queued
            heapq.heappush(queue, (-pairs[pair], pair))
            continue
        token = chr(len(tokens))
        tokens.append(tokens[ord(pair[0])] + tokens[ord(pair[1])])
        fresh = set()
        for place in places.pop(pair):
            old = words[place]
            words[place] = new = old.replace(pair, token)
            if new == old:  # listed twice
                continue
            for gone in neighbours(old):
                pairs[gone] -= times[place]
            for found in neighbours(new):
                pairs[found] += times[place]
                if token in found:
                    places[found].append(place)
                    fresh.add(found)
        # Only pairs with the new token can have become more frequent.
        for found in fresh:
            heapq.heappush(queue, (-pairs[found], found))
    return tokens[256:]


def word_counts(texts: Iterable[str]) -> Counter[str]:
    """How often each word occurs; a word is one character chr(id) for each token id.

    Python's strings then do the heavy work: merging a pair is `str.replace`.
    """
    counts: Counter[str] = Counter()
    for text in texts:
        utf8(text)  # names the place of a lone surrogate
        counts.update(map(operator.itemgetter(0), WORD.finditer(text)))
    words: Counter[str] = Counter()
    for word, count in counts.items():
        data = word.encode().decode("latin-1")
        for start in range(0, len(data), MAX_TOKEN_BYTES):
            words[data[start : start + MAX_TOKEN_BYTES]] += count
    return words


def neighbours(word: str) -> Iterable[str]:
    """The pairs of adjacent characters."""
    return map(operator.add, word, word[1:])


def utf8(text: str) -> bytes:
    """The text as bytes.

    Raises:
        DataError: the text holds half a surrogate pair, which is no character.
    """
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"character {error.start} of the text is {text[error.start]!r}, a lone "
            "surrogate, which has no UTF-8 form. Read the text as UTF-8, or replace "
            "the character."
        ) from error


def halves(token: bytes, ranks: Mapping[bytes, int]) -> tuple[bytes, bytes] | None:
    """The two tokens that `token` is merged from, or None if merging never makes it.

    If every token has its halves, then whatever the text, two neighbours that
    together are a token are its halves: until they met, the merges between their
    outer borders did not depend on anything outside. So a table of ranks and a list
    of merges say the same.
    """
    limit = ranks[token]
    parts = [token[i : i + 1] for i in range(len(token))]
    made = [ranks.get(a + b, limit) for a, b in pairwise(parts)]  # rank of each pair
    while len(parts) > 2:
        rank = min(made)
        if rank >= limit:
            return None
        i = made.index(rank)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
        del made[i]
        if i < len(made):
            made[i] = ranks.get(parts[i] + parts[i + 1], limit)
        if i > 0:
            made[i - 1] = ranks.get(parts[i - 1] + parts[i], limit)
    return (parts[0], parts[1]) if len(parts) == 2 else None
