"""Evaluation of assistants: loss on reference answers and overlap of responses."""

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from gptjax.answering import answer_batch
from gptjax.data.conversations import Conversation
from gptjax.data.example_batches import make_bucketed_batches
from gptjax.data.examples import Example
from gptjax.data.labelling import atomic_write
from gptjax.evaluate import Evaluation, evaluate, eval_step_for
from gptjax.overlap import exact_match, rouge_l, token_f1
from gptjax.weights.folder import Model

LOSS_BATCH_SIZE = 8  # conversations per batch
SCORE_FUNCTIONS = {"exact_match": exact_match, "token_f1": token_f1, "rouge_l": rouge_l}


class ResponseEval(NamedTuple):
    """Conversation and the model's response in place of its last answer."""

    conversation: Conversation
    response: str
    scores: dict[str, float]  # by name, as in SCORE_FUNCTIONS

    @property
    def reference(self) -> str:
        """Reference answer: the last message of the conversation."""
        return self.conversation.messages[-1]["content"].strip()


def example_loss(model: Model, examples: Sequence[Example]) -> Evaluation:
    """Mean loss in nats over the trained tokens of the examples.

    The examples must be tokenized for this model and fit its context.
    """
    context, pad_id = model.config.context_length, model.tokenizer.eot_token
    bucketed = make_bucketed_batches(examples, LOSS_BATCH_SIZE, context, pad_id)
    batches = (batch for _, batch in bucketed.in_order())
    eval_step = eval_step_for(model.config)
    return evaluate(eval_step, model.params, batches, model.tokenizer.byte_lengths)


def generate_responses(
    model: Model, conversations: Sequence[Conversation], max_new_tokens: int
) -> list[ResponseEval]:
    """Generates greedy responses in place of the last answer of each conversation.

    Each conversation ends with a reference answer, which is not part of the prompt.
    """
    prompts = [conversation.messages[:-1] for conversation in conversations]
    results = []
    for conversation, response in zip(
        conversations, answer_batch(model, prompts, max_new_tokens), strict=True
    ):
        result = ResponseEval(conversation, response, {})
        scores = {
            name: score(response, result.reference)
            for name, score in SCORE_FUNCTIONS.items()
        }
        results.append(result._replace(scores=scores))
    return results


def mean_scores(results: Sequence[ResponseEval]) -> dict[str, float]:
    """Averages each score."""
    return {
        name: sum(result.scores[name] for result in results) / len(results)
        for name in SCORE_FUNCTIONS
    }


def group_scores(results: Iterable[ResponseEval]) -> dict[str, dict[str, float]]:
    """Averages the scores by task; conversations without a task are skipped."""
    grouped = defaultdict(list)
    for result in results:
        if result.conversation.task:
            grouped[result.conversation.task].append(result)
    return {task: mean_scores(grouped[task]) for task in sorted(grouped)}


def to_rows(results: Iterable[ResponseEval]) -> list[dict[str, Any]]:
    """Converts results to rows: the original row, the response and its scores."""
    return [
        {**result.conversation.source_row, "response": result.response, **result.scores}
        for result in results
    ]


def write_rows(rows: Iterable[Mapping[str, Any]], path: Path) -> None:
    """Writes rows as JSON lines, atomically.

    Raises:
        DataError: the file cannot be written.
    """
    with atomic_write(path) as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
