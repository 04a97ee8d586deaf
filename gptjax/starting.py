"""Where fine-tuning starts: the tokenizer, the shape and the parameters."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key

from gptjax import fingerprint
from gptjax import tokenizer as tokenizers
from gptjax.config import GPTConfig, RunConfig
from gptjax.data.conversations import Item, split_conversations
from gptjax.data.split import VALIDATION
from gptjax.errors import ConfigError
from gptjax.model import Params, init
from gptjax.template import Template, compiled, read_template
from gptjax.tokenizer import Tokenizer
from gptjax.weights.folder import Model
from gptjax.weights.importing import load

# What a run may choose anew for a model that is there; its shape is its own.
FREE = ("dropout", "causal", "head_bias", "pool", "dtype", "attention", "remat")
# A CPU makes the same numbers, compiled in half the time: each is computed once.
ONCE = {"xla_backend_optimization_level": 1}


def open_start(c: RunConfig, say: Callable[[str], None]) -> Model | None:
    """The model that `tune.start` names, or None for random parameters."""
    return load(c.tune.start, say) if c.tune.start else None


def split_items(c: RunConfig, items: list[Item], what: str) -> dict[str, list[Item]]:
    """The conversations or pairs of each split, some of them for validation.

    Raises:
        ConfigError: nothing is held out, or nothing is left to train on.
    """
    split = split_conversations(
        items,
        c.data.split,
        val_fraction=c.data.val_fraction,
        test_fraction=c.data.test_fraction,
        seed=c.data.val_seed,
    )
    return with_validation(c, split, what)


def with_validation(c: RunConfig, split: dict[str, Any], what: str) -> dict[str, Any]:
    """The same split, if it holds some of `what` out.

    Raises:
        ConfigError: it does not.
    """
    if VALIDATION not in split:
        raise ConfigError(
            f"data.val_fraction={c.data.val_fraction} holds no {what} out, so no step "
            "can be told to be the best. Choose one above 0."
        )
    return split


def choose_tokenizer(
    name: str, start: Model | None, texts: Callable[[], Iterable[str]]
) -> Tokenizer:
    """The tokenizer of a run.

    Args:
        name: `data.tokenizer`; "" = that of the start, or GPT-2's.
        start: where the run starts.
        texts: gives those that "bpe:SIZE" is trained on.

    Raises:
        GptjaxError: there is none of that name.
    """
    if not name:
        return start.tokenizer if start else tokenizers.load("gpt2")
    if not name.startswith("bpe:"):
        return tokenizers.load(name)
    size = name.removeprefix("bpe:")
    if not size.isdecimal():
        raise ConfigError(f"tokenizer {name!r} has no size. Write bpe:2048.")
    return tokenizers.train(texts(), int(size), name)


def settled_model(
    config: GPTConfig, start: Model | None, tokenizer: Tokenizer, classes: int = 0
) -> GPTConfig:
    """The shape of the run's model: that of its start, with what the run needs.

    Args:
        config: the run's `[model]`.
        start: where the run starts; its context is cut to that of the config.
        tokenizer: of the run.
        classes: [C] of a classifier's head, 0 for none.

    Raises:
        ConfigError: the config asks for another number of classes.
    """
    if config.n_classes not in (0, classes):
        have = f"{classes} labels" if classes else "none, as they have no labels"
        raise ConfigError(
            f"model.n_classes={config.n_classes} does not fit the data, which have "
            f"{have}. Leave the option out."
        )
    shape = {"n_classes": classes, "vocab_size": tokenizer.vocab_size}
    if start is None:
        return dataclasses.replace(config, **shape)
    own = {name: getattr(config, name) for name in FREE}
    context = min(config.context_length, start.config.context_length)
    return dataclasses.replace(start.config, context_length=context, **shape, **own)


def starting_params(
    config: GPTConfig, start: Model | None, tokenizer: Tokenizer, key: Key[Array, ""]
) -> Params:
    """Fresh parameters, or those of the start with a fresh head where one is needed.

    With another tokenizer than the start's, each token that both have keeps its row of
    the embedding; the others get fresh ones.

    Args:
        config: `settled_model`.
        start: where the run starts.
        tokenizer: of the run.
        key: of what is fresh.
    """
    options = ONCE if jax.default_backend() == "cpu" else None
    fresh = jax.jit(lambda key: init(config, key), compiler_options=options)(key)
    if start is None:
        return fresh
    params: Params = {n: start.params[n] for n in fresh if n in start.params}
    table = start.params["position_embedding"]["embedding"][: config.context_length]
    params["position_embedding"] = {"embedding": table}
    if config.n_classes:
        params["head"] = fresh["head"]
    if tokenizer.hash != start.tokenizer.hash:
        for name in {"token_embedding", "output_embedding"} & set(params):
            table_VD = np.array(fresh[name]["embedding"])
            ours, theirs = shared_tokens(tokenizer, start.tokenizer)
            table_VD[ours] = np.asarray(start.params[name]["embedding"])[theirs]
            params[name] = {"embedding": jnp.asarray(table_VD)}
    return params


def shared_tokens(one: Tokenizer, other: Tokenizer) -> tuple[list[int], list[int]]:
    """Ids in both tokenizers of each token that they share, the end token included."""
    both = [token for token in one.ranks if token in other.ranks]
    return (
        [one.eot, *(one.ranks[token] for token in both)],
        [other.eot, *(other.ranks[token] for token in both)],
    )


def tokenizer_facts(tokenizer: Tokenizer) -> dict[str, Any]:
    """What meta.json records of the tokenizer."""
    return {"tokenizer": {"name": tokenizer.name, "hash": tokenizer.hash}}


def start_facts(start: Model | None) -> dict[str, Any]:
    """What meta.json records of the model that a run starts from, if it has one."""
    return {"start": fingerprint.of_arrays(start.params)} if start else {}


def tuning_facts(
    tokenizer: Tokenizer,
    start: Model | None,
    rows: Mapping[str, Iterable[Any]],
    template: Template | None = None,
) -> dict[str, Any]:
    """What meta.json records of all that fine-tuning reads.

    Args:
        tokenizer: of the run.
        start: where the run starts.
        rows: of each split, anything that JSON can hold.
        template: of conversations.
    """
    data = {split: fingerprint.of_rows(part) for split, part in rows.items()}
    facts = {"data": data, **tokenizer_facts(tokenizer), **start_facts(start)}
    if template:
        facts["template"] = fingerprint.of_text(template.source)
    return facts


def choose_template(name: str, start: Model | None) -> Template:
    """The chat template of a run.

    Args:
        name: `data.template`; "" = that of the start, or Alpaca's.
        start: where the run starts.

    Raises:
        ConfigError: there is none of that name, or it cannot be used.
    """
    if not name and start and start.template:
        return compiled(start.template)
    return read_template(name or "alpaca")
