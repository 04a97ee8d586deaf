"""Chat completion for models with a chat template."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Unpack

from gptjax.data.sft import encode_segments
from gptjax.errors import ModelError
from gptjax.inference.generate import (
    GenerationConfig,
    GenerationOptions,
    check_language_model,
    complete,
    complete_batches,
    list_options,
    merge_options,
    stream,
    truncate_prompts,
)
from gptjax.tokenizer.chat_template import ChatTemplate, compile_template
from gptjax.tokenizer.template_worker import ChatMessage
from gptjax.weights.model_folder import Model


def chat_template_of(model: Model) -> ChatTemplate:
    """Returns the model's chat template."""
    check_language_model(model)
    if not model.chat_template:
        raise ModelError(
            "this model has no chat template. Use gptjax generate without --chat, or train an "
            "assistant with train.task = 'sft'."
        )
    return compile_template(model.chat_template, *model.tokenizer.template_tokens)


def encode_chat(model: Model, messages: str | Sequence[ChatMessage]) -> list[int]:
    """Encodes messages, or the only user message, up to the start of the answer."""
    if isinstance(messages, str):
        messages = [{"role": "user", "content": messages}]
    segments = chat_template_of(model).segments(messages, add_generation_prompt=True)
    return encode_segments(model.tokenizer, segments).ids


def make_chat_config(
    model: Model, generation_config: GenerationConfig | None, options: GenerationOptions
) -> GenerationConfig:
    """Applies the options and adds the stop texts of the chat template."""
    config = merge_options(generation_config, options)
    stop = (*config.stop, *chat_template_of(model).stop_strings)
    return dataclasses.replace(config, stop=stop)


@list_options
def answer(
    model: Model,
    messages: str | Sequence[ChatMessage],
    *,
    generation_config: GenerationConfig | None = None,
    **options: Unpack[GenerationOptions],
) -> str:
    """Generates an answer, stripped of surrounding whitespace.

    Messages are {"role": "user", "content": ...} and so on, or one user message as a
    string. Options are those of `gptjax.generate`.
    """
    config = make_chat_config(model, generation_config, options)
    (result,) = complete(model, encode_chat(model, messages), generation_config=config)
    return result.text.strip()


@list_options
def stream_answer(
    model: Model,
    messages: str | Sequence[ChatMessage],
    *,
    generation_config: GenerationConfig | None = None,
    **options: Unpack[GenerationOptions],
) -> Iterator[str]:
    """Streams the answer as text chunks; arguments and errors are those of `answer`."""
    config = make_chat_config(model, generation_config, options)
    return stream(model, encode_chat(model, messages), generation_config=config)


def answer_batch(
    model: Model, prompts: Sequence[Sequence[ChatMessage]], max_new_tokens: int
) -> list[str]:
    """Generates greedy answers to many conversations."""
    prompt_ids = [encode_chat(model, messages) for messages in prompts]
    prompt_ids = truncate_prompts(prompt_ids, model.config.context_length)
    config = GenerationConfig(temperature=0.0, max_new_tokens=max_new_tokens)
    config = make_chat_config(model, config, {})
    results = complete_batches(model, prompt_ids, config, "answering")
    return [result.text.strip() for result in results]
