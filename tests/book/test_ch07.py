"""Chapter 7's loaders: every length that the book prints, of both of its data sets."""

import statistics

import pytest

import gptjax
from gptjax.book import epochs
from gptjax.data.conversations import read_conversations, read_preference_pairs, split_conversations
from gptjax.data.sft import TRAIN_ON_ALL, encode_conversations, make_sft_batches
from gptjax.tasks.dpo import tokenize_pair
from gptjax.tokenizer.chat_template import load_chat_template
from gptjax.weights.model_folder import Model
from tests.torch_peer import import_torch

GPT2 = gptjax.tokenizer.load("gpt2")
ALPACA = load_chat_template("alpaca")
SHARES = {"val_fraction": 0, "test_fraction": 0, "seed": 0}

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
# Cell 26: the first row of the last of these batches.
SIMILE = "The baby is as cute as a button."


@pytest.fixture(scope="module")
def instructions(shared_data):
    found, _ = read_conversations("instructions")
    return split_conversations(found, "book", **SHARES)


@pytest.fixture(scope="module")
def preferences(shared_data):
    found, _ = read_preference_pairs("preferences")
    return split_conversations(found, "book", **SHARES)


def pairs_of(rows):
    """Both answers to each prompt as tokens; the template is all that is read."""
    shape = {"context_length": 8, "n_layers": 1, "n_heads": 1, "d_model": 8}
    model = Model(gptjax.GPTConfig(vocab_size=GPT2.vocab_size, **shape), {}, GPT2)
    return [tokenize_pair(row, model, ALPACA, 1024) for row in rows]


def test_the_instructions_are_split_and_as_long_as_in_the_book(shared_data, instructions):
    rows = [row for part in instructions.values() for row in part]
    examples = encode_conversations(GPT2, ALPACA, rows)
    lengths = [len(example.ids) - 1 for example in examples]  # without the end

    sizes = {name: len(part) for name, part in instructions.items()}
    assert sizes == {"train": 935, "validation": 55, "test": 110}
    assert sum(bool(row.source_row["input"]) for row in rows) == 325
    assert (min(lengths), max(lengths), statistics.median(lengths)) == (40, 91, 55)


def test_the_first_epoch_has_all_lengths_that_the_book_prints(shared_data, instructions):
    examples = encode_conversations(GPT2, ALPACA, instructions["train"])

    loader = make_sft_batches(
        "book", examples, rows=8, context=1024, pad_id=GPT2.eot_token, seed=123
    )

    batches = [loader.batch_at(step) for step in range(loader.steps_per_epoch)]
    assert [batch["tokens"].shape for batch in batches] == [(8, length) for length in INSTRUCTIONS]
    text, *_ = GPT2.decode(batches[-1]["tokens"][0].tolist()).split("<|endoftext|>")
    assert text.endswith(f"### Response:\n{SIMILE}")


def test_the_loader_of_preferences_has_all_lengths_that_the_book_prints(shared_data, preferences):
    pairs = pairs_of(preferences["train"])

    order = next(epochs(len(pairs), 8, 123))

    lengths = [max(len(e.ids) for n in rows for e in pairs[n]) for rows in order]
    assert lengths == PREFERENCES


@pytest.mark.peers
@pytest.mark.filterwarnings("ignore")
def test_both_loaders_give_the_rows_of_pytorchs_in_every_epoch(
    shared_data, instructions, preferences
):
    torch = import_torch()
    examples = encode_conversations(GPT2, ALPACA, instructions["train"], TRAIN_ON_ALL)
    book = make_sft_batches("book", examples, rows=8, context=1024, pad_id=GPT2.eot_token, seed=123)
    ours = epochs(len(preferences["train"]), 8, 123)

    def loader(items):
        return torch.utils.data.DataLoader(
            items, batch_size=8, shuffle=True, drop_last=True, collate_fn=list
        )

    torch.manual_seed(123)
    theirs = loader(examples)
    for step in range(2 * 116):
        if step % 116 == 0:
            rows = iter(theirs)
        batch = book.batch_at(step)
        for n, example in enumerate(next(rows)):
            ids = example.ids[:-1]
            assert batch["tokens"][n, : len(ids)].tolist() == ids
            assert (batch["tokens"][n, len(ids) :] == GPT2.eot_token).all()
            assert batch["loss_weights"][n].sum() == len(ids)
    torch.manual_seed(123)
    theirs = loader(range(len(preferences["train"])))
    for _ in range(3):
        assert next(ours) == list(theirs)
