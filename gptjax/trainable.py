"""What a fine-tuning run may change: tables of names, and the parameters in two parts.

Only the part that is trained goes through the gradient and the optimiser. Of a stack of
layers the last ones are split off as "tail", so that nothing flows back further.
"""

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
from jaxtyping import Array, Key

from gptjax.config import RunConfig
from gptjax.lora import Adapters, init_adapters, merged, scaled
from gptjax.model import Params
from gptjax.train import make_train_step
from gptjax.tree import merge, partition
from gptjax.weights.adapters import save_adapters
from gptjax.weights.folder import Model, save

# (config, parameters, adapters, batch, key) -> (sum, weight)
TunedLoss = Callable[[RunConfig, Params, Any, Any, Any], tuple[Array, Array]]

# tune.trainable: (layers in the tail, patterns of what is trained). The final norm goes
# with the blocks, as in Raschka 2024, chapter 6.
TRAINABLE: dict[str, tuple[int, list[str]]] = {
    "all": (0, ["*"]),
    "head": (0, ["head/*"]),
    "last-block": (1, ["tail/*", "final_norm/*", "head/*"]),
    "last-two-blocks": (2, ["tail/*", "final_norm/*", "head/*"]),
    "lora": (0, ["head/*"]),  # and the adapters
}


def parted(c: RunConfig, params: Params, key: Key[Array, ""]) -> tuple[Params, Params]:
    """(what is trained, what is frozen) of a model's parameters.

    Args:
        c: its `tune` says what is trained.
        params: of the whole model.
        key: of fresh adapters.
    """
    tail, patterns = TRAINABLE[c.tune.trainable]
    trained, frozen = partition(split_tail(params, tail), patterns)
    if c.tune.trainable == "lora":
        targets, rank = c.tune.lora_targets, c.tune.lora_rank
        trained["adapters"] = init_adapters(c.model, params, targets, rank, key)
    return trained, frozen


def joined(
    c: RunConfig, trained: Params, frozen: Params
) -> tuple[Params, Adapters | None]:
    """The parameters as `gptjax.hidden` takes them, and the adapters, scaled."""
    own = {name: leaf for name, leaf in trained.items() if name != "adapters"}
    adapters = trained.get("adapters")
    if adapters is not None:
        adapters = scaled(adapters, c.tune.lora_alpha / c.tune.lora_rank)
    return merge(frozen, own), adapters


def split_tail(params: Params, layers: int) -> Params:
    """The last layers of the stack apart; all of them, where there are no more."""
    if not layers:
        return params
    rest = {name: leaf for name, leaf in params.items() if name != "blocks"}
    depth = jax.tree.leaves(params["blocks"])[0].shape[0]
    first = depth - min(layers, depth)
    parts: Any = {"tail": jax.tree.map(lambda leaf: leaf[first:], params["blocks"])}
    if first:
        parts["blocks"] = jax.tree.map(lambda leaf: leaf[:first], params["blocks"])
    return rest | parts


def join_tail(params: Params) -> Params:
    """All layers in one stack again; the inverse of `split_tail`."""
    if "tail" not in params:
        return params
    rest = {n: leaf for n, leaf in params.items() if n not in ("blocks", "tail")}
    blocks = params["tail"]
    if "blocks" in params:
        together = lambda *parts: jax.numpy.concatenate(parts)  # noqa: E731
        blocks = jax.tree.map(together, params["blocks"], blocks)
    return rest | {"blocks": blocks}


def whole(c: RunConfig, trained: Params, frozen: Params) -> Params:
    """The parameters of the model that a run has made: one stack, adapters merged."""
    params, adapters = joined(c, trained, frozen)
    params = join_tail(params)
    return merged(params, adapters) if adapters else params


def make_tuned_step(
    c: RunConfig, loss: TunedLoss, optimizer: Any
) -> Callable[[Any, Any, Params], Any]:
    """A pure (state, batch, frozen) -> (state, metrics); only the state changes."""

    def step(state: Any, batch: Any, frozen: Params, limit: Any = math.inf) -> Any:
        def loss_fn(trained: Params, batch: Any, key: Any) -> tuple[Array, Array]:
            return loss(c, *joined(c, trained, frozen), batch, key)

        step = make_train_step(loss_fn, optimizer, c.train.accumulate)
        return step(state, batch, limit)

    return step


def save_tuned(
    c: RunConfig, folder: Path, model: Model, trained: Params, frozen: Params
) -> None:
    """Writes model/ of a run, and its adapters beside it."""
    save(model, folder / "model")
    if adapters := joined(c, trained, frozen)[1]:
        save_adapters(adapters, folder / "adapters.safetensors")


def stream(batches: Any, first: int, stop: int) -> Iterator[Any]:
    """`batches.batch_at` of the steps from `first` to before `stop`."""
    return (batches.batch_at(step) for step in range(first, stop))
