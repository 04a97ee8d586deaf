"""Text generation.

Context window: only the last `context_length` tokens of a prompt are used;
`Completion.truncated` counts the tokens dropped. A sequence that has filled the window
continues from a new prefill of its last half. Other sequences in the batch keep their
results.
"""

import codecs
import dataclasses
import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypedDict, TypeVar, Unpack, overload

import jax
import numpy as np
from jaxtyping import Array, Int, Key

from gptjax.config import SAMPLING_RANGES, check_range
from gptjax.data.readers import read_jsonl
from gptjax.errors import ConfigError, DataError
from gptjax.inference.engine import (
    DecodeArgs,
    bucket_length,
    init_decode_state,
    jitted_steps,
    pad_prompts,
)
from gptjax.inference.sampling import SamplingParams
from gptjax.runtime.preemption import check_interrupted
from gptjax.runtime.timing import mark_phase
from gptjax.weights.model_folder import Model

MAX_STOP_IDS = 8
TOKENS_PER_CALL = 16  # decoded per compiled call when streaming or checking stop texts

Prompt = str | Sequence[int]


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerationConfig:
    """Sampling and stopping options."""

    max_new_tokens: int = 100
    temperature: float = 1.0  # 0 = greedy
    top_k: int = 0  # keep the k most likely tokens; 0 = off
    top_p: float = 1.0  # smallest set of top tokens with this total probability
    min_p: float = 0.0  # minimum probability relative to the most likely token
    repetition_penalty: float = 1.0  # penalty on repeated tokens; 1.0 = off
    stop: str | Sequence[str] = ()  # texts that end generation; not part of the output
    stop_ids: Sequence[int] | None = None  # stop tokens; None: <|endoftext|>
    seed: int = 0

    def __post_init__(self) -> None:
        """Validates the options."""
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        for name in SAMPLING_RANGES.keys() & vars(self).keys():
            check_range(name, getattr(self, name), SAMPLING_RANGES[name])
        if "" in self.stop:
            raise ConfigError(f"stop={self.stop!r:.80} must be texts that are not empty.")
        if len(self.stop_ids or ()) > MAX_STOP_IDS:
            raise ConfigError(f"stop_ids={self.stop_ids!r:.80} must be at most {MAX_STOP_IDS} ids.")


class GenerationOptions(TypedDict, total=False):
    """Fields of `GenerationConfig` as keyword arguments."""

    max_new_tokens: int
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    stop: str | Sequence[str]
    stop_ids: Sequence[int] | None
    seed: int


Function = TypeVar("Function", bound=Callable[..., Any])


def list_options(function: Function) -> Function:
    """Lists the fields of `GenerationConfig` in place of `**options` in a signature.

    `help` and IPython's completion use it; static tools know `GenerationOptions`.
    """
    signature, options = inspect.signature(function), inspect.signature(GenerationConfig)
    *parameters, _ = signature.parameters.values()
    listed: Any = function
    listed.__signature__ = signature.replace(parameters=[*parameters, *options.parameters.values()])
    return listed


@dataclasses.dataclass(frozen=True)
class Completion:
    """Generated continuation of one prompt."""

    text: str  # new text only
    ids: list[int]  # new tokens, without the stop token
    logprobs: list[float]  # of `ids`, in nats, before temperature and filters
    finish_reason: str  # "stop" or "length"
    truncated: int  # tokens dropped from the front of the prompt


@overload
def generate(
    model: Model,
    prompt: Prompt,
    *,
    generation_config: GenerationConfig | None = None,
    **options: Unpack[GenerationOptions],
) -> str: ...


@overload
def generate(
    model: Model,
    prompt: Sequence[Prompt],
    *,
    samples: int = 1,
    generation_config: GenerationConfig | None = None,
    **options: Unpack[GenerationOptions],
) -> list[str]: ...


@overload
def generate(
    model: Model,
    prompt: Prompt,
    *,
    samples: int,
    generation_config: GenerationConfig | None = None,
    **options: Unpack[GenerationOptions],
) -> str | list[str]: ...


@list_options
def generate(
    model: Model,
    prompt: Prompt | Sequence[Prompt],
    *,
    samples: int = 1,
    generation_config: GenerationConfig | None = None,
    **options: Unpack[GenerationOptions],
) -> str | list[str]:
    """Generates text and returns it together with the prompt.

    A prompt is a text or token ids; the result is a list if there are several prompts,
    or `samples` of each. Options replace fields of `generation_config`.
    """
    prompts, single = normalize_prompts(prompt)
    config = dataclasses.replace(generation_config or GenerationConfig(), **options)
    results = complete(model, prompts, samples=samples, generation_config=config)
    decode = model.tokenizer.decode
    sources = [prompt if isinstance(prompt, str) else decode(prompt) for prompt in prompts]
    texts = [sources[n // samples] + result.text for n, result in enumerate(results)]
    return texts[0] if single and samples == 1 else texts


@list_options
def complete(
    model: Model,
    prompt: Prompt | Sequence[Prompt],
    *,
    samples: int = 1,
    generation_config: GenerationConfig | None = None,
    **options: Unpack[GenerationOptions],
) -> list[Completion]:
    """Generates completions; arguments and errors are those of `generate`.

    Samples of one prompt are adjacent. Sample s of a prompt is the same in any batch.
    """
    config = dataclasses.replace(generation_config or GenerationConfig(), **options)
    check_range("samples", samples, SAMPLING_RANGES["samples"])
    rows, truncated = tokenize_prompts(model, normalize_prompts(prompt)[0], samples)
    (*_, final) = decode_sequences(model, rows, config, samples, streaming=bool(config.stop))
    completions = []
    for (ids, logprobs, stopped), num_truncated in zip(final, truncated, strict=True):
        text, count, has_stop_text = decode_until_stop(model, ids, config.stop)
        reason = "stop" if stopped or has_stop_text else "length"
        completions.append(Completion(text, ids[:count], logprobs[:count], reason, num_truncated))
    return completions


@list_options
def stream(
    model: Model,
    prompt: Prompt | Sequence[Prompt],
    *,
    generation_config: GenerationConfig | None = None,
    **options: Unpack[GenerationOptions],
) -> Iterator[str]:
    """Streams the completion of one prompt; arguments and errors as in `generate`.

    Chunks never split a character and contain no part of a stop text.
    """
    config = dataclasses.replace(generation_config or GenerationConfig(), **options)
    prompts, single = normalize_prompts(prompt)
    if not single:
        raise ConfigError(f"{len(prompts)} prompts cannot be streamed. Use complete().")
    return stream_chunks(model, tokenize_prompts(model, prompts, 1)[0], config)


def stream_chunks(model: Model, rows: list[list[int]], config: GenerationConfig) -> Iterator[str]:
    """Yields the text chunks of `stream` for validated prompts."""
    num_sent, ids = 0, []
    for ((ids, _, _),) in decode_sequences(model, rows, config, streaming=True):
        text, _, is_stopped = decode_until_stop(model, ids, config.stop, final=False)
        held_back = 0 if is_stopped else partial_stop_length(text, config.stop)
        if chunk := text[num_sent : len(text) - held_back]:
            yield chunk
            num_sent += len(chunk)
        if is_stopped:
            return
    text, _, _ = decode_until_stop(model, ids, config.stop)
    if text[num_sent:]:
        yield text[num_sent:]


def normalize_prompts(prompt: Prompt | Sequence[Prompt]) -> tuple[list[Prompt], bool]:
    """Returns the prompts as a list, and True if a single prompt was given."""
    untyped_prompt: Any = prompt
    is_single = isinstance(prompt, str) or not len(prompt) or not hasattr(prompt[0], "__len__")
    return ([untyped_prompt] if is_single else list(untyped_prompt)), is_single


def tokenize_prompts(
    model: Model, prompts: Sequence[Prompt], samples: int
) -> tuple[list[list[int]], list[int]]:
    """Tokenizes prompts; also returns the number of tokens dropped from each front."""
    max_length = model.config.context_length
    rows, truncated = [], []
    for prompt in prompts:
        ids = model.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
        ids = [int(i) for i in ids]
        if not ids:
            raise ConfigError("the prompt is empty. Give it a character, such as a line break.")
        check_token_ids(model, ids, "in the prompt")
        rows += [ids[-max_length:]] * samples
        truncated += [max(0, len(ids) - max_length)] * samples
    return rows, truncated


def check_token_ids(model: Model, ids: Iterable[int], where: str) -> None:
    """Raises DataError for the first token outside the vocabulary."""
    for i in ids:
        if not 0 <= i < model.config.vocab_size:
            raise DataError(
                f"token {i} {where} is not one of the {model.config.vocab_size} tokens of the "
                "model. Encode with its tokenizer."
            )


SequenceState = tuple[list[int], list[float], bool]  # new ids, log-probabilities, stopped


def decode_sequences(
    model: Model,
    prompts: list[list[int]],
    generation_config: GenerationConfig,
    samples: int = 1,
    streaming: bool = False,
) -> Iterator[list[SequenceState]]:
    """Yields completions; every chunk if streaming, else once per context window."""
    prefill, decode_loop = jitted_steps()
    config, params, limit = model.config, model.decode_params, generation_config.max_new_tokens
    cache_length = bucket_length(max(map(len, prompts)) + limit, config.context_length)
    args = make_decode_args(model, generation_config, len(prompts), samples)
    state = init_decode_state(config, len(prompts), cache_length, bucket_length(limit, None))
    max_steps: Any = np.int32(TOKENS_PER_CALL if streaming else limit)
    window = prompts
    while True:
        state = prefill(config, params, *pad_prompts(window, cache_length), state, args)
        while True:
            check_interrupted()
            ids_BM, logprob_BM = jax.device_get((state.ids_BM, state.logprob_BM))
            count_B, length_B = jax.device_get((state.count_B, state.length_B))
            done_B = np.array(state.done_B)
            sequences = [
                (ids[:n].tolist(), logprob[:n].tolist(), bool(done))
                for ids, logprob, n, done in zip(ids_BM, logprob_BM, count_B, done_B, strict=True)
            ]
            mark_phase("first token")
            yield sequences
            if stop := generation_config.stop:
                done_B |= [decode_until_stop(model, ids, stop)[2] for ids, *_ in sequences]
                state = state._replace(done_B=done_B)
            active_B = ~done_B & (count_B < limit)
            if not (active_B & (length_B < cache_length)).any():
                break
            state = decode_loop(config, params, state, args, max_steps)
        if not active_B.any():
            return
        half_length = max(1, config.context_length // 2)
        window = [
            [*prompt, *ids][-half_length:]
            for prompt, (ids, _, _) in zip(prompts, sequences, strict=True)
        ]


def make_decode_args(
    model: Model, generation_config: GenerationConfig, rows: int, samples: int
) -> DecodeArgs:
    """Converts the options to device arrays; sample s always gets the same key."""
    c, stop_ids = generation_config, generation_config.stop_ids
    if stop_ids is None:
        stop_ids = [model.tokenizer.eot_token]
    check_token_ids(model, stop_ids, "in stop_ids")
    # NumPy scalars: eager JAX would compile one program each.
    numbers = c.temperature, c.top_p, c.min_p, c.repetition_penalty
    values: Any = np.array(numbers, np.float32)
    top_k: Any = np.int32(min(c.top_k, model.config.vocab_size))
    sampling = SamplingParams(values[0], top_k, *values[1:])
    stop_id_I: Any = np.full(MAX_STOP_IDS, -1, np.int32)
    stop_id_I[: len(stop_ids)] = stop_ids
    max_new_tokens: Any = np.int32(c.max_new_tokens)
    sample_index_B: Any = np.arange(rows, dtype=np.int32) % samples
    key_B = row_keys(np.int64(c.seed), sample_index_B)
    return DecodeArgs(key_B, sampling, stop_id_I, max_new_tokens)


@jax.jit
def row_keys(seed: Any, sample_index_B: Int[Array, " B"]) -> Key[Array, " B"]:
    """Derives one PRNG key per row from the seed and the sample index."""
    fold = jax.vmap(jax.random.fold_in, in_axes=(None, 0))
    return fold(jax.random.key(seed), sample_index_B)


def decode_until_stop(
    model: Model, ids: Sequence[int], stop_texts: str | Sequence[str], final: bool = True
) -> tuple[str, int, bool]:
    """Decodes tokens up to the stop text that is completed first.

    Returns the text, the number of tokens decoded, and True if a stop text was found.
    Unless `final`, an incomplete character at the end is omitted.
    """
    decoder, text = codecs.getincrementaldecoder("utf-8")("replace"), ""
    for count, i in enumerate(ids, 1):
        text += decoder.decode(model.tokenizer.decode_bytes([i]))
        if positions := [text.index(stop) for stop in stop_texts if stop in text]:
            return text[: min(positions)], count, True
    return text + decoder.decode(b"", final=final), len(ids), False


def partial_stop_length(text: str, stop_texts: Iterable[str]) -> int:
    """Length of the longest suffix of `text` that is a proper prefix of a stop text."""
    return max(
        (n for stop in stop_texts for n in range(1, len(stop)) if text.endswith(stop[:n])),
        default=0,
    )


def few_shot_prompt(path: Path, query: str) -> str:
    """Builds a few-shot prompt: "input -> output" lines, then "query ->"."""
    prompt = ""
    for location, row in read_jsonl(path):
        match row:
            case {"input": str(source), "output": str(target)}:
                prompt += f"{source} -> {target}\n"
            case _:
                fix = 'Write {"input": "woc", "output": "cow"}.'
                raise DataError(f"{location}: not an example. {fix}")
    return f"{prompt}{query} ->"
