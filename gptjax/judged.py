"""An assistant on a file of conversations: its loss, its answers, a judge's scores."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from gptjax.answering import template_of
from gptjax.data.conversations import read_conversations
from gptjax.data.examples import encode_all, fit_all
from gptjax.errors import ConfigError, DataError, ModelError
from gptjax.examine import (
    Answered,
    by_task,
    example_loss,
    mean_scores,
    respond,
    response_rows,
    write_rows,
)
from gptjax.judge import (
    Judge,
    Judgement,
    check_allowed,
    judge_all,
    summary,
)
from gptjax.weights.folder import Model

Say = Callable[[str], None]
Numbers = dict[str, float | int | None]


def evaluate_file(
    model: Model,
    path: str,
    out: Path | None,
    judge: Judge | None,
    say: Say,
    max_new_tokens: int = 256,
) -> tuple[Numbers, dict[str, dict[str, float]]]:
    """(numbers by name, scores of each task) of an assistant on all rows of a file.

    Args:
        model: an assistant, from `gptjax.load`.
        path: a file of conversations, or a named data set.
        out: gets each row with the response, its scores and the judgement.
        judge: scores the responses; asks for `out`, where everything is kept.
        say: gets what a person should know.
        max_new_tokens: of a response at most.

    Raises:
        GptjaxError: the model is no assistant, the file cannot be used, `out` is taken,
            or the judge cannot be reached at all.
    """
    if out is not None and out.exists():
        raise ConfigError(f"{out} is there already. Name another file with --out.")
    if judge is not None:
        if out is None:
            raise ConfigError("a judge needs --out FILE, where what it says is kept.")
        check_allowed(judge)
    template = template_of(model)
    conversations, detected = read_conversations(path)
    say(f"data     {detected}")
    encoded = encode_all(model.tokenizer, template, conversations)
    fitted = fit_all(encoded, model.config.context_length)
    if not fitted.examples:
        raise DataError(
            f"no answer in {path} fits the model's context of "
            f"{model.config.context_length} tokens. Shorten them."
        )
    if fitted.cut or fitted.skipped:
        say(
            f"too long {fitted.cut} conversations cut at their front, {fitted.skipped} "
            "without a loss as the answer alone does not fit"
        )
    loss = example_loss(model, fitted.examples)
    answered = respond(
        model, conversations, min(max_new_tokens, model.config.context_length)
    )
    numbers: Numbers = {"rows": len(answered), "response_loss": loss.loss}
    numbers |= mean_scores(answered)
    if out is not None:
        write_rows(response_rows(answered), out)
        say(f"wrote    {out}")
    if judge is not None and out is not None:
        numbers |= judged(model, answered, out, judge, say)
    return numbers, by_task(answered)


def judged(
    model: Model, answered: Sequence[Answered], out: Path, judge: Judge, say: Say
) -> Numbers:
    """The judge's scores; each judgement is written as it comes.

    Raises:
        ModelError: nobody is there to judge; the responses are in `out`.
    """
    template, rows = template_of(model), response_rows(answered)
    part = out.with_name(f"{out.name}.judging")
    asked = []
    for one in answered:
        pieces = template.pieces(one.conversation.messages[:-1], answering=True)
        prompt = "".join(piece.text for piece in pieces if piece.kind == "prompt")
        asked.append((prompt, one.reference, one.response))
    try:
        with part.open("w", encoding="utf-8", errors="backslashreplace") as file:

            def note(number: int, judgement: Judgement) -> None:
                rows[number] |= fields(judge, judgement)
                file.write(json.dumps(rows[number], ensure_ascii=False) + "\n")
                file.flush()
                if (number + 1) % 10 == 0:
                    say(f"judged   {number + 1} of {len(asked)}")

            judgements = judge_all(judge, asked, note)
        part.replace(out)
    except OSError as error:
        raise ModelError(f"cannot write {part}: {error}. Free some space.") from error
    except ModelError as error:
        part.unlink(missing_ok=True)
        raise ModelError(f"{error} The responses are in {out}.") from error
    return summary(judgements)


def fields(judge: Judge, judgement: Judgement) -> dict[str, Any]:
    """What a row of the file says about its judgement."""
    return {
        "judge": judge.model,
        "judge_score": judgement.score,
        "judge_reply": judgement.reply,
        "judge_error": judgement.error,
    }
