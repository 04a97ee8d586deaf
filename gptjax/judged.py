"""Evaluation of assistants on a file: loss, responses, LLM judge."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from gptjax.answering import chat_template_of
from gptjax.data.conversations import read_conversations
from gptjax.data.examples import encode_conversations, truncate_all
from gptjax.errors import ConfigError, DataError, ModelError
from gptjax.examine import (
    ResponseEval,
    group_scores,
    example_loss,
    mean_scores,
    generate_responses,
    to_rows,
    write_rows,
)
from gptjax.judge import (
    LLMJudge,
    Judgement,
    check_judge_allowed,
    judge_all,
    summarize_judgements,
)
from gptjax.weights.folder import Model

_LogFn = Callable[[str], None]
MetricValues = dict[str, float | int | None]


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
            f"{truncated.num_dropped} without a loss because the answer alone does not fit"
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
    model: Model,
    results: Sequence[ResponseEval],
    out: Path,
    judge: LLMJudge,
    log: _LogFn,
) -> MetricValues:
    """Scores responses with an LLM judge; writes each judgement as it arrives.

    Raises:
        ModelError: the judge is unreachable; `out` still holds the responses.
    """
    template, rows = chat_template_of(model), to_rows(results)
    partial_path = out.with_name(f"{out.name}.judging")
    judge_inputs = []
    for result in results:
        segments = template.segments(
            result.conversation.messages[:-1], add_generation_prompt=True
        )
        prompt = "".join(
            segment.text for segment in segments if segment.kind == "prompt"
        )
        judge_inputs.append((prompt, result.reference, result.response))
    try:
        with partial_path.open(
            "w", encoding="utf-8", errors="backslashreplace"
        ) as file:

            def on_judgement(index: int, judgement: Judgement) -> None:
                rows[index] |= judgement_columns(judge, judgement)
                file.write(json.dumps(rows[index], ensure_ascii=False) + "\n")
                file.flush()
                if (index + 1) % 10 == 0:
                    log(f"judged   {index + 1} of {len(judge_inputs)}")

            judgements = judge_all(judge, judge_inputs, on_judgement)
        partial_path.replace(out)
    except OSError as error:
        raise ModelError(
            f"cannot write {partial_path}: {error}. Free disk space."
        ) from error
    except ModelError as error:
        partial_path.unlink(missing_ok=True)
        raise ModelError(f"{error} The responses are in {out}.") from error
    return summarize_judgements(judgements)


def judgement_columns(judge: LLMJudge, judgement: Judgement) -> dict[str, Any]:
    """Returns the judgement columns of an output row."""
    return {
        "judge": judge.model,
        "judge_score": judgement.score,
        "judge_reply": judgement.reply,
        "judge_error": judgement.error,
    }
