"""Writing: what comes after a prompt, as text.

The window. Of a prompt longer than `context_length` the last tokens are kept, and
`Completion.cut` says how many were not. A row that has filled `context_length` goes on
from the last half of its window, which is read again; the other rows are not touched
by it.
"""

import codecs
import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Int, Key

from gptjax.config import at_least
from gptjax.data.rows import jsonl_rows, opened
from gptjax.decoding import Limits, bucket, empty_state, padded, programs
from gptjax.errors import ConfigError, DataError
from gptjax.phases import reached
from gptjax.sampling import Knobs
from gptjax.stopping import poll
from gptjax.weights.folder import Model

MOST_STOP_IDS = 8
CHUNK = 16  # tokens between two looks at the text, where someone looks

Prompt = str | Sequence[int]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """How to choose the next tokens, and when to stop."""

    max_new_tokens: int = 100
    temperature: float = 1.0  # 0 = greedy
    top_k: int = 0  # keep the k likeliest tokens; 0 = all
    top_p: float = 1.0  # keep the likeliest tokens that together have this probability
    min_p: float = 0.0  # keep tokens of at least this part of the likeliest's
    repetition_penalty: float = 1.0  # lowers tokens that were there; 1 = does not
    stop: str | Sequence[str] = ()  # texts that end a row; they are cut off
    stop_ids: Sequence[int] | None = None  # tokens that do; None: <|endoftext|>
    seed: int = 0

    def __post_init__(self) -> None:
        """Rejects values that choose nothing."""
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        at_least("sampling", self, 1, "max_new_tokens")
        at_least("sampling", self, 0, "temperature top_k seed")
        for name, low, high in (("top_p", 0.0, 1.0), ("min_p", -1e-9, 1.0)):
            if not low < getattr(self, name) <= high:
                raise ConfigError(
                    f"{name}={getattr(self, name)} is not a probability that leaves a "
                    f"token. Choose {name} between 0 and 1."
                )
        if not self.repetition_penalty > 0:
            raise ConfigError(
                f"repetition_penalty={self.repetition_penalty} is not positive. Use 1 "
                "for none, 1.2 for some."
            )
        if len(self.stop_ids or ()) > MOST_STOP_IDS:
            raise ConfigError(
                f"stop_ids has {len(self.stop_ids or ())} tokens, more than "
                f"{MOST_STOP_IDS}. Leave some out, or use stop texts."
            )
        if "" in self.stop:
            raise ConfigError("a stop text is empty. Give it characters, or leave it.")


@dataclasses.dataclass(frozen=True)
class Completion:
    """What was added to one prompt."""

    text: str  # new text only
    ids: list[int]  # new tokens, without the one that stopped
    logprobs: list[float]  # of these, under the model's own distribution; nats
    finish: str  # "stop" or "length"
    cut: int  # tokens dropped from the front of the prompt


def generate(
    model: Model, prompt: Prompt | Sequence[Prompt], **options: Any
) -> str | list[str]:
    """The prompt and what the model adds to it.

    Args:
        model: from `gptjax.load`.
        prompt: a text or token ids; or several, for a list of texts.
        **options: fields of `Sampling`; with `samples` above 1 the result is a list.
    """
    prompts, single = as_prompts(prompt)
    results = complete(model, prompts, **options)
    each = len(results) // len(prompts)
    texts = []
    for n, result in enumerate(results):
        start = prompts[n // each]
        decode = model.tokenizer.decode
        texts.append((start if isinstance(start, str) else decode(start)) + result.text)
    return texts[0] if single and each == 1 else texts


def complete(
    model: Model,
    prompt: Prompt | Sequence[Prompt],
    *,
    samples: int = 1,
    **options: Any,
) -> list[Completion]:
    """What the model adds to each prompt; the samples of a prompt follow each other.

    Sample s of a prompt is the same alone and in any batch.

    Args:
        model: from `gptjax.load`.
        prompt: a text or token ids, or several of them.
        samples: for each prompt.
        **options: fields of `Sampling`.

    Raises:
        ConfigError: an empty prompt, or an option that cannot be used.
        DataError: a token id that the model does not have.
    """
    sampling = Sampling(**options)
    rows, cuts = prompt_rows(model, as_prompts(prompt)[0], samples)
    (*_, last) = grow(model, rows, sampling, samples, watched=bool(sampling.stop))
    return [
        finished(model, sampling, *row, cut)
        for row, cut in zip(last, cuts, strict=True)
    ]


def stream(
    model: Model, prompt: Prompt | Sequence[Prompt], **options: Any
) -> Iterator[str]:
    """The text of `complete` for one prompt, in pieces as they come.

    Characters arrive whole, and no part of a stop text arrives.

    Raises:
        ConfigError: as `complete`, or several prompts.
        DataError: as `complete`.
    """
    sampling = Sampling(**options)
    prompts, single = as_prompts(prompt)
    if not single:
        raise ConfigError(
            f"{len(prompts)} prompts cannot be streamed as one text. Stream them one "
            "by one, or use complete()."
        )
    rows, _ = prompt_rows(model, prompts, 1)
    return pieces(model, rows, sampling)


def pieces(model: Model, rows: list[list[int]], sampling: Sampling) -> Iterator[str]:
    """What `stream` yields, of prompts that were found good."""
    sent, ids = 0, []
    for ((ids, _, _),) in grow(model, rows, sampling, watched=True):
        text, _, hit = read_text(model, ids, sampling.stop, final=False)
        safe = len(text) if hit else len(text) - held_back(text, sampling.stop)
        if safe > sent:
            yield text[sent:safe]
            sent = safe
        if hit:
            return
    text, _, _ = read_text(model, ids, sampling.stop)
    if text[sent:]:
        yield text[sent:]


def as_prompts(prompt: Prompt | Sequence[Prompt]) -> tuple[list[Prompt], bool]:
    """The prompts as a list, and whether it was just one."""
    several: Any = prompt
    if isinstance(prompt, str) or not len(prompt):
        return [several], True
    if isinstance(prompt[0], int | np.integer):
        return [several], True
    return list(several), False


def prompt_rows(
    model: Model, prompts: Sequence[Prompt], samples: int
) -> tuple[list[list[int]], list[int]]:
    """Token ids of each row, and how many tokens were dropped from its front."""
    room = model.config.context_length
    rows, cuts = [], []
    for prompt in prompts:
        ids = model.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
        ids = [int(i) for i in ids]
        if not ids:
            raise ConfigError(
                "the prompt is empty, so there is nothing to go on from. Give it "
                "text, or a line break."
            )
        check_ids(model, ids, "in the prompt")
        rows += [ids[-room:]] * samples
        cuts += [max(0, len(ids) - room)] * samples
    return rows, cuts


def check_ids(model: Model, ids: Iterable[int], where: str) -> None:
    """Raises for the first token that the model does not have."""
    for i in ids:
        if not 0 <= i < model.config.vocab_size:
            raise DataError(
                f"token {i} {where} is not below the model's vocabulary of "
                f"{model.config.vocab_size}. Encode with the model's tokenizer."
            )


Row = tuple[list[int], list[float], bool]  # new ids, their log-probabilities, stopped


def grow(
    model: Model,
    prompts: list[list[int]],
    sampling: Sampling,
    samples: int = 1,
    watched: bool = False,
) -> Iterator[list[Row]]:
    """Yields all rows as they are so far, at the end or, if watched, on the way."""
    fill, extend_rows = programs()
    config, rows = model.config, len(prompts)
    longest = max(map(len, prompts))
    slots = bucket(longest + sampling.max_new_tokens, config.context_length)
    limits = make_limits(model, sampling, rows, samples)
    state = empty_state(config, rows, slots, bucket(sampling.max_new_tokens, None))
    chunk: Any = np.int32(CHUNK if watched else sampling.max_new_tokens)
    window = prompts
    while True:
        state = fill(config, model.layers, *padded(window, slots), state, limits)
        while True:
            poll()
            ids_BM, logprob_BM = jax.device_get((state.ids_BM, state.logprob_BM))
            count_B, length_B = jax.device_get((state.count_B, state.length_B))
            done_B = np.array(state.done_B)
            grown = [
                (ids[:n].tolist(), logprob[:n].tolist(), bool(done))
                for ids, logprob, n, done in zip(
                    ids_BM, logprob_BM, count_B, done_B, strict=True
                )
            ]
            reached("first token")
            yield grown
            if sampling.stop:
                done_B |= [read_text(model, ids, sampling.stop)[2] for ids, *_ in grown]
                state = state._replace(done_B=done_B)
            growing_B = ~done_B & (count_B < sampling.max_new_tokens)
            if not (growing_B & (length_B < slots)).any():
                break
            state = extend_rows(config, model.layers, state, limits, chunk)
        if not growing_B.any():
            return
        half = max(1, config.context_length // 2)
        window = [
            [*prompt, *ids[:n].tolist()][-half:]
            for prompt, ids, n in zip(prompts, ids_BM, count_B, strict=True)
        ]


def make_limits(model: Model, s: Sampling, rows: int, samples: int) -> Limits:
    """The traced form of the options; sample s draws with the key of s."""
    stop_ids = [model.tokenizer.eot] if s.stop_ids is None else [*s.stop_ids]
    check_ids(model, stop_ids, "in stop_ids")
    knobs: Any = (  # NumPy's, as eager JAX would compile a program for each
        np.float32(s.temperature),
        np.int32(min(s.top_k, model.config.vocab_size)),
        np.float32(s.top_p),
        np.float32(s.min_p),
        np.float32(s.repetition_penalty),
    )
    stop_I: Any = np.full(MOST_STOP_IDS, -1, np.int32)
    stop_I[: len(stop_ids)] = stop_ids
    most: Any = np.int32(s.max_new_tokens)
    number_B: Any = np.arange(rows, dtype=np.int32) % samples
    key_B = sample_keys(np.int64(s.seed), number_B)
    return Limits(key_B, Knobs(*knobs), stop_I, most)


@jax.jit
def sample_keys(seed: Any, number_B: Int[Array, " B"]) -> Key[Array, " B"]:
    """The key of each sample."""
    fold = jax.vmap(jax.random.fold_in, in_axes=(None, 0))
    return fold(jax.random.key(seed), number_B)


def finished(
    model: Model,
    sampling: Sampling,
    ids: list[int],
    logprobs: list[float],
    stopped: bool,
    cut: int,
) -> Completion:
    """One row as a completion, cut where its first stop text begins."""
    text, count, hit = read_text(model, ids, sampling.stop)
    finish = "stop" if stopped or hit else "length"
    return Completion(text, ids[:count], logprobs[:count], finish, cut)


def read_text(
    model: Model, ids: Sequence[int], stops: str | Sequence[str], final: bool = True
) -> tuple[str, int, bool]:
    """The text of the ids up to a stop text, the tokens read, and whether one came.

    Token after token, so that the stop text that is complete first decides, however
    many tokens came at once. Unless `final`, a character cut short is left out.
    """
    decoder, text = codecs.getincrementaldecoder("utf-8")("replace"), ""
    for count, i in enumerate(ids, 1):
        text += decoder.decode(model.tokenizer.decode_bytes([i]))
        if found := [text.index(stop) for stop in stops if stop in text]:
            return text[: min(found)], count, True
    return text + decoder.decode(b"", final=final), len(ids), False


def held_back(text: str, stops: Iterable[str]) -> int:
    """Characters at the end of `text` that may be the start of a stop text."""
    return max(
        (n for stop in stops for n in range(1, len(stop)) if text.endswith(stop[:n])),
        default=0,
    )


def few_shot_prompt(path: Path, query: str) -> str:
    """Lines "input -> output" from a JSONL file, and the query as one more input.

    Raises:
        DataError: a row has no "input" and "output" texts, said with its line.
    """
    lines = []
    with opened(path) as (file, _):
        for line, row in jsonl_rows(file, path):
            if not isinstance(row, dict) or not all(
                isinstance(row.get(name), str) for name in ("input", "output")
            ):
                raise DataError(
                    f'{path}:{line}: an example needs the texts "input" and "output". '
                    'Write {"input": "woc", "output": "cow"}.'
                )
            lines.append(f"{row['input']} -> {row['output']}\n")
    return "".join(lines) + f"{query} ->"
