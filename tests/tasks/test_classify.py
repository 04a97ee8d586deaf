"""Classifiers: padding and company change nothing, and a run keeps its best model."""

import csv
import dataclasses
import json
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import gptjax
from gptjax.checkpoint.retention import list_steps
from gptjax.cli.main import main
from gptjax.config import GPTConfig, RunConfig, from_dict
from gptjax.data.bucketing import buckets
from gptjax.data.classification import ClassificationBatches
from gptjax.errors import ConfigError, DataError, ModelError
from gptjax.evaluation.classification import evaluate_classifier
from gptjax.inference.classify import predict_probs
from gptjax.model.classifier import class_logits
from gptjax.model.lora import merge_adapters
from gptjax.runtime.preemption import Interrupted
from gptjax.tasks.classify import load_classification_data
from gptjax.tasks.train import train
from gptjax.training import trainer
from gptjax.training.loss import classification_loss
from gptjax.training.metrics import read_events
from gptjax.training.task import RunContext
from gptjax.training.trainer import save_checkpoint
from gptjax.weights.model_folder import Model, load_adapters
from tests.runs import train_logged

class_logits = jax.jit(class_logits, static_argnums=0)
POOLS = ["last", "first", "mean"]


def make_model(**changes):
    shape = {"context_length": 32, "n_layers": 2, "n_heads": 2, "d_model": 16}
    shape |= {"n_classes": 3, "head_bias": True}
    tokenizer = gptjax.tokenizer.load("bytes")
    config = GPTConfig(vocab_size=tokenizer.vocab_size, **(shape | changes))
    params = gptjax.init(config, jax.random.key(0))
    params = jax.tree.map(lambda leaf: leaf * 4, params)
    return Model(config, params, tokenizer, ("a", "b", "c"))


@pytest.mark.fast
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("pool", POOLS)
def test_padding_changes_no_logit_whatever_it_holds(pool, causal):
    model = make_model(pool=pool, causal=causal)
    row, length_B = jnp.arange(5)[None], jnp.array([5])

    alone = class_logits(model.config, model.params, row, length_B)
    for fill in (0, 256):
        padded = jnp.concatenate([row, jnp.full((1, 20), fill)], axis=1)
        logits = class_logits(model.config, model.params, padded, length_B)
        np.testing.assert_allclose(logits, alone, atol=1e-5)


def test_the_position_that_the_book_reads_sees_its_padding():
    model = make_model(pool="position")
    row, length_B = jnp.arange(5)[None], jnp.array([5])
    padded = jnp.concatenate([row, jnp.full((1, 20), 256)], axis=1)

    full = class_logits(model.config, model.params, padded, length_B)
    last = class_logits(
        dataclasses.replace(model.config, pool="last"), model.params, padded, jnp.array([25])
    )

    np.testing.assert_allclose(full, last, atol=1e-5)


@pytest.mark.parametrize("pool", POOLS)
def test_a_text_alone_has_the_probabilities_that_it_has_among_others(pool):
    model = make_model(pool=pool)
    texts = ["x", "some words", "a" * 100, "more", "x"]

    together = gptjax.classify(model, texts)

    for text, verdict in zip(texts, together, strict=True):
        (alone,) = gptjax.classify(model, [text])
        assert alone.label == verdict.label
        assert alone.probability == pytest.approx(verdict.probability, abs=1e-5)
        assert sum(verdict.probabilities.values()) == pytest.approx(1, abs=1e-5)


def test_without_a_causal_mask_early_positions_see_later_ones():
    token_BT, length_B = jnp.array([[1, 2, 3, 4], [1, 2, 3, 5]]), jnp.array([4, 4])
    for causal in (True, False):
        model = make_model(pool="first", causal=causal)
        one, other = class_logits(model.config, model.params, token_BT, length_B)
        assert bool((one == other).all()) == causal


def test_the_loss_is_that_of_the_rows_that_count():
    logit_BC = jnp.array([[0.0, 1.0], [5.0, 5.0], [2.0, 0.0]])
    weight_B = jnp.array([1.0, 0.0, 1.0])

    nats, weight = classification_loss(logit_BC, jnp.array([1, 0, 1]), weight_B)

    assert weight == 2
    expected = np.log(1 + np.exp(-1)) + np.log(1 + np.exp(2))
    assert float(nats) == pytest.approx(expected, rel=1e-6)


@given(st.lists(st.integers(1, 70), min_size=1, max_size=60), st.integers(1, 9), st.integers(0, 3))
def test_an_epoch_visits_every_row_once_in_few_shapes(lengths, rows, epoch):
    ids = [[n] * length for n, length in enumerate(lengths)]
    batches = ClassificationBatches(
        ids, [0] * len(ids), rows=rows, bucket_lengths=buckets(70), pad_id=999, seed=3
    )
    first = epoch * batches.steps_per_epoch

    seen, shapes = [], set()
    for step in range(first, first + batches.steps_per_epoch):
        batch = batches.batch_at(step)
        shapes.add(batch["tokens"].shape)
        for n in np.flatnonzero(batch["loss_weights"]):
            length = batch["lengths"][n]
            seen.append(int(batch["tokens"][n, 0]))
            assert length == lengths[seen[-1]]
            assert (batch["tokens"][n, length:] == 999).all()

    assert sorted(seen) == list(range(len(ids)))
    assert len(shapes) <= len(buckets(70))


def test_epochs_differ_and_repeat():
    ids = [[n] for n in range(50)]

    def order(step):
        batches = ClassificationBatches(ids, [0] * 50, rows=50, bucket_lengths=[16], pad_id=0)
        return batches.batch_at(step)["tokens"]

    np.testing.assert_array_equal(order(1), order(1))
    assert (order(0) != order(1)).any()


def make_config(folder, shortest=2, **changes):
    """Words that begin with a vowel, or not; long ones alone need fewer programs."""
    rng = np.random.default_rng(0)
    with (folder / "words.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        for _ in range(120):
            word = "".join(rng.choice(list("abcdeiou"), rng.integers(shortest, 25)))
            writer.writerow([word, "vowel" if word[0] in "aeiou" else "other"])
    table = {
        "model": {"context_length": 32, "n_layers": 2, "n_heads": 2, "d_model": 16},
        "data": {
            "source": str(folder / "words.csv"),
            "tokenizer": "bytes",
            "batch_size": 8,
            "val_fraction": 0.2,
        },
        "optim": {"warmup_steps": 2, "peak_lr": 1e-2},
        "train": {"task": "classify", "steps": 40, "eval_every": 10, "log_every": 5},
        "checkpoint": {"every": 10},
    }
    table["model"]["pool"] = "first"
    for name, value in changes.items():
        section, option = name.split("__")
        table.setdefault(section, {})[option] = value
    return from_dict(RunConfig, table)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    folder, said = tmp_path_factory.mktemp("classes"), []
    config = make_config(folder)
    model = train_logged(config, folder / "run", said)
    return config, folder / "run", model, said


def evals(folder, split):
    events = read_events(folder / "metrics.jsonl")
    return [e for e in events if e["event"] == "eval" and e["split"] == split]


def test_a_run_leaves_its_best_model_and_a_report(unbroken):
    _, folder, model, said = unbroken
    best = max(evals(folder, "validation"), key=lambda e: (e["accuracy"], -e["loss"]))

    assert best["accuracy"] > 0.8
    assert model.labels == ("other", "vowel")
    names = "config.toml meta.json loss.png accuracy.png confusion.png report.md"
    for name in names.split():
        assert (folder / name).exists(), name
    assert len(evals(folder, "test")) == 1
    (done,) = [line for line in said if line.startswith("done")]
    assert f"test accuracy {evals(folder, 'test')[0]['accuracy']:.4f}" in done
    assert "majority-class baseline: 0." in done
    compiled = [line for line in said if line.startswith("compiled")]
    (step,) = [line for line in said if line.startswith("step     ")]
    assert f"{len(compiled)} compiled shapes" in step


def test_the_kept_model_is_the_one_that_did_best(unbroken):
    config, folder, model, _ = unbroken
    best = max(evals(folder, "validation"), key=lambda e: (e["accuracy"], -e["loss"]))
    _, sets = load_classification_data(RunContext(config, folder))

    result = evaluate_classifier(model, sets.rows["validation"], sets.ids["validation"])

    assert result.metrics.accuracy == best["accuracy"]
    assert result.loss == pytest.approx(best["loss"], rel=1e-6)


@pytest.mark.parametrize(
    ("trainable", "shortest", "lost"),
    [("all", 2, ""), ("last-block", 17, "metrics.jsonl"), ("lora", 17, "")],
)
def test_a_stopped_and_resumed_run_is_the_unbroken_one(
    tmp_path, monkeypatch, trainable, shortest, lost
):
    tuned = {"finetune__trainable": trainable, "train__steps": 20}
    config = make_config(tmp_path, shortest, **tuned)
    whole = train(config, tmp_path / "whole")
    forward = save_checkpoint

    def interrupting(run, state, step, *rest):
        forward(run, state, step, *rest)
        if step == 10:
            raise Interrupted("here")

    monkeypatch.setattr(trainer, "save_checkpoint", interrupting)
    with pytest.raises(Interrupted):
        train(config, tmp_path / "run")
    monkeypatch.undo()
    if lost:
        (tmp_path / "run" / lost).unlink()
    resumed = train(config, tmp_path / "run")

    jax.tree.map(np.testing.assert_array_equal, resumed.params, whole.params)
    for split in ("train", "validation", "test"):
        expected = evals(tmp_path / "whole", split)
        if lost:
            expected = [event for event in expected if event["step"] > 10]
        assert evals(tmp_path / "run", split) == expected


def test_asked_to_stop_while_it_compiles_again_a_run_makes_no_step_more(tmp_path, monkeypatch):
    config, before = make_config(tmp_path, train__steps=20), []
    forward = trainer.aot_compile

    def interrupting(run, step_fn, state, *rest):
        before.append(int(state.step))
        if len(before) == 2:
            signal.raise_signal(signal.SIGTERM)
        return forward(run, step_fn, state, *rest)

    monkeypatch.setattr(trainer, "aot_compile", interrupting)
    with pytest.raises(Interrupted, match="all progress is saved"):
        train(config, tmp_path / "run")

    assert before[0] < before[1]
    assert max(list_steps(tmp_path / "run" / "checkpoints")) == before[1]


@pytest.mark.parametrize("trainable", ["head", "last-block", "last-two-blocks", "lora"])
def test_frozen_parameters_come_out_bit_for_bit(tmp_path, trainable):
    (tmp_path / "start").mkdir()
    start = make_model(n_classes=0, head_bias=False, n_layers=3)
    start = dataclasses.replace(start, labels=())
    gptjax.save(start, tmp_path / "start" / "model")
    config = make_config(
        tmp_path,
        finetune__trainable=trainable,
        finetune__init_from=str(tmp_path / "start" / "model"),
        finetune__lora_targets="mlp/up",
        train__steps=5,
        train__eval_every=5,
    )

    model = train(config, tmp_path / "run")

    assert model.config.n_layers == 3
    blocks = {"head": [], "last-block": [2], "last-two-blocks": [1, 2], "lora": []}
    same = lambda a, b: bool((a == b).all())  # noqa: E731
    for name in ("token_embedding", "position_embedding"):
        assert jax.tree.all(jax.tree.map(same, model.params[name], start.params[name]))
    for layer in range(3):
        at = lambda tree, n=layer: jax.tree.map(lambda leaf: leaf[n], tree)  # noqa: E731
        equal = jax.tree.map(same, at(model.params["blocks"]), at(start.params["blocks"]))
        if trainable == "lora":
            alone = load_adapters(tmp_path / "run" / "adapters.safetensors")
            kernel = merge_adapters(start.params, alone)["blocks"]["mlp"]["up"]["kernel"]
            np.testing.assert_array_equal(kernel, model.params["blocks"]["mlp"]["up"]["kernel"])
            assert not equal["mlp"]["up"].pop("kernel")
        assert jax.tree.all(equal) == (layer not in blocks[trainable])


def test_the_next_token_loss_can_be_added(tmp_path):
    config = make_config(
        tmp_path,
        finetune__lm_loss_weight=0.5,
        train__steps=20,
        train__accumulate=2,
        model__dropout=0.1,
    )

    train(config, tmp_path / "run")

    events = read_events(tmp_path / "run" / "metrics.jsonl")
    losses = [e["loss"] for e in events if e["event"] == "train"]
    assert losses[-1] < losses[0]
    assert losses[0] > 2  # half of ln 257 is in it


def test_what_is_no_classifier_or_no_text_is_said(tmp_path):
    plain = dataclasses.replace(make_model(n_classes=0, head_bias=False), labels=())

    with pytest.raises(ModelError, match="has no labels"):
        gptjax.classify(plain, ["x"])
    with pytest.raises(DataError, match="text 2 is empty"):
        gptjax.classify(make_model(), ["x", ""])
    with pytest.raises(ConfigError, match=r"data\.val_fraction=0\.0"):
        train(make_config(tmp_path, data__val_fraction=0.0), tmp_path / "r")
    with pytest.raises(ConfigError, match=r"model\.n_classes=7"):
        train(make_config(tmp_path, model__n_classes=7), tmp_path / "run")


def test_labels_travel_with_the_model(tmp_path):
    model = make_model()
    gptjax.save(model, tmp_path / "model")

    again = gptjax.load(tmp_path / "model")

    assert again.labels == model.labels
    ids = [[1, 2, 3]]
    np.testing.assert_array_equal(predict_probs(again, ids), predict_probs(model, ids))
    path = tmp_path / "model" / "config.json"
    about = json.loads(path.read_text())
    path.write_text(json.dumps(about | {"labels": ["a"]}))
    with pytest.raises(ModelError, match="1 labels for 3 classes"):
        gptjax.load(tmp_path / "model")


def test_the_command_line_labels_texts_and_files(unbroken, tmp_path, capsys):
    _, folder, _, _ = unbroken
    (tmp_path / "in.csv").write_text("id,text\n1,abba\n2,dodo\n")

    assert main(["classify", str(folder), "abba", "dodo"]) == 0
    lines = capsys.readouterr().out.splitlines()
    files = ["--file", str(tmp_path / "in.csv"), "--out", str(tmp_path / "out.csv")]
    assert main(["classify", str(folder), *files]) == 0
    rows = list(csv.DictReader((tmp_path / "out.csv").read_text().splitlines()))

    assert [line.split()[0] for line in lines] == [row["label"] for row in rows]
    assert [row["id"] for row in rows] == ["1", "2"]
    words = str(folder.parent / "words.csv")
    assert main(["eval", str(folder), "--classification-data", words, "--json"]) == 0
    numbers = json.loads(capsys.readouterr().out)
    assert numbers["texts"] == 120
    assert numbers["accuracy low 95%"] <= numbers["accuracy"] > 0.8
    (tmp_path / "new.csv").write_text("text,label\nabba,vowel\ndodo,new\n")
    new = str(tmp_path / "new.csv")
    assert main(["eval", str(folder), "--classification-data", new]) == 2
    assert "the label 'new'" in capsys.readouterr().err
    assert main(["classify", str(folder), "--file", "x.csv"]) == 2
    assert "together with --out" in capsys.readouterr().err
