"""Classification of texts."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from gptjax.config import GPTConfig
from gptjax.data.bucketing import buckets
from gptjax.data.classification import ClassificationBatches
from gptjax.errors import DataError, ModelError, check_type
from gptjax.inference.generate import warn_truncated
from gptjax.model.classifier import class_probabilities
from gptjax.runtime.preemption import check_interrupted
from gptjax.weights.model_folder import Model

CLASSIFY_BATCH_SIZE = 32  # texts per batch


class Prediction(NamedTuple):
    """Predicted label with probabilities."""

    label: str
    probability: float  # of the label
    probabilities: dict[str, float]  # of all labels
    truncated: int  # tokens dropped from the end of the text


def classify(model: Model, texts: Sequence[str]) -> list[Prediction]:
    """Predicts the label of each text; results do not depend on the batch.

    Tokens beyond the context length are dropped; `Prediction.truncated` counts them.
    """
    check_classifier(model)
    if isinstance(texts, str) or not isinstance(texts, Iterable):
        raise DataError(f"texts={texts!r:.40} is not a list of texts. Write [text].")
    for number, text in enumerate(texts, 1):
        if not isinstance(text, str) or not text:
            raise DataError(f"text {number} is {text!r:.40}, not a text to classify. Remove it.")
    ids, predictions = [model.tokenizer.encode_prompt(text) for text in texts], []
    max_length = model.config.context_length
    prob_NC = predict_probs(model, [row[:max_length] for row in ids])
    for row, prob_C in zip(ids, prob_NC.tolist(), strict=True):
        table = dict(zip(model.labels, prob_C, strict=True))
        label, truncated = max(table, key=table.__getitem__), max(0, len(row) - max_length)
        predictions.append(Prediction(label, table[label], table, truncated))
    return predictions


def check_classifier(model: Model) -> None:
    """Raises ModelError if the model has no classification labels."""
    check_type("model", model, Model, 'Load it: gptjax.load("DIR").')
    if not model.labels:
        raise ModelError("the model has no labels. Train a classifier with train.task=classify.")


def encode_texts(model: Model, texts: Sequence[str]) -> list[list[int]]:
    """Tokenizes texts, truncated to the context length with a warning."""
    ids = [model.tokenizer.encode_prompt(text) for text in texts]
    warn_truncated(ids, model.config.context_length, "texts", "last")
    return [row[: model.config.context_length] for row in ids]


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
