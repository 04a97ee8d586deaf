"""Text generation.

Context window: only the last `context_length` tokens of a prompt are used; a warning
and `Completion.truncated` count the tokens dropped. A sequence that has filled the
window continues from a new prefill of its last half. Other sequences in the batch keep
their results.
"""

import codecs
import dataclasses
import functools
import inspect
import itertools
import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, SupportsIndex, TypedDict, TypeVar, Unpack, overload

import jax
import numpy as np
from jaxtyping import Array, Int, Key

from gptjax.config import SAMPLING_RANGES, convert_option
from gptjax.data.readers import read_jsonl
from gptjax.errors import ConfigError, DataError, ModelError, check_type
from gptjax.inference.engine import (
    DecodeArgs,
    DecodeState,
    bucket_length,
    init_decode_state,
    jitted_steps,
    pad_prompts,
)
from gptjax.inference.sampling import SamplingParams
from gptjax.runtime.preemption import check_interrupted
from gptjax.runtime.prng import key_of_words
from gptjax.runtime.terminal import logger
from gptjax.runtime.timing import log_progress, mark_phase
from gptjax.tokenizer.tokenizer import MAX_STOP_IDS
from gptjax.weights.model_folder import Model

COMPLETION_BATCH_SIZE = 32  # prompts
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
    stop_ids: Sequence[int] | None = None  # stop tokens; None: those of the tokenizer
    seed: int = 0

    def __post_init__(self) -> None:
        """Converts the options to their types and rejects invalid ones."""
        object.__setattr__(self, "stop", (self.stop,) if isinstance(self.stop, str) else self.stop)
        stop_ids = () if self.stop_ids is None else self.stop_ids
        for name, values, kind in (("stop", self.stop, str), ("stop_ids", stop_ids, SupportsIndex)):
            if not isinstance(values, Iterable) or not all(isinstance(x, kind) for x in values):
                raise ConfigError(f"{name}={values!r:.80} must be a list of {kind.__name__}.")
        if "" in self.stop:
            raise ConfigError(f"stop={self.stop!r:.80} must be texts that are not empty.")
        if len(stop_ids) > MAX_STOP_IDS:
            raise ConfigError(f"stop_ids={stop_ids!r:.80} must be at most {MAX_STOP_IDS} ids.")
        for field in dataclasses.fields(self):
            if valid_range := SAMPLING_RANGES.get(field.name):
                value = getattr(self, field.name)
                value = convert_option(field.name, value, field.type, valid_range)
                object.__setattr__(self, field.name, value)


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


def merge_options(config: GenerationConfig | None, options: GenerationOptions) -> GenerationConfig:
    """Returns a config, by default that of the class, with other options."""
    config = config or GenerationConfig()
    check_type("generation_config", config, GenerationConfig, "Pass GenerationConfig(...).")
    return dataclasses.replace(config, **options)


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
    config = merge_options(generation_config, options)
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
    config = merge_options(generation_config, options)
    samples = convert_option("samples", samples, int, SAMPLING_RANGES["samples"])
    check_language_model(model)
    rows, truncated = tokenize_prompts(model, normalize_prompts(prompt)[0], samples)
    chunks = decode_sequences(model, rows, config, samples, streaming=bool(config.stop))
    completions = []
    for row_chunks, num_truncated in zip(zip(*chunks, strict=True), truncated, strict=True):
        texts, ids, logprobs, stopped = zip(*row_chunks, strict=True)
        ids, logprobs = (list(itertools.chain.from_iterable(x)) for x in (ids, logprobs))
        reason = "stop" if stopped[-1] else "length"
        completions.append(Completion("".join(texts), ids, logprobs, reason, num_truncated))
    return completions


def complete_batches(
    model: Model, prompts: Sequence[list[int]], config: GenerationConfig, action: str
) -> list[Completion]:
    """Generates completions of many tokenized prompts; logs the progress of an action.

    Batches have a fixed size and prompts of similar length, so that few programs are
    compiled. Completions do not depend on the batch.
    """
    order = sorted(range(len(prompts)), key=lambda n: len(prompts[n]))
    completions: list[Any] = [None] * len(prompts)
    starts = range(0, len(order), COMPLETION_BATCH_SIZE)
    for start in log_progress(starts, len(starts), action, "batches"):
        indices = order[start : start + COMPLETION_BATCH_SIZE]
        batch = [prompts[n] for n in indices]
        if len(prompts) > COMPLETION_BATCH_SIZE:
            batch += [batch[-1]] * (COMPLETION_BATCH_SIZE - len(batch))
        results = complete(model, batch, generation_config=config)
        for n, result in zip(indices, results, strict=False):
            completions[n] = result
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
    config = merge_options(generation_config, options)
    check_language_model(model)
    prompts, single = normalize_prompts(prompt)
    if not single:
        raise ConfigError(f"{len(prompts)} prompts cannot be streamed. Use complete().")
    rows, _ = tokenize_prompts(model, prompts, 1)
    chunks = decode_sequences(model, rows, config, streaming=True)
    return (chunk.text for (chunk,) in chunks if chunk.text)


def check_language_model(model: Model) -> None:
    """Raises an error unless the model generates text."""
    check_type("model", model, Model, 'Load it: gptjax.load("DIR").')
    if model.labels:
        raise ModelError(
            f"the model is a classifier of {len(model.labels)} labels and cannot generate or "
            "score text. Use gptjax classify."
        )


def normalize_prompts(prompt: Prompt | Sequence[Prompt]) -> tuple[list[Prompt], bool]:
    """Returns the prompts as a list, and True if a single prompt was given."""
    untyped_prompt: Any = prompt
    try:
        is_single = isinstance(prompt, str) or not len(prompt) or is_token(prompt[0])
    except (TypeError, LookupError):
        raise invalid_prompt_error(prompt) from None
    return ([untyped_prompt] if is_single else list(untyped_prompt)), is_single


def is_token(value: Any) -> bool:
    """True for a token id, False for a prompt."""
    return not isinstance(value, str) and np.ndim(value) == 0


def invalid_prompt_error(prompt: Any) -> ConfigError:
    """Returns the error for a prompt of a wrong type."""
    return ConfigError(f"the prompt {prompt!r:.60} is neither a text nor a list of token ids.")


def tokenize_prompts(
    model: Model, prompts: Sequence[Prompt], samples: int
) -> tuple[list[list[int]], list[int]]:
    """Tokenizes prompts; also returns the number of tokens dropped from each front."""
    prompt_ids = []
    for prompt in prompts:
        ids = model.tokenizer.encode_prompt(prompt) if isinstance(prompt, str) else prompt
        try:
            ids = [operator.index(i) for i in ids]
        except TypeError:
            raise invalid_prompt_error(prompt) from None
        if not ids:
            raise ConfigError("the prompt is empty. Give it a character, such as a line break.")
        check_token_ids(model, ids, "in the prompt")
        prompt_ids.append(ids)
    rows = truncate_prompts(prompt_ids, model.config.context_length)
    truncated = [len(ids) - len(row) for ids, row in zip(prompt_ids, rows, strict=True)]
    repeated = [n for n in range(len(rows)) for _ in range(samples)]
    return [rows[n] for n in repeated], [truncated[n] for n in repeated]


def truncate_prompts(prompts: list[list[int]], max_length: int) -> list[list[int]]:
    """Drops the first tokens of prompts that are too long, with a warning."""
    warn_truncated(prompts, max_length, "prompts", "first")
    return [ids[-max_length:] for ids in prompts]


def warn_truncated(rows: Sequence[list[int]], max_length: int, name: str, side: str) -> None:
    """Logs how many tokens of rows that exceed the context are dropped, if any."""
    if surplus := [len(ids) - max_length for ids in rows if len(ids) > max_length]:
        logger.warning(
            f"{len(surplus)} of {len(rows)} {name} exceed the model's context of {max_length:,} "
            f"tokens: the {side} {sum(surplus):,} tokens are dropped"
        )


def check_token_ids(model: Model, ids: Iterable[int], where: str) -> None:
    """Raises DataError for the first token outside the vocabulary."""
    for i in ids:
        if not 0 <= i < model.config.vocab_size:
            raise DataError(
                f"token {i} {where} is not one of the {model.config.vocab_size} tokens of the "
                "model. Encode with its tokenizer."
            )


class SequenceChunk(NamedTuple):
    """New tokens of one sequence, up to a stop token or stop text."""

    text: str  # complete characters; no part of a stop text
    ids: list[int]
    logprobs: list[float]
    is_stopped: bool


class Detokenizer:
    """Text of one growing sequence, up to the stop text that is completed first.

    Each token is decoded and searched once, so the work is linear in the tokens.
    """

    def __init__(self, model: Model, stop_texts: Sequence[str]) -> None:
        self.decode_bytes, self.stop_texts = model.tokenizer.decode_bytes, stop_texts
        self.utf8_decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self.held_back = ""  # end of the text that may be the start of a stop text
        self.num_tokens, self.is_stopped = 0, False

    def append(self, ids: Iterable[int], is_final: bool) -> str:
        """Decodes tokens; returns the new text, all of it only if `is_final`."""
        texts: list[str] = []
        for i in () if self.is_stopped else ids:
            text = self.held_back + self.utf8_decoder.decode(self.decode_bytes([i]))
            self.num_tokens += 1
            positions = [text.index(stop) for stop in self.stop_texts if stop in text]
            self.is_stopped = bool(positions)
            if self.is_stopped:
                return "".join([*texts, text[: min(positions)]])
            safe_length = len(text) - partial_stop_length(text, self.stop_texts)
            texts.append(text[:safe_length])
            self.held_back = text[safe_length:]
        if is_final and not self.is_stopped:
            texts += [self.held_back, self.utf8_decoder.decode(b"", final=True)]
            self.held_back = ""
        return "".join(texts)


def decode_sequences(
    model: Model,
    prompts: list[list[int]],
    generation_config: GenerationConfig,
    samples: int = 1,
    streaming: bool = False,
) -> Iterator[list[SequenceChunk]]:
    """Yields the new tokens of each row: often if streaming, else once per window."""
    prefill, decode_loop = jitted_steps()
    config, params, limit = model.config, model.decode_params, generation_config.max_new_tokens
    cache_length = bucket_length(max(map(len, prompts)) + limit, config.context_length)
    args = make_decode_args(model, generation_config, len(prompts), samples)
    state = init_decode_state(config, len(prompts), cache_length, bucket_length(limit, None))
    max_steps: Any = np.int32(TOKENS_PER_CALL if streaming else limit)
    detokenizers = [Detokenizer(model, generation_config.stop) for _ in prompts]
    half_length = max(1, config.context_length // 2)
    window = prompts
    while True:
        state = prefill(config, params, *pad_prompts(window, cache_length), state, args)
        while True:
            check_interrupted()
            host_state = jax.device_get(state._replace(cache=None, seen_BV=None))
            chunks = read_chunks(host_state, detokenizers, limit)
            mark_phase("first token")
            yield chunks
            done_B = np.array([chunk.is_stopped for chunk in chunks])
            if generation_config.stop:
                state = state._replace(done_B=done_B)
            window = [
                [*row, *chunk.ids][-config.context_length :]
                for row, chunk in zip(window, chunks, strict=True)
            ]
            active_B = ~done_B & (host_state.count_B < limit)
            if not (active_B & (host_state.length_B < cache_length)).any():
                break
            state = decode_loop(config, params, state, args, max_steps)
        if not active_B.any():
            return
        window = [row[-half_length:] for row in window]


def read_chunks(
    state: DecodeState, detokenizers: Sequence[Detokenizer], limit: int
) -> list[SequenceChunk]:
    """Reads the tokens that are new since the last call; the state is on the host."""
    chunks = []
    counts, done = np.asarray(state.count_B).tolist(), np.asarray(state.done_B).tolist()
    for row, (detokenizer, count, is_done) in enumerate(
        zip(detokenizers, counts, done, strict=True)
    ):
        start = detokenizer.num_tokens
        ids, logprobs = state.ids_BM[row, start:count].tolist(), state.logprob_BM[row, start:count]
        if np.isnan(logprobs).any():
            raise ModelError(
                "the logits of the model are not finite. Load or save its parameters again, or "
                "retrain it."
            )
        text = detokenizer.append(ids, is_final=is_done or count >= limit)
        used = slice(detokenizer.num_tokens - start)  # until a stop text
        is_stopped = is_done or detokenizer.is_stopped
        chunks.append(SequenceChunk(text, ids[used], logprobs[used].tolist(), is_stopped))
    return chunks


def make_decode_args(
    model: Model, generation_config: GenerationConfig, rows: int, samples: int
) -> DecodeArgs:
    """Converts the options to device arrays; sample s always gets the same key."""
    c, stop_ids = generation_config, generation_config.stop_ids
    if stop_ids is None:
        stop_ids = model.tokenizer.stop_ids
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
    high, low = divmod(c.seed, 2**32)
    settings: Any = jax.config  # jit does not notice that this one changes
    prng_impl = settings.jax_default_prng_impl
    key_B = row_keys(np.uint32(high), np.uint32(low), sample_index_B, prng_impl)
    return DecodeArgs(key_B, sampling, stop_id_I, max_new_tokens)


@functools.partial(jax.jit, static_argnums=3)
def row_keys(
    high: Any, low: Any, sample_index_B: Int[Array, " B"], prng_impl: str
) -> Key[Array, " B"]:
    """Derives one PRNG key per row from the words of the seed and the sample index."""
    fold = jax.vmap(jax.random.fold_in, in_axes=(None, 0))
    with jax.default_prng_impl(prng_impl):
        return fold(key_of_words(high, low), sample_index_B)


def partial_stop_length(text: str, stop_texts: Iterable[str]) -> int:
    """Length of the longest suffix of `text` that is a proper prefix of a stop text."""
    return max(
        (
            n
            for stop in stop_texts
            for n in range(1, min(len(stop), len(text) + 1))
            if text.endswith(stop[:n])
        ),
        default=0,
    )


def few_shot_prompt(path: Path, query: str) -> str:
    """Builds a few-shot prompt: "input -> output" lines, then "query ->"."""
    prompt = ""
    for location, row in read_jsonl(path):
        match row:
            case {"input": str(source), "output": str(target), **others} if not others:
                prompt += f"{source} -> {target}\n"
            case _:
                fix = 'Write {"input": "woc", "output": "cow"}.'
                raise DataError(f"{location}: not an example. {fix}")
    return f"{prompt}{query} ->"
