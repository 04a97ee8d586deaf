"""Initialization of a run: tokenizer, model config, parameters, provenance."""

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
from gptjax.data.conversations import ConversationOrPair, split_conversations
from gptjax.data.split import VALIDATION_SPLIT
from gptjax.errors import ConfigError
from gptjax.model import Params, init
from gptjax.template import ChatTemplate, compile_template, load_chat_template
from gptjax.tokenizer import Tokenizer
from gptjax.weights.folder import Model
from gptjax.weights.importing import load

# GPTConfig fields that a run may override in the model it starts from.
OVERRIDABLE_FIELDS = (
    "dropout",
    "causal",
    "head_bias",
    "pool",
    "dtype",
    "attention",
    "remat",
)
# On CPU: same values, half the compile time. Initialization runs only once.
FAST_COMPILE_OPTIONS = {"xla_backend_optimization_level": 1}


def load_init_model(config: RunConfig, log: Callable[[str], None]) -> Model | None:
    """Loads the model of `finetune.init_from`; None for random initialization."""
    return load(config.finetune.init_from, log) if config.finetune.init_from else None


def train_val_test_split(
    config: RunConfig, items: list[ConversationOrPair], item_name: str
) -> dict[str, list[ConversationOrPair]]:
    """Splits conversations or preference pairs; the validation split is required.

    Args:
        config: config of the run.
        items: conversations or pairs.
        item_name: plural noun for the items in error messages.

    Raises:
        ConfigError: the training or validation split is empty.
    """
    splits = split_conversations(
        items,
        config.data.split_strategy,
        val_fraction=config.data.val_fraction,
        test_fraction=config.data.test_fraction,
        seed=config.data.split_seed,
    )
    return check_validation_split(config, splits, item_name)


def check_validation_split(
    config: RunConfig, splits: dict[str, Any], item_name: str
) -> dict[str, Any]:
    """Returns the splits after checking that there is a validation split.

    Raises:
        ConfigError: there is none.
    """
    if VALIDATION_SPLIT not in splits:
        raise ConfigError(
            f"data.val_fraction={config.data.val_fraction} leaves no {item_name} for validation, "
            "which selects the best step. Choose a fraction above 0."
        )
    return splits


def choose_tokenizer(
    name: str, init_model: Model | None, texts: Callable[[], Iterable[str]]
) -> Tokenizer:
    """Loads or trains the tokenizer of a run.

    Args:
        name: `data.tokenizer`; "" = the initial model's, or GPT-2's.
        init_model: model the run starts from.
        texts: returns the training texts for "bpe:SIZE".

    Raises:
        GptjaxError: no tokenizer of that name, or no valid size.
    """
    if not name:
        return init_model.tokenizer if init_model else tokenizers.load_tokenizer("gpt2")
    if not name.startswith("bpe:"):
        return tokenizers.load_tokenizer(name)
    size = name.removeprefix("bpe:")
    if not size.isdecimal():
        raise ConfigError(
            f"data.tokenizer={name!r} has no valid size. Write bpe:2048, for example."
        )
    return tokenizers.train_tokenizer(texts(), int(size), name)


def resolve_model_config(
    config: GPTConfig,
    init_model: Model | None,
    tokenizer: Tokenizer,
    num_classes: int = 0,
) -> GPTConfig:
    """Model config: the initial model's, with task overrides.

    Args:
        config: the run's `[model]`.
        init_model: model the run starts from; its context is truncated to the config's.
        tokenizer: of the run.
        num_classes: [C] of a classifier's head, 0 for none.

    Raises:
        ConfigError: the config has a different number of classes.
    """
    if config.n_classes not in (0, num_classes):
        available = f"{num_classes} labels" if num_classes else "no labels"
        raise ConfigError(
            f"model.n_classes={config.n_classes} does not match the data, which have "
            f"{available}. Remove the option."
        )
    task_fields = {"n_classes": num_classes, "vocab_size": tokenizer.vocab_size}
    if init_model is None:
        return dataclasses.replace(config, **task_fields)
    overrides = {name: getattr(config, name) for name in OVERRIDABLE_FIELDS}
    context_length = min(config.context_length, init_model.config.context_length)
    return dataclasses.replace(
        init_model.config, context_length=context_length, **task_fields, **overrides
    )


def initial_params(
    config: GPTConfig,
    init_model: Model | None,
    tokenizer: Tokenizer,
    key: Key[Array, ""],
) -> Params:
    """New parameters, or the initial model's with a new classifier head if needed.

    If the tokenizers differ, tokens in both vocabularies keep their embeddings; the
    others get new ones.

    Args:
        config: from `resolve_model_config`.
        init_model: model the run starts from.
        tokenizer: of the run.
        key: initializes new parameters.
    """
    options = FAST_COMPILE_OPTIONS if jax.default_backend() == "cpu" else None
    new_params = jax.jit(lambda key: init(config, key), compiler_options=options)(key)
    if init_model is None:
        return new_params
    params: Params = {
        n: init_model.params[n] for n in new_params if n in init_model.params
    }
    table = init_model.params["position_embedding"]["embedding"][
        : config.context_length
    ]
    params["position_embedding"] = {"embedding": table}
    if config.n_classes:
        params["head"] = new_params["head"]
    if tokenizer.hash != init_model.tokenizer.hash:
        for name in {"token_embedding", "output_embedding"} & set(params):
            table_VD = np.array(new_params[name]["embedding"])
            new_ids, old_ids = shared_token_ids(tokenizer, init_model.tokenizer)
            table_VD[new_ids] = np.asarray(init_model.params[name]["embedding"])[
                old_ids
            ]
            params[name] = {"embedding": jnp.asarray(table_VD)}
    return params


def shared_token_ids(one: Tokenizer, other: Tokenizer) -> tuple[list[int], list[int]]:
    """Ids, in each of two tokenizers, of the tokens in both, with the end token."""
    both = [token for token in one.ranks if token in other.ranks]
    return (
        [one.eot_token, *(one.ranks[token] for token in both)],
        [other.eot_token, *(other.ranks[token] for token in both)],
    )


def tokenizer_provenance(tokenizer: Tokenizer) -> dict[str, Any]:
    """Tokenizer entry of meta.json."""
    return {"tokenizer": {"name": tokenizer.name, "hash": tokenizer.hash}}


def init_provenance(init_model: Model | None) -> dict[str, Any]:
    """Entry of meta.json for the initial model, if there is one."""
    return {"start": fingerprint.hash_pytree(init_model.params)} if init_model else {}


def finetune_provenance(
    tokenizer: Tokenizer,
    init_model: Model | None,
    rows: Mapping[str, Iterable[Any]],
    template: ChatTemplate | None = None,
) -> dict[str, Any]:
    """Entries of meta.json for all inputs of fine-tuning, as hashes.

    Args:
        tokenizer: of the run.
        init_model: model the run starts from.
        rows: JSON-serializable rows by split.
        template: chat template of the conversations.
    """
    data = {split: fingerprint.hash_rows(part) for split, part in rows.items()}
    provenance = {
        "data": data,
        **tokenizer_provenance(tokenizer),
        **init_provenance(init_model),
    }
    if template:
        provenance["template"] = fingerprint.hash_text(template.source)
    return provenance


def choose_chat_template(name: str, init_model: Model | None) -> ChatTemplate:
    """Loads the chat template of a run.

    Args:
        name: `data.chat_template`; "" = the initial model's, or Alpaca's.
        init_model: model the run starts from.

    Raises:
        ConfigError: no template of that name, or an invalid one.
    """
    if not name and init_model and init_model.chat_template:
        return compile_template(init_model.chat_template)
    return load_chat_template(name or "alpaca")
