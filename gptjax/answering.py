"""Answers: what a model with a chat template writes to the messages before."""

from collections.abc import Iterator, Sequence
from typing import Any

from gptjax.data.examples import encode
from gptjax.errors import ModelError
from gptjax.generation import complete, stream
from gptjax.template import Message, Template, compiled
from gptjax.weights.folder import Model

ROWS = 32  # prompts answered at a time


def template_of(model: Model) -> Template:
    """The model's chat template.

    Raises:
        ModelError: it has none.
    """
    if not model.template:
        raise ModelError(
            "this model has no chat template: it completes text, it does not answer. "
            "Use gptjax generate, or train an assistant: train.task = 'instruct'."
        )
    return compiled(model.template)


def prompt_ids(model: Model, messages: Sequence[Message]) -> list[int]:
    """The tokens of a conversation up to where the next answer starts."""
    pieces = template_of(model).pieces(messages, answering=True)
    return encode(model.tokenizer, pieces).ids


def stop_options(model: Model, sampling: dict[str, Any]) -> dict[str, Any]:
    """The sampling options with what ends an answer among their stop texts."""
    own = sampling.get("stop", ())
    own = (own,) if isinstance(own, str) else own
    return {**sampling, "stop": (*own, *template_of(model).stops)}


def answer(model: Model, messages: str | Sequence[Message], **sampling: Any) -> str:
    """What the model answers, without the white space around it.

    Args:
        model: with a chat template, from `gptjax.load`.
        messages: {"role": "user", "content": ...} and so on, or just what a user says.
        **sampling: fields of `gptjax.generation.Sampling`.

    Raises:
        GptjaxError: the model is no assistant, or an option cannot be used.
    """
    if isinstance(messages, str):
        messages = [{"role": "user", "content": messages}]
    ids, options = prompt_ids(model, messages), stop_options(model, sampling)
    (result,) = complete(model, ids, **options)
    return result.text.strip()


def stream_answer(
    model: Model, messages: Sequence[Message], **sampling: Any
) -> Iterator[str]:
    """The answer in pieces as they come; errors and options as for `answer`."""
    return stream(model, prompt_ids(model, messages), **stop_options(model, sampling))


def answer_all(
    model: Model, prompts: Sequence[Sequence[Message]], max_new_tokens: int
) -> list[str]:
    """Greedy answers to many conversations, in their order.

    Those of like length are answered together, always as many at a time, so that few
    programs are compiled; no answer depends on what else is in the batch.
    """
    rows = [prompt_ids(model, messages) for messages in prompts]
    options = {"temperature": 0.0, "max_new_tokens": max_new_tokens}
    order = sorted(range(len(rows)), key=lambda n: len(rows[n]))
    answers = [""] * len(rows)
    for start in range(0, len(order), ROWS):
        chosen = order[start : start + ROWS]
        batch = [rows[n] for n in chosen]
        if len(rows) > ROWS:
            batch += [batch[-1]] * (ROWS - len(batch))
        results = complete(model, batch, **stop_options(model, options))
        for n, result in zip(chosen, results, strict=False):
            answers[n] = result.text.strip()
    return answers
