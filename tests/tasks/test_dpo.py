import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gptjax
from gptjax.config import RunConfig, from_dict
from gptjax.data.conversations import read_preference_pairs
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
from gptjax.training.run_dir import hash_pytree
from gptjax.weights.model_folder import Model
from tests.runs import train_logged
from tests.small_models import make_model


def start_model() -> Model:
    made = make_model(context_length=32)
    template = load_chat_template("qa").source
    return Model(made.config, made.params, made.tokenizer, chat_template=template)


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
        table[section][option] = value
    return from_dict(RunConfig, table)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dpo")
    config, said = make_config(folder), []
    model = train_logged(config, folder / "run", said)
    return config, folder / "run", model, said


@pytest.mark.fast
def test_before_the_first_step_the_loss_is_ln_2_and_the_margin_0(unbroken):
    _, folder, _, said = unbroken
    events = read_events(folder / "metrics.jsonl")

    for split in ("train", "validation"):
        first = next(e for e in events if e.get("split") == split)
        assert first["step"] == 0
        assert first["loss"] == pytest.approx(np.log(2), abs=1e-9)
        assert first["margin"] == 0
        assert first["accuracy"] == 0.5
    step = next(e for e in events if e["event"] == "train")
    assert step["step"] == 10
    assert any("dropped  1 pairs with equal answers" in line for line in said)


def test_the_chosen_answers_win(unbroken):
    _, folder, model, _ = unbroken
    events = read_events(folder / "metrics.jsonl")

    last = [e for e in events if e.get("split") == "test"][-1]

    assert last["margin"] > 0
    assert last["accuracy"] > 0.6
    assert last["loss"] < np.log(2)
    assert model.chat_template == start_model().chat_template


def test_the_reference_is_what_the_start_says_and_does_not_move(unbroken):
    config, folder, _, _ = unbroken
    start = gptjax.load(folder.parent / "start")
    pairs, _ = read_preference_pairs(folder.parent / "pairs.json")
    template = load_chat_template("qa")
    meta = json.loads((folder / "meta.json").read_text())

    examples = [tokenize_pair(pair, start, template, 32) for pair in pairs[:4]]
    batches = PreferenceBatches(
        examples, np.zeros((4, 2), np.float32), rows=4, bucket_lengths=[32], pad_id=256
    )
    run = from_dict(RunConfig, {"model": {"context_length": 32}})
    config = run.__class__(model=start.config)
    found = sequence_logprobs(config, start.params, batches)

    for n, pair in enumerate(pairs[:4]):
        for side, answer in enumerate((pair.chosen, pair.rejected)):
            text = f"Q: {pair.prompt[-1]['content']}\nA: "
            ids = [*start.tokenizer.encode(text), *start.tokenizer.encode(answer), 256]
            logit_BTV = apply(start.config, start.params, jnp.array([ids[:-1]]))
            logprob = jax.nn.log_softmax(logit_BTV)[0, jnp.arange(len(ids) - 1)]
            chosen = logprob[jnp.arange(len(ids) - 1), jnp.array(ids[1:])]
            assert found[n, side] == pytest.approx(
                float(chosen[-len(answer) - 1 :].sum()), abs=1e-4
            )
    assert set(meta["reference"]) == {"train", "validation", "test"}
    again = sequence_logprobs(config, start.params, batches)
    assert hash_pytree(again) == hash_pytree(found)


def test_a_finished_run_computes_the_same_reference_again(unbroken, monkeypatch):
    config, folder, model, _ = unbroken

    again = train(config, folder)

    jax.tree.map(np.testing.assert_array_equal, again.params, model.params)


def test_the_loss_is_that_of_the_paper():
    gain_B2 = jnp.array([[3.0, 1.0], [-1.0, 2.0]])

    expected = -np.log(1 / (1 + np.exp(-0.5 * np.array([2.0, -3.0]))))

    np.testing.assert_allclose(dpo_loss(gain_B2, 0.5), expected, rtol=1e-6)


def test_padding_changes_neither_loss_nor_gradient():
    model, template = start_model(), load_chat_template("qa")
    config = RunConfig(model=model.config)
    pair = read_pairs_of([{"prompt": "a", "chosen": "bcd", "rejected": "e"}], model, template)
    zero_12 = np.zeros((1, 2), np.float32)
    wide = PreferenceBatches(pair, zero_12, rows=3, bucket_lengths=[32], pad_id=7)
    narrow = PreferenceBatches(pair, zero_12, rows=1, bucket_lengths=[16], pad_id=9)
    wide, narrow = wide.make_batch(32, [0]), narrow.make_batch(16, [0])

    @jax.jit
    @jax.value_and_grad
    def value(params, batch):
        nats, weight = dpo_loss_fn(config, params, None, batch, None)
        return nats / weight

    results = [value(model.params, batch) for batch in (wide, narrow)]

    assert float(results[0][0]) == pytest.approx(float(results[1][0]), rel=1e-5)
    close = lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5)  # noqa: E731
    jax.tree.map(close, results[0][1], results[1][1])
    nats = answer_logprobs(config, model.params, jax.tree.map(jnp.asarray, wide))
    assert np.asarray(nats)[1:].tolist() == [[0, 0], [0, 0]]


def read_pairs_of(rows, model, template):
    from gptjax.data.conversations import PreferencePair

    pairs = [
        PreferencePair(
            ({"role": "user", "content": row["prompt"]},),
            row["chosen"],
            row["rejected"],
            row,
            "here",
        )
        for row in rows
    ]
    return [tokenize_pair(pair, model, template, 32) for pair in pairs]


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"finetune__init_from": ""}, ConfigError, "set finetune.init_from"),
        ({"data__batching": "packed"}, ConfigError, "data.batching='packed'"),
        ({"data__val_fraction": 0.0}, ConfigError, "data.val_fraction=0.0 .* pairs"),
        ({"model__context_length": 3}, DataError, "no train pair of .* fit"),
    ],
)
def test_a_run_that_cannot_be_says_why(tmp_path, changes, error, message):
    if "model__context_length" in changes:
        config = make_config(tmp_path)
        model = from_dict(RunConfig, {"model": {"context_length": 3}}).model
        config = type(config)(
            model=model, data=config.data, train=config.train, finetune=config.finetune
        )
    else:
        config = make_config(tmp_path, **changes)

    with pytest.raises(error, match=message):
        train(config, tmp_path / "run")
