"""Chat completion for models with a chat template."""

from collections.abc import Iterator, Sequence
from typing import Any

from gptjax.data.sft import encode_segments
from gptjax.errors import ModelError
from gptjax.inference.generate import complete, stream
from gptjax.tokenizer.chat_template import ChatTemplate, compile_template
from gptjax.tokenizer.template_worker import ChatMessage
from gptjax.weights.model_folder import Model

ANSWER_BATCH_SIZE = 32  # prompts per batch


def chat_template_of(model: Model) -> ChatTemplate:
    """Returns the model's chat template.

    Raises:
        ModelError: the model has none.
    """
    if not model.chat_template:
        raise ModelError(
            "this model has no chat template and can only complete text. Use gptjax "
            "generate, or train an assistant with train.task = 'sft'."
        )
    return compile_template(model.chat_template)


def encode_chat(model: Model, messages: Sequence[ChatMessage]) -> list[int]:
    """Encodes messages up to the start of the next answer."""
    segments = chat_template_of(model).segments(messages, add_generation_prompt=True)
    return encode_segments(model.tokenizer, segments).ids


def add_stop_strings(model: Model, options: dict[str, Any]) -> dict[str, Any]:
    """Adds the stop texts of the chat template to the generation options."""
    stop = options.get("stop", ())
    stop = (stop,) if isinstance(stop, str) else stop
    return {**options, "stop": (*stop, *chat_template_of(model).stop_strings)}


def answer(model: Model, messages: str | Sequence[ChatMessage], **options: Any) -> str:
    """Generates an answer, stripped of surrounding whitespace.

    Args:
        model: with a chat template, from `gptjax.load`.
        messages: {"role": "user", "content": ...} and so on, or one user message as
            a string.
        **generation_options: fields of `gptjax.GenerationConfig`.

    Raises:
        GptjaxError: the model has no chat template, or an option is invalid.
    """
    if isinstance(messages, str):
        messages = [{"role": "user", "content": messages}]
    ids, generation_options = (
        encode_chat(model, messages),
        add_stop_strings(model, options),
    )
    (result,) = complete(model, ids, **generation_options)
    return result.text.strip()


def stream_answer(
    model: Model, messages: Sequence[ChatMessage], **options: Any
) -> Iterator[str]:
    """Streams the answer as text chunks; same options and errors as `answer`."""
    return stream(
        model, encode_chat(model, messages), **add_stop_strings(model, options)
    )


def answer_batch(
    model: Model, prompts: Sequence[Sequence[ChatMessage]], max_new_tokens: int
) -> list[str]:
    """Generates greedy answers to many conversations.

    Batches have a fixed size and prompts of similar length, so that few programs are
    compiled. Answers do not depend on the batch and keep the order of the prompts.
    """
    prompt_ids = [encode_chat(model, messages) for messages in prompts]
    options = {"temperature": 0.0, "max_new_tokens": max_new_tokens}
    order = sorted(range(len(prompt_ids)), key=lambda n: len(prompt_ids[n]))
    answers = [""] * len(prompt_ids)
    for start in range(0, len(order), ANSWER_BATCH_SIZE):
        indices = order[start : start + ANSWER_BATCH_SIZE]
        batch = [prompt_ids[n] for n in indices]
        if len(prompt_ids) > ANSWER_BATCH_SIZE:
            batch += [batch[-1]] * (ANSWER_BATCH_SIZE - len(batch))
        results = complete(model, batch, **add_stop_strings(model, options))
        for n, result in zip(indices, results, strict=False):
            answers[n] = result.text.strip()
    return answers
