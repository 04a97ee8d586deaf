"""DPO: the loss of the paper, the reference model, and runs."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gptjax
from gptjax.config import RunConfig, from_dict
from gptjax.data.bucketing import buckets
from gptjax.data.conversations import PreferencePair, read_preference_pairs
from gptjax.data.preference import PreferenceBatches
from gptjax.errors import ConfigError, DataError
from gptjax.model.gpt import apply
from gptjax.tasks.dpo import (
    answer_logprobs,
    dpo_loss,
    dpo_loss_fn,
    sequence_logprobs,
    tokenize_pair,
)
from gptjax.tasks.train import train
from gptjax.tokenizer.chat_template import load_chat_template
from gptjax.training.metrics import read_events
from gptjax.weights.model_folder import Model
from tests.runs import train_logged
from tests.small_models import make_model

TEMPLATE = load_chat_template("qa")


def start_model() -> Model:
    made = make_model(context_length=32)
    return Model(made.config, made.params, made.tokenizer, chat_template=TEMPLATE.source)


def make_rows():
    """The chosen answer is in capitals."""
    words = ["sky", "sea", "sun", "ant", "elm", "ice", "oak", "owl", "rye", "yew"]
    rows = [{"prompt": w, "chosen": w.upper(), "rejected": w} for w in words * 2]
    return [*rows, {"prompt": "x", "chosen": "same", "rejected": "same"}]


def make_config(folder, **changes) -> RunConfig:
    (folder / "pairs.json").write_text(json.dumps(make_rows()))
    gptjax.save(start_model(), folder / "start")
    table = {
        "data": {"source": str(folder / "pairs.json"), "batch_size": 4},
        "optim": {"warmup_steps": 2, "peak_lr": 2e-3},
        "train": {"task": "dpo", "steps": 20, "eval_every": 10},
        "finetune": {"init_from": str(folder / "start")},
    }
    for name, value in changes.items():
        section, option = name.split("__")
        table.setdefault(section, {})[option] = value
    return from_dict(RunConfig, table)


def make_batches(pairs, rows, pad_id):
    logprob_P2 = np.zeros((len(pairs), 2), np.float32)
    return PreferenceBatches(
        pairs, logprob_P2, rows=rows, bucket_lengths=buckets(32), pad_id=pad_id, seed=0
    )


@pytest.mark.fast
def test_a_run_starts_at_ln_2_and_learns_to_prefer_the_chosen_answers(tmp_path):
    config, lines = make_config(tmp_path), []

    model = train_logged(config, tmp_path / "run", lines)

    events = read_events(tmp_path / "run" / "metrics.jsonl")
    evaluations = [e for e in events if e["event"] == "eval"]
    for split in ("train", "validation"):
        first = next(e for e in evaluations if e["split"] == split)
        assert (first["step"], first["margin"], first["accuracy"]) == (0, 0, 0.5)
        assert first["loss"] == pytest.approx(np.log(2), abs=1e-9)
    (test,) = (e for e in evaluations if e["split"] == "test")
    assert test["margin"] > 0
    assert test["accuracy"] > 0.6
    assert test["loss"] < np.log(2)
    assert model.chat_template == TEMPLATE.source
    assert any("dropped  1 pairs with equal answers" in line for line in lines)
    meta = json.loads((tmp_path / "run" / "meta.json").read_text())
    assert set(meta["reference"]) == {"train", "validation", "test"}
    finished = train(config, tmp_path / "run")
    jax.tree.map(np.testing.assert_array_equal, finished.params, model.params)


def test_log_probabilities_are_those_of_the_answers_alone(tmp_path):
    make_config(tmp_path)
    start, eot = start_model(), start_model().tokenizer.eot_token
    pairs, _ = read_preference_pairs(tmp_path / "pairs.json")
    examples = [tokenize_pair(pair, start, TEMPLATE, 32) for pair in pairs[:2]]
    batches = make_batches(examples, rows=2, pad_id=eot)

    logprob_P2 = sequence_logprobs(RunConfig(model=start.config), start.params, batches)

    for n, pair in enumerate(pairs[:2]):
        for side, answer in enumerate((pair.chosen, pair.rejected)):
            text = f"Q: {pair.prompt[-1]['content']}\nA: {answer}"
            ids = [*start.tokenizer.encode(text), eot]
            logit_BTV = apply(start.config, start.params, jnp.array([ids[:-1]]))
            positions = jnp.arange(len(ids) - 1)
            logprob_T = jax.nn.log_softmax(logit_BTV)[0, positions, jnp.array(ids[1:])]
            expected = float(logprob_T[-len(answer) - 1 :].sum())
            assert logprob_P2[n, side] == pytest.approx(expected, abs=1e-4)


def test_the_loss_is_that_of_the_paper():
    logratio_B2 = jnp.array([[3.0, 1.0], [-1.0, 2.0]])

    expected = -np.log(1 / (1 + np.exp(-0.5 * np.array([2.0, -3.0]))))

    np.testing.assert_allclose(dpo_loss(logratio_B2, 0.5), expected, rtol=1e-6)


def test_padding_changes_neither_loss_nor_gradient():
    model = start_model()
    config = RunConfig(model=model.config)
    pair = PreferencePair(({"role": "user", "content": "a"},), "bcd", "e", {}, "here")
    examples = [tokenize_pair(pair, model, TEMPLATE, 32)]
    wide = make_batches(examples, rows=3, pad_id=7).make_batch(32, [0])
    narrow = make_batches(examples, rows=1, pad_id=9).make_batch(16, [0])

    @jax.jit
    @jax.value_and_grad
    def mean_loss(params, batch):
        nats, weight = dpo_loss_fn(config, params, None, batch, None)
        return nats / weight

    results = [mean_loss(model.params, batch) for batch in (wide, narrow)]

    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), *results)
    logprobs = answer_logprobs(config, model.params, jax.tree.map(jnp.asarray, wide))
    assert np.asarray(logprobs)[1:].tolist() == [[0, 0], [0, 0]]


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"finetune__init_from": ""}, ConfigError, r"finetune\.init_from"),
        ({"data__batching": "packed"}, ConfigError, r"data\.batching='packed'"),
        ({"data__val_fraction": 0.0}, ConfigError, r"data\.val_fraction=0\.0 .* pairs"),
        ({"model__context_length": 3}, DataError, r"train pair .*model\.context_length=3"),
    ],
)
def test_invalid_data_and_options_are_reported(tmp_path, changes, error, message):
    with pytest.raises(error, match=message):
        train(make_config(tmp_path, **changes), tmp_path / "run")
