"""Using a classifier: texts in, labels with their probabilities out."""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from gptjax.classifier import chances
from gptjax.config import GPTConfig
from gptjax.data.dealing import buckets
from gptjax.data.labelled import Labelled, read_labelled
from gptjax.data.labelled_batches import LabelledBatches
from gptjax.errors import DataError, ModelError
from gptjax.scores import Scores, bootstrap_interval, confusion, scores
from gptjax.stopping import poll
from gptjax.weights.folder import Model

ROWS = 32  # texts classified at a time


class Verdict(NamedTuple):
    """What a model makes of a text."""

    label: str
    probability: float  # of the label
    probabilities: dict[str, float]  # of all labels


class Judged(NamedTuple):
    """How a model does on labelled rows."""

    nats: float  # mean
    chance_NC: np.ndarray  # of each row and class
    scores: Scores
    matrix_CC: np.ndarray


def classify(model: Model, texts: Sequence[str]) -> list[Verdict]:
    """The label of each text; what else is in the list does not matter.

    Args:
        model: a classifier, from `gptjax.load`.
        texts: not empty; what is longer than the context is cut at its end.

    Raises:
        ModelError: the model is no classifier.
        DataError: a text is empty.
    """
    check_classifier(model)
    for number, text in enumerate(texts, 1):
        if not text:
            raise DataError(
                f"text {number} is empty, so it has no class. Leave it out."
            )
    chance_NC = predict(model, encoded(model, texts))
    best_N = chance_NC.argmax(axis=-1)
    return [
        Verdict(
            model.labels[best],
            float(chance_C[best]),
            dict(zip(model.labels, chance_C.tolist(), strict=True)),
        )
        for best, chance_C in zip(best_N, chance_NC, strict=True)
    ]


def check_classifier(model: Model) -> None:
    """Raises unless the model has a head and labels."""
    if not model.labels:
        raise ModelError(
            "this model has no labels, so it is no classifier. Train one: gptjax "
            "train with train.task = 'classify'."
        )


def encoded(model: Model, texts: Sequence[str]) -> list[list[int]]:
    """Tokens of each text, at most as many as the context holds."""
    most = model.config.context_length
    return [model.tokenizer.encode(text)[:most] for text in texts]


def sizes_of(config: GPTConfig) -> list[int]:
    """Lengths that rows are padded to."""
    return buckets(config.context_length, fixed=config.pool == "position")


def predict(model: Model, ids: Sequence[Sequence[int]]) -> np.ndarray:
    """Probabilities [rows, classes] of rows of tokens."""
    fill = model.tokenizer.eot
    batches = LabelledBatches(ids, [0] * len(ids), ROWS, sizes_of(model.config), fill)
    chance_NC = np.zeros((len(ids), len(model.labels)), np.float32)
    for chosen, batch in batches.in_order():
        poll()
        tokens, lengths = jnp.asarray(batch["tokens"]), jnp.asarray(batch["lengths"])
        chance_BC = chances(model.config, model.params, tokens, lengths)
        chance_NC[chosen] = np.asarray(chance_BC)[: len(chosen)]
    return chance_NC


def judge(model: Model, data: Labelled, ids: Sequence[Sequence[int]]) -> Judged:
    """Compares what the model says with the labels of the rows."""
    chance_NC = predict(model, ids)
    true_N = np.asarray(data.labels)
    least = np.finfo(np.float32).tiny
    right_N = np.maximum(chance_NC[np.arange(len(true_N)), true_N], least)
    matrix_CC = confusion(true_N, chance_NC.argmax(axis=-1), len(data.names))
    nats = float(-np.log(right_N.astype(np.float64)).mean())
    return Judged(nats, chance_NC, scores(matrix_CC), matrix_CC)


def judge_file(model: Model, path: str) -> dict[str, int | float]:
    """How a classifier does on a file of labelled texts, in numbers by name.

    Raises:
        ModelError: the model is no classifier.
        DataError: the file cannot be used, or has a label that the model does not.
    """
    check_classifier(model)
    data, _ = read_labelled(path)
    if unknown := sorted(set(data.names) - set(model.labels)):
        raise DataError(
            f"{path} has the label {unknown[0]!r}, but the model knows "
            f"{', '.join(model.labels)}. Rename it, or train with it."
        )
    ids = [model.labels.index(data.names[label]) for label in data.labels]
    data = dataclasses.replace(data, labels=ids, names=model.labels)
    result = judge(model, data, encoded(model, data.texts))
    right_N = result.chance_NC.argmax(axis=-1) == np.asarray(ids)
    low, high = bootstrap_interval(right_N)
    return {
        "texts": len(ids),
        "loss": result.nats,
        "accuracy": result.scores.accuracy,
        "accuracy low 95%": low,
        "accuracy high 95%": high,
        "macro-F1": result.scores.macro_f1,
        "balanced accuracy": result.scores.balanced_accuracy,
    }
