"""How well an assistant answers: its loss on good answers, and its own beside them."""

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from gptjax.answering import answer_all
from gptjax.data.conversations import Conversation
from gptjax.data.example_batches import padded
from gptjax.data.examples import Example
from gptjax.data.labelling import new_file
from gptjax.evaluate import Evaluation, evaluate, scorer_of
from gptjax.overlap import exact_match, rouge_l, token_f1
from gptjax.weights.folder import Model

ROWS = 8  # conversations scored at a time
SCORES = {"exact_match": exact_match, "token_f1": token_f1, "rouge_l": rouge_l}


class Answered(NamedTuple):
    """A conversation and what the model says in place of its last answer."""

    conversation: Conversation
    response: str
    scores: dict[str, float]  # by the names in SCORES

    @property
    def reference(self) -> str:
        """The answer that the data give."""
        return self.conversation.messages[-1]["content"].strip()


def example_loss(model: Model, examples: Sequence[Example]) -> Evaluation:
    """Nats per learned token of the examples, each once.

    Args:
        model: whatever made the examples' tokens.
        examples: that fit its context.
    """
    context, fill = model.config.context_length, model.tokenizer.eot
    rows = padded(examples, ROWS, context, fill)
    batches = (batch for _, batch in rows.in_order())
    scorer = scorer_of(model.config)
    return evaluate(scorer, model.params, batches, model.tokenizer.byte_lengths)


def respond(
    model: Model, conversations: Sequence[Conversation], max_new_tokens: int
) -> list[Answered]:
    """The model's greedy answers to the last message of each user.

    Args:
        model: an assistant.
        conversations: that end with an answer, which is not shown to the model.
        max_new_tokens: of an answer at most.
    """
    prompts = [conversation.messages[:-1] for conversation in conversations]
    found = []
    for conversation, response in zip(
        conversations, answer_all(model, prompts, max_new_tokens), strict=True
    ):
        one = Answered(conversation, response, {})
        scores = {
            name: score(response, one.reference) for name, score in SCORES.items()
        }
        found.append(one._replace(scores=scores))
    return found


def mean_scores(answered: Sequence[Answered]) -> dict[str, float]:
    """The mean of each score."""
    return {
        name: sum(one.scores[name] for one in answered) / len(answered)
        for name in SCORES
    }


def by_task(answered: Iterable[Answered]) -> dict[str, dict[str, float]]:
    """The mean scores of each task, where the rows name tasks."""
    tasks = defaultdict(list)
    for one in answered:
        if one.conversation.task:
            tasks[one.conversation.task].append(one)
    return {task: mean_scores(tasks[task]) for task in sorted(tasks)}


def response_rows(answered: Iterable[Answered]) -> list[dict[str, Any]]:
    """Each row of the data as it was, with the response and its scores."""
    return [
        {**one.conversation.row, "response": one.response, **one.scores}
        for one in answered
    ]


def write_rows(rows: Iterable[Mapping[str, Any]], path: Path) -> None:
    """Writes JSON lines, all or none.

    Raises:
        DataError: the file cannot be written.
    """
    with new_file(path) as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
