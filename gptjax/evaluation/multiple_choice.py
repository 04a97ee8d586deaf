"""Benchmarks from files: multiple choice, and the last word of a text.

Prompts, tokens and metrics are those of lm-evaluation-harness 0.4.13 for tasks of the
type `multiple_choice`, and for LAMBADA (Paperno et al. 2016).
"""

import math
import statistics
import string
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gptjax.data.readers import check_object, get_text, read_jsonl, require_text
from gptjax.errors import ConfigError, DataError
from gptjax.evaluation.metrics import MetricValues, mean_ci
from gptjax.evaluation.perplexity import to_perplexity
from gptjax.fileio.atomic import write_jsonl
from gptjax.fileio.paths import require_new_file
from gptjax.inference.generate import check_language_model
from gptjax.inference.loglikelihood import (
    ContinuationScore,
    ScoringRequest,
    encode_pair,
    score_continuations,
)
from gptjax.runtime.terminal import logger
from gptjax.weights.model_folder import Model

TARGET_DELIMITER = " "  # before each choice
FEW_SHOT_DELIMITER = "\n\n"  # after each example
LETTERS = string.ascii_uppercase  # of choices
QUESTION_ADVICE = 'Write {"context": "2 + 2 =", "choices": ["3", "4"], "answer": 1}.'


class Question(NamedTuple):
    """Multiple-choice question."""

    context: str  # before the choices
    choices: list[str]
    answer: int  # index of the right choice
    source_row: dict[str, Any]


def evaluate_questions(
    model: Model, path: Path, few_shot: Path | None, num_few_shot: int | None, out: Path | None
) -> MetricValues:
    """Evaluates a model on a file of multiple-choice questions.

    The context starts with the first `num_few_shot` examples of the file `few_shot`
    (None: all) that are not the question itself. Writes the rows with the
    log-probability of each choice to `out`.
    """
    check_language_model(model)
    require_new_file(out)
    questions = [parse_question(*item) for item in read_jsonl(path)]
    examples = [parse_question(*item) for item in read_jsonl(few_shot)] if few_shot else []
    require_rows(questions, path)
    logger.info(f"data     {len(questions):,} questions, {len(examples):,} examples")
    contexts = [few_shot_context(question, examples, num_few_shot) for question in questions]
    choices = [[TARGET_DELIMITER + choice for choice in x.choices] for x in questions]
    results: list[dict[str, Any]] = [
        {"logprobs": logprobs, **grade_choices(question, logprobs)}
        for question, logprobs in zip(
            questions, score_choices(model, contexts, choices), strict=True
        )
    ]
    write_results([question.source_row for question in questions], results, out)
    metrics: MetricValues = {"questions": len(questions)}
    for name in ("acc", "acc_norm", "acc_bytes"):
        metrics |= summarize(name, [result[name] for result in results])
    return metrics


def grade_choices(question: Question, logprobs: Sequence[float]) -> dict[str, Any]:
    """Grades the most likely choice: as it is, by its characters and by its bytes."""
    logprob_C = np.asarray(logprobs)
    lengths = {
        "acc": np.ones(len(logprobs)),
        "acc_norm": np.array([float(len(choice)) for choice in question.choices]),
        "acc_bytes": np.array([float(len(choice.encode())) for choice in question.choices]),
    }
    predicted = {name: int(np.argmax(logprob_C / x_C)) for name, x_C in lengths.items()}
    grades = {name: float(choice == question.answer) for name, choice in predicted.items()}
    return {"prediction": predicted["acc"], **grades}


def evaluate_last_words(model: Model, path: Path, out: Path | None) -> MetricValues:
    """Evaluates the prediction of the last word of each text of a file.

    A prediction is right if greedy decoding generates the word. The perplexity is that
    of a word, not of a token. Writes the rows with the log-probability to `out`.
    """
    check_language_model(model)
    require_new_file(out)
    rows = list(read_jsonl(path))
    pairs = [split_last_word(*item) for item in rows]
    require_rows(pairs, path)
    logger.info(f"data     {len(pairs):,} texts")
    results = [
        {"target": target, "logprob": score.logprob, "acc": float(score.is_greedy)}
        for (_, target), score in zip(pairs, score_pairs(model, pairs), strict=True)
    ]
    write_results([row for _, row in rows], results, out)
    losses = [-result["logprob"] for result in results]
    low, high = map(to_perplexity, mean_ci(losses))
    metrics: MetricValues = {"texts": len(pairs)}
    metrics |= summarize("acc", [result["acc"] for result in results])
    metrics["perplexity"] = to_perplexity(statistics.fmean(losses))
    return metrics | {"perplexity low 95%": low, "perplexity high 95%": high}


def score_choices(
    model: Model, contexts: Sequence[str], choices: Sequence[Sequence[str]]
) -> list[list[float]]:
    """Log-probability of each choice of each context, in nats."""
    pairs = [(x, choice) for x, some in zip(contexts, choices, strict=True) for choice in some]
    scores = iter(score_pairs(model, pairs))
    return [[next(scores).logprob for _ in some] for some in choices]


def score_pairs(model: Model, pairs: Sequence[tuple[str, str]]) -> list[ContinuationScore]:
    """Scores each text as the continuation of its context."""
    encoded = (encode_pair(model.tokenizer, *pair) for pair in pairs)
    requests = [ScoringRequest(context, [continuation]) for context, continuation in encoded]
    return [score for (score,) in score_continuations(model, requests)]


def few_shot_context(
    question: Question, examples: Sequence[Question], num_few_shot: int | None
) -> str:
    """Puts solved examples before the context of a question."""
    others = [example for example in examples if example[:3] != question[:3]][:num_few_shot]
    if num_few_shot is not None and len(others) < num_few_shot:
        raise ConfigError(
            f"--num-fewshot {num_few_shot}: --few-shot has {len(others)} examples besides the "
            "question itself. Add examples, or lower --num-fewshot."
        )
    solved = (x.context + TARGET_DELIMITER + x.choices[x.answer] for x in others)
    return FEW_SHOT_DELIMITER.join([*solved, question.context])


def parse_question(location: str, row: Any) -> Question:
    """Validates a row of `context` or `question`, `choices` and `answer`."""
    columns = check_object(row, location, QUESTION_ADVICE)
    names = [name for name in ("context", "question") if name in columns]
    choices = columns.get("choices")
    if len(names) != 1:
        raise DataError(
            f"{location}: {len(names)} of the columns context and question, not 1. "
            f"{QUESTION_ADVICE}"
        )
    if not isinstance(choices, list) or len(choices) < 2:
        raise DataError(
            f"{location}: choices is {choices!r:.80}, not a list of two or more texts. "
            f"{QUESTION_ADVICE}"
        )
    named = {f"choices[{n}]": choice for n, choice in enumerate(choices)}
    texts = [require_text(named, name, location) for name in named]
    context = get_text(columns, names[0], location)
    answer = find_answer(columns.get("answer"), texts, location)
    return Question(context, texts, answer, columns)


def find_answer(answer: Any, choices: Sequence[str], location: str) -> int:
    """Returns the index of the right choice: given as text, letter, or index from 0."""
    match answer:
        case str() if answer in choices:
            return choices.index(answer)
        case str() if len(answer) == 1 and answer in LETTERS[: len(choices)]:
            return LETTERS.index(answer)
        case int() if not isinstance(answer, bool) and 0 <= answer < len(choices):
            return answer
    raise DataError(
        f"{location}: answer is {answer!r:.80}, not an index from 0 to {len(choices) - 1}, a "
        f"letter from A to {LETTERS[: len(choices)][-1]}, or the text of a choice."
    )


def split_last_word(location: str, row: Any) -> tuple[str, str]:
    """Splits a text before the blank that precedes its last word."""
    text = require_text(row, "text", location)
    context, blank, word = text.rpartition(" ")
    if not context.strip() or not word.strip():
        raise DataError(f"{location}: text is {text!r:.80}, which does not end with a second word.")
    return context, blank + word


def require_rows(rows: Sequence[Any], path: Path) -> None:
    """Raises DataError if a file has no rows."""
    if not rows:
        raise DataError(f"{path} has no rows. Write one JSON object per line.")


def summarize(name: str, values: Sequence[float]) -> MetricValues:
    """Mean with its standard error and a bootstrap interval."""
    low, high = mean_ci(values)
    metrics: MetricValues = {name: statistics.fmean(values)}
    if len(values) > 1:
        metrics[f"{name}_stderr"] = statistics.stdev(values) / math.sqrt(len(values))
    return metrics | {f"{name} low 95%": low, f"{name} high 95%": high}


def write_results(
    rows: Sequence[dict[str, Any]], results: Sequence[dict[str, Any]], out: Path | None
) -> None:
    """Writes each row with its result as a JSON line, atomically."""
    if out is None:
        return
    write_jsonl(out, (row | result for row, result in zip(rows, results, strict=True)))
    logger.info(f"wrote    {out}")
