"""Byte-pair encoding: splitting into words, training, and recovering merges.

A token is a byte string and its rank is its id. Encoding applies the possible merge of
lowest rank first (Sennrich et al. 2016; on bytes, Radford et al. 2019, sec. 2.2).
`gptjax.tokenizer.tokenizer` encodes, with tiktoken.
"""

import heapq
import operator
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from itertools import pairwise

from gptjax.errors import DataError
from gptjax.tokenizer.pre_tokenizer import PRE_TOKENIZERS

MAX_TOKEN_BYTES = 256  # twice GPT-2's longest; bounds the cost of unusual text
NO_RANK = sys.maxsize  # of a pair that is not merged
MIN_PAIR_COUNT = 2  # minimum occurrences of a merged pair


def train_bpe(texts: Iterable[str], num_merges: int) -> list[bytes]:
    """Trains BPE; returns at most `num_merges` new tokens in merge order.

    Each step merges the most frequent adjacent pair; ties go to the smaller first id,
    then the smaller second id (bytes are their own ids, merges start at 256). Stops
    early when no pair occurs twice. Memory grows with the number of distinct words.

    >>> train_bpe(["low lower lowest"], 3)
    [b'lo', b'low', b' low']
    """
    word_freqs = count_words(texts)
    words, freqs = list(word_freqs), list(word_freqs.values())
    pair_freqs: defaultdict[str, int] = defaultdict(int)
    pair_to_words: defaultdict[str, list[int]] = defaultdict(list)  # indices of words
    for word_index, word in enumerate(words):
        for pair in adjacent_pairs(word):
            pair_freqs[pair] += freqs[word_index]
            pair_to_words[pair].append(word_index)
    queue = [(-count, pair) for pair, count in pair_freqs.items()]
    heapq.heapify(queue)
    tokens = [bytes([byte]) for byte in range(256)]
    while queue and len(tokens) < 256 + num_merges:
        count, pair = heapq.heappop(queue)
        if pair_freqs[pair] < MIN_PAIR_COUNT:
            continue
        if pair_freqs[pair] != -count:  # stale: other merges used some occurrences
            heapq.heappush(queue, (-pair_freqs[pair], pair))
            continue
        token = chr(len(tokens))
        tokens.append(tokens[ord(pair[0])] + tokens[ord(pair[1])])
        new_pairs = set()
        for word_index in pair_to_words.pop(pair):
            old_word = words[word_index]
            words[word_index] = new_word = old_word.replace(pair, token)
            if new_word == old_word:  # duplicate entry
                continue
            for old_pair in adjacent_pairs(old_word):
                pair_freqs[old_pair] -= freqs[word_index]
            for new_pair in adjacent_pairs(new_word):
                pair_freqs[new_pair] += freqs[word_index]
                if token in new_pair:
                    pair_to_words[new_pair].append(word_index)
                    new_pairs.add(new_pair)
        # Only pairs with the new token can have become more frequent.
        for new_pair in new_pairs:
            heapq.heappush(queue, (-pair_freqs[new_pair], new_pair))
    return tokens[256:]


def count_words(texts: Iterable[str]) -> Counter[str]:
    """Counts words; each is a string with one character chr(id) per token id.

    Merging a pair is then a fast `str.replace`.
    """
    counts: Counter[str] = Counter()
    for text in texts:
        encode_utf8(text)  # raises for a lone surrogate
        counts.update(PRE_TOKENIZERS["gpt-2"].words(text))
    words: Counter[str] = Counter()
    for word, count in counts.items():
        data = word.encode().decode("latin-1")
        for start in range(0, len(data), MAX_TOKEN_BYTES):
            words[data[start : start + MAX_TOKEN_BYTES]] += count
    return words


def adjacent_pairs(word: str) -> Iterable[str]:
    """Pairs of adjacent characters."""
    return map(operator.add, word, word[1:])


def encode_utf8(text: str) -> bytes:
    """Encodes text as UTF-8; raises DataError for a lone surrogate."""
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"character {error.start} of the text is {text[error.start]!r}, a lone "
            "surrogate, which cannot be encoded as UTF-8. Read the text as UTF-8, or "
            "replace the character."
        ) from error


def split_merge(token: bytes, ranks: Mapping[bytes, int]) -> tuple[bytes, bytes] | None:
    """Splits a token into the pair it is merged from; None if no merge creates it.

    For all other tokens, a table of ranks and a list of merges are equivalent: merges
    inside a token do not depend on the surrounding text, so two adjacent tokens that
    together form a token are always its pair.
    """
    parts = [token[i : i + 1] for i in range(len(token))]
    pair_ranks = [ranks.get(a + b, NO_RANK) for a, b in pairwise(parts)]
    while len(parts) > 2:
        rank = min(pair_ranks)
        if rank == NO_RANK:
            return None
        i = pair_ranks.index(rank)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
        # Only the pairs at the merged part change.
        start = max(i - 1, 0)
        changed = [ranks.get(a + b, NO_RANK) for a, b in pairwise(parts[start : i + 2])]
        pair_ranks[start : i + 2] = changed
    return (parts[0], parts[1]) if len(parts) == 2 else None
