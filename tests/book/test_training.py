"""The book's training runs: its parameters and its order; and its page."""

import dataclasses
import itertools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gptjax
from gptjax import book
from gptjax.book import training
from gptjax.book.training import CHAPTERS
from gptjax.config import RunConfig, find_config, from_dict, load_config
from gptjax.data.classification import take
from gptjax.data.sft import collate
from gptjax.errors import ConfigError
from gptjax.evaluation.classification import evaluate_classifier
from gptjax.tasks import classify, sft
from gptjax.tasks.train import train
from gptjax.training.loss import batch_loss
from gptjax.training.metrics import read_events
from gptjax.training.task import EvalResult
from gptjax.weights.model_folder import Model
from tests.runs import make_task

PAGE = Path(book.__file__).parent / "README.md"


def small(name, **model):
    """A config of the book with a model of a few thousand parameters."""
    c = load_config(find_config(f"book/{name}"))
    shape = {"n_layers": 1, "n_heads": 2, "d_model": 16, "dropout": 0.0} | model
    train = dataclasses.replace(c.train, steps=12, sample_prompt="")
    return dataclasses.replace(c, model=dataclasses.replace(c.model, **shape), train=train)


def passes_of(config):
    """The epochs of chapter 5 once its parameters are drawn, evaluations included."""
    generator = book.TorchGenerator(123)
    book.init_params(config, generator)
    return book.epochs(18, 2, generator, eval_every=5)


@pytest.fixture
def start(tmp_path):
    """A GPT-2 of a few thousand parameters to fine-tune."""
    tokenizer = gptjax.tokenizer.load("gpt2")
    config = gptjax.GPTConfig(
        vocab_size=50_257, context_length=160, n_layers=1, n_heads=2, d_model=8
    )
    params = gptjax.init(config, jax.random.key(0))
    gptjax.save(Model(config, params, tokenizer), tmp_path / "start")
    return str(tmp_path / "start")


def test_chapter_5_trains_from_the_books_parameters_in_its_order(tmp_path, shared_data):
    config = small("ch05")

    model = train(config, tmp_path / "run")

    events = read_events(tmp_path / "run" / "metrics.jsonl")
    steps = [e["step"] for e in events if e.get("split") == "validation"]
    assert steps == [0, 1, 6, 11, 12]  # the book's 0, 5 and 10, and the ends
    run, _, task = make_task(CHAPTERS["verdict"], config, tmp_path)
    fresh = book.init_params(run.config.model, 123)
    jax.tree.map(np.testing.assert_array_equal, task.init_state.params, fresh)
    first, second = itertools.islice(passes_of(run.config.model), 2)
    rows = training.load_verdict_rows(256)["train"]
    for chosen, batch in zip(first, task.batches(0, 9), strict=True):
        np.testing.assert_array_equal(batch["tokens"], rows[chosen][:, :-1])
        np.testing.assert_array_equal(batch["targets"], rows[chosen][:, 1:])
    for chosen, batch in zip(second[:3], task.batches(9, 12), strict=True):
        np.testing.assert_array_equal(batch["tokens"], rows[chosen][:, :-1])
    losses = [e["loss"] for e in events if e.get("split") == "train"]
    assert losses[-1] < losses[0]
    assert model.config.vocab_size == 50_257


def started(name, start):
    """The small config of a chapter, from a model that is there."""
    config = small(name)
    tune = dataclasses.replace(config.finetune, init_from=start)
    return dataclasses.replace(config, finetune=tune)


def test_chapter_6_has_the_books_head_and_order(tmp_path, start, shared_data):
    config = started("ch06", start)

    run, sets, task = make_task(CHAPTERS["sms-spam"], config, tmp_path)

    kernel = book.TorchGenerator(123).uniform((2, 8), -(8**-0.5), 8**-0.5)
    head = task.init_state.params["head"]
    np.testing.assert_array_equal(head["kernel"], kernel.T)
    order = next(book.epochs(1045, 8, 123, eval_every=50, eval_after=1))
    for chosen, batch in zip(order[:5], task.batches(0, 5), strict=True):
        classes = [sets.rows["train"].labels[n] for n in chosen]
        assert batch["labels"].tolist() == classes
        assert batch["tokens"].shape == (8, 120)
    assert task.eval_offset == 1
    assert run.config.model.n_classes == 2


def test_chapter_7_has_the_books_order(tmp_path, start, shared_data):
    config = started("ch07", start)

    _, sets, task = make_task(CHAPTERS["instructions"], config, tmp_path)

    lengths = [batch["tokens"].shape[1] for batch in task.batches(0, 10)]
    assert lengths == [61, 76, 73, 68, 65, 72, 80, 67, 62, 75]
    (batch,) = task.batches(11, 12)
    assert batch["loss_weights"].sum() > 0
    assert len(sets.examples["train"]) == 935


def look(task, step):
    """The metrics that the book prints, from an evaluation."""
    result = task.evaluate(task.init_state, step, False)
    (values,) = [values for kind, values in result.events if kind == "book"]
    return values


def evaluate_nothing(*parts):
    """Replaces the evaluation of a task."""
    return lambda model, step, is_last: EvalResult([], "")


def test_chapter_6_says_what_the_book_prints(tmp_path, start, shared_data, monkeypatch):
    monkeypatch.setattr(classify, "make_classification_evaluate", evaluate_nothing)
    config = started("ch06", start)
    _, sets, task = make_task(CHAPTERS["sms-spam"], config, tmp_path)
    model = task.to_model(task.init_state)

    before, first = look(task, 0), look(task, 1)

    def means(split, batches):
        """Mean loss and accuracy of the means of batches."""
        parts = [
            evaluate_classifier(
                model, take(sets.rows[split], rows), [sets.ids[split][n] for n in rows]
            )
            for rows in batches
        ]
        accuracy = [part.metrics.accuracy for part in parts]
        return np.mean([part.loss for part in parts]), np.mean(accuracy)

    generator = book.TorchGenerator(123)
    wide_batches = book.Loader(1045, 8).start_epoch(generator)[:10]
    generator.next_uint32(2 + 2)  # the passes over the others
    loss_batches = book.Loader(1045, 8).start_epoch(generator)[:5]
    assert before["train_accuracy"] == pytest.approx(means("train", wide_batches)[1])
    assert before["train_loss"] == pytest.approx(means("train", loss_batches)[0])
    in_order = [list(range(n, n + 8)) for n in range(0, 80, 8)]
    for split in ("validation", "test"):
        assert before[f"{split}_accuracy"] == pytest.approx(means(split, in_order)[1])
        assert before[f"{split}_loss"] == pytest.approx(means(split, in_order[:5])[0])
    assert set(first) == {"train_loss", "validation_loss"}
    assert first["validation_loss"] == before["validation_loss"]
    assert first["train_loss"] != before["train_loss"]


def test_chapter_7_says_what_the_book_prints(tmp_path, start, shared_data, monkeypatch):
    monkeypatch.setattr(sft, "make_sft_evaluate", evaluate_nothing)
    config = started("ch07", start)
    _, sets, task = make_task(CHAPTERS["instructions"], config, tmp_path)
    model = task.to_model(task.init_state)

    before = look(task, 0)

    order = book.Loader(935, 8).start_epoch(book.TorchGenerator(123))[:5]
    parts = {"train": order, "validation": [range(n, n + 8) for n in range(0, 40, 8)]}
    for split, batches in parts.items():
        examples = sets.examples[split]
        means = []
        for rows in batches:
            longest = max(len(examples[n].ids) for n in rows) - 1
            batch = collate([[examples[n]] for n in rows], longest, sets.tokenizer.eot_token)
            batch = jax.tree.map(jnp.asarray, batch)
            nats, weight = batch_loss(model.config, model.params, batch, chunk_size=8)
            means.append(float(nats / weight))
        assert before[f"{split}_loss"] == pytest.approx(np.mean(means), rel=1e-6)


def test_other_data_are_of_no_chapter(tmp_path):
    config = from_dict(RunConfig, {"train": {"task": "book"}, "data": {"source": "wikitext2"}})

    with pytest.raises(ConfigError, match=r"data\.source='wikitext2'"):
        train(config, tmp_path)
