"""DPO: the loss of the paper, the reference model, and runs."""

import dataclasses
import json

import jax
import numpy as np
import pytest

import gptjax
from gptjax.config import RunConfig
from gptjax.data.conversations import PreferencePair
from gptjax.data.sft import PreferenceBatches
from gptjax.errors import ConfigError, DataError
from gptjax.model.gpt import apply
from gptjax.tasks import dpo
from gptjax.tasks.dpo import dpo_loss_fn, sequence_logprobs, tokenize_pair
from gptjax.tasks.train import train
from gptjax.tokenizer.chat_template import load_chat_template
from gptjax.training.task import RunContext
from tests.runs import config_with, evaluations, train_logged
from tests.small_models import make_model

TEMPLATE = load_chat_template("qa")
START = dataclasses.replace(
    make_model(context_length=32, n_layers=1), chat_template=TEMPLATE.source
)
CONFIG = RunConfig(model=START.config)
USER = {"role": "user", "content": "x"}


def make_rows():
    """The chosen answer is in capitals."""
    words = ["sky", "sea", "sun", "ant", "elm", "ice", "oak", "owl", "rye", "yew"]
    rows = [{"prompt": w, "chosen": w.upper(), "rejected": w} for w in words * 2]
    return [*rows, {"prompt": "x", "chosen": "same", "rejected": "same"}]


def make_config(folder, **changes) -> RunConfig:
    (folder / "pairs.json").write_text(json.dumps(make_rows()))
    gptjax.save(START, folder / "start")
    table = {
        "data": {"source": str(folder / "pairs.json"), "batch_size": 4},
        "optim": {"warmup_steps": 2, "peak_lr": 2e-3},
        "train": {"task": "dpo", "steps": 20, "eval_every": 20},
        "finetune": {"init_from": str(folder / "start")},
    }
    return config_with(table, **changes)


def test_a_run_starts_at_ln_2_and_learns_to_prefer_the_chosen_answers(tmp_path):
    config, lines, run_dir = make_config(tmp_path), [], tmp_path / "run"

    model = train_logged(config, run_dir, lines)

    for split in ("train", "validation"):
        first = evaluations(run_dir, split)[0]
        assert (first["step"], first["margin"], first["accuracy"]) == (0, 0, 0.5)
        assert first["loss"] == pytest.approx(np.log(2), abs=1e-9)
    (test,) = evaluations(run_dir, "test")
    assert test["margin"] > 0
    assert test["accuracy"] > 0.6
    assert test["loss"] < np.log(2)
    assert model.chat_template == TEMPLATE.source
    assert any("dropped  1 pairs with equal answers" in line for line in lines)


@pytest.mark.fast
def test_log_probabilities_are_those_of_the_answers_alone_whatever_the_padding():
    eot, examples, expected = START.tokenizer.eot_token, [], []
    apply_fn = jax.jit(apply, static_argnums=0)
    for word in ("sky", "a"):
        answers, prompt = (2 * word, word.upper()), f"Q: {word}\nA: "
        pair = PreferencePair(({"role": "user", "content": word},), *answers, {}, "")
        examples.append(tokenize_pair(pair, START, TEMPLATE, 32))
        for answer in answers:
            ids = [*START.tokenizer.encode(prompt + answer), eot]
            tokens = np.array([ids + [0] * (32 - len(ids))])
            logprob_TV = jax.nn.log_softmax(apply_fn(START.config, START.params, tokens)[0])
            answer_positions = range(len(prompt), len(ids))
            expected.append(sum(float(logprob_TV[t - 1, ids[t]]) for t in answer_positions))

    reference_P2 = np.array([[-3, -1], [0, -5]], np.float32)
    for rows, pad_id, length in ((2, eot, 16), (3, 7, 32)):
        batches = PreferenceBatches(
            examples, reference_P2, rows=rows, bucket_lengths=[length], pad_id=pad_id, seed=0
        )
        logprob_P2 = sequence_logprobs(CONFIG, START.params, batches)
        np.testing.assert_allclose(logprob_P2.ravel(), expected, atol=1e-4)

    # A row of padding counts in neither sum. Loss: Rafailov et al. 2023, equation 7.
    loss_fn = jax.jit(lambda params, batch: dpo_loss_fn(CONFIG, params, None, batch, None))
    loss, weight = loss_fn(START.params, batches.make_batch(32, [0, 1]))
    chosen_P, rejected_P = (logprob_P2 - reference_P2).T
    beta = CONFIG.finetune.dpo_beta
    expected_P = -np.log(1 / (1 + np.exp(-beta * (chosen_P - rejected_P))))
    assert weight == 2
    assert float(loss) == pytest.approx(expected_P.sum(), rel=1e-5)


def test_evaluations_during_training_are_bounded(tmp_path, monkeypatch):
    rows = np.zeros((9, 2), np.float32)
    pair = tokenize_pair(PreferencePair((USER,), "a", "b", {}, ""), START, TEMPLATE, 32)
    batches = PreferenceBatches([pair] * 9, rows, rows=4, bucket_lengths=[32], pad_id=0)
    config, sizes = make_config(tmp_path, train__eval_batches=2), []
    values = {"loss": 0.0, "margin": 0.0, "accuracy": 0.0}
    monkeypatch.setattr(
        dpo, "evaluate_pairs", lambda *args: sizes.append(len(args[2].lengths)) or values
    )

    splits = {"train": batches, "validation": batches}
    dpo.make_dpo_evaluate(RunContext(config, tmp_path), splits)(START, 0, True)

    assert sizes == [8, 8]


def test_invalid_data_and_options_are_reported(tmp_path):
    for changes, error, message in [
        ({"finetune__init_from": ""}, ConfigError, r"finetune\.init_from"),
        ({"data__batching": "packed"}, ConfigError, r"data\.batching='packed'"),
        ({"data__val_fraction": 0.0}, ConfigError, r"data\.val_fraction=0\.0 .* pairs"),
        ({"model__context_length": 3}, DataError, r"train pair .*model\.context_length=3"),
    ]:
        with pytest.raises(error, match=message):
            train(make_config(tmp_path, **changes), tmp_path / "run")
