"""Comparison of the public weights with published values.

Run with `pytest -m network -n0 tests/weights/test_network.py`; downloads 0.5 GB for
124M and 1.5 GB for 355M, once.
"""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

import gptjax
from gptjax.config import find_config, load_config
from gptjax.data.datasets import fetch_dataset
from gptjax.tasks.train import train
from gptjax.training.loss import cross_entropy_sum
from gptjax.training.metrics import read_events
from gptjax.weights import load

pytestmark = pytest.mark.network


@pytest.fixture(scope="module")
def gpt2():
    return gptjax.load("gpt2")


def test_the_public_model_has_the_published_values_and_text(gpt2):
    assert "agree" in load.check_reference_values(gpt2, load.REFERENCE_VALUES["gpt2"])
    assert gpt2.config.tie_embeddings
    assert gpt2.tokenizer.hash == gptjax.tokenizer.load("gpt2").hash
    # Raschka 2024, chapter 6.
    text = gptjax.generate(gpt2, "Every effort moves you", max_new_tokens=15, temperature=0.0)
    words = " forward.\n\nThe first step is to understand the importance of your work"
    assert text == "Every effort moves you" + words


def test_the_loss_on_the_verdict_is_the_published_one(gpt2):
    """Raschka 2024, exercise 5.5: rows of 256 tokens that do not overlap."""
    text = fetch_dataset("verdict").read_text(encoding="utf-8")
    cut = int(0.9 * len(text))

    def loss(part):
        ids = np.array(gpt2.tokenizer.encode(part))
        rows = [ids[i : i + 257] for i in range(0, len(ids) - 256, 256)]
        row_BT = jnp.asarray(np.stack(rows))
        logit_BTV = gptjax.apply(gpt2.config, gpt2.params, row_BT[:, :-1])
        nats, weight = cross_entropy_sum(logit_BTV, row_BT[:, 1:], jnp.ones(row_BT[:, 1:].shape))
        return float(nats / weight)

    assert loss(text[:cut]) == pytest.approx(3.7547487, abs=1e-3)
    assert loss(text[cut:]) == pytest.approx(3.5596182, abs=1e-3)


@pytest.mark.parametrize(
    ("name", "steps", "expected"),
    [
        # Chapter 6. Head and batch order are not the book's own, so some rows differ.
        ("classify/sms_gpt2", None, {"train": 0.9721, "validation": 0.9732, "test": 0.9567}),
        # Chapter 7: nats of training and validation rows, prompts included.
        ("instruct/book_355m", 1, {"train": 2.637, "validation": 2.626}),
        ("instruct/book_355m", 231, {"train": 0.299, "validation": 0.657}),
    ],
)
def test_the_books_fine_tuning_is_as_good_as_published(tmp_path, name, steps, expected):
    config = load_config(find_config(name))
    if steps:
        config = dataclasses.replace(config, train=dataclasses.replace(config.train, steps=steps))

    train(config, tmp_path / "run")

    key = "loss" if steps else "accuracy"
    events = read_events(tmp_path / "run" / "metrics.jsonl")
    found = {event["split"]: event[key] for event in events if {"split", key} <= event.keys()}
    for split, value in expected.items():
        assert found[split] == pytest.approx(value, rel=0.1 if steps else 0.03)
