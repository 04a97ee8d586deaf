"""Evaluation: every token scored once, and nothing else has a say in its loss."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gptjax
from gptjax.config import GPTConfig
from gptjax.errors import ConfigError, DataError
from gptjax.evaluation import perplexity
from gptjax.model.gpt import apply, init
from gptjax.training.loss import cross_entropy_sum
from gptjax.weights.model_folder import Model

TEXT = "To be, or not to be: that is the question. " * 3


@pytest.fixture(scope="module")
def model():
    tokenizer = gptjax.tokenizer.load("bytes")
    config = GPTConfig(
        vocab_size=tokenizer.vocab_size, context_length=16, n_layers=2, n_heads=2, d_model=16
    )
    return Model(config, init(config, jax.random.key(0)), tokenizer)


@pytest.mark.parametrize("stride", [1, 3, 8, 15, 16])
@pytest.mark.parametrize("length", [2, 16, 17, 18, 33, 100])
def test_every_token_but_the_first_is_scored_exactly_once(length, stride):
    token_L = np.arange(1, length + 1, dtype=np.int32)

    scored = []
    for batch in perplexity.sliding_windows(token_L, 16, stride, batch_size=3, eot_token=None):
        counted = batch["loss_weights"] > 0
        scored += batch["targets"][counted].tolist()
        assert (batch["targets"] - batch["tokens"])[counted].tolist() == [1] * sum(counted.ravel())

    assert sorted(scored) == list(range(2, length + 1))


def test_a_smaller_stride_gives_each_token_at_least_the_rest_to_look_back_at():
    token_L = np.arange(1, 101, dtype=np.int32)

    for batch in perplexity.sliding_windows(token_L, 16, 4, batch_size=4, eot_token=None):
        place = np.broadcast_to(np.arange(16), batch["tokens"].shape)
        first = batch["tokens"][:, :1] == 1
        assert (place[(batch["loss_weights"] > 0) & ~first] >= 12).all()


@pytest.mark.fast
def test_the_loss_of_a_short_text_is_that_of_one_plain_forward_pass(model):
    text = "to be or not to"
    ids = [model.tokenizer.eot_token, *model.tokenizer.encode(text)]
    token_BT = jnp.array([ids], jnp.int32)
    logits = apply(model.config, model.params, token_BT[:, :-1])
    weights = jnp.ones((1, len(ids) - 1))
    nats, _ = cross_entropy_sum(logits, token_BT[:, 1:], weights)

    result = perplexity.score(model, text)

    assert result.total_loss == pytest.approx(float(nats), rel=1e-6)
    assert result.tokens == result.bytes == len(text)
    assert result.perplexity == pytest.approx(math.exp(result.loss))
    assert result.bits_per_byte == pytest.approx(float(nats) / math.log(2) / len(text))


def test_the_loss_of_a_token_does_not_depend_on_its_batch(model):
    scorer = perplexity.make_eval_step(model.config)
    ids = np.array(model.tokenizer.encode(TEXT), np.int32)
    batch = next(perplexity.sliding_windows(ids, 16, 16, batch_size=4, eot_token=None))
    alone = {name: leaf.copy() for name, leaf in batch.items()}
    for name in ("tokens", "targets"):
        alone[name][1:] = 0

    nats, nats_alone = (np.asarray(scorer(model.params, b)) for b in (batch, alone))

    np.testing.assert_array_equal(nats[0], nats_alone[0])
    assert (nats[1:] != nats_alone[1:]).any()


def test_documents_do_not_help_to_predict_each_other(model):
    eot, ids = model.tokenizer.eot_token, model.tokenizer.encode("the same text")
    both = np.array([eot, *ids, eot, *ids, eot], np.int32)
    one = np.array([eot, *ids, eot], np.int32)

    pair = perplexity.score_tokens(model, both, 16, eot)
    single = perplexity.score_tokens(model, one, 16, eot)

    # The second document is cut by the window edge, so only the first half is equal.
    assert pair.tokens == 2 * single.tokens
    assert single.bytes == len("the same text")


def test_text_that_is_empty_or_a_stride_of_no_length_is_refused(model):
    with pytest.raises(DataError, match="no token to score"):
        perplexity.score(model, "")
    with pytest.raises(ConfigError, match="--stride 17"):
        perplexity.score(model, TEXT, stride=17)
