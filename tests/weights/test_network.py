"""Comparison of the public weights with published values.

Run with `pytest -m network -n0 tests/weights/test_network.py`; downloads 0.5 GB, once.
"""

import jax.numpy as jnp
import numpy as np
import pytest

import gptjax
from gptjax.data.datasets import fetch_dataset
from gptjax.training.loss import cross_entropy_sum
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
