"""Printed numbers of chapters 5 to 7 and appendix D that gptjax recomputes."""

import statistics

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gptjax
from gptjax.book import TorchGenerator, epochs
from gptjax.book.schedule import first_batches, make_loaders
from gptjax.config import find_config, load_config
from gptjax.data.classification import read_labeled_texts
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

# Raschka 2024, ch07.ipynb, cell 66: the second axis of each batch of the first epoch.
INSTRUCTIONS = [
    *(61, 76, 73, 68, 65, 72, 80, 67, 62, 75, 62, 68, 67, 77, 69, 79, 71, 66, 83, 68),
    *(80, 71, 69, 65, 68, 60, 59, 69, 63, 65, 76, 66, 71, 91, 65, 64, 67, 66, 64, 65),
    *(75, 89, 59, 88, 83, 83, 70, 65, 74, 76, 67, 75, 83, 69, 67, 60, 60, 66, 80, 71),
    *(61, 58, 71, 67, 68, 63, 87, 68, 64, 68, 71, 68, 71, 61, 65, 67, 65, 64, 60, 72),
    *(64, 70, 57, 72, 64, 68, 62, 74, 80, 68, 70, 91, 61, 66, 80, 81, 74, 82, 63, 83),
    *(68, 67, 77, 91, 64, 61, 75, 64, 66, 78, 66, 64, 83, 66, 74, 69),
]
# dpo-from-scratch.ipynb, cell 30, where no position is cut off at the end.
PREFERENCES = [
    *(77, 81, 94, 75, 75, 76, 99, 71, 67, 88, 65, 79, 80, 97, 71, 89, 75, 69, 84, 79),
    *(101, 87, 73, 69, 80, 68, 73, 71, 91, 78, 78, 71, 84, 92, 71, 66, 73, 73, 78, 66),
    *(76, 100, 77, 92, 93, 115, 81, 95, 81, 94, 70, 89, 90, 70, 85, 65, 76, 72, 84, 84),
    *(65, 63, 74, 79, 93, 71, 99, 81, 77, 74, 75, 73, 87, 80, 75, 81, 86, 71, 63, 82),
    *(68, 76, 68, 97, 72, 85, 67, 85, 87, 76, 74, 92, 85, 72, 93, 82, 76, 93, 80, 87),
    *(69, 90, 99, 104, 101, 98, 79, 71, 76, 79, 79, 67, 84, 78, 85, 70),
]


def test_the_instructions_have_the_lengths_of_the_book(shared_data):
    rows = read_conversations("instructions")[0]
    examples = encode_conversations(GPT2, ALPACA, rows)
    lengths = [len(example.ids) - 1 for example in examples]  # without the end

    batches = make_sft_batches(
        "book", examples[:935], rows=8, context=1024, pad_id=GPT2.eot_token, seed=123
    )

    assert sum(bool(row.source_row["input"]) for row in rows) == 325
    assert (min(lengths), max(lengths), statistics.median(lengths)) == (40, 91, 55)
    epoch = [batches.batch_at(step) for step in range(batches.steps_per_epoch)]
    assert [batch["tokens"].shape for batch in epoch] == [(8, n) for n in INSTRUCTIONS]
    text, *_ = GPT2.decode(epoch[-1]["tokens"][0].tolist()).split("<|endoftext|>")
    assert text.endswith("### Response:\nThe baby is as cute as a button.")  # cell 26
    prompt = (
        "Below is an instruction that describes a task. Write a response that "
        "appropriately completes the request.\n\n### Instruction:\n"
    )
    for row, example in zip(rows, examples, strict=True):
        text = prompt + row.source_row["instruction"]
        text += f"\n\n### Input:\n{row.source_row['input']}" * bool(row.source_row["input"])
        text += f"\n\n### Response:\n{row.source_row['output']}"
        assert example.ids == [*GPT2.encode(text), GPT2.eot_token]


def test_the_preferences_have_the_lengths_of_the_book(shared_data):
    config = gptjax.GPTConfig(
        vocab_size=GPT2.vocab_size, context_length=8, n_layers=1, n_heads=1, d_model=8
    )
    model = Model(config, {}, GPT2)
    rows = read_preference_pairs("preferences")[0][:935]
    pairs = [tokenize_pair(row, model, ALPACA, 1024) for row in rows]

    order = next(epochs(len(pairs), 8, 123))

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
    logits = jnp.array([[[-1.0, 1.0], [-0.5, 1.5], [-0.5, 1.5]]])

    for targets, weights, printed in [
        ([0, 1, 1], [1.0, 1.0, 0.0], "1.1269"),
        ([0, 1, 1], [1.0, 1.0, 1.0], "0.7936"),
    ]:
        total, weight = cross_entropy_sum(logits, jnp.array([targets]), jnp.array([weights]))
        assert f"{float(total / weight):.4f}" == printed


def test_appendix_d_warms_up_over_27_of_135_steps():
    config = load_config(find_config("book/appendix_d"))

    rates = learning_rates(config.optim, config.train.steps)

    assert (config.optim.warmup_steps, len(rates)) == (27, 135)
    # Cell 14: initial_lr and min_lr; float32 subtracts them from the peak.
    assert rates[0] == pytest.approx(1e-5, rel=1e-4)
    assert max(rates) == rates[27] == pytest.approx(1e-3)
    assert 1e-5 <= rates[-1] < 1.1e-5


def test_the_spam_set_has_the_counts_of_chapter_6(shared_data):
    data, _ = read_labeled_texts("sms-spam")
    loaders = make_loaders(
        {"train": 1_045, "validation": 149, "test": 300}, load_config(find_config("book/ch06"))
    )

    batches = first_batches(loaders, TorchGenerator(123), 999)

    assert np.bincount(data.labels).tolist() == [4_825, 747]
    counts = {split: len(rows) for split, rows in batches.items()}
    assert counts == {"train": 130, "validation": 19, "test": 38}
