"""Printed numbers of the book that our own functions recompute; see gptjax/book too."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gptjax
from gptjax.book import TorchGenerator
from gptjax.book.schedule import first_batches, make_loaders
from gptjax.config import find_config, load_config
from gptjax.data.classification import read_labeled_texts
from gptjax.data.splits import stratified_split
from gptjax.inference.sampling import SamplingParams, filter_logits, sample
from gptjax.training.loss import cross_entropy_sum
from gptjax.training.optimizer import learning_rates

# Section 5.3.1: scores of the words that may follow "every effort moves you".
WORDS = ["closer", "every", "effort", "forward", "inches", "moves"]
WORDS += ["pizza", "toward", "you"]
SCORES = [4.51, 0.89, -1.90, 6.75, 1.63, -1.62, -1.89, 6.28, 1.79]


def knobs(temperature=1.0, top_k=0):
    return SamplingParams(
        jnp.float32(temperature), jnp.int32(top_k), jnp.float32(1), jnp.float32(0), jnp.float32(1)
    )


def test_a_hot_softmax_gives_pizza_the_chance_of_exercise_5_1():
    logit_BV = jnp.array([SCORES], jnp.float32)
    key_B = jax.random.split(jax.random.key(0), 4000)
    rows = jnp.tile(logit_BV, (4000, 1))

    drawn = sample(rows, jnp.zeros(rows.shape, bool), key_B, knobs(5.0))

    chance = jax.nn.softmax(logit_BV / 5)[0]
    assert f"{float(chance[WORDS.index('pizza')]):.4f}" == "0.0430"
    counts = np.bincount(np.asarray(drawn), minlength=9) / 4000
    np.testing.assert_allclose(counts, chance, atol=0.025)  # three deviations


def test_top_k_leaves_the_three_chances_of_the_book():
    logit_BV = jnp.array([SCORES], jnp.float32)

    chance = jax.nn.softmax(filter_logits(logit_BV - logit_BV.max(), knobs(top_k=3)))[0]

    kept = {WORDS[n]: f"{float(chance[n]):.4f}" for n in np.flatnonzero(chance)}
    assert kept == {"closer": "0.0615", "forward": "0.5775", "toward": "0.3610"}


@pytest.mark.parametrize(
    ("logits", "targets", "weights", "printed"),
    [
        ([[-1.0, 1.0], [-0.5, 1.5]], [0, 1], [1, 1], "1.1269"),
        ([[-1.0, 1.0], [-0.5, 1.5], [-0.5, 1.5]], [0, 1, 1], [1, 1, 1], "0.7936"),
        ([[-1.0, 1.0], [-0.5, 1.5], [-0.5, 1.5]], [0, 1, 1], [1, 1, 0], "1.1269"),
    ],
)
def test_what_is_not_counted_leaves_the_loss_of_chapter_7(logits, targets, weights, printed):
    nats, weight = cross_entropy_sum(
        jnp.array([logits]), jnp.array([targets]), jnp.array([weights], jnp.float32)
    )

    assert f"{float(nats / weight):.4f}" == printed


def test_appendix_d_warms_up_over_27_of_135_steps():
    config = load_config(find_config("book/appendix_d"))

    rates = learning_rates(config.optim, config.train.steps)

    assert (config.optim.warmup_steps, config.train.steps) == (27, 135)
    assert np.argmax(rates) == 27
    # Cell 14: initial_lr and min_lr; float32 subtracts them from the peak.
    assert rates[0] == pytest.approx(1e-5, rel=1e-4)
    assert rates[27] == pytest.approx(1e-3)
    assert 1e-5 <= rates[-1] < 1.1e-5


def test_the_spam_set_has_the_counts_of_chapter_6(shared_data):
    data, _ = read_labeled_texts("sms-spam")
    splits = stratified_split(
        data,
        "book",
        val_fraction=0.1,
        test_fraction=0.2,
        seed=0,
        balance_classes=False,
        deduplicate=False,
    )

    assert len(data) == 5_572
    assert [data.labels.count(n) for n in (0, 1)] == [4_825, 747]
    sizes = {split: len(rows) for split, rows in splits.items()}
    assert sizes == {"train": 1_045, "validation": 149, "test": 300}

    longest = {split: max(map(len, ids_of(rows))) for split, rows in splits.items()}
    assert longest["train"] == max(longest.values()) == 120
    config = load_config(find_config("book/ch06"))
    generator = TorchGenerator(123)
    batches = first_batches(make_loaders(sizes, config), generator, 999)
    counts = {split: len(rows) for split, rows in batches.items()}
    assert counts == {"train": 130, "validation": 19, "test": 38}


def ids_of(rows):
    """The tokens of each text."""
    return [gptjax.tokenizer.load("gpt2").encode(text) for text in rows.texts]
