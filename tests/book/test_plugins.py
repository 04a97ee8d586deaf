"""The values "book" of four options: splits, batches, learning rate and task."""

import hashlib

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gptjax import plugins
from gptjax.book import splits as book_splits
from gptjax.book.loader import BookBatches
from gptjax.config import OptimConfig
from gptjax.data.classification import read_labeled_texts
from gptjax.data.conversations import read_conversations, split_conversations
from gptjax.data.sft import Example
from gptjax.data.splits import describe_splits, stratified_split
from gptjax.errors import ConfigError
from gptjax.training.optimizer import make_grad_clip, make_schedule


def split_rows(rows):
    return split_conversations(rows, "book", val_fraction=0.2, test_fraction=0.2, seed=0)


def test_without_the_import_the_value_is_rejected(monkeypatch):
    monkeypatch.setattr(plugins, "_loaders", {})

    with pytest.raises(ConfigError, match=r"data\.split_strategy='book' .*`import gptjax\.book`"):
        split_rows([])


def test_the_sms_splits_are_the_files_of_the_book(shared_data):
    options = {"val_fraction": 0.3, "test_fraction": 0.2, "balance_classes": False}
    data, _ = read_labeled_texts("sms-spam")

    splits = stratified_split(data, "book", seed=5, **options)

    assert [len(part) for part in splits.values()] == [1045, 149, 300]
    # Of the files that the book's own code writes, with pandas 3.1.
    hashes = [
        hashlib.sha256(book_splits.book_csv(part).encode()).hexdigest()[:16]
        for part in splits.values()
    ]
    assert hashes == ["c89a1156b8476e6f", "0ac7a07215729476", "a5764d4eed041dad"]
    assert "13 in train and validation" in describe_splits(splits)[-1]


def test_the_instructions_are_split_in_file_order(shared_data):
    rows, _ = read_conversations("instructions")

    splits = split_rows(rows)

    assert [len(part) for part in splits.values()] == [935, 55, 110]
    parts = [splits[name] for name in ("train", "test", "validation")]
    assert [row for part in parts for row in part] == list(rows)


def test_the_collate_example_of_the_book():
    # Raschka 2024, ch07.ipynb, cell 46; -100 is where nothing is learned.
    rows = [[0, 1, 2, 3, 4, 50], [5, 6, 50], [7, 8, 9, 50]]
    examples = [Example(ids, [False, *[True] * (len(ids) - 1)], []) for ids in rows]

    batch = BookBatches(examples, rows=3, bucket_lengths=(), pad_id=50).make_batch(5, range(3))

    assert batch["tokens"].tolist() == [[0, 1, 2, 3, 4], [5, 6, 50, 50, 50], [7, 8, 9, 50, 50]]
    targets = np.where(batch["loss_weights"] > 0, batch["targets"], -100)
    assert targets.tolist() == [[1, 2, 3, 4, 50], [6, 50, -100, -100, -100], [8, 9, 50, -100, -100]]


def test_the_schedule_and_clipping_are_those_of_appendix_d():
    options = {"schedule": "book", "warmup_steps": 27, "grad_clip": 1.0}
    optim = OptimConfig(peak_lr=1.0, final_lr_fraction=0.01, **options)
    clip, grads = make_grad_clip(optim), {"bias": jnp.array([30.0, 40.0])}
    state, norms = clip.init(grads), []

    rate = make_schedule(optim, 135)(jnp.arange(136))
    for _ in range(29):
        clipped, state = clip.update(grads, state)
        norms.append(float(optax.tree.norm(clipped)))

    np.testing.assert_allclose(rate[:27], 0.01 + np.arange(27) * 0.99 / 27, rtol=1e-5)
    done = np.arange(136 - 27) / (135 - 27)
    expected = 0.01 + 0.99 * 0.5 * (1 + np.cos(np.pi * done))
    np.testing.assert_allclose(rate[27:], expected, rtol=1e-5)
    # Gradients are clipped only after the warm-up.
    np.testing.assert_allclose(norms, [50] * 27 + [1, 1], rtol=1e-6)
