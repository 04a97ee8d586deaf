"""Evaluation of assistants: loss on reference answers and scores of responses.

Responses are scored by their overlap with the reference answers and by an LLM judge.
"""

import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from gptjax.data.conversations import Conversation, read_conversations
from gptjax.data.sft import Example, encode_conversations, make_bucketed_batches, truncate_all
from gptjax.errors import ConfigError, DataError, ModelError
from gptjax.evaluation.llm_judge import (
    Judgement,
    LLMJudge,
    check_judge_allowed,
    judge_all,
    summarize_judgements,
)
from gptjax.evaluation.metrics import exact_match, rouge_l, token_f1
from gptjax.evaluation.perplexity import Evaluation, eval_step_for, evaluate
from gptjax.fileio.atomic import open_atomic
from gptjax.inference.assistant import answer_batch, chat_template_of
from gptjax.weights.model_folder import Model

LOSS_BATCH_SIZE = 8  # conversations per batch
SCORE_FUNCTIONS = {"exact_match": exact_match, "token_f1": token_f1, "rouge_l": rouge_l}

MetricValues = dict[str, float | int | None]
_LogFn = Callable[[str], None]


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
            name: score(response, result.reference) for name, score in SCORE_FUNCTIONS.items()
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
    with open_atomic(path) as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def evaluate_file(
    model: Model,
    path: str,
    out: Path | None,
    judge: LLMJudge | None,
    log: _LogFn,
    max_new_tokens: int = 256,
) -> tuple[MetricValues, dict[str, dict[str, float]]]:
    """Evaluates an assistant on all conversations of a file.

    Writes each row with its response, scores and judgement to `out`, which is required
    if there is a judge. `path` may also name a built-in data set.

    Returns:
        Metrics by name, and mean scores by task.

    Raises:
        GptjaxError: the model has no chat template, the file is invalid, `out` exists,
            or the judge is unreachable.
    """
    if out is not None and out.exists():
        raise ConfigError(f"{out} already exists. Name another file with --out.")
    if judge is not None:
        if out is None:
            raise ConfigError("a judge requires --out FILE for its scores.")
        check_judge_allowed(judge)
    template = chat_template_of(model)
    conversations, detected = read_conversations(path)
    log(f"data     {detected}")
    encoded = encode_conversations(model.tokenizer, template, conversations)
    truncated = truncate_all(encoded, model.config.context_length)
    if not truncated.examples:
        raise DataError(
            f"no answer in {path} fits the model's context length of "
            f"{model.config.context_length} tokens. Shorten the answers."
        )
    if truncated.num_truncated or truncated.num_dropped:
        log(
            f"too long {truncated.num_truncated} conversations truncated on the left, "
            f"{truncated.num_dropped} without a loss because the answer alone does not "
            "fit"
        )
    loss = example_loss(model, truncated.examples)
    results = generate_responses(
        model, conversations, min(max_new_tokens, model.config.context_length)
    )
    metrics: MetricValues = {"rows": len(results), "response_loss": loss.loss}
    metrics |= mean_scores(results)
    if out is not None:
        write_rows(to_rows(results), out)
        log(f"wrote    {out}")
    if judge is not None and out is not None:
        metrics |= run_llm_judge(model, results, out, judge, log)
    return metrics, group_scores(results)


def run_llm_judge(
    model: Model, results: Sequence[ResponseEval], out: Path, judge: LLMJudge, log: _LogFn
) -> MetricValues:
    """Scores responses with an LLM judge and adds its judgements to the rows of `out`.

    Raises:
        ModelError: the judge is unreachable; `out` still holds the responses.
    """
    template, rows = chat_template_of(model), to_rows(results)
    judge_inputs = []
    for result in results:
        segments = template.segments(result.conversation.messages[:-1], add_generation_prompt=True)
        prompt = "".join(segment.text for segment in segments if segment.kind == "prompt")
        judge_inputs.append((prompt, result.reference, result.response))

    def on_judgement(index: int, judgement: Judgement) -> None:
        rows[index] |= judgement_columns(judge, judgement)
        if (index + 1) % 10 == 0:
            log(f"judged   {index + 1} of {len(judge_inputs)}")

    try:
        judgements = judge_all(judge, judge_inputs, on_judgement)
    except ModelError as error:
        raise ModelError(f"{error} The responses are in {out}.") from error
    write_rows(rows, out)
    return summarize_judgements(judgements)


def judgement_columns(judge: LLMJudge, judgement: Judgement) -> dict[str, Any]:
    """Returns the judgement columns of an output row."""
    return {
        "judge": judge.model,
        "judge_score": judgement.score,
        "judge_reply": judgement.reply,
        "judge_error": judgement.error,
    }
