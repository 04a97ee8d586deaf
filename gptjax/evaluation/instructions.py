"""Evaluation of assistants: loss on reference answers and scores of responses.

Responses are scored by their overlap with the reference answers and by an LLM judge.
"""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from gptjax.data.conversations import Conversation, read_conversations
from gptjax.data.sft import Example, encode_conversations, make_sft_batches, truncate_all
from gptjax.errors import ConfigError, DataError, ModelError
from gptjax.evaluation.llm_judge import LLMJudge, iter_judgements, summarize_judgements
from gptjax.evaluation.metrics import MetricValues, exact_match, rouge_l, token_f1
from gptjax.evaluation.perplexity import Evaluation, eval_step_for, evaluate
from gptjax.fileio.atomic import write_jsonl
from gptjax.fileio.paths import require_new_file
from gptjax.inference.assistant import answer_batch, chat_template_of
from gptjax.runtime.terminal import logger
from gptjax.runtime.timing import log_progress
from gptjax.weights.model_folder import Model

LOSS_BATCH_SIZE = 8  # conversations per batch
SCORE_FUNCTIONS = {"exact_match": exact_match, "token_f1": token_f1, "rouge_l": rouge_l}


class ResponseEval(NamedTuple):
    """Conversation and the model's response in place of its last answer."""

    conversation: Conversation
    reference: str  # that answer, without surrounding whitespace
    response: str
    scores: dict[str, float]  # by name, as in SCORE_FUNCTIONS


def example_loss(model: Model, examples: Sequence[Example]) -> Evaluation:
    """Evaluates the model on the trained tokens of examples that fit its context."""
    context, pad_id = model.config.context_length, model.tokenizer.eot_token
    padded = make_sft_batches(
        "padded", examples, rows=LOSS_BATCH_SIZE, context=context, pad_id=pad_id, seed=0
    )
    batches = (batch for _, batch in padded.in_order())
    eval_step = eval_step_for(model.config)
    return evaluate(eval_step, model.params, batches, model.tokenizer.byte_lengths)


def generate_responses(
    model: Model, conversations: Sequence[Conversation], max_new_tokens: int
) -> list[ResponseEval]:
    """Generates greedy responses in place of the last message of each conversation."""
    prompts = [conversation.messages[:-1] for conversation in conversations]
    responses, results = answer_batch(model, prompts, max_new_tokens), []
    for conversation, response in zip(conversations, responses, strict=True):
        reference = conversation.messages[-1]["content"].strip()
        scores = {name: score(response, reference) for name, score in SCORE_FUNCTIONS.items()}
        results.append(ResponseEval(conversation, reference, response, scores))
    return results


def mean_scores(results: Sequence[ResponseEval]) -> dict[str, float]:
    """Averages each score."""
    return {n: sum(r.scores[n] for r in results) / len(results) for n in SCORE_FUNCTIONS}


def group_scores(results: Sequence[ResponseEval]) -> dict[str, dict[str, float]]:
    """Averages the scores by task; conversations without a task are skipped."""
    tasks = sorted({r.conversation.task for r in results if r.conversation.task})
    return {t: mean_scores([r for r in results if r.conversation.task == t]) for t in tasks}


def response_row(result: ResponseEval, **judgement: Any) -> dict[str, Any]:
    """The original row with the response, its scores and judgement."""
    row = {**result.conversation.source_row, "response": result.response, **result.scores}
    return row | judgement


def write_responses(results: Iterable[ResponseEval], path: Path) -> None:
    """Writes the responses as JSON lines, atomically."""
    write_jsonl(path, map(response_row, results))


def evaluate_file(
    model: Model, path: str, out: Path | None, judge: LLMJudge | None, max_new_tokens: int = 256
) -> tuple[MetricValues, dict[str, dict[str, float]]]:
    """Evaluates an assistant on all conversations of a file or built-in data set.

    Writes each row with its response, scores and judgement to `out`, which is required
    if there is a judge. Returns metrics by name, and mean scores by task.
    """
    require_new_file(out)
    if judge is not None and out is None:
        raise ConfigError("a judge requires --out FILE for its scores.")
    template, max_length = chat_template_of(model), model.config.context_length
    conversations, detected = read_conversations(path)
    logger.info(f"data     {detected}")
    encoded = encode_conversations(model.tokenizer, template, conversations)
    truncated = truncate_all(encoded, max_length)
    if not truncated.examples:
        raise DataError(
            f"no answer in {path} fits the context of {max_length} tokens. Shorten the answers."
        )
    if truncated.num_truncated or truncated.num_dropped:
        logger.info(
            f"too long {truncated.num_truncated} conversations truncated on the left, "
            f"{truncated.num_dropped} without a loss because the answer alone does not fit"
        )
    loss = example_loss(model, truncated.examples)
    results = generate_responses(model, conversations, min(max_new_tokens, max_length))
    metrics: MetricValues = {"rows": len(results), "response_loss": loss.loss}
    metrics |= mean_scores(results)
    if out is not None:
        write_responses(results, out)
        logger.info(f"wrote    {out}")
    if judge is not None and out is not None:
        metrics |= run_llm_judge(model, results, out, judge)
    return metrics, group_scores(results)


def run_llm_judge(
    model: Model, results: Sequence[ResponseEval], out: Path, judge: LLMJudge
) -> MetricValues:
    """Adds judgements to the rows in `out`.

    OUT.judging holds them as they arrive, so that an interruption does not lose them.
    """
    template, partial_path = chat_template_of(model), out.with_name(f"{out.name}.judging")
    inputs, judgements = [], []
    for result in results:
        segments = template.segments(result.conversation.messages[:-1], add_generation_prompt=True)
        prompt = "".join(segment.text for segment in segments if segment.kind == "prompt")
        inputs.append((prompt, result.reference, result.response))
    try:
        partial_path.unlink(missing_ok=True)  # of an interrupted run; a link is not followed
        with partial_path.open("x", encoding="utf-8", errors="backslashreplace") as file:
            rows = zip(results, iter_judgements(judge, inputs), strict=True)
            for result, judgement in log_progress(rows, len(inputs), "judging", "responses"):
                columns = {f"judge_{name}": value for name, value in judgement._asdict().items()}
                row = response_row(result, judge=judge.model, **columns)
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
                file.flush()
                judgements.append(judgement)
        partial_path.replace(out)
    except OSError as error:
        raise ModelError(f"cannot write {partial_path}: {error}. Free disk space.") from error
    except ModelError as error:
        partial_path.unlink(missing_ok=True)
        raise ModelError(f"{error} The responses are in {out}.") from error
    return summarize_judgements(judgements)
