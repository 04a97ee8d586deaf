"""The train step, a pure function, and the loop, a generator that its caller owns."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, Key

from gptjax.attention.call import platform
from gptjax.errors import ConfigError
from gptjax.model import Params

LossFn = Callable[[Params, Any, Key[Array, ""]], tuple[Array, Array]]


class TrainState(NamedTuple):
    """Everything that changes during training, and nothing else."""

    step: Int[Array, ""]  # finished steps, skipped ones included
    params: Params
    opt_state: Any
    skipped: Int[Array, ""]  # steps whose update was left out
    key: Key[Array, ""]  # constant; each step folds its number into it


class Metrics(NamedTuple):
    """What one step computed, still on the device."""

    loss: Float[Array, ""]  # nats per token
    grad_norm: Float[Array, ""]  # global, before clipping
    tokens: Float[Array, ""]  # weight that the loss was divided by
    updated: Array  # bool: whether the update was made


TrainStep = Callable[..., tuple[TrainState, Metrics]]  # (state, batch)


def init_state(
    params: Params, optimizer: optax.GradientTransformation, key: Key[Array, ""]
) -> TrainState:
    """The state before the first step."""
    zero = jnp.zeros((), jnp.int32)
    return TrainState(zero, params, optimizer.init(params), jnp.copy(zero), key)


def mean_gradient(
    loss_fn: LossFn, accumulate: int, axis: str | None
) -> Callable[..., tuple[Any, Any, Any]]:
    """(params, batch, key) -> nats, weight and d(nats / weight)/d(params), of all."""

    def whole(part: Any) -> Any:
        """The sum over the devices of `jax.pmap`."""
        return part if axis is None else jax.lax.psum(part, axis)

    def at_once(params: Params, batch: Any, key: Key[Array, ""]) -> Any:
        nats, pull, weight = jax.vjp(
            lambda params: loss_fn(params, batch, key), params, has_aux=True
        )
        # The division is of one number here, and of every gradient's otherwise.
        weight = divisor(whole(weight))
        (grads,) = pull(1 / weight)
        return whole(nats), weight, whole(grads)

    def in_parts(params: Params, batch: Any, key: Key[Array, ""]) -> Any:
        grad_fn = jax.value_and_grad(loss_fn, has_aux=True)

        def deal(leaf: Array) -> Array:
            return leaf.reshape(-1, accumulate, *leaf.shape[1:]).swapaxes(0, 1)

        def add(sums: Any, micro: Any) -> tuple[Any, None]:
            (nats, weight), grads = grad_fn(params, *micro)
            return jax.tree.map(jnp.add, sums, (nats, weight, grads)), None

        zero = jnp.zeros((), jnp.float32)
        zeros = zero, zero, jax.tree.map(jnp.zeros_like, params)
        micros = jax.tree.map(deal, batch), jax.random.split(key, accumulate)
        nats, weight, grads = whole(jax.lax.scan(add, zeros, micros)[0])
        weight = divisor(weight)
        return nats, weight, jax.tree.map(lambda g: g / weight, grads)

    return at_once if accumulate == 1 else in_parts


def divisor(weight: Float[Array, ""]) -> Float[Array, ""]:
    """The weight; where nothing counts, a tiny one, so that loss and gradient are 0."""
    return jnp.maximum(weight, jnp.finfo(jnp.float32).tiny)


def make_train_step(
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    accumulate: int = 1,
    axis: str | None = None,
) -> TrainStep:
    """A pure `step(state, batch, limit=inf)`; the caller jits it and donates `state`.

    The gradient is that of the mean over all tokens of all micro-batches, however
    unevenly they are filled. A step whose loss or gradient is not finite, or whose
    gradient has a norm above the limit, changes nothing but the counts of steps and of
    skipped ones.

    Args:
        loss_fn: `(params, batch, key) -> (sum, weight)`, as `gptjax.loss` has it.
        optimizer: any Optax transformation.
        accumulate: [G] micro-batches that the first axis of each leaf of the batch
            is dealt to, row by row; G times less memory for activations.
        axis: of `jax.pmap`, over which the sums are taken, too; see `pmapped`.
    """
    gradient = mean_gradient(loss_fn, accumulate, axis)

    def step(
        state: TrainState, batch: Any, limit: Any = math.inf
    ) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(state.key, state.step)
        if axis is not None:
            key = jax.random.fold_in(key, jax.lax.axis_index(axis))
        nats, weight, grads = gradient(state.params, batch, key)
        norm = optax.tree.norm(grads)
        good = jnp.isfinite(nats) & jnp.isfinite(norm) & (norm <= limit)

        def updated(params: Params, opt_state: Any) -> tuple[Any, Any]:
            updates, opt_state = optax.with_extra_args_support(optimizer).update(
                grads, opt_state, params, grad_norm=norm
            )
            return optax.apply_updates(params, updates), opt_state

        before = state.params, state.opt_state
        params, opt_state = only_if(good, updated, before)
        state = TrainState(
            state.step + 1, params, opt_state, state.skipped + ~good, state.key
        )
        return state, Metrics(nats / weight, norm, weight, good)

    return step


def only_if(right: Array, change: Callable[..., Any], before: tuple[Any, ...]) -> Any:
    """`change(*before)` where it is right to make it, else what was before.

    A CPU makes an update of AdamW in half the time if nothing is chosen element by
    element; other devices would have to ask the host which way to go.
    """
    if platform() == "cpu":
        return jax.lax.cond(right, change, lambda *same: same, *before)
    new = change(*before)
    return jax.tree.map(lambda n, o: jnp.where(right, n, o), new, before)


def pmapped(
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    accumulate: int = 1,
    devices: Sequence[Any] | None = None,
) -> TrainStep:
    """`make_train_step`, compiled with `jax.pmap`: each device has part of the rows.

    State and metrics are as with `jax.jit`. Every step copies the state to all devices,
    and none holds less than all of it: a mesh (`gptjax.sharding`) does better.

    Args:
        loss_fn: as for `make_train_step`.
        optimizer: any Optax transformation.
        accumulate: micro-batches of each device.
        devices: default: all of this process.
    """
    devices = jax.local_devices() if devices is None else list(devices)
    step, count = make_train_step(loss_fn, optimizer, accumulate, "rows"), len(devices)
    mapped = jax.pmap(step, "rows", in_axes=(None, 0), out_axes=None, devices=devices)

    def split(leaf: Any) -> Any:
        if len(leaf) % (count * accumulate):
            raise ConfigError(
                f"data.batch_size={len(leaf)} does not split evenly over {count} "
                f"devices with train.accumulate={accumulate}. Choose a multiple of "
                f"{count * accumulate}."
            )
        return leaf.reshape(count, -1, *leaf.shape[1:])

    return lambda state, batch: mapped(state, jax.tree.map(split, batch))


def steps(
    state: TrainState, step_fn: TrainStep, batches: Iterable[Any]
) -> Iterator[tuple[int, TrainState, Metrics]]:
    """Yields (steps finished, state, metrics) once per batch; the caller does the rest.

    Logging, evaluation and checkpoints are plain statements in the caller's `for`
    body, so there are no callbacks. The count is a Python int: testing it does not
    wait for the device, reading a metric does. A yielded state is donated to the
    next step, so it can only be used until the next one is asked for.
    """
    done = int(state.step)
    for batch in batches:
        state, metrics = step_fn(state, batch)
        done += 1
        yield done, state, metrics
