"""Chapter 2: its numbers, and properties for any text."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptjax.book import TorchGenerator
from gptjax.book.ch02 import (
    UNKNOWN_TOKEN,
    batch_windows,
    context_target_pairs,
    embed_tokens,
    encode_with_eot,
    make_vocabulary,
    make_windows,
    simple_decode,
    simple_encode,
    split_simple_tokens,
    split_text,
)
from gptjax.errors import ConfigError, DataError
from gptjax.tokenizer.tokenizer import ENDOFTEXT, load_tokenizer

GPT2 = load_tokenizer("gpt2")


def test_the_verdict_has_the_words_and_ids_of_the_book(verdict):
    tokens = split_simple_tokens(verdict)
    ids = make_vocabulary(tokens)
    quote = '"It\'s the last he painted, you know," Mrs. Gisburn said with pardonable pride.'

    numbers = simple_encode(quote, ids)

    assert (len(verdict), len(tokens), len(ids)) == (20_479, 4_690, 1_130)
    assert " ".join(tokens[5:11]) == "Gisburn rather a cheap genius --"
    assert (ids["!"], ids["A"], ids["Hermia"]) == (0, 11, 50)
    assert numbers == [
        *(1, 56, 2, 850, 988, 602, 533, 746, 5, 1126, 596, 5, 1, 67, 7, 38, 851),
        *(1108, 754, 793, 7),
    ]
    expected = '" It\' s the last he painted, you know," Mrs. Gisburn said with pardonable pride.'
    assert simple_decode(numbers, ids) == expected

    ids = make_vocabulary(tokens, [ENDOFTEXT, UNKNOWN_TOKEN])
    text = f"Hello, do you like tea? {ENDOFTEXT} In the sunlit terraces of the palace."
    numbers = simple_encode(text, ids)

    assert (len(ids), numbers) == (
        1_132,
        [1131, 5, 355, 1126, 628, 975, 10, 1130, 55, 988, 956, 984, 722, 988, 1131, 7],
    )
    assert simple_decode(numbers, ids) == text.replace("Hello", UNKNOWN_TOKEN).replace(
        "palace", UNKNOWN_TOKEN
    )


@given(st.text("abC ,.-:;?_!\"()'\n"))
def test_words_lose_only_white_space_and_come_back_from_ids(text):
    tokens = split_simple_tokens(text)
    ids = make_vocabulary(tokens)

    assert "".join(tokens) == "".join(text.split())
    assert split_simple_tokens(simple_decode(simple_encode(text, ids), ids)) == tokens


def test_end_of_text_is_encoded_as_in_the_book_and_as_in_tiktoken():
    text = f"Hello, do you like tea? {ENDOFTEXT} In the sunlit terracesof someunknownPlace."

    assert encode_with_eot(text, GPT2) == [
        *(15496, 11, 466, 345, 588, 8887, 30, 220, 50256, 554, 262, 4252, 18250),
        *(8812, 2114, 1659, 617, 34680, 27271, 13),
    ]
    for text in ("", ENDOFTEXT, f"{ENDOFTEXT}{ENDOFTEXT} a{ENDOFTEXT}"):
        expected = GPT2.encoding.encode(text, allowed_special={ENDOFTEXT})
        assert encode_with_eot(text, GPT2) == expected


def test_windows_and_batches_have_the_numbers_of_the_book(verdict):
    ids = GPT2.encode(verdict)
    pairs = list(context_target_pairs(ids[50:], 4))
    first, *_ = batch_windows(make_windows(ids, 4, 1), 1)
    eight = batch_windows(make_windows(ids, max_length=4, stride=4), 8)[0]
    text = [
        *(40, 367, 2885, 1464, 1807, 3619, 402, 271, 10899, 2138, 257, 7026, 15632),
        *(438, 2016, 257, 922, 5891, 1576, 438, 568, 340, 373, 645, 1049, 5975, 284),
        *(502, 284, 3285, 326, 11, 287),
    ]

    assert len(ids) == 5_145
    assert (pairs[0], pairs[-1]) == (([290], 4920), ([290, 4920, 2241, 287], 257))
    assert (first.input_BT.tolist(), first.target_BT.tolist()) == ([text[:4]], [text[1:5]])
    assert eight.input_BT.ravel().tolist() == text[:-1]
    assert eight.target_BT.ravel().tolist() == text[1:]

    train, validation = (
        batch_windows(make_windows(GPT2.encode(part), 256, 256), 2)
        for part in split_text(verdict, 0.9)
    )
    assert [b.input_BT.shape for b in train] == [(2, 256)] * 9  # 4,608 tokens
    assert [b.target_BT.shape for b in validation] == [(2, 256)]  # 512 tokens


@given(st.integers(2, 40), st.integers(1, 10), st.integers(1, 10), st.booleans())
def test_windows_are_slices_of_the_ids_in_batches(count, length, stride, drop_last):
    ids = [7 * i for i in range(count + length)]
    starts = list(range(0, count, stride))

    batches = batch_windows(make_windows(ids, length, stride), 3, drop_last)

    stop = len(starts) - len(starts) % 3 if drop_last else len(starts)
    rows = [row for batch in batches for row in batch.input_BT.tolist()]
    assert rows == [ids[i : i + length] for i in starts[:stop]]
    targets = [row for batch in batches for row in batch.target_BT.tolist()]
    assert targets == [ids[i + 1 : i + length + 1] for i in starts[:stop]]
    assert all(len(batch.input_BT) == 3 for batch in batches[:-1])


def test_embeddings_are_the_rows_that_the_book_prints():
    token_VD = jnp.array(TorchGenerator(123).normal((6, 3)))
    ids_BT = jnp.array([[2, 3, 5, 1]])

    x_BTD = embed_tokens(ids_BT, token_VD, jnp.zeros((4, 3)))

    expected = [1.2753, -0.2010, -0.1606, -0.4015, 0.9666, -1.1481]
    expected += [-2.8400, -0.7849, -1.4096, 0.9178, 1.5810, 1.3010]
    np.testing.assert_allclose(x_BTD.ravel(), expected, atol=5e-5)  # printed digits
    positions = jax.random.normal(jax.random.key(0), (9, 3))
    expected = jax.nn.one_hot(ids_BT, 6) @ token_VD + positions[:4][None]
    np.testing.assert_allclose(embed_tokens(ids_BT, token_VD, positions), expected, rtol=1e-6)
    outside = embed_tokens(jnp.array([[1, 6]]), token_VD, positions)
    assert jnp.isnan(outside[0]).any(1).tolist() == [False, True]


def test_invalid_words_sizes_and_fractions_are_rejected():
    rows = make_windows(range(9), 4, 1)
    for error, message, call in [
        (DataError, r"'tea' .*<\|unk\|>", lambda: simple_encode("or tea", {"or": 0})),
        (DataError, "id 7 ", lambda: simple_decode([0, 7], {"or": 0})),
        (ConfigError, "max_length=0 and stride=1", lambda: make_windows(range(9), 0, 1)),
        (ConfigError, "max_length=1 and stride=0", lambda: make_windows(range(9), 1, 0)),
        (DataError, "4 ids .* max_length=4", lambda: make_windows(range(4), 4, 1)),
        (ConfigError, "batch size 0", lambda: batch_windows(rows, 0)),
        (ConfigError, "fraction -0.1", lambda: split_text("text", -0.1)),
        (ConfigError, "fraction nan", lambda: split_text("text", float("nan"))),
        (
            *(DataError, "rows of 3 ids .* 2 rows"),
            lambda: embed_tokens(jnp.zeros((1, 3), int), jnp.ones((5, 4)), jnp.ones((2, 4))),
        ),
    ]:
        with pytest.raises(error, match=message):
            call()
