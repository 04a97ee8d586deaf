"""Evaluation of a classifier on labeled texts."""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from gptjax.data.classification import LabeledTexts, read_labeled_texts
from gptjax.errors import DataError
from gptjax.evaluation.metrics import (
    ClassificationMetrics,
    classification_metrics,
    confusion_matrix,
    mean_ci,
)
from gptjax.inference.classify import check_classifier, encode_texts, predict_probs
from gptjax.weights.model_folder import Model


class ClassificationResult(NamedTuple):
    """Evaluation of a classifier on labeled texts."""

    loss: float  # mean cross-entropy, nats
    prob_NC: np.ndarray  # probability of each class for each text
    metrics: ClassificationMetrics
    confusion_CC: np.ndarray  # counts: true class in rows, predicted in columns


def evaluate_classifier(
    model: Model, data: LabeledTexts, ids: Sequence[Sequence[int]]
) -> ClassificationResult:
    """Computes loss and metrics of a classifier on tokenized, labeled texts."""
    prob_NC = predict_probs(model, ids)
    true_N = np.asarray(data.labels)
    true_prob_N = prob_NC[np.arange(len(true_N)), true_N].astype(np.float64)
    loss = float(-np.log(np.maximum(true_prob_N, np.finfo(np.float32).tiny)).mean())
    confusion_CC = confusion_matrix(true_N, prob_NC.argmax(axis=-1), len(data.class_names))
    return ClassificationResult(loss, prob_NC, classification_metrics(confusion_CC), confusion_CC)


def evaluate_labeled_file(model: Model, path: str) -> dict[str, int | float]:
    """Evaluates a classifier on a file of labeled texts; returns metrics by name."""
    check_classifier(model)
    data, _ = read_labeled_texts(path)
    if unknown := sorted(set(data.class_names) - set(model.labels)):
        raise DataError(
            f"{path} has the label {unknown[0]!r}, but the labels of the model are "
            f"{', '.join(model.labels)}. Rename it, or train with it."
        )
    label_ids = [model.labels.index(data.class_names[label]) for label in data.labels]
    data = dataclasses.replace(data, labels=label_ids, class_names=model.labels)
    result = evaluate_classifier(model, data, encode_texts(model, data.texts))
    low, high = mean_ci(result.prob_NC.argmax(axis=-1) == np.asarray(label_ids))
    return {
        "texts": len(label_ids),
        "loss": result.loss,
        "accuracy": result.metrics.accuracy,
        "accuracy low 95%": low,
        "accuracy high 95%": high,
        "macro-F1": result.metrics.macro_f1,
        "balanced accuracy": result.metrics.balanced_accuracy,
    }
