"""AdamW, learning-rate schedules and weight-decay rules over parameter names."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from gptjax.config import OptimConfig
from gptjax.errors import ConfigError
from gptjax.plugins import load_plugin
from gptjax.tree import flatten_with_names, match_rules

# Radford et al. 2018 ("all non bias or gain weights"). Exact cover: see `match_rules`.
WEIGHT_DECAY_RULES = {
    **{"*kernel": True, "*embedding": True, "*lora_a": True, "*lora_b": True},
    **{"*bias": False, "*scale": False},
}

SCHEDULES = ("constant", "cosine", "wsd")  # others are those of plugins
WSD_DECAY_FRACTION = 0.2  # fraction of the run in which the schedule "wsd" decays


class LearningRateRule(NamedTuple):
    """Learning rate and gradient clipping of a plugin's value of `optim.schedule`."""

    make_schedule: Callable[[OptimConfig, int], optax.Schedule]
    adapt_grad_clip: Callable[
        [OptimConfig, optax.GradientTransformation], optax.GradientTransformation
    ]


def make_schedule(optim: OptimConfig, steps: int) -> optax.Schedule:
    """Learning rate as a function of the number of finished steps.

    After a linear warm-up, "cosine" decays to `final_lr_fraction * peak_lr` at the last
    step (Loshchilov & Hutter 2017); "wsd" is constant and decays linearly over the last
    fifth of the run (Hu et al. 2024). Other names are those of plugins.
    """
    peak_lr, warmup_steps = optim.peak_lr, optim.warmup_steps
    if warmup_steps > steps:
        raise ConfigError(
            f"optim.warmup_steps={warmup_steps} must not exceed train.steps={steps}. "
            "Lower optim.warmup_steps or raise train.steps."
        )
    if optim.schedule not in SCHEDULES:
        rule: LearningRateRule = load_plugin("optim.schedule", optim.schedule)
        return rule.make_schedule(optim, steps)
    remaining_steps = steps - warmup_steps
    decay_steps = min(remaining_steps, round(steps * WSD_DECAY_FRACTION))
    final_lr = peak_lr * optim.final_lr_fraction
    schedules = {
        "constant": optax.constant_schedule(peak_lr),
        "cosine": optax.cosine_decay_schedule(
            peak_lr, max(remaining_steps, 1), optim.final_lr_fraction
        ),
        "wsd": optax.linear_schedule(
            peak_lr, final_lr, max(decay_steps, 1), remaining_steps - decay_steps
        ),
    }
    # Starts at peak / warmup: a first update with rate 0 would be wasted.
    warmup_schedule = optax.linear_schedule(
        peak_lr / max(warmup_steps, 1), peak_lr, max(warmup_steps - 1, 1)
    )
    return optax.join_schedules([warmup_schedule, schedules[optim.schedule]], [warmup_steps])


def learning_rates(optim: OptimConfig, steps: int) -> list[float]:
    """Learning rate of each step of the run, for logs and figures."""
    schedule: Any = make_schedule(optim, steps)
    return jax.jit(jax.vmap(schedule))(jnp.arange(steps)).tolist()


def make_optimizer(optim: OptimConfig, steps: int) -> optax.GradientTransformation:
    """Global-norm clipping, then AdamW (Loshchilov & Hutter 2019)."""
    return optax.chain(
        make_grad_clip(optim),
        optax.adamw(
            make_schedule(optim, steps),
            b1=optim.beta1,
            b2=optim.beta2,
            weight_decay=optim.weight_decay,
            mask=None if optim.decay_norms_and_biases else decay_mask,
        ),
    )


def make_grad_clip(optim: OptimConfig) -> optax.GradientTransformation:
    """Clipping by global norm, as the learning-rate schedule requires."""
    if not optim.grad_clip:
        return optax.identity()
    clip = clip_by_global_norm(optim.grad_clip)
    if optim.schedule in SCHEDULES:
        return clip
    rule: LearningRateRule = load_plugin("optim.schedule", optim.schedule)
    return rule.adapt_grad_clip(optim, clip)


def clip_by_global_norm(max_norm: float) -> optax.GradientTransformation:
    """Scales gradients to a global norm of at most `max_norm`.

    Pascanu et al. 2013, algorithm 1. Unlike `optax.clip_by_global_norm`, multiplies by
    one factor, which XLA fuses on CPU; dividing by the norm writes all gradients once
    more. `update(..., grad_norm=norm)` reuses a norm that is already computed.
    """

    def update(updates: Any, state: Any, params: Any = None, **extra_args: Any) -> tuple[Any, Any]:
        del params
        norm = extra_args["grad_norm"] if "grad_norm" in extra_args else optax.tree.norm(updates)
        factor = jnp.minimum(1.0, max_norm / norm)
        return jax.tree.map(lambda g: g * factor, updates), state

    def init(params: Any) -> Any:
        return optax.EmptyState()

    return optax.GradientTransformationExtraArgs(init, update)


def decay_mask(params: optax.Params) -> optax.Params:
    """True for each parameter with weight decay."""
    suffixes = {name.rsplit("/", 1)[-1] for name in flatten_with_names(params)}
    return match_rules(params, {p: d for p, d in WEIGHT_DECAY_RULES.items() if p[1:] in suffixes})
