"""Chapter 2: its numbers, and properties for any text."""

import jax.numpy as jnp
import numpy as np

from gptjax.book import TorchGenerator, ch02
from gptjax.tokenizer.tokenizer import ENDOFTEXT, load_tokenizer

GPT2 = load_tokenizer("gpt2")


def test_the_verdict_has_the_words_and_ids_of_the_book(verdict):
    tokens = ch02.split_simple_tokens(verdict)
    ids = ch02.make_vocabulary(tokens, [ENDOFTEXT, ch02.UNKNOWN_TOKEN])
    text = f"Hello, do you like tea? {ENDOFTEXT} In the sunlit terraces of the palace."

    numbers = ch02.simple_encode(text, ids)

    assert (len(verdict), len(tokens), len(ids)) == (20_479, 4_690, 1_132)
    assert " ".join(tokens[5:11]) == "Gisburn rather a cheap genius --"
    assert (ids["!"], ids["A"], ids["Hermia"]) == (0, 11, 50)
    assert numbers == [
        *(1131, 5, 355, 1126, 628, 975, 10, 1130, 55, 988, 956, 984, 722, 988, 1131, 7)
    ]
    unknown = text.replace("Hello", ch02.UNKNOWN_TOKEN).replace("palace", ch02.UNKNOWN_TOKEN)
    assert ch02.simple_decode(numbers, ids) == unknown
    expected = GPT2.encoding.encode(text, allowed_special={ENDOFTEXT})
    assert ch02.encode_with_eot(text, GPT2) == expected


def test_windows_and_batches_have_the_numbers_of_the_book(verdict):
    ids = GPT2.encode(verdict)
    pairs = list(ch02.context_target_pairs(ids[50:], 4))
    first, *_ = ch02.batch_windows(ch02.make_windows(ids, 4, 1), 1)
    eight = ch02.batch_windows(ch02.make_windows(ids, max_length=4, stride=4), 8)[0]

    assert len(ids) == 5_145
    assert ids[:9] == [40, 367, 2885, 1464, 1807, 3619, 402, 271, 10899]
    assert (pairs[0], pairs[-1]) == (([290], 4920), ([290, 4920, 2241, 287], 257))
    assert (first.input_BT.tolist(), first.target_BT.tolist()) == ([ids[:4]], [ids[1:5]])
    assert eight.target_BT.ravel().tolist() == ids[1:33]
    train, validation = (
        ch02.batch_windows(ch02.make_windows(GPT2.encode(part), 256, 256), 2)
        for part in ch02.split_text(verdict, 0.9)
    )
    assert [b.input_BT.shape for b in train] == [(2, 256)] * 9  # 4,608 tokens
    assert [b.target_BT.shape for b in validation] == [(2, 256)]  # 512 tokens


def test_embeddings_are_the_rows_that_the_book_prints():
    token_VD = jnp.array(TorchGenerator(123).normal((6, 3)))
    position_TD = np.arange(12, dtype=np.float32).reshape(4, 3)

    x_BTD = ch02.embed_tokens(jnp.array([[2, 3, 5, 1]]), token_VD, jnp.array(position_TD))

    expected = [1.2753, -0.2010, -0.1606, -0.4015, 0.9666, -1.1481]
    expected += [-2.8400, -0.7849, -1.4096, 0.9178, 1.5810, 1.3010]
    np.testing.assert_allclose(x_BTD[0] - position_TD, np.reshape(expected, (4, 3)), atol=6e-5)
