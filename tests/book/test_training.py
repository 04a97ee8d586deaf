"""Training runs of the book: initial parameters, batch order, and printed metrics."""

import dataclasses
import itertools

import jax
import numpy as np
import pytest

import gptjax
from gptjax import book
from gptjax.book import training
from gptjax.book.training import CHAPTERS
from gptjax.config import RunConfig, find_config, from_dict, load_config
from gptjax.data.classification import take
from gptjax.data.sft import collate
from gptjax.evaluation.classification import evaluate_classifier
from gptjax.tasks import classify, sft
from gptjax.tasks.train import train
from gptjax.training.loss import batch_loss
from gptjax.training.task import EvalResult
from gptjax.weights.model_folder import Model
from tests.runs import evaluations, make_task

SHAPE = {"n_layers": 1, "n_heads": 2, "d_model": 8}


def small_config(name, start="", **model):
    """A config of the book with a tiny model and two batches per evaluation."""
    table = dataclasses.asdict(load_config(find_config(f"book/{name}")))
    table["model"] |= SHAPE | {"dropout": 0.0, **model}
    table["train"] |= {"steps": 12, "sample_prompt": "", "eval_batches": 2}
    table["finetune"]["init_from"] = start
    return from_dict(RunConfig, table)


@pytest.fixture(scope="module")
def start(tmp_path_factory, shared_data):
    """Folder of a GPT-2 of a few thousand parameters."""
    folder = tmp_path_factory.mktemp("start")
    config = gptjax.GPTConfig(vocab_size=50_257, context_length=160, **SHAPE)
    params = gptjax.init(config, jax.random.key(0))
    gptjax.save(Model(config, params, gptjax.tokenizer.load("gpt2")), folder)
    return str(folder)


@pytest.fixture
def _no_evaluation(monkeypatch):
    """Only the metrics of the book are computed."""
    for task, name in ((classify, "make_classification_evaluate"), (sft, "make_sft_evaluate")):
        monkeypatch.setattr(task, name, lambda *_: lambda model, step, last: EvalResult([], ""))


def book_metrics(task, step):
    return dict(task.evaluate(task.init_state, step, False).events).get("book")


def test_chapter_5_has_the_parameters_batches_and_evaluations_of_the_book(tmp_path, shared_data):
    run, _, task = make_task(CHAPTERS["verdict"], small_config("ch05"), tmp_path)
    train(small_config("ch05", context_length=32), tmp_path / "run")

    generator = book.TorchGenerator(123)
    params = book.init_params(run.config.model, generator)
    jax.tree.map(np.testing.assert_array_equal, task.init_state.params, params)
    rows = training.load_verdict_rows(256)["train"]
    epochs = book.epochs(18, 2, generator, eval_every=5)
    order = itertools.islice(itertools.chain.from_iterable(epochs), 12)
    for indices, batch in zip(order, task.batches(0, 12), strict=True):
        np.testing.assert_array_equal(batch["tokens"], rows[indices][:, :-1])
        np.testing.assert_array_equal(batch["targets"], rows[indices][:, 1:])
    steps = [e["step"] for e in evaluations(tmp_path / "run", "validation")]
    assert steps == [0, 1, 6, 11, 12]  # the book's 0, 5 and 10, and the ends


@pytest.mark.usefixtures("_no_evaluation")
def test_chapter_6_has_the_head_batches_and_metrics_of_the_book(tmp_path, start):
    _, data, task = make_task(CHAPTERS["sms-spam"], small_config("ch06", start), tmp_path)

    kernel = book.TorchGenerator(123).uniform((2, 8), -(8**-0.5), 8**-0.5)
    np.testing.assert_array_equal(task.init_state.params["head"]["kernel"], kernel.T)
    order = next(book.epochs(1045, 8, 123, eval_every=50, eval_after=1))
    for indices, batch in zip(order[:5], task.batches(0, 5), strict=True):
        assert batch["labels"].tolist() == [data.rows["train"].labels[n] for n in indices]
        assert batch["tokens"].shape == (8, 120)
    model = task.to_model(task.init_state)

    def mean_scores(split, batches):
        rows, ids = data.rows[split], data.ids[split]
        results = [evaluate_classifier(model, take(rows, b), [ids[n] for n in b]) for b in batches]
        return np.mean([(x.loss, x.metrics.accuracy) for x in results], axis=0)

    generator = book.TorchGenerator(123)
    for_accuracy = book.Loader(1045, 8).start_epoch(generator)[:4]
    generator.next_uint32(2 + 2)  # passes over validation and test rows
    for_loss = book.Loader(1045, 8).start_epoch(generator)[:2]
    found = book_metrics(task, 0)
    assert found["train_accuracy"] == pytest.approx(mean_scores("train", for_accuracy)[1])
    assert found["train_loss"] == pytest.approx(mean_scores("train", for_loss)[0])
    batches = [list(range(8 * n, 8 * n + 8)) for n in range(4)]
    assert found["test_accuracy"] == pytest.approx(mean_scores("test", batches)[1])
    assert found["test_loss"] == pytest.approx(mean_scores("test", batches[:2])[0])
    assert set(book_metrics(task, 1)) == {"train_loss", "validation_loss"}
    assert book_metrics(task, 2) is None


@pytest.mark.usefixtures("_no_evaluation")
def test_chapter_7_has_the_batches_and_metrics_of_the_book(tmp_path, start):
    _, data, task = make_task(CHAPTERS["instructions"], small_config("ch07", start), tmp_path)

    lengths = [batch["tokens"].shape[1] for batch in task.batches(0, 10)]
    assert lengths == [61, 76, 73, 68, 65, 72, 80, 67, 62, 75]
    model, metrics = task.to_model(task.init_state), book_metrics(task, 0)
    loss_fn = jax.jit(lambda batch: batch_loss(model.config, model.params, batch, chunk_size=8))
    order = book.Loader(935, 8).start_epoch(book.TorchGenerator(123))
    for split, batches in {"train": order[:2], "validation": [range(8), range(8, 16)]}.items():
        losses = []
        for rows in batches:
            examples = [[data.examples[split][n]] for n in rows]
            loss, weight = loss_fn(collate(examples, 96, data.inputs.tokenizer.eot_token))
            losses.append(float(loss / weight))
        assert metrics[f"{split}_loss"] == pytest.approx(np.mean(losses), rel=1e-6)
