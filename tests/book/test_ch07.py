"""Printed numbers of chapters 5 to 7 and appendix D that gptjax recomputes."""

import statistics

import jax
import jax.numpy as jnp
import pytest

import gptjax
from gptjax.book import TorchGenerator, epochs
from gptjax.book.schedule import first_batches, make_loaders
from gptjax.config import find_config, load_config
from gptjax.data.conversations import read_conversations, read_preference_pairs
from gptjax.data.sft import encode_conversations, make_sft_batches
from gptjax.inference.sampling import SamplingParams, filter_logits
from gptjax.tasks.dpo import tokenize_pair
from gptjax.tokenizer.chat_template import load_chat_template
from gptjax.training.loss import cross_entropy_sum
from gptjax.training.optimizer import learning_rates
from gptjax.weights.model_folder import Model

GPT2 = gptjax.tokenizer.load("gpt2")
ALPACA = load_chat_template("alpaca")
# Raschka 2024, ch07.ipynb, cell 66: the second axis of the first batches.
INSTRUCTIONS = [61, 76, 73, 68, 65, 72, 80, 67, 62, 75, 62, 68, 67, 77, 69, 79, 71, 66, 83, 68]
# dpo-from-scratch.ipynb, cell 30, where no position is cut off at the end.
PREFERENCES = [77, 81, 94, 75, 75, 76, 99, 71, 67, 88, 65, 79, 80, 97, 71, 89, 75, 69, 84, 79]


def test_the_instructions_have_the_lengths_of_the_book(shared_data):
    rows = read_conversations("instructions")[0]
    examples = [*encode_conversations(GPT2, ALPACA, rows)]
    lengths = [len(example.ids) - 1 for example in examples]  # without the end

    batches = make_sft_batches(
        "book", examples[:935], rows=8, context=1024, pad_id=GPT2.eot_token, seed=123
    )

    assert (min(lengths), max(lengths), statistics.median(lengths)) == (40, 91, 55)
    shapes = [batches.batch_at(step)["tokens"].shape for step in range(20)]
    assert shapes == [(8, n) for n in INSTRUCTIONS]
    last = batches.batch_at(115)["tokens"][0]  # cell 26
    text, *_ = GPT2.decode(last.tolist()).split("<|endoftext|>")
    assert text.endswith("### Response:\nThe baby is as cute as a button.")


def test_the_preferences_have_the_lengths_of_the_book(shared_data):
    shape = {"context_length": 8, "n_layers": 1, "n_heads": 1, "d_model": 8}
    model = Model(gptjax.GPTConfig(vocab_size=GPT2.vocab_size, **shape), {}, GPT2)
    rows = read_preference_pairs("preferences")[0][:935]
    pairs = [tokenize_pair(row, model, ALPACA, 1024) for row in rows]

    order = next(epochs(len(pairs), 8, 123))[:20]

    assert [max(len(e.ids) for n in rows for e in pairs[n]) for rows in order] == PREFERENCES


def test_temperature_and_top_k_give_the_probabilities_of_section_5_3():
    words = ["closer", "every", "effort", "forward", "inches", "moves", "pizza", "toward", "you"]
    logit_BV = jnp.array([[4.51, 0.89, -1.90, 6.75, 1.63, -1.62, -1.89, 6.28, 1.79]])

    def probabilities(temperature, top_k):
        numbers = (jnp.float32(temperature), jnp.int32(top_k), *map(jnp.float32, (1, 0, 1)))
        scaled_BV = (logit_BV - logit_BV.max()) / temperature
        prob_V = jax.nn.softmax(filter_logits(scaled_BV, SamplingParams(*numbers)))[0]
        return {word: f"{p:.4f}" for word, p in zip(words, prob_V, strict=True) if p}

    assert probabilities(5.0, 0)["pizza"] == "0.0430"
    assert probabilities(1.0, 3) == {"closer": "0.0615", "forward": "0.5775", "toward": "0.3610"}


def test_ignored_targets_leave_the_loss_of_section_7_3():
    logits, targets = jnp.array([[[-1.0, 1.0], [-0.5, 1.5], [-0.5, 1.5]]]), jnp.array([[0, 1, 1]])

    for weights, printed in [([1.0, 1.0, 0.0], "1.1269"), ([1.0, 1.0, 1.0], "0.7936")]:
        total, weight = cross_entropy_sum(logits, targets, jnp.array([weights]))
        assert f"{float(total / weight):.4f}" == printed


def test_appendix_d_warms_up_over_27_of_135_steps():
    config = load_config(find_config("book/appendix_d"))

    rates = learning_rates(config.optim, config.train.steps)

    assert (config.optim.warmup_steps, len(rates)) == (27, 135)
    # Cell 14: initial_lr and min_lr; float32 subtracts them from the peak.
    assert rates[0] == pytest.approx(1e-5, rel=1e-4)
    assert max(rates) == rates[27] == pytest.approx(1e-3)


def test_the_spam_set_has_the_batches_of_chapter_6():
    config, sizes = load_config(find_config("book/ch06")), (1_045, 149, 300)
    loaders = make_loaders(dict(zip(("train", "validation", "test"), sizes, strict=True)), config)

    batches = first_batches(loaders, TorchGenerator(123), 999)

    assert [len(rows) for rows in batches.values()] == [130, 19, 38]
