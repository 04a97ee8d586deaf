"""Train step (a pure function) and training loop (a generator)."""

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, Key

from gptjax.errors import ConfigError, check_type
from gptjax.runtime.device import target_platform
from gptjax.tree import Params

TINY = np.finfo(np.float32).tiny  # instead of a weight of 0: loss and gradient are 0
LossFn = Callable[[Params, Any, Key[Array, ""]], tuple[Array, Array]]


class TrainState(NamedTuple):
    """Everything that changes during training."""

    step: Int[Array, ""]  # finished steps, including skipped ones
    params: Params
    opt_state: Any
    num_skipped: Int[Array, ""]  # steps without an update
    key: Key[Array, ""]  # constant; each step folds in its number


class Metrics(NamedTuple):
    """Metrics of one step, still on the device."""

    loss: Float[Array, ""]  # nats per token
    grad_norm: Float[Array, ""]  # global, before clipping
    tokens: Float[Array, ""]  # weight the loss was divided by
    applied: Array  # bool: True if the update was applied


TrainStep = Callable[..., tuple[TrainState, Metrics]]  # (state, batch)


def init_state(
    params: Params, optimizer: optax.GradientTransformation, key: Key[Array, ""]
) -> TrainState:
    """State before the first step."""
    check_type("optimizer", optimizer, optax.GradientTransformation, "Pass one of Optax.")
    check_type("key", key, jax.Array, "Write jax.random.key(0).")
    zero = jnp.zeros((), jnp.int32)
    return TrainState(zero, params, optimizer.init(params), jnp.copy(zero), key)


def make_grad_fn(
    loss_fn: LossFn, accumulate: int, axis_name: str | None
) -> Callable[..., tuple[Any, Any, Any]]:
    """Returns (params, batch, key) -> (loss sum, weight, gradient of the mean loss)."""

    def sum_over_devices(tree: Any) -> Any:
        return tree if axis_name is None else jax.lax.psum(tree, axis_name)

    def full_batch_gradient(params: Params, batch: Any, key: Key[Array, ""]) -> Any:
        loss_sum, vjp_fn, weight = jax.vjp(
            lambda params: loss_fn(params, batch, key), params, has_aux=True
        )
        # Seeding the VJP with 1 / weight divides one scalar instead of all gradients.
        weight = jnp.maximum(sum_over_devices(weight), TINY)
        (grads,) = vjp_fn(1 / weight)
        return sum_over_devices(loss_sum), weight, sum_over_devices(grads)

    def accumulate_gradients(params: Params, batch: Any, key: Key[Array, ""]) -> Any:
        grad_fn = jax.value_and_grad(loss_fn, has_aux=True)

        def to_microbatches(leaf: Array) -> Array:
            return leaf.reshape(-1, accumulate, *leaf.shape[1:]).swapaxes(0, 1)

        def add_microbatch(sums: Any, microbatch: Any) -> tuple[Any, None]:
            (loss_sum, weight), grads = grad_fn(params, *microbatch)
            return jax.tree.map(jnp.add, sums, (loss_sum, weight, grads)), None

        zero = jnp.zeros((), jnp.float32)
        zeros = zero, zero, jax.tree.map(jnp.zeros_like, params)
        microbatches = (jax.tree.map(to_microbatches, batch), jax.random.split(key, accumulate))
        loss_sum, weight, grads = sum_over_devices(
            jax.lax.scan(add_microbatch, zeros, microbatches)[0]
        )
        weight = jnp.maximum(weight, TINY)
        return loss_sum, weight, jax.tree.map(lambda g: g / weight, grads)

    return full_batch_gradient if accumulate == 1 else accumulate_gradients


def check_loss_fn(loss_fn: LossFn) -> LossFn:
    """Returns a loss function that raises ConfigError unless it returns two scalars."""

    def checked_loss_fn(params: Params, batch: Any, key: Key[Array, ""]) -> tuple[Array, Array]:
        result: Any = loss_fn(params, batch, key)
        shapes = jax.tree.map(np.shape, result)
        if not isinstance(result, tuple) or shapes != ((), ()):
            raise ConfigError(
                f"loss_fn returned shapes {shapes} instead of ((), ()), a tuple of two "
                "scalars (loss sum, weight). Return (jnp.sum(losses), "
                "jnp.sum(loss_weights)); the step divides one by the other."
            )
        return result

    return checked_loss_fn


def make_train_step(
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    accumulate: int = 1,
    axis_name: str | None = None,
) -> TrainStep:
    """Returns a pure `train_step(state, batch, max_grad_norm=inf)`.

    The caller jits it and donates `state`. The gradient is that of the mean over all
    tokens of all micro-batches, even if they hold different numbers of tokens. A step
    with a non-finite loss or gradient, or with a gradient norm above `max_grad_norm`,
    changes only the step counters.

    `loss_fn` is `(params, batch, key) -> (sum, weight)`, as in `gptjax.training.loss`.
    `accumulate`, the number of micro-batches [G], divides activation memory by G; the
    first axis of each batch leaf is distributed over them row by row. `axis_name` is
    that of the `jax.pmap` axis to sum over.
    """
    grad_fn = make_grad_fn(check_loss_fn(loss_fn), accumulate, axis_name)

    def train_step(
        state: TrainState, batch: Any, max_grad_norm: Any = math.inf
    ) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(state.key, state.step)
        if axis_name is not None:
            key = jax.random.fold_in(key, jax.lax.axis_index(axis_name))
        loss_sum, weight, grads = grad_fn(state.params, batch, key)
        grad_norm = optax.tree.norm(grads)
        is_valid = jnp.isfinite(loss_sum) & jnp.isfinite(grad_norm) & (grad_norm <= max_grad_norm)

        def apply_update(params: Params, opt_state: Any) -> tuple[Any, Any]:
            updates, opt_state = optax.with_extra_args_support(optimizer).update(
                grads, opt_state, params, grad_norm=grad_norm
            )
            return optax.apply_updates(params, updates), opt_state

        old = state.params, state.opt_state
        params, opt_state = select_update(is_valid, apply_update, old)
        state = TrainState(
            state.step + 1, params, opt_state, state.num_skipped + ~is_valid, state.key
        )
        return state, Metrics(loss_sum / weight, grad_norm, weight, is_valid)

    return train_step


def select_update(condition: Array, update_fn: Callable[..., Any], old: tuple[Any, ...]) -> Any:
    """`update_fn(*old)` if the condition holds, else `old`.

    On CPU `lax.cond` halves the time of an AdamW update compared with an elementwise
    select; on other devices it would synchronize with the host.
    """
    if target_platform() == "cpu":
        return jax.lax.cond(condition, update_fn, lambda *same: same, *old)
    new = update_fn(*old)
    return jax.tree.map(lambda n, o: jnp.where(condition, n, o), new, old)


def pmap_train_step(
    loss_fn: LossFn, optimizer: optax.GradientTransformation, accumulate: int = 1
) -> TrainStep:
    """`make_train_step` compiled with `jax.pmap`, with the rows split over devices.

    State and metrics are as with `jax.jit`. Every step copies the full state to all
    local devices; prefer a mesh (`gptjax.parallel.sharding`).
    """
    step = make_train_step(loss_fn, optimizer, accumulate, "rows")
    pmapped_step = jax.pmap(step, "rows", in_axes=(None, 0), out_axes=None)

    def split_over_devices(leaf: Any) -> Any:
        if len(leaf) % (jax.local_device_count() * accumulate):
            raise ConfigError(
                f"{len(leaf)} rows are not divisible by {jax.local_device_count()} devices "
                f"x {accumulate} micro-batches. Choose another number of rows."
            )
        return leaf.reshape(jax.local_device_count(), -1, *leaf.shape[1:])

    return lambda state, batch: pmapped_step(state, jax.tree.map(split_over_devices, batch))


def train_steps(
    state: TrainState, train_step: TrainStep, batches: Iterable[Any]
) -> Iterator[tuple[int, TrainState, Metrics]]:
    """Yields (finished steps, state, metrics) after each batch.

    The step is a Python int, so testing it does not block on the device; reading a
    metric does. A yielded state is donated to the next step: use it before then.
    """
    step = int(state.step)
    for batch in batches:
        state, metrics = train_step(state, batch)
        step += 1
        yield step, state, metrics
