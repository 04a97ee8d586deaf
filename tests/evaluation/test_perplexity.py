"""Evaluation: each token is scored once, and other documents do not affect its loss."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.errors import ConfigError, DataError
from gptjax.evaluation import perplexity
from gptjax.model.gpt import apply
from tests.small_models import make_model


@pytest.fixture(scope="module")
def model():
    return make_model(context_length=16, n_layers=1)


@pytest.mark.parametrize("stride", [1, 3, 16])
def test_each_token_is_scored_once_with_the_context_that_the_stride_leaves(stride):
    for length in (2, 16, 17, 18, 33):
        token_L = np.arange(1, length + 1, dtype=np.int32)
        scored = []
        for batch in perplexity.sliding_windows(token_L, 16, stride, batch_size=3, eot_token=None):
            counts = batch["loss_weights"] > 0
            scored += batch["targets"][counts].tolist()
            assert ((batch["targets"] - batch["tokens"])[counts] == 1).all()
            position = np.broadcast_to(np.arange(16), counts.shape)
            is_first = batch["tokens"][:, :1] == 1
            assert (position[counts & ~is_first] >= 16 - stride).all()

        assert sorted(scored) == list(range(2, length + 1))


@pytest.mark.fast
@pytest.mark.parametrize("bos", [None, 65])
def test_loss_of_a_short_text_is_that_of_one_plain_forward_pass(model, bos):
    if bos:
        tokenizer = dataclasses.replace(model.tokenizer, bos_token=bos, add_bos=True)
        model = dataclasses.replace(model, tokenizer=tokenizer)
    text = "to be or not to"
    ids = [bos or model.tokenizer.eot_token, *model.tokenizer.encode(text)]
    logits = jax.jit(apply, static_argnums=0)(model.config, model.params, jnp.array([ids[:-1]]))
    log_probs = np.asarray(jax.nn.log_softmax(logits[0], axis=-1))
    expected = [-log_probs[n, token] for n, token in enumerate(ids[1:])]

    result = perplexity.score(model, text)
    token_ids, losses = perplexity.token_losses(model, text)

    assert result.total_loss == pytest.approx(sum(expected), rel=1e-6)
    assert result.bytes == len(text)
    assert result.to_dict()["bits_per_byte"] == pytest.approx(result.loss / math.log(2))
    assert token_ids == ids[1:]
    np.testing.assert_allclose(losses, expected, rtol=1e-5)


def test_documents_do_not_help_to_predict_each_other(model):
    eot, ids = model.tokenizer.eot_token, model.tokenizer.encode("a text")
    one, both = np.array([eot, *ids, eot]), np.array([eot, *ids, eot, *ids, eot])

    single = perplexity.score_tokens(model, one, 16, eot)
    pair = perplexity.score_tokens(model, both, 16, eot)
    joined = perplexity.score_tokens(model, both, 16, None)

    assert pair.tokens == 2 * single.tokens
    assert pair.bytes == 2 * single.bytes == 2 * len("a text")
    assert pair.loss == pytest.approx(single.loss, rel=1e-6)
    assert joined.loss != pytest.approx(single.loss, rel=1e-3)


def test_empty_or_too_long_text_and_invalid_stride_are_rejected(model):
    with pytest.raises(DataError, match="no token"):
        perplexity.score(model, "")
    with pytest.raises(ConfigError, match=" 17 tokens"):
        perplexity.token_losses(model, "x" * 17)
    for stride in (0, 17):
        with pytest.raises(ConfigError, match=f"--stride {stride} "):
            perplexity.score(model, "a text", stride=stride)
    for context in (0, 17):
        with pytest.raises(ConfigError, match=f"--context {context} "):
            perplexity.score(model, "a text", context=context)


def test_windows_are_as_long_as_the_context_and_batches_hold_few_long_ones(model, monkeypatch):
    text = "a text of several windows"
    parts = [text[n : n + 8] for n in range(0, len(text), 8)]
    starts = [model.tokenizer.eot_token, *(ord(part[-1]) for part in parts)]
    alone = 0.0
    for start, part in zip(starts, parts, strict=False):
        token_L = np.array([start, *part.encode()], np.int32)
        alone += perplexity.score_tokens(model, token_L, 16, None).total_loss
    shapes = []
    monkeypatch.setattr(perplexity, "MAX_SCORE_TOKENS", 16)
    monkeypatch.setattr(perplexity, "eval_step_for", lambda config: record)
    eval_step = perplexity.make_eval_step(model.config)

    def record(params, batch):
        shapes.append(batch["tokens"].shape)
        return eval_step(params, batch)

    assert perplexity.score(model, text, context=8).total_loss == pytest.approx(alone, rel=1e-5)
    assert {*shapes} == {(2, 8)}
