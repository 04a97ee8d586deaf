"""Statistical comparison of models and of configs, with 95% confidence intervals.

Two models are compared on the same documents: `paired_interval` of the losses of
`score_documents`. The interval is about new documents of the same kind, for these two
models. Two configs are compared by the losses of several seeds each: `welch_interval`.
"""

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int, Real
from scipy.special import stdtrit

from gptjax.data.lm import make_lm_batch
from gptjax.errors import DataError
from gptjax.evaluation.perplexity import eval_step_for, score_batch_size, start_ids
from gptjax.inference.generate import check_language_model
from gptjax.runtime.preemption import check_interrupted
from gptjax.runtime.timing import log_progress
from gptjax.weights.model_folder import Model

CONFIDENCE = 0.95
MIN_SEEDS = 3  # per config
MIN_DOCUMENTS = 10  # fewer are divided into blocks of text
NUM_BLOCKS = 40
MIN_EFFECTIVE_COUNT = 20  # of documents of unequal length: else intervals cover 86 to 93 %


class Interval(NamedTuple):
    """Estimate of a difference, with its 95% confidence interval."""

    difference: float
    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        """True if the difference is significant at the level of 5%."""
        return self.low > 0 or self.high < 0


class TokenLosses(NamedTuple):
    """Losses of the tokens of documents, in their order."""

    nats: Float[np.ndarray, " L"]
    num_bytes: Int[np.ndarray, " L"]  # of the text of each token
    document: Int[np.ndarray, " L"]  # number of its document, from 0


class Clusters(NamedTuple):
    """Sums over the documents, or blocks of text, that count as independent."""

    nats: Float[np.ndarray, " n"]
    tokens: Int[np.ndarray, " n"]
    num_bytes: Int[np.ndarray, " n"]


def paired_interval(difference: Real[np.ndarray, " n"], size: Real[np.ndarray, " n"]) -> Interval:
    """Interval of sum(difference) / sum(size) over clusters, such as documents.

    `difference` is that of two losses, each summed over a cluster; `size` is its tokens
    or bytes; there are at least two clusters. The variance is that of the jackknife
    over clusters (CR3 of Bell & McCaffrey 2002). The quantile is Student's, with
    `effective_count` minus one as degrees of freedom, since few long documents say less
    than many equal ones. `tests/benchmarks/interval_coverage.py` compares it with
    alternatives.

    >>> paired_interval(np.array([-1.0, -3.0]), np.array([10, 10])).difference
    -0.2
    """
    share = size / size.sum()
    mean = difference.sum() / size.sum()
    deviation = (difference - mean * size) / size.sum() / (1 - share)
    n = len(size)
    error = math.sqrt((n - 1) / n * np.sum(deviation**2))
    return student_interval(float(mean), error, max(effective_count(size) - 1, 1.0))


def effective_count(size: Real[np.ndarray, " n"]) -> float:
    """Number of equal clusters that say as much as clusters of these sizes (Kish 1965).

    >>> effective_count(np.array([90, 10]))
    1.2195...
    """
    return float(size.sum() ** 2 / np.sum(np.square(size, dtype=np.float64)))


def welch_interval(first: Sequence[float], second: Sequence[float]) -> Interval:
    """Interval of mean(second) - mean(first), whose variances may differ (Welch 1947).

    Each has at least two values.
    """
    difference = statistics.fmean(second) - statistics.fmean(first)
    parts = [statistics.variance(values) / len(values) for values in (first, second)]
    if not sum(parts):
        return Interval(difference, difference, difference)
    weights = [part**2 / (len(x) - 1) for part, x in zip(parts, (first, second), strict=True)]
    return student_interval(difference, math.sqrt(sum(parts)), sum(parts) ** 2 / sum(weights))


def student_interval(difference: float, error: float, degrees_of_freedom: float) -> Interval:
    """Interval of an estimate with a standard error."""
    half_width = error * float(stdtrit(degrees_of_freedom, (1 + CONFIDENCE) / 2))
    return Interval(difference, difference - half_width, difference + half_width)


def score_documents(model: Model, documents: Sequence[str]) -> TokenLosses:
    """Scores each document by itself, in windows of the context length.

    The token that ends a document is not scored.
    """
    check_language_model(model)
    context, start = model.config.context_length, start_ids(model)
    token_ids = [model.tokenizer.encode(text) for text in documents]
    token_RT, document_RT = pack_documents(token_ids, start, context)
    rows = score_batch_size(context)
    eval_step, parts = eval_step_for(model.config), []
    batches = range(0, len(token_RT), rows)
    for first in log_progress(batches, len(batches), "scoring", "batches"):
        check_interrupted()
        token_BT = np.full((rows, context + 1), start[0], np.int32)
        part = token_RT[first : first + rows]
        token_BT[: len(part)] = part  # all batches have the same shape
        losses = np.asarray(eval_step(model.params, make_lm_batch(token_BT, start[0])), np.float64)
        parts.append(losses[: len(part)])
    is_scored = document_RT >= 0
    return TokenLosses(
        np.concatenate(parts)[is_scored],
        model.tokenizer.byte_lengths[token_RT[:, 1:][is_scored]].astype(np.int64),
        document_RT[is_scored],
    )


def pack_documents(
    token_ids: Sequence[Sequence[int]], start: Sequence[int], context: int
) -> tuple[Int[np.ndarray, "R _"], Int[np.ndarray, "R T"]]:
    """Packs documents into rows, none of them across rows unless it is too long.

    Returns rows of `context` + 1 tokens, and the document of each target, or -1 if it
    is not scored. A document begins with the tokens `start`. One that does not fit into
    a row begins a row, and each row repeats the last token of the row before.
    """
    rows: list[tuple[list[int], list[int]]] = []  # tokens, and the document of each
    for number, ids in enumerate(token_ids):
        tokens, owners = [*start, *ids], [-1] * len(start) + [number] * len(ids)
        if rows and len(rows[-1][0]) + len(tokens) <= context + 1:
            rows[-1][0].extend(tokens)
            rows[-1][1].extend(owners)
            continue
        for begin in range(0, max(len(tokens) - 1, 1), context):
            end = begin + context + 1
            rows.append((tokens[begin:end], owners[begin:end]))
    token_RT = np.full((len(rows), context + 1), start[0], np.int32)
    owner_RT = np.full((len(rows), context + 1), -1)
    for row, (tokens, owners) in enumerate(rows):
        token_RT[row, : len(tokens)] = tokens
        owner_RT[row, : len(owners)] = owners
    return token_RT, owner_RT[:, 1:]


def sum_clusters(losses: TokenLosses, num_documents: int) -> Clusters:
    """Sums losses over documents, or over blocks of text if there are too few."""
    cluster = losses.document
    if num_documents < MIN_DOCUMENTS:
        start = np.cumsum(losses.num_bytes) - losses.num_bytes
        cluster = start * NUM_BLOCKS // max(int(losses.num_bytes.sum()), 1)
    sums = [np.bincount(cluster, weights) for weights in (losses.nats, None, losses.num_bytes)]
    if np.count_nonzero(sums[1]) < 2:
        raise DataError("the text has too few tokens for a comparison. Give a longer --text.")
    return Clusters(sums[0], sums[1], sums[2].astype(np.int64))
