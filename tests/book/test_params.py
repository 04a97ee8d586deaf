"""The book's untrained models: every parameter, and the numbers of chapters 4 and 5."""

import dataclasses
import functools
import hashlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gptjax
from gptjax.book import init_params
from gptjax.config import GPTConfig
from gptjax.errors import ConfigError
from gptjax.inference.generate import complete
from gptjax.training.loss import cross_entropy_sum
from gptjax.tree import flatten_with_names, num_params
from gptjax.weights.model_folder import Model

SHAPE = {"context_length": 6, "n_layers": 2, "n_heads": 2, "d_model": 8}
SMALL = GPTConfig(vocab_size=17, qkv_bias=True, tie_embeddings=False, **SHAPE)


def test_a_small_model_has_the_bits_of_pytorch():
    params = init_params(SMALL, 7)

    fresh = jax.eval_shape(lambda: gptjax.init(SMALL, jax.random.key(0)))
    jax.tree.map(lambda a, b: np.testing.assert_equal(a.shape, b.shape), params, fresh)
    leaves = flatten_with_names(params)
    data = b"".join(np.asarray(leaves[name]).tobytes() for name in sorted(leaves))
    # The digits: the same layers made of torch.nn, PyTorch 2.13, AVX512.
    assert hashlib.sha256(data).hexdigest()[:16] == "459f36c5944c081e"
    with pytest.raises(ConfigError, match=r"model\.n_classes=2"):
        init_params(dataclasses.replace(SMALL, n_classes=2))


@functools.cache
def book_model(context_length):
    """The book's untrained 124M model, as it is after torch.manual_seed(123)."""
    changes = {"tie_embeddings": False, "qkv_bias": False, "dtype": "float32", "dropout": 0.1}
    config = GPTConfig.preset("gpt2", context_length=context_length, **changes)
    return Model(config, init_params(config), gptjax.tokenizer.load("gpt2"))


@functools.partial(jax.jit, static_argnums=0)
def logits_and_loss(config, params, token_BT, target_BT):
    logit_BTV = gptjax.apply(config, params, token_BT)
    weight_BT = jnp.ones(token_BT.shape, jnp.float32)
    nats, weight = cross_entropy_sum(logit_BTV, target_BT, weight_BT)
    return logit_BTV, nats / weight


@pytest.mark.slow
def test_the_untrained_model_of_chapter_4_generates_the_words_of_the_book():
    model = book_model(1024)

    (completion,) = complete(model, "Hello, I am", max_new_tokens=10, temperature=0.0)

    words = " Featureiman Byeswickattribute argue logger Normandy Compton analogous"
    assert completion.text == words
    assert num_params(model.params) == 163_009_536


@pytest.mark.slow
@pytest.mark.fast  # its digits depend on the versions
def test_the_untrained_model_of_chapter_5_has_the_losses_of_the_book(verdict):
    model = book_model(256)  # "every effort moves", "I really like"
    token_BT = jnp.array([[16833, 3626, 6100], [40, 1107, 588]])
    target_BT = jnp.array([[3626, 6100, 345], [1107, 588, 11311]])

    logit_BTV, loss = logits_and_loss(model.config, model.params, token_BT, target_BT)
    losses = []
    cut = int(0.9 * len(verdict))
    for part in (verdict[:cut], verdict[cut:]):
        ids = np.array(model.tokenizer.encode(part))
        rows = np.stack([ids[n : n + 257] for n in range(0, len(ids) - 256, 256)])
        each = [  # batches of 2; their order does not change the mean
            logits_and_loss(model.config, model.params, batch[:, :-1], batch[:, 1:])[1]
            for batch in rows.reshape(-1, 2, 257)
        ]
        losses.append((len(each), float(np.mean(each))))

    assert logit_BTV.argmax(-1).tolist() == [[16657, 339, 42826], [49906, 29669, 41751]]
    assert round(float(loss), 4) == 10.7940
    expected = [(9, 10.987583), (1, 10.981106)]
    assert losses == [(n, pytest.approx(loss, abs=1e-5)) for n, loss in expected]
