"""The book's training runs: its parameters and its order; and its page."""

import dataclasses
import itertools
import re
import shlex
from pathlib import Path

import jax
import numpy as np
import pytest

import gptjax
from gptjax import book, report
from gptjax.book import training
from gptjax.cli import make_parser
from gptjax.config import RunConfig, build, config_path, read_config
from gptjax.errors import ConfigError
from gptjax.run_task import Run
from gptjax.weights.folder import Model

PAGE = Path(book.__file__).parent / "README.md"


def small(name, **model):
    """A config of the book with a model of a few thousand parameters."""
    c = read_config(config_path(f"book/{name}"))
    shape = {"n_layers": 1, "n_heads": 2, "d_model": 16, "dropout": 0.0} | model
    train = dataclasses.replace(c.train, steps=12, sample_prompt="")
    return dataclasses.replace(
        c, model=dataclasses.replace(c.model, **shape), train=train
    )


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

    model = training.train_book(config, tmp_path / "run", lambda line: None)

    events = report.read_events(tmp_path / "run" / "metrics.jsonl")
    steps = [e["step"] for e in events if e.get("split") == "validation"]
    assert steps == [0, 1, 6, 11, 12]  # the book's 0, 5 and 10, and the ends
    run, task = training.make_chapter_5(Run(config, tmp_path, print))
    fresh = book.init_params(run.config.model, 123)
    jax.tree.map(np.testing.assert_array_equal, task.fresh.params, fresh)
    first, second = itertools.islice(passes_of(run.config.model), 2)
    rows = training.verdict_rows(256)["train"]
    for chosen, batch in zip(first, task.batches(0, 9), strict=True):
        np.testing.assert_array_equal(batch["tokens"], rows[chosen][:, :-1])
        np.testing.assert_array_equal(batch["targets"], rows[chosen][:, 1:])
    for chosen, batch in zip(second[:3], task.batches(9, 12), strict=True):
        np.testing.assert_array_equal(batch["tokens"], rows[chosen][:, :-1])
    losses = [e["loss"] for e in events if e.get("split") == "train"]
    assert losses[-1] < losses[0]
    assert model.config.vocab_size == 50_257


def test_chapter_6_has_the_books_head_and_order(tmp_path, start, shared_data):
    config = small("ch06")
    tune = dataclasses.replace(config.tune, start=start)
    config = dataclasses.replace(config, tune=tune)

    run, task, sets = training.make_chapter_6(Run(config, tmp_path, print))

    kernel = book.TorchGenerator(123).uniform((2, 8), -(8**-0.5), 8**-0.5)
    head = task.fresh.params["head"]
    np.testing.assert_array_equal(head["kernel"], kernel.T)
    order = next(book.epochs(1045, 8, 123, eval_every=50, eval_after=1))
    for chosen, batch in zip(order[:5], task.batches(0, 5), strict=True):
        classes = [sets.rows["train"].labels[n] for n in chosen]
        assert batch["classes"].tolist() == classes
        assert batch["tokens"].shape == (8, 120)
    assert task.eval_offset == 1
    assert run.config.model.n_classes == 2


def test_chapter_7_has_the_books_order(tmp_path, start, shared_data):
    config = small("ch07")
    tune = dataclasses.replace(config.tune, start=start)
    config = dataclasses.replace(config, tune=tune)

    _, task, sets = training.make_chapter_7(Run(config, tmp_path, print))

    lengths = [batch["tokens"].shape[1] for batch in task.batches(0, 10)]
    assert lengths == [61, 76, 73, 68, 65, 72, 80, 67, 62, 75]
    (batch,) = task.batches(11, 12)
    assert batch["weights"].sum() > 0
    assert len(sets.examples["train"]) == 935


def test_other_data_are_of_no_chapter(tmp_path):
    config = build(RunConfig, {"data": {"source": "wikitext2"}})

    with pytest.raises(ConfigError, match="'wikitext2' is trained on in no chapter"):
        training.train_book(config, tmp_path)


def test_the_page_names_what_there_is():
    text = PAGE.read_text(encoding="utf-8")

    for name in re.findall(r"`(\w+\.py)`", text):
        assert (PAGE.parent / name).is_file(), name
    for line in re.findall(r"`(gptjax [^`]+)`", text):
        words = shlex.split(line)[1:]
        args, _ = make_parser().parse_known_args(words)
        assert config_path(args.config).is_file()
    for file in re.findall(r"tests/\w+\.py", text):
        assert (PAGE.parents[2] / file).is_file()
    for name in re.findall(r"`(\w+)\(", text):
        assert hasattr(book, name), name
