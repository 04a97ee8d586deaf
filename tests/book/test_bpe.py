"""BPE from scratch: the ids of the book, and those of GPT-2."""

from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptjax.book.bpe import (
    SPACE_MARK,
    decode_ids,
    encode_words,
    gpt2_merge_table,
    gpt2_text,
    gpt2_words,
    merge_by_rank,
    merge_by_sweeps,
    merge_pairs,
    spaced_text,
    spaced_words,
    train_merges,
)
from gptjax.errors import ConfigError, DataError
from gptjax.tokenizer.tokenizer import ENDOFTEXT, load_tokenizer

SENTENCE = "Jack embraced beauty through art and life."
GPT2_IDS = {
    "This is some text": [1212, 318, 617, 2420],
    "Implementations": [3546, 26908, 602],
    "Hello, world. Is this-- a test?": [15496, 11, 995, 13, 1148, 428, 438, 257, 1332, 30],
    "asdf asdfasdf a!!, @aba 9asdf90asdfk": [
        *(292, 7568, 355, 7568, 292, 7568, 257, 3228, 11, 2488, 15498, 860),
        *(292, 7568, 3829, 292, 7568, 74),
    ],
}


def count_merges(text, merges):
    """The merges of training, by counting all pairs of the text anew each time."""
    words, chosen = [list(word) for word in spaced_words(text)], []
    while len(chosen) < merges and any(len(word) > 1 for word in words):
        counts = Counter(pair for word in words for pair in pairwise(word))
        ((pair, _),) = counts.most_common(1)  # the first of equals
        chosen.append(pair)
        for word in words:
            i = 0
            while i < len(word) - 1:
                if (word[i], word[i + 1]) == pair:
                    word[i : i + 2] = ["".join(pair)]
                i += 1
    return chosen


def test_the_verdict_gives_the_merges_and_ids_of_the_book(verdict):
    table = train_merges(verdict, 1_000)

    assert (len(table.symbols), len(table.ranks)) == (1_000, 742)
    assert table.symbols[256:258] == (SPACE_MARK, ENDOFTEXT)
    assert list(table.ranks)[:99] == count_merges(verdict, 99)
    ids = encode_words(spaced_words(SENTENCE), table, merge_by_sweeps)
    assert ids == [
        *(74, 361, 310, 109, 98, 420, 397, 100, 300, 428, 116, 121, 519, 699, 299),
        *(808, 534),
    ]
    # Merges in the order of training split two of the words differently.
    assert encode_words(spaced_words(SENTENCE), table) == [
        *(74, 361, 310, 109, 98, 114, 305, 272, 300, 97, 317, 121, 519, 699, 299),
        *(808, 534),
    ]


@settings(max_examples=50)
@given(st.text("abc  .\n", max_size=60), st.integers(0, 12))
def test_training_merges_the_first_of_the_most_frequent_pairs(text, merges):
    table = train_merges(text, 258 + merges)

    assert list(table.ranks) == count_merges(text, merges)
    assert ["".join(pair) for pair in table.ranks] == list(table.symbols[258:])
    for word in spaced_words(text):
        symbols = tuple(word)
        for pair in table.ranks:
            symbols = merge_pairs(symbols, {pair})
        assert merge_by_rank(word, table) == symbols
        swept = merge_by_sweeps(word, table)
        assert not set(pairwise(swept)) & set(table.ranks)
        assert swept == (word,) or word not in table.ids


@settings(max_examples=50)
@given(st.text("abc .\n", max_size=60), st.text("abc .\n\t\xa0"))
def test_decoding_reverses_encoding(corpus, text):
    table = train_merges(corpus + "\t\xa0", 270)

    for merge in (merge_by_sweeps, merge_by_rank):
        ids = encode_words(spaced_words(text), table, merge)
        assert spaced_text(decode_ids(ids, table)) == text


def test_the_table_and_ids_of_gpt2_are_those_of_the_book_and_of_tiktoken(verdict):
    table = gpt2_merge_table()

    assert (len(table.symbols), len(table.ranks)) == (50_257, 50_000)
    assert (table.ids["Ċ"], table.ids[ENDOFTEXT]) == (198, 50_256)
    for text, ids in GPT2_IDS.items():
        assert encode_words(gpt2_words(text), table) == ids


@given(st.text())
def test_gpt2_has_the_ids_of_tiktoken(text):
    ids = encode_words(gpt2_words(text), gpt2_merge_table())

    assert ids == load_tokenizer("gpt2").encode(text)
    assert gpt2_text(decode_ids(ids, gpt2_merge_table())) == text


def test_invalid_texts_sizes_and_ids_are_rejected():
    assert train_merges("wąż", 260).symbols[256:] == ("ą", "ż", SPACE_MARK, ENDOFTEXT)
    table = train_merges("ab ab", 999)
    assert table.symbols[258:] == ("ab", "Ġab")  # no pair is left
    for error, message, call in [
        (DataError, "'Ġ'", lambda: train_merges("a Ġb", 300)),
        (DataError, "character 2 ", lambda: gpt2_words("ab\ud800")),
        (ConfigError, "vocab_size=258 .* 259", lambda: train_merges("ą", 258)),
        (DataError, "'ż'", lambda: encode_words(["aż"], table)),
        (DataError, "-1 .* 0 and 259", lambda: decode_ids([0, -1], table)),
        (DataError, "260 .* 0 and 259", lambda: decode_ids([0, 260], table)),
    ]:
        with pytest.raises(error, match=message):
            call()
