"""Loss masks and losses of conversations, truncation, and batches of all kinds."""

import tracemalloc

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptjax.config import RunConfig
from gptjax.data.bucketing import buckets
from gptjax.data.classification import ClassificationBatches, encode_truncated
from gptjax.data.conversations import Conversation
from gptjax.data.sft import (
    TRAIN_ON_ALL,
    TRAIN_ON_COMPLETIONS,
    Example,
    PreferenceBatches,
    encode_conversations,
    make_sft_batches,
    mask_all_but_answers,
    truncate_all,
    truncate_left,
)
from gptjax.tasks.sft import sft_loss_fn
from gptjax.tokenizer.chat_template import load_chat_template
from tests.data.tables import quick
from tests.small_models import make_model

MODEL = make_model(context_length=40, n_layers=1, d_model=8)
ROLES = ("user", "assistant")
EOT = MODEL.tokenizer.eot_token
CHATS = [
    [("Hé", "Ho")],
    [("a", "b"), ("c", "漢 d")],
    [("q" * 9, "<|endoftext|>")],
    [("a", "b")] * 3,
]


def encode_chats(train_on):
    conversations = []
    for turns in CHATS:
        texts = [(role, text) for turn in turns for role, text in zip(ROLES, turn, strict=True)]
        messages = tuple({"role": role, "content": text} for role, text in texts)
        conversations.append(Conversation(messages, {}, "a:1"))
    template = load_chat_template("qa")
    return [*encode_conversations(MODEL.tokenizer, template, conversations, train_on)]


@pytest.mark.parametrize("train_on", [TRAIN_ON_COMPLETIONS, TRAIN_ON_ALL])
def test_answers_with_their_end_are_trained_on_and_prompts_on_request(train_on):
    expected = []
    for turns in CHATS:
        tokens = []
        for n, (user, answer) in enumerate(turns):
            prompt = ("\n" if n else "") + f"Q: {user}\nA: "
            tokens += [(byte, "prompt" in train_on) for byte in prompt.encode()]
            tokens += [(byte, True) for byte in [*answer.encode(), EOT]]
        expected.append([(tokens[0][0], False), *tokens[1:]])

    examples = encode_chats(train_on)

    assert [list(zip(x.ids, x.loss_mask, strict=True)) for x in examples] == expected


def test_answers_alone_can_be_trained_on_without_another_encoding():
    for context in range(1, 40):
        everything, answers = (
            truncate_all(encode_chats(x), context) for x in (TRAIN_ON_ALL, TRAIN_ON_COMPLETIONS)
        )
        assert list(mask_all_but_answers(everything.examples)) == list(answers.examples)


def test_losses_of_packed_rows_are_those_of_one_conversation_at_a_time():
    examples, config = encode_chats(TRAIN_ON_COMPLETIONS), RunConfig(model=MODEL.config)
    loss_fn = jax.jit(lambda batch: sft_loss_fn(config, MODEL.params, None, batch, None))

    def sum_losses(batching, rows):
        batches = make_sft_batches(batching, examples, rows=rows, context=40, pad_id=EOT, seed=0)
        steps = range(batches.steps_per_epoch)
        return np.sum([loss_fn(batches.batch_at(step)) for step in steps], axis=0)

    packed, padded = sum_losses("packed", 4), sum_losses("padded", 1)

    np.testing.assert_allclose(packed, padded, rtol=1e-5)
    assert packed[1] == sum(sum(x.loss_mask) for x in examples)


def make_example(length, answer=1, first=0):
    """Tokens first, first + 1, ..., of which the last are the answer."""
    start = length - answer
    loss_mask = [n >= max(start, 1) for n in range(length)]
    return Example(list(range(first, first + length)), loss_mask, [(start, length)])


def test_truncation_counts_examples_and_drops_broken_answers():
    loss_mask = [False, True, True, True, False, False, True, True]
    example = Example(list(range(8)), loss_mask, [(1, 4), (6, 8)])

    assert truncate_left(example, 6) == ([2, 3, 4, 5, 6, 7], [False] * 4 + [True] * 2, [(4, 6)])
    assert truncate_left(example, 3) == ([5, 6, 7], [False, True, True], [(1, 3)])
    assert truncate_left(example, 2) is None  # a token before the last answer does not fit
    for length, num_truncated in ((10, 0), (11, 1)):  # 10 tokens fit a context of 9
        found = truncate_all([make_example(40, 30), make_example(length, 3)], 9)
        assert (found.num_truncated, found.num_dropped) == (num_truncated, 1)
        assert list(found.kept_indices) == [1]
        assert len(found.examples[0].ids) == 10


def test_packed_ids_and_masks_take_a_few_bytes_per_token():
    ids, text = [*range(257)], "a" * 257
    for pack in (
        lambda: truncate_all((Example([*ids], [True] * 257, [(1, 9)]) for _ in range(999)), 300),
        lambda: encode_truncated(MODEL.tokenizer, (text for _ in range(999)), 300),
    ):
        tracemalloc.start()
        pack()
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 4 * 257 * 999


def examples_of(batch, examples):
    """The numbers of the examples in a batch, in order; checks all of their fields."""
    seen, length = [], batch["tokens"].shape[-1]
    names = ("tokens", "targets", "loss_weights", "segment_ids", "positions")
    rows = {name: batch[name].reshape(-1, length) for name in names}
    for b, segment_T in enumerate(rows["segment_ids"]):
        for segment in range(1, segment_T.max() + 1):
            found = [array[b, segment_T == segment].tolist() for array in rows.values()]
            seen.append(found[0][0] // 100)
            ids, loss_mask, _ = examples[seen[-1]]
            count = len(ids) - 1
            assert found == [ids[:-1], ids[1:], loss_mask[1:], [segment] * count, [*range(count)]]
        assert not rows["loss_weights"][b, segment_T == 0].any()
    return seen


@quick
@given(st.lists(st.integers(2, 70), min_size=1, max_size=60), st.integers(1, 9), st.integers(0, 3))
def test_all_batches_visit_each_example_once_in_few_shapes(lengths, rows, epoch):
    examples = [make_example(n, first=100 * i) for i, n in enumerate(lengths)]
    options = {"rows": rows, "bucket_lengths": buckets(70), "pad_id": -1, "seed": 3}
    logprob_P2 = np.arange(2.0 * len(lengths), dtype=np.float32).reshape(-1, 2)
    pairs = PreferenceBatches([(x, x) for x in examples], logprob_P2, **options)
    labels = ClassificationBatches([x.ids for x in examples], list(range(len(lengths))), **options)
    padded, packed = (
        make_sft_batches(name, examples, rows=rows, context=70, pad_id=-1, seed=3)
        for name in ("padded", "packed")
    )

    for batches in (padded, packed, pairs, labels):
        steps = range(epoch * batches.steps_per_epoch, (epoch + 1) * batches.steps_per_epoch)
        in_order = [] if batches is packed else [[batch for _, batch in batches.in_order()]]
        for found in ([batches.batch_at(step) for step in steps], *in_order):
            seen = []
            for batch in found:
                assert batch["tokens"].shape[0] == rows
                assert batch["tokens"].shape[-1] in buckets(70)
                if batches is labels:
                    numbers = batch["labels"][batch["loss_weights"] > 0].tolist()
                    for b, n in enumerate(numbers):
                        tokens_T = batch["tokens"][b]
                        assert tokens_T[tokens_T >= 0].tolist() == examples[n].ids
                        assert batch["lengths"][b] == len(examples[n].ids)
                else:
                    numbers = examples_of(batch, examples)
                if batches is pairs:
                    numbers, rejected = numbers[::2], numbers[1::2]
                    assert numbers == rejected
                    logprobs = batch["reference_logprobs"][: len(numbers)]
                    assert logprobs.tolist() == logprob_P2[numbers].tolist()
                if rows == 1 and batches in (padded, labels):
                    size = lengths[numbers[0]] - (batches is padded)
                    assert batch["tokens"].shape[-1] == min(x for x in buckets(70) if x >= size)
                seen += numbers
            assert sorted(seen) == list(range(len(lengths)))


@pytest.mark.parametrize("batching", ["padded", "packed"])
def test_epochs_and_seeds_differ_in_order(batching):
    examples = [make_example(9, first=100 * n) for n in range(40)]

    count, orders = {"padded": 10, "packed": 5}[batching], set()
    for seed in (0, 1):
        batches = make_sft_batches(batching, examples, rows=4, context=16, pad_id=-1, seed=seed)
        assert batches.steps_per_epoch == count
        starts = [batches.batch_at(step)["tokens"][:, 0].tolist() for step in range(2 * count)]
        orders |= {str(starts[:count]), str(starts[count:])}

    assert len(orders) == 4


def test_a_short_run_has_the_same_rows_in_fewer_shapes():
    rows = [[n] * length for n, length in enumerate([10, 30, 60] * 7)]
    options = {"rows": 4, "bucket_lengths": buckets(512), "pad_id": -1}
    batches = ClassificationBatches(rows, [0] * len(rows), **options)

    assert batches.batch_shapes == [16, 32, 64]  # also of the rows left over
    for steps, shapes in ((1, [64]), (60, [32, 64]), (90, [16, 32, 64])):
        limited = batches.limit_shapes(steps)
        assert limited.batch_shapes == shapes
        for step in range(2 * batches.steps_per_epoch):
            one, other = (each.batch_at(step)["tokens"] for each in (batches, limited))
            np.testing.assert_array_equal(other[:, : one.shape[1]], one)
            assert (other[:, one.shape[1] :] == -1).all()
            assert other.shape[1] in shapes
