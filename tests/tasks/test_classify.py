"""Classifiers: padding, frozen parameters, resuming, the best model, commands."""

import csv
import dataclasses
import functools
import io
import json
import math
import shutil
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gptjax
from gptjax.cli.main import main
from gptjax.config import FinetuneConfig, RunConfig
from gptjax.data.classification import ClassificationBatches, encode_truncated
from gptjax.errors import ConfigError, DataError, ModelError
from gptjax.evaluation.classification import ClassificationResult, evaluate_classifier
from gptjax.evaluation.metrics import classification_metrics
from gptjax.inference.classify import encode_texts
from gptjax.model.classifier import class_logits
from gptjax.model.lora import merge_adapters
from gptjax.tasks import classify
from gptjax.tasks.classify import classification_loss_fn, load_classification_data
from gptjax.tasks.train import train
from gptjax.training.finetune import initial_params
from gptjax.training.run_dir import RUN_FILES, RUN_FOLDERS
from gptjax.training.task import RunContext
from gptjax.weights.model_folder import load_adapters
from tests.runs import capture_lines, config_with, delete_after, evaluations, train_logged
from tests.small_models import assert_same, make_model

BASE = make_model(context_length=32, n_layers=1, n_classes=3, head_bias=True)
MODEL = dataclasses.replace(BASE, labels=("a", "b", "c"))


@pytest.mark.fast
def test_logits_depend_on_no_padding_and_a_causal_mask_hides_later_tokens():
    row, length = list(range(5)), jnp.full(4, 5)
    tokens = jnp.array([row + [0] * 15, row + [256] * 15, [*range(20)], row[:4] + [9] * 16])

    @functools.partial(jax.jit, static_argnums=0)
    def logits(config):
        found = [(tokens, length), (jnp.array([row]), length[:1]), (tokens, jnp.full(4, 20))]
        return [class_logits(config, BASE.params, *batch) for batch in found]

    for causal in (True, False):
        config = dataclasses.replace(BASE.config, causal=causal)
        last = logits(dataclasses.replace(config, pool="last"))[2]
        at_end = logits(dataclasses.replace(config, pool="position"))[0]
        np.testing.assert_allclose(at_end, last, atol=1e-5)  # reads the last, with padding
        for pool in ("last", "first", "mean"):
            padded, alone, _ = logits(dataclasses.replace(config, pool=pool))
            for n in range(3):
                np.testing.assert_allclose(padded[n], alone[0], atol=1e-5)
            is_hidden = pool == "first" and causal
            assert np.allclose(padded[3], alone[0], atol=1e-5) == is_hidden


def test_the_next_token_loss_is_added_as_a_mean_over_the_tokens_of_the_batch():
    rows = [[1, 2, 3], [5, 6]]
    batches = ClassificationBatches(rows, [0, 2], rows=3, bucket_lengths=[4], pad_id=7)
    batch = jax.tree.map(jnp.asarray, batches.make_batch(4, [0, 1]))

    @functools.partial(jax.jit, static_argnums=0)
    def loss(lm_loss_weight):
        finetune = FinetuneConfig(lm_loss_weight=lm_loss_weight)
        config = RunConfig(model=BASE.config, finetune=finetune)
        return classification_loss_fn(config, BASE.params, None, batch, None)

    (plain, count), (total, same_count) = loss(0.0), loss(0.5)

    decoder, tokens = dataclasses.replace(BASE.config, n_classes=0), batch["tokens"]
    logit_BTV = jax.jit(functools.partial(gptjax.apply, decoder))(BASE.params, tokens)
    loss_BT = optax.softmax_cross_entropy_with_integer_labels(logit_BTV[:, :-1], tokens[:, 1:])
    next_token = (loss_BT[0, :2].sum() + loss_BT[1, 0]) / 3
    assert count == same_count == 2
    assert float(total) == pytest.approx(float(plain + 0.5 * 2 * next_token), rel=1e-5)


def make_config(folder, **changes):
    """Words that begin with a vowel, or not."""
    rng = np.random.default_rng(0)
    words = ["".join(rng.choice(list("abcdeiou"), rng.integers(2, 25))) for _ in range(120)]
    rows = [f"{word},{'vowel' if word[0] in 'aeiou' else 'other'}\n" for word in words]
    (folder / "words.csv").write_text("text,label\n" + "".join(rows))
    data = {"source": str(folder / "words.csv"), "tokenizer": "bytes"}
    table = {
        "model": {"context_length": 32, "n_layers": 1, "n_heads": 2, "d_model": 16},
        "data": {**data, "batch_size": 8, "val_fraction": 0.2},
        "optim": {"warmup_steps": 2, "peak_lr": 3e-2},
        "train": {"task": "classify", "steps": 40, "eval_every": 10, "log_every": 5},
        "checkpoint": {"every": 10},
    }
    return config_with(table, **{"model__pool": "first"} | changes)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run: its config, folder, model and progress lines."""
    folder, lines = tmp_path_factory.mktemp("classes"), []
    config = make_config(folder, finetune__trainable="lora", finetune__lora_targets="mlp/up")
    model = train_logged(config, folder / "run", lines)
    return config, folder / "run", model, lines


def test_a_run_keeps_its_best_model_and_writes_a_report(finished):
    config, folder, model, lines = finished
    best = max(evaluations(folder, "validation"), key=lambda e: (e["accuracy"], -e["loss"]))

    _, data = load_classification_data(RunContext(config, folder))
    result = evaluate_classifier(model, data.rows["validation"], data.ids["validation"])
    assert result.metrics.accuracy == best["accuracy"] > 0.8
    assert result.loss == pytest.approx(best["loss"], rel=1e-6)
    assert model.labels == ("other", "vowel")
    names = "config.toml meta.json loss.png accuracy.png confusion.png report.md"
    assert all((folder / name).exists() for name in names.split())
    assert {path.name for path in folder.iterdir()} <= {*RUN_FILES, *RUN_FOLDERS}
    (test,) = evaluations(folder, "test")
    assert any("--to hf: " in line and "model.pool=first" in line for line in lines)
    (done,) = [line for line in lines if line.startswith("done")]
    assert f"test accuracy {test['accuracy']:.4f}" in done


def test_left_out_rows_are_reported_before_training(tmp_path):
    for option, value in {"data__split_strategy": "book", "data__balance_classes": True}.items():
        config = make_config(tmp_path, **{option: value})

        _, data = load_classification_data(RunContext(config, tmp_path))

        (line,) = [x for x in data.inputs.summary_lines if x.startswith("dropped ")]
        assert f" {120 - sum(map(len, data.rows.values()))} of 120 rows: " in line
        assert option.replace("__", ".") in line


def test_only_adapters_and_head_are_trained(finished):
    config, folder, model, _ = finished
    run, data = load_classification_data(RunContext(config, folder))
    start = initial_params(run.config.model, None, data.inputs.tokenizer, jax.random.key(0))
    expected = merge_adapters(start, load_adapters(folder / "adapters.safetensors"))

    kernels = [p["blocks"]["mlp"]["up"]["kernel"] for p in (start, expected)]
    assert not np.array_equal(*kernels)
    assert not np.array_equal(model.params["head"]["kernel"], expected["head"]["kernel"])
    frozen = expected | {"head": model.params["head"]}
    jax.tree.map(np.testing.assert_array_equal, model.params, frozen)


def test_a_resumed_run_equals_the_uninterrupted_one(finished, tmp_path):
    config, folder, model, _ = finished
    run_dir = shutil.copytree(folder, tmp_path / "run")
    delete_after(run_dir / "checkpoints", 30)

    resumed = train(config, run_dir)

    jax.tree.map(np.testing.assert_array_equal, resumed.params, model.params)
    for split in ("train", "validation", "test"):
        assert evaluations(run_dir, split) == evaluations(folder, split)


def test_an_unfinished_run_whose_checkpoints_have_only_adapters_is_its_best_model(
    finished, tmp_path
):
    _, folder, model, _ = finished
    run_dir, lines = shutil.copytree(folder, tmp_path / "run"), []
    best = max(evaluations(folder, "validation"), key=lambda e: (e["accuracy"], -e["loss"]))
    delete_after(run_dir / "checkpoints", 30)
    with capture_lines(lines):
        assert_same(gptjax.load(run_dir), model)
    assert lines[0].startswith(f"step     {best['step']}, ")
    shutil.copytree(folder / "checkpoints", run_dir / "checkpoints", dirs_exist_ok=True)
    (run_dir / "model" / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="checkpoint 40"):
        gptjax.load(run_dir)


def test_invalid_options_are_reported(tmp_path):
    options = {"data.val_fraction": 0.0, "data.batching": "packed", "model.n_classes": 7}
    for option, value in options.items():
        config = make_config(tmp_path, **{option.replace(".", "__"): value})
        with pytest.raises(ConfigError, match=f"{option}={value!r}"):
            train(config, tmp_path / option)


def test_evaluations_during_training_are_bounded(tmp_path, monkeypatch):
    config = make_config(tmp_path, data__val_fraction=0.4, train__eval_batches=1)
    run, data = load_classification_data(RunContext(config, tmp_path))
    sizes, metrics = [], classification_metrics(np.eye(2, dtype=int))

    def evaluate_classifier(model, texts, ids):
        sizes.append((len(texts), len(ids)))
        return ClassificationResult(1.0, np.zeros((1, 2)), metrics, np.eye(2))

    monkeypatch.setattr(classify, "evaluate_classifier", evaluate_classifier)
    monkeypatch.setattr(classify, "MAX_TRAIN_ROWS", 40)
    evaluate = classify.make_classification_evaluate(run, data)
    for is_last in (False, True):
        evaluate(MODEL, 0, is_last)

    assert min(len(data.ids[split]) for split in ("train", "validation")) > 40
    assert sizes == [(32, 32), (32, 32), (40, 40), (32, 32)]


def test_texts_are_classified_the_same_alone_and_in_a_batch():
    texts = ["x", "some words", "a" * 100]

    for text, prediction in zip(texts, gptjax.classify(MODEL, texts), strict=True):
        (alone,) = gptjax.classify(MODEL, [text])
        assert alone.label == prediction.label
        assert alone.probabilities == pytest.approx(prediction.probabilities, abs=1e-5)
        assert sum(prediction.probabilities.values()) == pytest.approx(1, abs=1e-5)
    with pytest.raises(DataError, match="text 2"):
        gptjax.classify(MODEL, ["x", ""])
    with pytest.raises(ModelError, match="labels"):
        gptjax.classify(BASE, ["x"])


def test_texts_start_with_bos_in_training_and_prediction_if_the_model_expects_it():
    tokenizer = dataclasses.replace(MODEL.tokenizer, bos_token=65, add_bos=True)

    trained, num_truncated = encode_truncated(tokenizer, ["b", "c" * 9], 4)

    model = dataclasses.replace(MODEL, tokenizer=tokenizer)
    assert [trained[0], num_truncated] == [[65, 98], 1]
    assert encode_texts(model, ["b"]) == [[65, 98]]
    assert gptjax.classify(model, ["b"]) == gptjax.classify(MODEL, ["Ab"])


def test_the_command_line_classifies_and_evaluates_texts_and_files(
    finished, tmp_path, capsys, monkeypatch
):
    folder = str(finished[1])
    source, out = tmp_path / "in.csv", tmp_path / "out.csv"
    source.write_text("text,label\nabba,vowel\ndodo,new\n")

    assert main(["classify", folder, "abba", "dodo"]) == 0
    labels = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    lines = io.BytesIO(b"abba\x0c\rabba\r\n\ndodo")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(lines, encoding="utf-8"))
    assert main(["classify", folder]) == 0
    assert capsys.readouterr().out.count("\n") == 2
    assert main(["eval", folder, "--classification-data", str(source)]) == 2
    assert "'new'" in capsys.readouterr().err
    source.write_text("text\nabba\ndodo\n")
    assert main(["classify", folder, "--file", str(source), "--out", str(out)]) == 0
    rows = list(csv.DictReader(out.read_text().splitlines()))
    assert main(["eval", folder, "--classification-data", str(out), "--json"]) == 0
    numbers = json.loads(capsys.readouterr().out)

    (absent,) = {"other", "vowel"} - {labels[0]}
    out.write_text(f"label,id,text\n{labels[0]},1,abba\n")
    assert main(["eval", folder, "--classification-data", str(out)]) == 0
    assert f"classes without texts {absent}" in capsys.readouterr().out
    named = ["--text-column", "id", "--label-column", "tag"]
    assert main(["eval", folder, "--classification-data", str(out), *named]) == 2
    assert "Columns: label, id, text. Choose with --label-column" in capsys.readouterr().err
    assert labels == [row["label"] for row in rows]
    assert (numbers["texts"], numbers["accuracy"]) == (2, 1)
    nats = [-math.log(float(row["probability"])) for row in rows]
    assert numbers["loss"] == pytest.approx(sum(nats) / 2, abs=1e-5)
