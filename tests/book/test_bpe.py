"""BPE from scratch: the ids that the book's tests print, and those of GPT-2."""

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
from gptjax.data import datasets
from gptjax.errors import ConfigError, DataError
from gptjax.tokenizer.tokenizer import ENDOFTEXT, load_tokenizer
from tests.tokenizer.test_tokenizer import random_texts

GPT2 = load_tokenizer("gpt2")
SENTENCE = "Jack embraced beauty through art and life."
few = settings(max_examples=50)


@pytest.fixture
def verdict(shared_data):
    return datasets.fetch_dataset("verdict").read_text(encoding="utf-8")


def recounted(text, merges):
    """The pairs that training merges, counted in the whole text, word by word."""
    words = [list(word) for word in spaced_words(text)]
    chosen = []
    for _ in range(merges):
        counts = Counter(pair for word in words for pair in pairwise(word))
        if not counts:
            break
        ((pair, _),) = counts.most_common(1)  # of equal ones the first that it met
        chosen.append(pair)
        for word in words:
            i = 0
            while i < len(word) - 1:
                if (word[i], word[i + 1]) == pair:
                    word[i : i + 2] = ["".join(pair)]
                i += 1
    return chosen


# Words


@given(st.text("ab .\n\t\xa0é"))
def test_words_split_at_white_space_and_come_back(text):
    words = spaced_words(text)

    assert spaced_text(words) == text
    assert not any(SPACE_MARK in word[1:] for word in words)


@given(st.text())
def test_words_of_gpt2_come_back(text):
    assert gpt2_text(gpt2_words(text)) == text


def test_half_a_character_is_replaced():
    first, _ = gpt2_words("é")[0]

    assert gpt2_text([first]) == "\ufffd"


def test_the_sign_for_a_space_is_refused():
    with pytest.raises(DataError, match="the text contains 'Ġ'"):
        train_merges("a Ġb", 300)


def test_a_lone_surrogate_is_refused():
    with pytest.raises(DataError, match=r"character 2 of the text is .* lone surrogate"):
        gpt2_words("ab\ud800")


# Training


def test_the_verdict_gives_the_merges_and_ids_of_the_book(verdict):
    table = train_merges(verdict, 1_000)

    assert (len(table.symbols), len(table.ranks)) == (1_000, 742)
    assert table.symbols[256:258] == (SPACE_MARK, ENDOFTEXT)
    assert list(table.ranks)[:99] == recounted(verdict, 99)

    ids = encode_words(spaced_words(SENTENCE), table, merge_by_sweeps)

    assert ids == [
        *(74, 361, 310, 109, 98, 420, 397, 100, 300, 428, 116, 121, 519, 699, 299),
        *(808, 534),
    ]
    assert spaced_text(decode_ids(ids, table)) == SENTENCE

    # Merges in the order of training part two of the words at other places.
    assert encode_words(spaced_words(SENTENCE), table) == [
        *(74, 361, 310, 109, 98, 114, 305, 272, 300, 97, 317, 121, 519, 699, 299),
        *(808, 534),
    ]


@few
@given(st.text("abc  .\n", max_size=60), st.integers(0, 12))
def test_training_takes_the_first_of_the_most_frequent_pairs(text, merges):
    table = train_merges(text, 258 + merges)

    assert list(table.ranks) == recounted(text, merges)


@few
@given(st.text("abc  .\n", max_size=60), st.integers(0, 12))
def test_each_merge_makes_a_new_symbol(text, merges):
    table = train_merges(text, 258 + merges)

    assert len(set(table.symbols)) == len(table.symbols) == 258 + len(table.ranks)
    assert ["".join(pair) for pair in table.ranks] == list(table.symbols[258:])


def test_training_ends_when_every_word_is_a_symbol():
    table = train_merges("ab ab", 999)

    assert table.symbols[258:] == ("ab", "Ġab")


def test_other_characters_come_before_the_sign_for_a_space():
    assert train_merges("wąż", 260).symbols[256:] == ("ą", "ż", SPACE_MARK, ENDOFTEXT)


def test_a_vocabulary_without_room_for_the_characters_is_refused():
    with pytest.raises(ConfigError, match="vocab_size=258 must be at least 259"):
        train_merges("ą", 258)


# Encoding


@few
@given(st.text("abc .\n", max_size=60), st.text("abc .\n"), st.booleans())
def test_decoding_undoes_encoding(corpus, text, sweeping):
    table = train_merges(corpus, 270)

    ids = encode_words(spaced_words(text), table, merge_by_sweeps if sweeping else merge_by_rank)

    assert spaced_text(decode_ids(ids, table)) == text


@few
@given(st.text("abc .\n", max_size=60))
def test_words_in_order_end_as_training_left_them(text):
    table = train_merges(text, 270)

    for word in spaced_words(text):
        symbols = tuple(word)
        for pair in table.ranks:
            symbols = merge_pairs(symbols, {pair})
        assert merge_by_rank(word, table) == symbols


@few
@given(st.text("abc .\n", max_size=60))
def test_sweeps_leave_no_merge_undone_and_no_symbol_in_parts(text):
    table = train_merges(text, 270)

    for word in spaced_words(text):
        symbols = merge_by_sweeps(word, table)
        assert not set(pairwise(symbols)) & set(table.ranks)
        assert symbols == (word,) or word not in table.ids


@pytest.mark.fast
def test_the_table_of_gpt2_is_that_of_the_tokenizer():
    table = gpt2_merge_table()

    assert (len(table.symbols), len(table.ranks)) == (50_257, 50_000)
    assert (table.ids["Ċ"], table.ids[ENDOFTEXT]) == (198, 50_256)


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("This is some text", [1212, 318, 617, 2420]),
        ("Hello,", [15496, 11]),
        ("Implementations", [3546, 26908, 602]),
        (
            "asdf asdfasdf a!!, @aba 9asdf90asdfk",
            [
                *(292, 7568, 355, 7568, 292, 7568, 257, 3228, 11, 2488, 15498, 860),
                *(292, 7568, 3829, 292, 7568, 74),
            ],
        ),
        ("Hello, world. Is this-- a test?", [15496, 11, 995, 13, 1148, 428, 438, 257, 1332, 30]),
    ],
)
def test_gpt2_gives_the_ids_of_the_book(text, ids):
    assert encode_words(gpt2_words(text), gpt2_merge_table()) == ids
    assert gpt2_text(decode_ids(ids, gpt2_merge_table())) == text


@given(st.text())
def test_gpt2_gives_the_ids_of_tiktoken(text):
    assert encode_words(gpt2_words(text), gpt2_merge_table()) == GPT2.encode(text)


def test_gpt2_gives_the_ids_of_tiktoken_in_many_scripts():
    for text in random_texts(500):
        assert encode_words(gpt2_words(text), gpt2_merge_table()) == GPT2.encode(text)


def test_gpt2_gives_the_ids_of_tiktoken_for_the_verdict(verdict):
    assert encode_words(gpt2_words(verdict), gpt2_merge_table()) == GPT2.encode(verdict)


def test_a_character_that_is_no_symbol_is_refused():
    with pytest.raises(DataError, match="the character 'ż' is not in the table"):
        encode_words(["aż"], train_merges("a", 258))


@pytest.mark.parametrize("wrong", [-1, 258])
def test_an_id_outside_the_table_is_refused(wrong):
    with pytest.raises(DataError, match=f"id {wrong} must be between 0 and 257"):
        decode_ids([0, wrong], train_merges("a", 258))
