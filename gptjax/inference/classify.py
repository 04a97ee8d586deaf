"""Classification of texts."""

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from gptjax.config import GPTConfig
from gptjax.data.bucketing import buckets
from gptjax.data.classification import ClassificationBatches
from gptjax.errors import DataError, ModelError
from gptjax.model.classifier import class_probabilities
from gptjax.runtime.preemption import check_interrupted
from gptjax.weights.model_folder import Model

CLASSIFY_BATCH_SIZE = 32  # texts per batch


class Prediction(NamedTuple):
    """Predicted label with probabilities."""

    label: str
    probability: float  # of the label
    probabilities: dict[str, float]  # of all labels


def classify(model: Model, texts: Sequence[str]) -> list[Prediction]:
    """Predicts the label of each text; results do not depend on the batch.

    Tokens beyond the context length are dropped.
    """
    check_classifier(model)
    if isinstance(texts, str):
        raise DataError(f"texts={texts[:40]!r} is a string, not a list of texts. Write [text].")
    for number, text in enumerate(texts, 1):
        if not text:
            raise DataError(f"text {number} is empty and cannot be classified. Remove it.")
    prob_NC = predict_probs(model, encode_texts(model, texts))
    tables = [dict(zip(model.labels, prob_C.tolist(), strict=True)) for prob_C in prob_NC]
    return [Prediction(label := max(t, key=t.__getitem__), t[label], t) for t in tables]


def check_classifier(model: Model) -> None:
    """Raises ModelError if the model has no classification labels."""
    if not model.labels:
        raise ModelError("the model has no labels. Train a classifier with train.task=classify.")


def encode_texts(model: Model, texts: Sequence[str]) -> list[list[int]]:
    """Tokenizes texts, truncated to the context length."""
    max_length = model.config.context_length
    return [model.tokenizer.encode(text)[:max_length] for text in texts]


def bucket_lengths(config: GPTConfig) -> list[int]:
    """Lengths to which rows are padded."""
    return buckets(config.context_length, single=config.pool == "position")


def predict_probs(model: Model, ids: Sequence[Sequence[int]]) -> np.ndarray:
    """Class probabilities [N, C] of tokenized texts."""
    batches = ClassificationBatches(
        ids,
        [0] * len(ids),
        rows=CLASSIFY_BATCH_SIZE,
        bucket_lengths=bucket_lengths(model.config),
        pad_id=model.tokenizer.eot_token,
    )
    prob_NC = np.zeros((len(ids), len(model.labels)), np.float32)
    for indices, batch in batches.in_order():
        check_interrupted()
        tokens, lengths = jnp.asarray(batch["tokens"]), jnp.asarray(batch["lengths"])
        prob_BC = class_probabilities(model.config, model.params, tokens, lengths)
        prob_NC[indices] = np.asarray(prob_BC)[: len(indices)]
    return prob_NC
