"""Loss masks and losses of conversations, against a slow reference in float64.

The reference shares nothing with the package but the parameters: it writes the
templates out by hand, decides token by token what counts, and computes the GPT in
NumPy, one conversation at a time.
"""

import functools
import math

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

CONTEXT, ROWS, EOT = 64, 8, 256
MODEL = make_model(context_length=CONTEXT, n_layers=1, d_model=8)
CONFIG = RunConfig(model=MODEL.config)
PREAMBLE = (
    "Below is an instruction that describes a task. Write a response that "
    "appropriately completes the request."
)


def alpaca(system, turns):
    """(text, True for an answer) in order; None is the end token."""
    yield system or PREAMBLE, False
    for user, extra, answer in turns:
        yield f"\n\n### Instruction:\n{user}", False
        if extra:
            yield f"\n\n### Input:\n{extra}", False
        yield "\n\n### Response:\n", False
        yield answer, True
        yield None, True


def chatml(system, turns):
    if system:
        yield f"<|im_start|>system\n{system}<|im_end|>\n", False
    for user, extra, answer in turns:
        said = f"{user}\n\n{extra}" if extra else user
        yield f"<|im_start|>user\n{said}<|im_end|>\n<|im_start|>assistant\n", False
        yield f"{answer}<|im_end|>\n", True


def qa(system, turns):
    if system:
        yield f"{system}\n", False
    for number, (user, extra, answer) in enumerate(turns):
        yield ("\n" if number else "") + f"Q: {user}", False
        if extra:
            yield f"\n{extra}", False
        yield "\nA: ", False
        yield answer, True
        yield None, True


FORMS = {"qa": qa, "alpaca": alpaca, "chatml": chatml}


def reference_tokens(form, system, turns, masked):
    """[(token, counts)] truncated to the context, or None if it does not fit."""
    tokens, start = [], 0
    for text, is_answer in FORMS[form](system, turns):
        if is_answer and not (tokens and tokens[-1][1]):
            start = len(tokens)
        bytes_ = [EOT] if text is None else list(text.encode())
        tokens += [(byte, is_answer) for byte in bytes_]
    surplus = len(tokens) - (CONTEXT + 1)
    if surplus <= 0:
        kept = tokens
    elif surplus >= start:
        return None
    else:
        kept, broken = [], tokens[surplus - 1][1]
        for byte, is_answer in tokens[surplus:]:
            broken = broken and is_answer  # the rest of an answer cut through
            kept.append((byte, is_answer and not broken))
        if not masked:
            head = next(n for n, (_, a) in enumerate(tokens[surplus:]) if not a)
            head = head if tokens[surplus - 1][1] else 0
            return [(byte, n >= max(head, 1)) for n, (byte, _) in enumerate(kept)]
    return [(byte, n > 0 and (a or not masked)) for n, (byte, a) in enumerate(kept)]


PARAMS = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), MODEL.params)


def norm(x_TD, p):
    mean_T1, var_T1 = x_TD.mean(-1, keepdims=True), x_TD.var(-1, keepdims=True)
    return (x_TD - mean_T1) / np.sqrt(var_T1 + 1e-5) * p["scale"] + p["bias"]


def reference_nats(tokens):
    """Loss in nats of each token but the first."""
    ids = np.array([token for token, _ in tokens])
    read, table = ids[:-1], PARAMS["token_embedding"]["embedding"]
    x = table[read] + PARAMS["position_embedding"]["embedding"][: len(read)]
    block = jax.tree.map(lambda leaf: leaf[0], PARAMS["blocks"])
    y, a = norm(x, block["attention_norm"]), block["attention"]
    q, k, v = (
        np.tensordot(y, a[name]["kernel"], 1) + a[name]["bias"]
        for name in ("query", "key", "value")
    )
    score = np.einsum("thk,shk->hts", q, k) / math.sqrt(q.shape[-1])
    score[:, ~np.tri(len(read), dtype=bool)] = -np.inf
    weight = np.exp(score - score.max(-1, keepdims=True))
    weight /= weight.sum(-1, keepdims=True)
    mixed = np.einsum("hts,shk->thk", weight, v)
    x = x + np.tensordot(mixed, a["out"]["kernel"], 2) + a["out"]["bias"]
    m = block["mlp"]
    h = norm(x, block["mlp_norm"]) @ m["up"]["kernel"] + m["up"]["bias"]
    h = h / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)))
    x = norm(x + h @ m["down"]["kernel"] + m["down"]["bias"], PARAMS["final_norm"])
    logits = x @ table.T
    top = logits.max(-1)
    total = np.log(np.exp(logits - top[:, None]).sum(-1)) + top
    return total - logits[np.arange(len(read)), ids[1:]]


@functools.cache
def make_step(accumulate):
    """The training step, with an optimizer that changes nothing."""
    nothing = optax.set_to_zero()

    def loss_fn(params, batch, key):
        return sft_loss_fn(CONFIG, params, None, batch, key)

    state = init_state(MODEL.params, nothing, jax.random.key(0))
    step = jax.jit(gptjax.make_train_step(loss_fn, nothing, accumulate))
    return lambda batch: step(state, batch)[1]


def epoch_loss(batches, accumulate, devices):
    """Summed nats of the trained tokens of one epoch, and their number."""
    mesh = Mesh(np.array(jax.devices()[:devices]), ("data",))
    rows = NamedSharding(mesh, PartitionSpec("data"))
    nats = tokens = 0.0
    for number in range(batches.steps_per_epoch):
        batch = batches.batch_at(number)
        if devices > 1:
            batch = jax.device_put(batch, rows)
        metrics = make_step(accumulate)(batch)
        count = float(metrics.tokens)
        count = count if count >= 1 else 0.0
        nats, tokens = nats + float(metrics.loss) * count, tokens + count
    return nats, tokens


TEXTS = st.text(st.sampled_from("ab c\né漢"), min_size=1, max_size=12) | st.sampled_from(
    ["<|endoftext|>", "yks", "### Note", "{{ 7 * 7 }}", "0.5%s"]
)
TURNS = st.lists(
    st.tuples(TEXTS, st.just("") | TEXTS.filter(str.strip), TEXTS), min_size=1, max_size=3
)
CONVERSATIONS = st.lists(st.tuples(st.just("") | TEXTS, TURNS), min_size=1, max_size=10)


def messages_of(system, turns):
    messages = [{"role": "system", "content": system}] if system else []
    for user, extra, answer in turns:
        asked = {"role": "user", "content": user} | ({"input": extra} if extra else {})
        messages += [asked, {"role": "assistant", "content": answer}]
    return messages


def check(conversations, form, masked, batching, accumulate, devices, seed):
    """Compares the tokens, the loss mask and the loss of an epoch."""
    template = load_chat_template(form)
    kinds = TRAIN_ON_COMPLETIONS if masked else TRAIN_ON_ALL
    pieces = [template.segments(messages_of(*each)) for each in conversations]
    examples = [encode_segments(MODEL.tokenizer, each, kinds) for each in pieces]
    fitted = truncate_all(examples, CONTEXT)
    rows = [reference_tokens(form, *each, masked) for each in conversations]
    kept = [row for row in rows if row is not None]

    assert fitted.num_dropped == len(rows) - len(kept)
    assert [list(zip(x.ids, x.loss_mask, strict=True)) for x in fitted.examples] == kept
    for example in fitted.examples:
        assert example.loss_mask[-1], "the end of the last answer is not trained on"
        assert form == "chatml" or example.ids[-1] == EOT
    if not kept:
        return
    batches = make_sft_batches(
        batching, fitted.examples, rows=ROWS, context=CONTEXT, pad_id=EOT, seed=seed
    )
    nats, tokens = epoch_loss(batches, accumulate, devices)
    counted = [
        nats
        for row in kept
        for nats, (_, counts) in zip(reference_nats(row), row[1:], strict=True)
        if counts
    ]
    assert tokens == len(counted)
    assert nats / tokens == pytest.approx(sum(counted) / len(counted), rel=1e-6)


@quick
@given(
    CONVERSATIONS,
    st.sampled_from(sorted(FORMS)),
    st.booleans(),
    # Few combinations: each shape is compiled for each of them.
    st.sampled_from([("padded", 1, 1), ("packed", 2, 8)]),
    st.integers(0, 3),
)
def test_losses_are_those_of_a_slow_reference(conversations, form, masked, batching, seed):
    check(conversations, form, masked, *batching, seed)


def test_a_batch_without_trained_tokens_has_loss_and_gradient_zero():
    template = load_chat_template("qa")
    messages = messages_of("", [("a", "", "b")])
    example = encode_segments(MODEL.tokenizer, template.segments(messages), frozenset())
    batches = make_sft_batches("padded", [example] * 8, rows=8, context=CONTEXT, pad_id=EOT, seed=0)

    metrics = make_step(1)(batches.batch_at(0))

    assert float(metrics.loss) == 0
    assert float(metrics.grad_norm) == 0
    assert bool(metrics.applied)
