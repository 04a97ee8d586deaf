import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import gptjax
import gptjax.book
from gptjax.book.torch_random import dataloader_order
from gptjax.data.conversations import read_conversations, split_conversations
from gptjax.data.sft import (
    TRAIN_ON_ALL,
    TRAIN_ON_COMPLETIONS,
    Example,
    encode_conversations,
    encode_segments,
    make_sft_batches,
    truncate_all,
    truncate_left,
)
from gptjax.errors import ConfigError, DataError
from gptjax.tokenizer.chat_template import compile_template, load_chat_template

GPT2 = gptjax.tokenizer.load("gpt2")
EOT = GPT2.eot_token


def example(length, answer=1, first=0):
    """Tokens first, first + 1, ..., of which the last are the answer."""
    start = length - answer
    learned = [n >= max(start, 1) for n in range(length)]
    return Example(list(range(first, first + length)), learned, [(start, length)])


def book_prompt(row):
    """The book's format_input, written out."""
    text = (
        "Below is an instruction that describes a task. Write a response that "
        "appropriately completes the request.\n\n### Instruction:\n"
        f"{row['instruction']}"
    )
    return text + (f"\n\n### Input:\n{row['input']}" if row["input"] else "")


@pytest.fixture
def instructions(shared_data):
    conversations, _ = read_conversations(shared_data / "instruction-data.json")
    return split_conversations(conversations, "book", val_fraction=0, test_fraction=0, seed=0)


def test_all_instructions_are_encoded_as_the_book_does(instructions):
    template = load_chat_template("alpaca")

    for rows in instructions.values():
        for one, got in zip(rows, encode_conversations(GPT2, template, rows), strict=True):
            prompt = book_prompt(one.source_row)
            text = f"{prompt}\n\n### Response:\n{one.source_row['output']}"
            assert got.ids == [*GPT2.encode(text), EOT]
            ((start, stop),) = got.answer_spans
            assert got.ids[:start] == GPT2.encode(f"{prompt}\n\n### Response:\n")
            assert stop == len(got.ids)


def test_buckets_need_few_programs_for_the_same_data(instructions):
    examples = encode_conversations(GPT2, load_chat_template("alpaca"), instructions["train"])

    batches = make_sft_batches("padded", examples, rows=8, context=1024, pad_id=EOT, seed=123)

    assert len(batches.batch_shapes) <= 8


@pytest.mark.peers
def test_the_order_is_that_of_torchs_data_loader():
    import torch
    from torch.utils.data import DataLoader

    torch.manual_seed(123)
    loader = DataLoader(list(range(935)), batch_size=8, shuffle=True)

    for epoch in range(3):
        rows = [int(row) for batch in loader for row in batch]
        assert rows == dataloader_order(123, 935, epoch)


def test_the_masked_form_of_the_book_learns_all_after_the_prompt(instructions):
    template = load_chat_template("alpaca")
    one = instructions["train"][0]

    got = encode_segments(GPT2, template.segments(one.messages), {"header", "answer"})

    assert got.loss_mask.index(True) == len(GPT2.encode(book_prompt(one.source_row)))


@given(st.integers(2, 12), st.integers(1, 11), st.integers(2, 40))
def test_a_cut_keeps_the_whole_answer_or_nothing(length, answer, most):
    answer = min(answer, length - 1)

    got = truncate_left(example(length, answer), most)

    if answer + 1 > most:
        assert got is None
    else:
        assert got is not None
        assert got.ids == list(range(length))[-most:]
        assert sum(got.loss_mask) == answer
        assert got.loss_mask[-answer:] == [True] * answer


def test_what_a_cut_leaves_of_an_earlier_answer_is_not_learned():
    learned = [False, True, True, True, False, False, True, True]
    whole = Example(list(range(8)), learned, [(1, 4), (6, 8)])

    got = truncate_left(whole, 6)

    assert got == Example([2, 3, 4, 5, 6, 7], [False] * 4 + [True] * 2, [(4, 6)])


@pytest.mark.parametrize(("length", "cut"), [(9, 0), (10, 0), (11, 1), (100, 1)])
def test_examples_around_the_context_are_cut_and_counted(length, cut):
    context = 9  # so 10 tokens fit

    got = truncate_all([example(length, 3), example(40, 30)], context)

    assert (got.num_truncated, got.num_dropped, got.kept_indices) == (cut, 1, [0])
    assert len(got.examples[0].ids) == min(length, 10)


@given(
    st.lists(st.integers(2, 17), min_size=1, max_size=40),
    st.integers(1, 5),
    st.sampled_from(["packed", "padded"]),
    st.integers(0, 2),
)
def test_an_epoch_has_every_example_once_whole_and_apart(lengths, rows, kind, epoch):
    examples = [example(n, first=100 * i) for i, n in enumerate(lengths)]
    batches = make_sft_batches(kind, examples, rows=rows, context=16, pad_id=-1, seed=5)

    seen = []
    for number in range(batches.steps_per_epoch):
        batch = batches.batch_at(epoch * batches.steps_per_epoch + number)
        assert batch["tokens"].shape[0] == rows
        assert batch["tokens"].shape[1] in batches.batch_shapes
        for b in range(rows):
            segment_T = batch["segment_ids"][b]
            for segment in range(1, segment_T.max() + 1):
                place = np.flatnonzero(segment_T == segment)
                tokens = batch["tokens"][b, place]
                n = tokens[0] // 100
                seen.append(n)
                assert tokens.tolist() == examples[n].ids[:-1]
                assert batch["targets"][b, place].tolist() == examples[n].ids[1:]
                assert batch["loss_weights"][b, place].tolist() == examples[n].loss_mask[1:]
                assert batch["positions"][b, place].tolist() == list(range(len(place)))
            assert not batch["loss_weights"][b, segment_T == 0].any()

    assert sorted(seen) == list(range(len(examples)))


def test_packing_wastes_less_than_padding():
    rng = np.random.default_rng(0)
    examples = [example(int(n)) for n in rng.integers(5, 60, 500)]

    packed, padded = (
        make_sft_batches(kind, examples, rows=8, context=64, pad_id=0, seed=0)
        for kind in ("packed", "padded")
    )

    tokens = sum(len(x.ids) - 1 for x in examples)
    assert tokens / (packed.steps_per_epoch * 8 * 64) > 0.9  # the longest rows leave gaps
    sizes = [padded.batch_at(n)["tokens"].size for n in range(padded.steps_per_epoch)]
    assert sum(sizes) > packed.steps_per_epoch * 8 * 64


def test_other_ways_of_batching_are_refused():
    def batches(kind, rows):
        return make_sft_batches(kind, [example(4)], rows=rows, context=8, pad_id=0, seed=0)

    with pytest.raises(DataError, match=r"data\.batching=concat"):
        batches("concat", 1)


def test_everything_can_be_learned_but_the_first_token():
    pieces = load_chat_template("qa").segments(
        [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    )

    assert encode_segments(GPT2, pieces, TRAIN_ON_ALL).loss_mask.count(False) == 1
    assert sum(encode_segments(GPT2, pieces, TRAIN_ON_COMPLETIONS).loss_mask) == 2


def test_a_row_that_the_template_refuses_is_named(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"prompt": "a", "completion": "b"}))
    conversations, _ = read_conversations(path)
    source = (
        "{% for m in messages %}{% if m.content == 'a' %}x{% endif %}"
        "{% if m.role == 'user' and m.content|length > 2 and not m.content.endswith("
        "'u' ~ m.content[-1]) %}{{ raise_exception('odd') }}{% endif %}"
        "{{ m.content }}{{ eos_token if m.role != 'user' else '' }}{% endfor %}"
    )

    with pytest.raises(ConfigError, match=r"rows\.jsonl:1: the chat template .*odd"):
        encode_conversations(GPT2, compile_template(source), conversations)
