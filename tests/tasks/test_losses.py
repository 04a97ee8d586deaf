"""The losses of all tasks: sums that do not depend on how a batch is split."""

import functools

import jax
import numpy as np
import pytest

from gptjax.data.classification import ClassificationBatches
from gptjax.data.lm import make_lm_batch
from gptjax.data.sft import Example, PreferenceBatches, make_sft_batches
from gptjax.tasks.classify import classification_loss_fn
from gptjax.tasks.dpo import dpo_loss_fn
from gptjax.tasks.pretrain import isolate_documents
from gptjax.tasks.sft import sft_loss_fn
from gptjax.training.finetune import combine_params, split_trainable
from gptjax.training.loss import make_lm_loss_fn
from tests.runs import config_with
from tests.small_models import random_params

B, T, EOT = 4, 8, 256
# Of three texts; there is also a row of padding.
IDS = [np.random.default_rng(n).integers(EOT, size=n).tolist() for n in (2, 8, 3)]
KEY = jax.random.key(0)


def example(ids, answer_start):
    mask = [n >= answer_start for n in range(len(ids))]
    return Example([*ids], mask, [(answer_start, len(ids))])


def pretraining(config):
    """Documents of uneven lengths; the last row has no targets."""
    row_BT = np.random.default_rng(0).integers(EOT + 1, size=(B, T + 1), dtype=np.int32)
    row_BT[1, 3:5] = EOT
    is_isolated = isolate_documents(config.data.batching)
    batch = make_lm_batch(row_BT, EOT if is_isolated else None)
    batch["loss_weights"][2, 1:] = batch["loss_weights"][3] = 0
    loss_fn = make_lm_loss_fn(config.model, config.train.loss_chunk_size, is_isolated)
    return lambda config, params, adapters, *inputs: loss_fn(params, *inputs), batch


def classification(config):
    batches = ClassificationBatches(IDS, [0, 2, 1], rows=B, bucket_lengths=[T], pad_id=EOT)
    return classification_loss_fn, batches.make_batch(T, range(3))


def sft(config):
    options = {"rows": B, "context": T, "pad_id": EOT, "seed": 0}
    batches = make_sft_batches(config.data.batching, [example(i, 1) for i in IDS], **options)
    return sft_loss_fn, batches.make_batch(T, range(len(batches.lengths)))


def dpo(config):
    pairs = [(example(ids, 1), example(ids[::-1], 1)) for ids in IDS]
    logprobs = np.random.default_rng(0).normal(-9, 3, (3, 2)).astype(np.float32)
    batches = PreferenceBatches(pairs, logprobs, rows=B, bucket_lengths=[T], pad_id=EOT)
    return dpo_loss_fn, batches.make_batch(T, range(3))


LORA = {"finetune__trainable": "lora"}


@pytest.mark.parametrize(
    ("make", "options"),
    [
        *((pretraining, {"data__batching": name}) for name in ("packed", "concat")),
        *((classification, {"model__pool": pool}) for pool in ("last", "mean")),
        (classification, {"finetune__lm_loss_weight": 2.0} | LORA),
        *((sft, {"data__batching": name} | LORA) for name in ("padded", "packed")),
        (dpo, LORA),
    ],
)
def test_the_sum_and_weight_of_a_batch_are_those_of_its_parts(make, options):
    """So are gradients of the mean: see `tests/training/test_train_step.py`."""
    shape = {"context_length": T, "n_layers": 1, "n_heads": 2, "d_model": 8, "vocab_size": 257}
    table = {"model": shape | {"n_classes": 3 * (make is classification)}}
    config = config_with(table, **options)
    trainable, frozen = split_trainable(config, random_params(config.model), KEY)
    params, adapters = combine_params(config, trainable, frozen)
    task_loss_fn, batch = make(config)
    loss_fn = jax.jit(functools.partial(task_loss_fn, config, params, adapters))

    whole = np.array(loss_fn(batch, KEY))

    parts = [{name: x[n : n + 1] for name, x in batch.items()} for n in range(len(batch["tokens"]))]
    sums = np.sum([loss_fn(part, KEY) for part in parts], axis=0)
    np.testing.assert_allclose(sums, whole, rtol=1e-5)
