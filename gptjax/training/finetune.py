"""Initialization of a run: tokenizer, model config, parameters, provenance."""

import dataclasses
import hashlib
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key

from gptjax.config import FinetuneConfig, GPTConfig, RunConfig
from gptjax.data.conversations import ConversationOrPair, split_conversations
from gptjax.data.text import VALIDATION_SPLIT
from gptjax.errors import ConfigError
from gptjax.model.gpt import init
from gptjax.model.lora import Adapters, init_adapters, scale_adapters
from gptjax.runtime.terminal import logger
from gptjax.tokenizer.chat_template import ChatTemplate, compile_template, load_chat_template
from gptjax.tokenizer.tokenizer import (
    Tokenizer,
    load_tokenizer,
    train_tokenizer,
    untrained_vocab_size,
)
from gptjax.training.run_dir import hash_pytree
from gptjax.training.train_step import make_train_step
from gptjax.tree import Params, combine, partition
from gptjax.weights.load import load
from gptjax.weights.model_folder import Model

Splits = TypeVar("Splits", bound=dict[str, Any])  # data by split

# GPTConfig fields that a run may override in the model it starts from.
OVERRIDABLE_FIELDS = ("dropout", "causal", "head_bias", "pool", "dtype", "attention", "remat")
# On CPU: same values, half the compile time. Initialization runs only once.
FAST_COMPILE_OPTIONS = {"xla_backend_optimization_level": 1}


def load_init_model(config: FinetuneConfig) -> Model | None:
    """Loads the model of `finetune.init_from`; None for random initialization."""
    return load(config.init_from) if config.init_from else None


def train_val_test_split(
    config: RunConfig, items: Sequence[ConversationOrPair], item_name: str
) -> dict[str, Sequence[ConversationOrPair]]:
    """Splits conversations or pairs (`item_name`); requires a validation split."""
    splits = split_conversations(
        items,
        config.data.split_strategy,
        val_fraction=config.data.val_fraction,
        test_fraction=config.data.test_fraction,
        seed=config.data.split_seed,
    )
    return check_validation_split(config, splits, item_name)


def check_validation_split(config: RunConfig, splits: Splits, item_name: str) -> Splits:
    """Returns the splits, or raises a ConfigError if there is no validation split."""
    if VALIDATION_SPLIT not in splits:
        raise ConfigError(
            f"data.val_fraction={config.data.val_fraction} leaves no {item_name} for "
            "validation, which selects the best step. Choose a fraction above 0."
        )
    return splits


def choose_tokenizer(
    name: str, init_model: Model | None, texts: Callable[[], Iterable[str]]
) -> Tokenizer:
    """Loads the tokenizer of a run, or trains "bpe:SIZE" on the texts.

    The name "" selects the tokenizer of the initial model, or GPT-2's.
    """
    if not name:
        return init_model.tokenizer if init_model else load_tokenizer("gpt2")
    if not (size := untrained_vocab_size(name)):
        return load_tokenizer(name)
    return train_tokenizer(texts(), size, name)


def max_context(config: GPTConfig, init_model: Model | None) -> int:
    """Context length of a run: that of the config, truncated to the initial model's."""
    limit = init_model.config.context_length if init_model else config.context_length
    return min(config.context_length, limit)


def resolve_model_config(
    config: GPTConfig, init_model: Model | None, tokenizer: Tokenizer, num_classes: int = 0
) -> GPTConfig:
    """Model config: the run's `[model]`, or the initial model's with task overrides."""
    if config.n_classes not in (0, num_classes):
        available = f"{num_classes} labels" if num_classes else "no labels"
        raise ConfigError(
            f"model.n_classes={config.n_classes} does not match the data, which have "
            f"{available}. Remove the option."
        )
    changes: dict[str, Any] = {"n_classes": num_classes, "vocab_size": tokenizer.vocab_size}
    if init_model is None:
        return dataclasses.replace(config, **changes)
    changes |= {name: getattr(config, name) for name in OVERRIDABLE_FIELDS}
    changes["context_length"] = max_context(config, init_model)
    return dataclasses.replace(init_model.config, **changes)


def initial_params(
    config: GPTConfig, init_model: Model | None, tokenizer: Tokenizer, key: Key[Array, ""]
) -> Params:
    """New parameters, or the initial model's with a new classifier head if needed.

    If the tokenizers differ, tokens in both vocabularies keep their embeddings; the
    others get new ones. `config` is from `resolve_model_config`.
    """
    options = FAST_COMPILE_OPTIONS if jax.default_backend() == "cpu" else None
    init_fn = jax.jit(lambda key: init(config, key), compiler_options=options)
    if init_model is None:
        return init_fn(key)
    is_same_tokenizer = tokenizer.hash == init_model.tokenizer.hash
    are_complete = is_same_tokenizer and not config.n_classes
    new_params: Any = jax.eval_shape(init_fn, key) if are_complete else init_fn(key)
    params: Params = {n: init_model.params[n] for n in new_params if n in init_model.params}
    if position := params.get("position_embedding"):
        params["position_embedding"] = {"embedding": position["embedding"][: config.context_length]}
    if config.n_classes:
        params["head"] = new_params["head"]
    if not is_same_tokenizer:
        tables = [{**x.ranks, **x.special_tokens} for x in (tokenizer, init_model.tokenizer)]
        shared = tables[0].keys() & tables[1].keys()
        new_ids, old_ids = ([ids[token] for token in shared] for ids in tables)
        logger.info(
            f"tokens   {len(shared):,} of {tokenizer.vocab_size:,} keep their embeddings; the "
            f"initial model has {init_model.tokenizer.vocab_size:,}"
        )
        for name in {"token_embedding", "output_embedding"} & set(params):
            table_VD = np.array(new_params[name]["embedding"])
            table_VD[new_ids] = np.asarray(init_model.params[name]["embedding"])[old_ids]
            params[name] = {"embedding": jnp.asarray(table_VD)}
    return params


def model_provenance(
    tokenizer: Tokenizer, init_model: Model | None = None, chat_template: str = ""
) -> dict[str, Any]:
    """Entries of meta.json for tokenizer, initial model and chat template."""
    provenance: dict[str, Any] = {"tokenizer": {"name": tokenizer.name, "hash": tokenizer.hash}}
    if init_model:
        provenance["start"] = hash_pytree(init_model.params)
    if chat_template:
        provenance["template"] = hashlib.sha256(chat_template.encode()).hexdigest()
    return provenance


def choose_chat_template(name: str, init_model: Model | None, tokenizer: Tokenizer) -> ChatTemplate:
    """Loads the chat template of a run; "" = the initial model's, or Alpaca's."""
    if not name and init_model and init_model.chat_template:
        return compile_template(init_model.chat_template, *tokenizer.template_tokens)
    return load_chat_template(name or "alpaca", *tokenizer.template_tokens)


# (config, params, adapters, batch, key) -> (sum, weight)
FinetuneLossFn = Callable[[RunConfig, Params, Any, Any, Any], tuple[Array, Array]]

# finetune.trainable: (layers in the tail, patterns of trainable parameters). The final
# norm is trained with the blocks, as in Raschka 2024, chapter 6.
TRAINABLE_RULES: dict[str, tuple[int, list[str]]] = {
    "all": (0, ["*"]),
    "head": (0, ["head/*"]),
    "last-block": (1, ["tail/*", "final_norm/*", "head/*"]),
    "last-two-blocks": (2, ["tail/*", "final_norm/*", "head/*"]),
    "lora": (0, ["head/*"]),  # plus the adapters
}


def split_trainable(
    config: RunConfig, params: Params, key: Key[Array, ""]
) -> tuple[Params, Params]:
    """Splits parameters into (trainable, frozen); the key initializes adapters."""
    num_layers, patterns = TRAINABLE_RULES[config.finetune.trainable]
    trainable_params, frozen_params = partition(split_last_layers(params, num_layers), patterns)
    if config.finetune.trainable == "lora":
        targets, rank = config.finetune.lora_targets, config.finetune.lora_rank
        trainable_params["adapters"] = init_adapters(config.model, params, targets, rank, key)
    return trainable_params, frozen_params


def combine_params(
    config: RunConfig, trainable_params: Params, frozen_params: Params
) -> tuple[Params, Adapters | None]:
    """Parameters as `gptjax.hidden_states` takes them, and the scaled adapters."""
    model_params = dict(trainable_params)
    if (adapters := model_params.pop("adapters", None)) is not None:
        adapters = scale_adapters(adapters, config.finetune.lora_alpha / config.finetune.lora_rank)
    return combine(frozen_params, model_params), adapters


def split_last_layers(params: Params, num_layers: int) -> Params:
    """Splits off the last layers of the stack, or all of them if it has fewer."""
    if not num_layers:
        return params
    parts = dict(params)
    blocks: Any = parts.pop("blocks")
    num_remaining = max(len(jax.tree.leaves(blocks)[0]) - num_layers, 0)
    parts["tail"] = jax.tree.map(lambda leaf: leaf[num_remaining:], blocks)
    if num_remaining:
        parts["blocks"] = jax.tree.map(lambda leaf: leaf[:num_remaining], blocks)
    return parts


def merge_last_layers(params: Params) -> Params:
    """Merges all layers into one stack; inverse of `split_last_layers`."""
    if "tail" not in params:
        return params
    merged = dict(params)
    parts = [merged.pop("tail")]
    if "blocks" in merged:
        parts.insert(0, merged["blocks"])
    merged["blocks"] = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *parts)
    return merged


def make_finetune_step(
    config: RunConfig, loss_fn: FinetuneLossFn, optimizer: Any
) -> Callable[..., Any]:
    """Returns a pure (state, batch, frozen_params) -> (state, metrics)."""

    def finetune_step(
        state: Any, batch: Any, frozen_params: Params, max_grad_norm: Any = math.inf
    ) -> Any:
        def trainable_loss_fn(trainable_params: Params, batch: Any, key: Any) -> Any:
            params, adapters = combine_params(config, trainable_params, frozen_params)
            return loss_fn(config, params, adapters, batch, key)

        train_step = make_train_step(trainable_loss_fn, optimizer, config.train.accumulate)
        return train_step(state, batch, max_grad_norm)

    return finetune_step
