"""Chapter 2 of the book: its numbers, and what holds for any text."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptjax.book import TorchGenerator, epochs
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
from gptjax.data import datasets
from gptjax.errors import ConfigError, DataError
from gptjax.tokenizer.tokenizer import ENDOFTEXT, load_tokenizer

GPT2 = load_tokenizer("gpt2")
SIGNS = "abC ,.-:;?_!\"()'\n"


@pytest.fixture
def verdict(shared_data):
    return datasets.fetch_dataset("verdict").read_text(encoding="utf-8")


# Words


@given(st.text(SIGNS))
def test_only_white_space_is_lost_between_tokens(text):
    tokens = split_simple_tokens(text)

    assert "".join(tokens) == "".join(text.split())
    assert not any(map(str.isspace, tokens))
    assert "" not in tokens


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("Hello, world. This, is a test.", "Hello , world . This , is a test ."),
        ("Is this-- a test?", "Is this -- a test ?"),
        ("genius--though a-b ---c", "genius -- though a-b -- -c"),
        (f"tea? {ENDOFTEXT} In", f"tea ? {ENDOFTEXT} In"),
    ],
)
def test_signs_are_tokens_of_their_own(text, tokens):
    assert split_simple_tokens(text) == tokens.split()


def test_the_verdict_has_the_tokens_and_ids_of_the_book(verdict):
    tokens = split_simple_tokens(verdict)
    ids = make_vocabulary(tokens)

    assert len(verdict) == 20_479
    assert len(tokens) == 4_690
    assert " ".join(tokens[5:11]) == "Gisburn rather a cheap genius --"
    assert len(ids) == 1_130
    assert (ids["!"], ids["A"], ids["Hermia"]) == (0, 11, 50)

    numbers = simple_encode(
        '"It\'s the last he painted, you know," Mrs. Gisburn said with pardonable pride.', ids
    )

    assert numbers == [
        *(1, 56, 2, 850, 988, 602, 533, 746, 5, 1126, 596, 5, 1, 67, 7, 38, 851),
        *(1108, 754, 793, 7),
    ]
    assert simple_decode(numbers, ids) == (
        '" It\' s the last he painted, you know," Mrs. Gisburn said with pardonable pride.'
    )


def test_unknown_words_have_an_id_as_in_the_book(verdict):
    ids = make_vocabulary(split_simple_tokens(verdict), [ENDOFTEXT, UNKNOWN_TOKEN])

    numbers = simple_encode(
        f"Hello, do you like tea? {ENDOFTEXT} In the sunlit terraces of the palace.", ids
    )

    assert len(ids) == 1_132
    assert numbers == [
        *(1131, 5, 355, 1126, 628, 975, 10, 1130, 55, 988, 956, 984, 722, 988, 1131, 7)
    ]
    assert simple_decode(numbers, ids) == (
        f"{UNKNOWN_TOKEN}, do you like tea? {ENDOFTEXT} In the sunlit terraces of the "
        f"{UNKNOWN_TOKEN}."
    )


@given(st.text(SIGNS))
def test_a_text_has_an_id_for_each_token_of_its_own_vocabulary(text):
    tokens = split_simple_tokens(text)
    ids = make_vocabulary(tokens)

    numbers = simple_encode(text, ids)

    assert sorted(ids.values()) == list(range(len(ids)))
    assert [list(ids)[number] for number in numbers] == tokens
    assert split_simple_tokens(simple_decode(numbers, ids)) == tokens


def test_an_unknown_word_is_refused():
    with pytest.raises(DataError, match=r"'tea' is not in the .* 1 .*<\|unk\|>"):
        simple_encode("or tea", {"or": 0})


def test_an_unknown_id_is_refused():
    with pytest.raises(DataError, match="id 7 is not in the vocabulary of 1"):
        simple_decode([0, 7], {"or": 0})


# Ids


def test_the_control_token_stands_where_it_is_spelled_out():
    text = f"Hello, do you like tea? {ENDOFTEXT} In the sunlit terracesof someunknownPlace."

    ids = encode_with_eot(text, GPT2)

    assert ids == [
        *(15496, 11, 466, 345, 588, 8887, 30, 220, 50256, 554, 262, 4252, 18250),
        *(8812, 2114, 1659, 617, 34680, 27271, 13),
    ]


@pytest.mark.parametrize("text", ["", ENDOFTEXT, f"{ENDOFTEXT}{ENDOFTEXT} a{ENDOFTEXT}"])
def test_ends_are_those_of_tiktoken(text):
    ids = encode_with_eot(text, GPT2)

    assert ids == GPT2.encoding.encode(text, allowed_special={ENDOFTEXT})


# Windows


def test_contexts_grow_as_in_the_book(verdict):
    ids = GPT2.encode(verdict)

    pairs = list(context_target_pairs(ids[50:], 4))

    assert len(ids) == 5_145
    assert pairs[0] == ([290], 4920)
    assert pairs[-1] == ([290, 4920, 2241, 287], 257)
    assert [GPT2.decode([follows]) for _, follows in pairs] == [
        *(" established", " himself", " in", " a")
    ]


def test_contexts_end_with_the_ids():
    assert list(context_target_pairs([1, 2], 4)) == [([1], 2)]
    assert not list(context_target_pairs([], 4))


@given(st.integers(2, 40), st.integers(1, 10), st.integers(1, 10))
def test_windows_are_slices_of_the_ids(count, length, stride):
    ids = [7 * i for i in range(count)]
    starts = range(0, count - length, stride)
    if not starts:
        return

    rows = make_windows(ids, length, stride)

    assert rows.input_BT.tolist() == [ids[i : i + length] for i in starts]
    assert rows.target_BT.tolist() == [ids[i + 1 : i + length + 1] for i in starts]


def test_the_first_batches_are_those_of_the_book(verdict):
    rows = make_windows(GPT2.encode(verdict), max_length=4, stride=1)

    first, second, *_ = batch_windows(rows, 1)

    assert first.input_BT.tolist() == [[40, 367, 2885, 1464]]
    assert first.target_BT.tolist() == [[367, 2885, 1464, 1807]]
    assert second.input_BT.tolist() == [[367, 2885, 1464, 1807]]
    assert second.target_BT.tolist() == [[2885, 1464, 1807, 3619]]


def test_a_batch_of_eight_is_that_of_the_book(verdict):
    rows = make_windows(GPT2.encode(verdict), max_length=4, stride=4)

    first = batch_windows(rows, 8)[0]

    text = [
        *(40, 367, 2885, 1464, 1807, 3619, 402, 271, 10899, 2138, 257, 7026, 15632),
        *(438, 2016, 257, 922, 5891, 1576, 438, 568, 340, 373, 645, 1049, 5975, 284),
        *(502, 284, 3285, 326, 11, 287),
    ]
    assert first.input_BT.ravel().tolist() == text[:-1]
    assert first.target_BT.ravel().tolist() == text[1:]


def test_the_loaders_of_chapter_5_have_the_batches_of_the_book(verdict):
    parts = split_text(verdict, 0.9)
    ids, other_ids = map(GPT2.encode, parts)

    train = batch_windows(make_windows(ids, 256, 256), 2)
    valid = batch_windows(make_windows(other_ids, 256, 256), 2, drop_last=False)

    assert [len(part) for part in parts] == [18_431, 2_048]
    assert (len(ids), len(other_ids)) == (4_612, 534)
    assert [b.input_BT.shape for b in train] == [(2, 256)] * 9
    assert [b.target_BT.shape for b in valid] == [(2, 256)]
    assert sum(b.input_BT.size for b in train) == 4_608
    assert sum(b.input_BT.size for b in valid) == 512


def test_a_shuffled_epoch_has_the_rows_of_the_plain_one(verdict):
    rows = make_windows(GPT2.encode(split_text(verdict)[0]), 256, 256)

    shuffled = [rows.input_BT[numbers] for numbers in next(epochs(18, 2))]

    plain = [row for batch in batch_windows(rows, 2) for row in batch.input_BT.tolist()]
    assert sorted(np.concatenate(shuffled).tolist()) == sorted(plain)


@given(st.integers(1, 12), st.integers(1, 5), st.booleans())
def test_batches_hold_all_rows_but_a_last_few(count, size, drop_last):
    rows = make_windows(range(count + 2), 2, 1)

    parts = batch_windows(rows, size, drop_last)

    whole = sum(len(part.input_BT) for part in parts)
    assert whole == (count - count % size if drop_last else count)
    for n, part in enumerate(parts):
        here = slice(n * size, (n + 1) * size)
        np.testing.assert_array_equal(part.input_BT, rows.input_BT[here])
        np.testing.assert_array_equal(part.target_BT, rows.target_BT[here])


@pytest.mark.parametrize(("length", "stride"), [(0, 1), (1, 0), (-1, 4)])
def test_windows_without_length_or_stride_are_refused(length, stride):
    with pytest.raises(ConfigError, match=f"max_length={length} and stride={stride} m"):
        make_windows(range(9), length, stride)


def test_a_text_shorter_than_a_window_is_refused():
    with pytest.raises(DataError, match=r"4 ids are too few .* max_length=4"):
        make_windows(range(4), 4, 1)


def test_batches_without_rows_are_refused():
    with pytest.raises(ConfigError, match="batch size 0 must be at least 1"):
        batch_windows(make_windows(range(9), 4, 1), 0)


@pytest.mark.parametrize("share", [-0.1, 1.1, float("nan")])
def test_a_share_that_is_none_is_refused(share):
    with pytest.raises(ConfigError, match=f"fraction {share} must be between 0 and 1"):
        split_text("text", share)


# Embeddings


def test_a_table_has_the_numbers_and_rows_of_the_book():
    token_VD = jnp.array(TorchGenerator(123).normal((6, 3)))
    nowhere = jnp.zeros((4, 3))

    x_BTD = embed_tokens(jnp.array([[2, 3, 5, 1]]), token_VD, nowhere)

    expected = [
        [1.2753, -0.2010, -0.1606],
        [-0.4015, 0.9666, -1.1481],
        [-2.8400, -0.7849, -1.4096],
        [0.9178, 1.5810, 1.3010],
    ]
    np.testing.assert_allclose(x_BTD[0], expected, atol=5e-5)  # as they are printed


def test_an_embedding_is_a_product_with_one_hot_rows():
    keys = jax.random.split(jax.random.key(0), 3)
    ids_BT = jax.random.randint(keys[0], (2, 5), 0, 7)
    token_VD = jax.random.normal(keys[1], (7, 4))
    positions = jax.random.normal(keys[2], (9, 4))

    x_BTD = jax.jit(embed_tokens)(ids_BT, token_VD, positions)

    expected = jax.nn.one_hot(ids_BT, 7) @ token_VD + positions[:5][None]
    np.testing.assert_allclose(x_BTD, expected, rtol=1e-6)


def test_embeddings_of_the_first_batch_have_the_width_of_the_table(verdict):
    rows = batch_windows(make_windows(GPT2.encode(verdict), 4, 4), 8)[0]
    token_VD, positions = jnp.ones((50_257, 256)), jnp.ones((4, 256))

    x_BTD = embed_tokens(rows.input_BT, token_VD, positions)

    assert x_BTD.shape == (8, 4, 256)
    np.testing.assert_array_equal(x_BTD, 2)


def test_an_id_beyond_the_table_is_not_another_token():
    x_BTD = embed_tokens(jnp.array([[1, 2]]), jnp.ones((2, 3)), jnp.ones((2, 3)))

    assert not jnp.isnan(x_BTD[0, 0]).any()
    assert jnp.isnan(x_BTD[0, 1]).all()


def test_rows_longer_than_the_positions_are_refused():
    with pytest.raises(DataError, match=r"rows of 3 ids are longer than .* 2 rows"):
        embed_tokens(jnp.zeros((1, 3), int), jnp.ones((5, 4)), jnp.ones((2, 4)))
