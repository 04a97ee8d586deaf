"""Trainable/frozen parameter split for fine-tuning.

Only the trainable part goes through the gradient and the optimizer. The last layers of
a stack are split off as "tail", so that backpropagation stops there.
"""

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
from jaxtyping import Array, Key

from gptjax.config import RunConfig
from gptjax.lora import Adapters, init_adapters, merge_adapters, scale_adapters
from gptjax.model import Params
from gptjax.train import make_train_step
from gptjax.tree import combine, partition
from gptjax.weights.adapters import save_adapters
from gptjax.weights.folder import Model, save_model

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
    """Splits parameters into (trainable, frozen) by `finetune.trainable`.

    Args:
        config: config of the run.
        params: parameters of the full model.
        key: initializes new adapters.
    """
    num_layers, patterns = TRAINABLE_RULES[config.finetune.trainable]
    trainable_params, frozen_params = partition(
        split_last_layers(params, num_layers), patterns
    )
    if config.finetune.trainable == "lora":
        targets, rank = config.finetune.lora_targets, config.finetune.lora_rank
        trainable_params["adapters"] = init_adapters(
            config.model, params, targets, rank, key
        )
    return trainable_params, frozen_params


def combine_params(
    config: RunConfig, trainable_params: Params, frozen_params: Params
) -> tuple[Params, Adapters | None]:
    """Parameters as `gptjax.hidden_states` takes them, and the scaled adapters."""
    model_params = {
        name: leaf for name, leaf in trainable_params.items() if name != "adapters"
    }
    adapters = trainable_params.get("adapters")
    if adapters is not None:
        adapters = scale_adapters(
            adapters, config.finetune.lora_alpha / config.finetune.lora_rank
        )
    return combine(frozen_params, model_params), adapters


def split_last_layers(params: Params, num_layers: int) -> Params:
    """Splits off the last layers of the stack, or all of them if it has fewer."""
    if not num_layers:
        return params
    rest = {name: leaf for name, leaf in params.items() if name != "blocks"}
    n_layers = jax.tree.leaves(params["blocks"])[0].shape[0]
    num_remaining = n_layers - min(num_layers, n_layers)
    parts: Any = {
        "tail": jax.tree.map(lambda leaf: leaf[num_remaining:], params["blocks"])
    }
    if num_remaining:
        parts["blocks"] = jax.tree.map(
            lambda leaf: leaf[:num_remaining], params["blocks"]
        )
    return rest | parts


def merge_last_layers(params: Params) -> Params:
    """Merges all layers into one stack; inverse of `split_last_layers`."""
    if "tail" not in params:
        return params
    rest = {n: leaf for n, leaf in params.items() if n not in ("blocks", "tail")}
    blocks = params["tail"]
    if "blocks" in params:
        concatenate = lambda *parts: jax.numpy.concatenate(parts)  # noqa: E731
        blocks = jax.tree.map(concatenate, params["blocks"], blocks)
    return rest | {"blocks": blocks}


def full_params(
    config: RunConfig, trainable_params: Params, frozen_params: Params
) -> Params:
    """Parameters of the full model: one stack of layers, adapters merged."""
    params, adapters = combine_params(config, trainable_params, frozen_params)
    params = merge_last_layers(params)
    return merge_adapters(params, adapters) if adapters else params


def make_finetune_step(
    config: RunConfig, loss_fn: FinetuneLossFn, optimizer: Any
) -> Callable[[Any, Any, Params], Any]:
    """Returns a pure (state, batch, frozen_params) -> (state, metrics)."""

    def finetune_step(
        state: Any, batch: Any, frozen_params: Params, max_grad_norm: Any = math.inf
    ) -> Any:
        def trainable_loss_fn(
            trainable_params: Params, batch: Any, key: Any
        ) -> tuple[Array, Array]:
            return loss_fn(
                config,
                *combine_params(config, trainable_params, frozen_params),
                batch,
                key,
            )

        train_step = make_train_step(
            trainable_loss_fn, optimizer, config.train.accumulate
        )
        return train_step(state, batch, max_grad_norm)

    return finetune_step


def save_finetuned(
    config: RunConfig,
    run_dir: Path,
    model: Model,
    trainable_params: Params,
    frozen_params: Params,
) -> None:
    """Writes model/ of a run and, if there are any, adapters.safetensors."""
    save_model(model, run_dir / "model")
    if adapters := combine_params(config, trainable_params, frozen_params)[1]:
        save_adapters(adapters, run_dir / "adapters.safetensors")


def iterate_batches(batches: Any, start: int, stop: int) -> Iterator[Any]:
    """Batches of the steps [start, stop)."""
    return (batches.batch_at(step) for step in range(start, stop))
