"""Evaluation of a classifier on labeled texts."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from gptjax.data.classification import LabeledTexts, read_labeled_texts
from gptjax.evaluation.metrics import (
    ClassificationMetrics,
    classification_metrics,
    confusion_matrix,
    proportion_ci,
)
from gptjax.inference.classify import check_classifier, encode_texts, predict_probs
from gptjax.runtime.terminal import logger
from gptjax.weights.model_folder import Model

# Options of `gptjax eval` that choose the columns.
EVAL_OPTIONS = ("--text-column NAME", "--label-column NAME")


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


def evaluate_labeled_file(
    model: Model, path: str, text_column: str = "", label_column: str = ""
) -> dict[str, Any]:
    """Evaluates a classifier on labeled texts; returns metrics by name.

    Any of its classes may occur. The default columns are those of the training data.
    """
    check_classifier(model)
    data, description = read_labeled_texts(
        path,
        text_column,
        label_column,
        class_names=model.labels,
        usual_columns=model.columns,
        options=EVAL_OPTIONS,
    )
    logger.info(f"data     {description}")
    result = evaluate_classifier(model, data, encode_texts(model, data.texts))
    is_correct = result.prob_NC.argmax(axis=-1) == np.asarray(data.labels)
    low, high = proportion_ci(int(is_correct.sum()), len(data))
    metrics = {
        "texts": len(data),
        "loss": result.loss,
        "accuracy": result.metrics.accuracy,
        "accuracy low 95%": low,
        "accuracy high 95%": high,
        "macro-F1": result.metrics.macro_f1,
        "balanced accuracy": result.metrics.balanced_accuracy,
    }
    counts = zip(model.labels, result.metrics.count, strict=True)
    absent = [label for label, count in counts if not count]
    return metrics | ({"classes without texts": absent} if absent else {})
