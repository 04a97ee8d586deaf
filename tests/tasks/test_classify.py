"""Classifiers: padding, frozen parameters, resuming, the best model, commands."""

import csv
import dataclasses
import json
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gptjax
from gptjax.checkpoint.retention import list_steps
from gptjax.cli.main import main
from gptjax.config import GPTConfig, RunConfig, from_dict
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


def logits_of(model, tokens, lengths):
    return class_logits(model.config, model.params, jnp.array(tokens), jnp.array(lengths))


@pytest.mark.fast
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("pool", POOLS)
def test_padding_changes_no_logit(pool, causal):
    model, row = make_model(pool=pool, causal=causal), list(range(5))

    alone = logits_of(model, [row], [5])
    padded = logits_of(model, [row + [0] * 20, row + [256] * 20], [5, 5])

    np.testing.assert_allclose(padded, jnp.concatenate([alone, alone]), atol=1e-5)


def test_pool_position_reads_the_last_position_with_padding():
    padded = [[*range(5), *[256] * 20]]

    model = make_model(pool="position")
    last = dataclasses.replace(model, config=dataclasses.replace(model.config, pool="last"))

    np.testing.assert_allclose(
        logits_of(model, padded, [5]), logits_of(last, padded, [25]), atol=1e-5
    )


def test_only_without_a_causal_mask_early_positions_depend_on_later_ones():
    for causal in (True, False):
        model = make_model(pool="first", causal=causal)
        one, other = logits_of(model, [[1, 2, 3, 4], [1, 2, 3, 5]], [4, 4])
        assert bool((one == other).all()) == causal


@pytest.mark.parametrize("pool", POOLS)
def test_a_text_has_the_same_probabilities_alone_and_among_others(pool):
    model = make_model(pool=pool)
    texts = ["x", "some words", "a" * 100, "more", "x"]

    predictions = gptjax.classify(model, texts)

    for text, prediction in zip(texts, predictions, strict=True):
        (alone,) = gptjax.classify(model, [text])
        assert alone.label == prediction.label
        assert alone.probability == pytest.approx(prediction.probability, abs=1e-5)
        assert sum(prediction.probabilities.values()) == pytest.approx(1, abs=1e-5)


def test_the_loss_is_that_of_the_rows_with_weight():
    logit_BC = jnp.array([[0.0, 1.0], [5.0, 5.0], [2.0, 0.0]])

    nats, weight = classification_loss(logit_BC, jnp.array([1, 0, 1]), jnp.array([1.0, 0.0, 1.0]))

    assert weight == 2
    expected = np.log(1 + np.exp(-1)) + np.log(1 + np.exp(2))
    assert float(nats) == pytest.approx(expected, rel=1e-6)


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
def finished(tmp_path_factory):
    """A finished run: its config, folder, model and progress lines."""
    folder, lines = tmp_path_factory.mktemp("classes"), []
    config = make_config(folder)
    model = train_logged(config, folder / "run", lines)
    return config, folder / "run", model, lines


def evaluations(folder, split):
    events = read_events(folder / "metrics.jsonl")
    return [e for e in events if e["event"] == "eval" and e["split"] == split]


def test_a_run_keeps_its_best_model_and_writes_a_report(finished):
    config, folder, model, lines = finished
    best = max(evaluations(folder, "validation"), key=lambda e: (e["accuracy"], -e["loss"]))

    _, data = load_classification_data(RunContext(config, folder))
    result = evaluate_classifier(model, data.rows["validation"], data.ids["validation"])
    assert result.metrics.accuracy == best["accuracy"] > 0.8
    assert result.loss == pytest.approx(best["loss"], rel=1e-6)
    assert model.labels == ("other", "vowel")
    names = "config.toml meta.json loss.png accuracy.png confusion.png report.md"
    for name in names.split():
        assert (folder / name).exists(), name
    (test,) = evaluations(folder, "test")
    (done,) = [line for line in lines if line.startswith("done")]
    assert f"test accuracy {test['accuracy']:.4f}" in done
    counts = [data.rows["test"].labels.count(label) for label in (0, 1)]
    assert f"baseline: {max(counts) / sum(counts):.4f}" in done
    num_compiled = sum(line.startswith("compiled") for line in lines)
    assert any(f"{num_compiled} compiled shapes" in line for line in lines)


@pytest.mark.parametrize("trainable", ["last-block", "lora"])
def test_an_interrupted_and_resumed_run_equals_the_uninterrupted_one(
    tmp_path, monkeypatch, trainable
):
    """Also if metrics.jsonl was deleted in between."""
    changes = {"finetune__trainable": trainable, "train__steps": 20}
    config = make_config(tmp_path, 17, **changes)
    whole = train(config, tmp_path / "whole")
    save_checkpoint = trainer.save_checkpoint

    def save_and_interrupt(run, state, step, *args):
        save_checkpoint(run, state, step, *args)
        if step == 10:
            raise Interrupted("here")

    monkeypatch.setattr(trainer, "save_checkpoint", save_and_interrupt)
    with pytest.raises(Interrupted):
        train(config, tmp_path / "run")
    monkeypatch.undo()
    if is_deleted := trainable == "last-block":
        (tmp_path / "run" / "metrics.jsonl").unlink()
    resumed = train(config, tmp_path / "run")

    jax.tree.map(np.testing.assert_array_equal, resumed.params, whole.params)
    for split in ("train", "validation", "test"):
        expected = evaluations(tmp_path / "whole", split)
        expected = [event for event in expected if event["step"] > 10 or not is_deleted]
        assert evaluations(tmp_path / "run", split) == expected


def test_a_signal_during_a_later_compilation_stops_the_run_before_its_step(tmp_path, monkeypatch):
    steps, aot_compile = [], trainer.aot_compile

    def interrupt(run, step_fn, state, *args):
        steps.append(int(state.step))
        if len(steps) == 2:
            signal.raise_signal(signal.SIGTERM)
        return aot_compile(run, step_fn, state, *args)

    monkeypatch.setattr(trainer, "aot_compile", interrupt)
    with pytest.raises(Interrupted, match="all progress is saved"):
        train(make_config(tmp_path, train__steps=20), tmp_path / "run")

    assert steps[0] < steps[1] == max(list_steps(tmp_path / "run" / "checkpoints"))


@pytest.mark.parametrize("trainable", ["last-two-blocks", "lora"])
def test_frozen_parameters_do_not_change(tmp_path, trainable):
    start = make_model(n_classes=0, head_bias=False, n_layers=3)
    start = dataclasses.replace(start, labels=())
    gptjax.save(start, tmp_path / "start")
    config = make_config(
        tmp_path,
        17,
        finetune__trainable=trainable,
        finetune__init_from=str(tmp_path / "start"),
        finetune__lora_targets="mlp/up",
        train__steps=5,
        train__eval_every=5,
    )

    model = train(config, tmp_path / "run")

    trained_blocks = [1, 2] if trainable == "last-two-blocks" else []
    expected = start.params
    if trainable == "lora":
        adapters = load_adapters(tmp_path / "run" / "adapters.safetensors")
        expected = merge_adapters(start.params, adapters)
        kernels = (p["blocks"]["mlp"]["up"]["kernel"] for p in (expected, start.params))
        assert not np.array_equal(*kernels)
    for name in ("token_embedding", "position_embedding"):
        jax.tree.map(np.testing.assert_array_equal, model.params[name], expected[name])
    for layer in range(3):
        is_equal = jax.tree.map(
            lambda a, b, n=layer: np.array_equal(a[n], b[n]),
            model.params["blocks"],
            expected["blocks"],
        )
        assert jax.tree.all(is_equal) == (layer not in trained_blocks)


def test_the_next_token_loss_can_be_added(tmp_path):
    config = make_config(
        tmp_path,
        17,
        finetune__lm_loss_weight=0.5,
        train__steps=20,
        train__accumulate=2,
        model__dropout=0.1,
    )

    train(config, tmp_path / "run")

    events = read_events(tmp_path / "run" / "metrics.jsonl")
    losses = [e["loss"] for e in events if e["event"] == "train"]
    assert losses[-1] < losses[0]
    assert losses[0] > 2  # it contains half of ln 257


def test_invalid_models_texts_and_options_are_reported(tmp_path):
    base_model = dataclasses.replace(make_model(n_classes=0, head_bias=False), labels=())

    with pytest.raises(ModelError, match="labels"):
        gptjax.classify(base_model, ["x"])
    with pytest.raises(DataError, match="text 2"):
        gptjax.classify(make_model(), ["x", ""])
    for option, value in {"val_fraction": 0.0, "batching": "packed"}.items():
        with pytest.raises(ConfigError, match=rf"data\.{option}={value!r}"):
            train(make_config(tmp_path, **{f"data__{option}": value}), tmp_path / option)
    with pytest.raises(ConfigError, match=r"model\.n_classes=7"):
        train(make_config(tmp_path, model__n_classes=7), tmp_path / "run")


def test_labels_are_saved_with_the_model(tmp_path):
    model, ids = make_model(), [[1, 2, 3]]
    gptjax.save(model, tmp_path)

    loaded = gptjax.load(tmp_path)

    assert loaded.labels == model.labels
    np.testing.assert_array_equal(predict_probs(loaded, ids), predict_probs(model, ids))
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"labels": ["a"]}))
    with pytest.raises(ModelError, match="1 labels for 3"):
        gptjax.load(tmp_path)


def test_the_command_line_classifies_and_evaluates_texts_and_files(finished, tmp_path, capsys):
    folder = str(finished[1])
    (tmp_path / "in.csv").write_text("id,text\n1,abba\n2,dodo\n")

    assert main(["classify", folder, "abba", "dodo"]) == 0
    lines = capsys.readouterr().out.splitlines()
    files = ["--file", str(tmp_path / "in.csv"), "--out", str(tmp_path / "out.csv")]
    assert main(["classify", folder, *files]) == 0
    rows = list(csv.DictReader((tmp_path / "out.csv").read_text().splitlines()))

    assert [line.split()[0] for line in lines] == [row["label"] for row in rows]
    assert [row["id"] for row in rows] == ["1", "2"]
    words = str(finished[1].parent / "words.csv")
    capsys.readouterr()
    assert main(["eval", folder, "--classification-data", words, "--json"]) == 0
    numbers = json.loads(capsys.readouterr().out)
    assert numbers["texts"] == 120
    assert numbers["accuracy low 95%"] <= numbers["accuracy"] > 0.8
    (tmp_path / "new.csv").write_text("text,label\nabba,vowel\ndodo,new\n")
    assert main(["eval", folder, "--classification-data", str(tmp_path / "new.csv")]) == 2
    assert "'new'" in capsys.readouterr().err
    assert main(["classify", folder, "--file", "x.csv"]) == 2
    assert "--out" in capsys.readouterr().err
