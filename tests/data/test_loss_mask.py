"""Loss masks and losses of conversations, against a slow reference.

The reference writes the templates out by hand, decides token by token what counts, and
computes the loss of one conversation at a time.
"""

import functools

import jax
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import gptjax
from gptjax.config import RunConfig
from gptjax.data.sft import (
    TRAIN_ON_ALL,
    TRAIN_ON_COMPLETIONS,
    encode_segments,
    make_sft_batches,
    truncate_all,
)
from gptjax.tasks.sft import sft_loss_fn
from gptjax.tokenizer.chat_template import load_chat_template
from gptjax.training.train_step import init_state
from tests.data.tables import quick
from tests.small_models import make_model

CONTEXT, ROWS, EOT = 32, 8, 256
MODEL = make_model(context_length=CONTEXT, n_layers=1, d_model=8)
FORMS = {  # text around each answer, end of an answer
    "qa": ("\nQ: {}\nA: ", [EOT]),
    "chatml": ("<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n", [*b"<|im_end|>\n"]),
}


def reference_tokens(form, turns, masked):
    """[(token, counts)] truncated to the context, or None if it does not fit."""
    (prompt, end), tokens, kept = FORMS[form], [], []
    for number, (user, answer) in enumerate(turns):
        text = prompt.format(user)
        tokens += [(byte, 0) for byte in (text if number else text.lstrip("\n")).encode()]
        tokens += [(byte, number + 1) for byte in [*answer.encode(), *end]]
    surplus = max(len(tokens) - (CONTEXT + 1), 0)
    broken = tokens[surplus - 1][1] if surplus else 0  # the answer that is cut through
    if broken == len(turns) or (surplus and tokens[surplus][1] == len(turns)):
        return None
    for n, (byte, answer) in enumerate(tokens[surplus:]):
        counts = n > 0 and (not answer or answer != broken) and (answer > 0 or not masked)
        kept.append((byte, counts))
    return kept


@jax.jit
def token_nats(token_T):
    """Loss in nats of each token but the first."""
    logit_BTV = gptjax.apply(MODEL.config, MODEL.params, token_T[None, :-1])
    return optax.softmax_cross_entropy_with_integer_labels(logit_BTV[0], token_T[1:])


@functools.cache
def make_step(accumulate):
    """The training step, with an optimizer that changes nothing."""
    nothing = optax.set_to_zero()

    def loss_fn(params, batch, key):
        return sft_loss_fn(RunConfig(model=MODEL.config), params, None, batch, key)

    state = init_state(MODEL.params, nothing, jax.random.key(0))
    step = jax.jit(gptjax.make_train_step(loss_fn, nothing, accumulate))
    return lambda batch: step(state, batch)[1]


TEXTS = st.text(st.sampled_from("ab c\né漢"), min_size=1, max_size=9).map("x".__add__)
TURNS = st.lists(st.tuples(TEXTS, TEXTS | st.just("<|endoftext|>")), min_size=1, max_size=3)


def make_batches(form, conversations, kinds, batching, seed):
    """The truncated examples of conversations and their batches."""
    template, roles = load_chat_template(form), ("user", "assistant")
    segments = [
        template.segments(
            [{"role": r, "content": t} for turn in turns for r, t in zip(roles, turn, strict=True)]
        )
        for turns in conversations
    ]
    fitted = truncate_all([encode_segments(MODEL.tokenizer, x, kinds) for x in segments], CONTEXT)
    options = {"rows": ROWS, "context": CONTEXT, "pad_id": EOT, "seed": seed}
    return fitted, make_sft_batches(batching, fitted.examples, **options)


@quick
@given(
    st.lists(TURNS, min_size=1, max_size=10),
    st.sampled_from(sorted(FORMS)),
    st.booleans(),
    # Few combinations: each shape is compiled for each of them.
    st.sampled_from([("padded", 1, 1), ("packed", 2, 2)]),
    st.integers(0, 3),
)
def test_losses_are_those_of_a_slow_reference(conversations, form, masked, how, seed):
    batching, accumulate, devices = how
    rows = [reference_tokens(form, turns, masked) for turns in conversations]
    kept = [row for row in rows if row is not None]
    kinds = TRAIN_ON_COMPLETIONS if masked else TRAIN_ON_ALL

    fitted, batches = make_batches(form, conversations, kinds, batching, seed)

    assert fitted.num_dropped == len(rows) - len(kept)
    assert [list(zip(x.ids, x.loss_mask, strict=True)) for x in fitted.examples] == kept
    nats = tokens = expected = 0.0
    sharding = NamedSharding(Mesh(jax.devices()[:devices], ("data",)), PartitionSpec("data"))
    for step in range(batches.steps_per_epoch if kept else 0):
        metrics = make_step(accumulate)(jax.device_put(batches.batch_at(step), sharding))
        nats += float(metrics.loss * metrics.tokens)
        tokens += float(metrics.tokens)
    for row in kept:
        token_T = np.full(CONTEXT + 1, EOT, np.int32)
        token_T[: len(row)] = [token for token, _ in row]
        mask = [counts for _, counts in row[1:]]
        expected += float(np.asarray(token_nats(token_T), np.float64)[: len(mask)][mask].sum())
    assert tokens == sum(counts for row in kept for _, counts in row)
    assert nats == pytest.approx(expected, rel=1e-5)


def test_a_batch_without_trained_tokens_has_loss_and_gradient_zero():
    _, batches = make_batches("qa", [[("a", "b")]] * 8, frozenset(), "padded", 0)

    metrics = make_step(1)(batches.batch_at(0))

    assert (float(metrics.loss), float(metrics.grad_norm)) == (0, 0)
    assert bool(metrics.applied)
