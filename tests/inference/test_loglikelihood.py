"""Log-likelihoods: sharing and padding do not change them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.errors import DataError, ModelError
from gptjax.inference import loglikelihood
from gptjax.inference.loglikelihood import ScoringRequest, score_continuations
from gptjax.model.gpt import apply
from tests.small_models import LLAMA, make_model

CONTEXT = 32
apply_jitted = jax.jit(apply, static_argnums=0)


@pytest.fixture(scope="module", params=[{}, LLAMA], ids=["gpt2", "llama"])
def model(request):
    """Large random weights, so that log-probabilities differ between positions."""
    changes = {"context_length": CONTEXT, "n_layers": 1, "dtype": "float32"} | request.param
    return make_model(0.4, vocab_multiple=64, **changes)


def draw_requests():
    """Of three buckets; some fit the context only without their first tokens."""
    rng = np.random.default_rng(0)
    shapes = [(3, [1, 4]), (24, [2, 9, 7]), (CONTEXT, [1]), (50, [10, CONTEXT])]
    return [
        ScoringRequest(
            rng.integers(256, size=context).tolist(),
            [rng.integers(256, size=size).tolist() for size in sizes],
        )
        for context, sizes in shapes
    ]


def score_from_scratch(model, context, continuation):
    """Log-probability by one forward pass, and the greedy tokens at its positions."""
    row = [*context, *continuation][-CONTEXT - 1 :]
    token_BT = np.zeros((1, CONTEXT), np.int32)
    token_BT[0, : len(row) - 1] = row[:-1]
    logit_TV = np.asarray(apply_jitted(model.config, model.params, jnp.asarray(token_BT)))[0]
    logit_TV = logit_TV[len(row) - 1 - len(continuation) : len(row) - 1, : model.config.vocab_size]
    logprob_TV = np.asarray(jax.nn.log_softmax(logit_TV.astype(np.float64)))
    total = sum(float(x) for x in logprob_TV[np.arange(len(continuation)), continuation])
    return total, logit_TV.argmax(-1).tolist()


def test_scores_are_those_of_one_forward_pass_each(model):
    requests = draw_requests()

    results = score_continuations(model, requests)

    for request, scores in zip(requests, results, strict=True):
        assert len(scores) == len(request.continuations)
        for continuation, score in zip(request.continuations, scores, strict=True):
            expected, _ = score_from_scratch(model, request.context, continuation)
            assert score.logprob == pytest.approx(expected, abs=2e-5)
            assert not score.is_greedy


def test_only_the_greedy_continuation_is_greedy(model):
    context, greedy = [5, 6, 7], []
    for _ in range(4):
        greedy += score_from_scratch(model, [*context, *greedy], [0])[1]
    others = [[*greedy[:n], (greedy[n] + 1) % 256, *greedy[n + 1 :]] for n in range(4)]

    (scores,) = score_continuations(model, [ScoringRequest(context, [greedy, *others])])

    assert [score.is_greedy for score in scores] == [True, False, False, False, False]


def test_equal_contexts_share_one_prefill():
    model = make_model(context_length=CONTEXT, n_layers=1)
    requests = [ScoringRequest([1] * 20, [[2, 3], [4, 5]]), ScoringRequest([1] * 20, [[6]])]

    (batch,) = loglikelihood.make_batches(loglikelihood.share_contexts(model, requests), CONTEXT)

    assert batch.context_BP.shape == (1, 24)
    assert batch.target_BCT.shape == (1, 3, 8)


def test_batches_do_not_change_scores(monkeypatch):
    model = make_model(context_length=CONTEXT, n_layers=1)
    requests = [ScoringRequest([n, n + 1], [[3, 4], [5]]) for n in range(3)]
    expected = score_continuations(model, requests)
    monkeypatch.setattr(loglikelihood, "MAX_BATCH_TOKENS", 1)
    monkeypatch.setattr(loglikelihood, "MAX_CONTINUATIONS", 1)
    monkeypatch.setattr(loglikelihood, "LOGIT_CHUNK_SIZE", 3)

    results = score_continuations(model, requests)

    np.testing.assert_allclose(results, expected, atol=2e-5)


@pytest.mark.parametrize(
    ("context", "continuation", "value"),
    [([], [1], "0"), ([1], [], "0"), ([1], [1] * 33, "33"), ([1], [257], "257")],
)
def test_requests_that_cannot_be_scored_are_errors(context, continuation, value):
    model = make_model(context_length=CONTEXT, n_layers=1)

    with pytest.raises(DataError, match=value):
        score_continuations(model, [ScoringRequest(context, [continuation])])


def test_a_model_of_nan_has_no_scores():
    model = make_model(context_length=CONTEXT, n_layers=1)
    model.params["final_norm"]["scale"] *= np.nan

    with pytest.raises(ModelError):
        score_continuations(model, [ScoringRequest([1], [[2]])])
