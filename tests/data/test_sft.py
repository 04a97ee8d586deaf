"""Tokenized conversations, their truncation, and batches of all kinds."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import gptjax
from gptjax.data.bucketing import buckets
from gptjax.data.classification import ClassificationBatches
from gptjax.data.conversations import Conversation
from gptjax.data.sft import (
    Example,
    PaddedBatches,
    PreferenceBatches,
    encode_conversations,
    make_sft_batches,
    truncate_all,
    truncate_left,
)
from gptjax.errors import ConfigError, DataError
from gptjax.tokenizer.chat_template import load_chat_template
from tests.data.tables import quick


def make_example(length, answer=1, first=0):
    """Tokens first, first + 1, ..., of which the last are the answer."""
    start = length - answer
    loss_mask = [n >= max(start, 1) for n in range(length)]
    return Example(list(range(first, first + length)), loss_mask, [(start, length)])


def test_a_row_that_the_template_rejects_is_named():
    system = {"role": "system", "content": "a"}
    conversation = Conversation((system,), {}, "rows.jsonl:1")

    with pytest.raises(ConfigError, match=r"rows\.jsonl:1: "):
        encode_conversations(
            gptjax.tokenizer.load("bytes"), load_chat_template("single"), [conversation]
        )


@quick
@given(st.integers(2, 12), st.integers(1, 11), st.integers(2, 40))
def test_truncation_keeps_the_whole_answer_or_nothing(length, answer, max_tokens):
    answer = min(answer, length - 1)

    found = truncate_left(make_example(length, answer), max_tokens)

    if answer + 1 > max_tokens:
        assert found is None
    else:
        assert found.ids == list(range(length))[-max_tokens:]
        assert found.loss_mask == [False] * (len(found.ids) - answer) + [True] * answer


def test_truncated_examples_are_counted_and_broken_answers_not_trained_on():
    loss_mask = [False, True, True, True, False, False, True, True]
    example = Example(list(range(8)), loss_mask, [(1, 4), (6, 8)])

    assert truncate_left(example, 6) == Example(
        [2, 3, 4, 5, 6, 7], [False] * 4 + [True] * 2, [(4, 6)]
    )
    for length, num_truncated in ((10, 0), (11, 1)):  # 10 tokens fit a context of 9
        found = truncate_all([make_example(40, 30), make_example(length, 3)], 9)
        assert (found.num_truncated, found.num_dropped) == (num_truncated, 1)
        assert found.kept_indices == [1]
        assert len(found.examples[0].ids) == 10


@quick
@given(st.lists(st.integers(2, 17), min_size=1, max_size=40), st.integers(1, 5), st.integers(0, 2))
def test_packed_rows_have_every_example_once_and_whole(lengths, rows, epoch):
    examples = [make_example(n, first=100 * i) for i, n in enumerate(lengths)]
    batches = make_sft_batches("packed", examples, rows=rows, context=16, pad_id=-1, seed=5)

    seen = []
    for number in range(batches.steps_per_epoch):
        batch = batches.batch_at(epoch * batches.steps_per_epoch + number)
        assert batch["tokens"].shape == (rows, 16)
        for b in range(rows):
            segment_T = batch["segment_ids"][b]
            for segment in range(1, segment_T.max() + 1):
                position = np.flatnonzero(segment_T == segment)
                found = {name: array[b, position].tolist() for name, array in batch.items()}
                n = found["tokens"][0] // 100
                seen.append(n)
                assert found["tokens"] == examples[n].ids[:-1]
                assert found["targets"] == examples[n].ids[1:]
                assert found["loss_weights"] == examples[n].loss_mask[1:]
                assert found["positions"] == list(range(len(position)))
            assert not batch["loss_weights"][b, segment_T == 0].any()

    assert sorted(seen) == list(range(len(examples)))


@quick
@given(st.lists(st.integers(2, 70), min_size=1, max_size=60), st.integers(1, 9), st.integers(0, 3))
def test_all_bucketed_batches_visit_each_row_once_in_few_shapes(lengths, rows, epoch):
    examples = [make_example(n, first=100 * i) for i, n in enumerate(lengths)]
    options = {"rows": rows, "bucket_lengths": buckets(70), "pad_id": -1, "seed": 3}
    logprob_P2 = np.arange(2.0 * len(lengths), dtype=np.float32).reshape(-1, 2)
    pairs = PreferenceBatches([(x, x) for x in examples], logprob_P2, **options)
    labels = ClassificationBatches([x.ids for x in examples], list(range(len(lengths))), **options)

    for batches in (PaddedBatches(examples, **options), pairs, labels):
        steps = range(epoch * batches.steps_per_epoch, (epoch + 1) * batches.steps_per_epoch)
        for found in (map(batches.batch_at, steps), (batch for _, batch in batches.in_order())):
            seen = []
            for batch in found:
                assert batch["tokens"].shape[0] == rows
                assert batch["tokens"].shape[-1] in set(batches.batch_shapes) | set(buckets(70))
                for b, tokens in enumerate(batch["tokens"].reshape(rows, -1)):
                    n = int(tokens[0]) // 100
                    if n < 0:  # padding
                        assert not batch["loss_weights"][b].any()
                        continue
                    seen.append(n)
                    ids = examples[n].ids if batches is labels else examples[n].ids[:-1]
                    assert tokens[tokens >= 0].tolist() == ids * (2 if batches is pairs else 1)
                    if batches is not labels:
                        targets = batch["targets"][b][batch["targets"][b] >= 0].tolist()
                        assert targets == examples[n].ids[1:] * (2 if batches is pairs else 1)
                    if batches is labels:
                        assert batch["lengths"][b] == lengths[n]
                        assert (batch["labels"][b], batch["loss_weights"][b]) == (n, 1)
                    if batches is pairs:
                        assert batch["reference_logprobs"][b].tolist() == [2 * n, 2 * n + 1]
            assert sorted(seen) == list(range(len(lengths)))


@pytest.mark.parametrize("batching", ["padded", "packed"])
def test_epochs_and_seeds_differ_in_order_and_repeat(batching):
    examples = [make_example(17, first=100 * n) for n in range(20)]

    def order(seed, epoch):
        batches = make_sft_batches(batching, examples, rows=2, context=16, pad_id=-1, seed=seed)
        steps = range(10 * epoch, 10 * epoch + 10)
        return [batches.batch_at(step)["tokens"][:, 0].tolist() for step in steps]

    orders = [order(seed, epoch) for seed in (0, 1) for epoch in (0, 1)]
    assert orders == [order(seed, epoch) for seed in (0, 1) for epoch in (0, 1)]
    assert len(set(map(str, orders))) == 4
    assert all(one != sorted(one) for one in orders)


def test_packing_and_buckets_waste_few_positions():
    rng = np.random.default_rng(0)
    examples = [make_example(int(n)) for n in rng.integers(5, 60, 500)]
    tokens, shares = sum(len(x.ids) - 1 for x in examples), []

    for batching in ("packed", "auto"):
        batches = make_sft_batches(batching, examples, rows=8, context=64, pad_id=0, seed=0)
        sizes = [batches.batch_at(n)["tokens"].size for n in range(batches.steps_per_epoch)]
        shares.append(tokens / sum(sizes))

    assert shares[0] > 0.9  # the longest rows leave gaps
    assert shares[0] > shares[1] > 0.65
    with pytest.raises(DataError, match=r"data\.batching=concat"):
        make_sft_batches("concat", examples, rows=8, context=64, pad_id=0, seed=0)
