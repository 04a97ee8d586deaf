"""The optimiser: AdamW on a schedule, with weight decay by rules over names."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from gptjax.config import OptimConfig
from gptjax.errors import ConfigError
from gptjax.tree import assign, named_leaves

# Radford et al. 2018 ("all non bias or gain weights"). Exact cover: see `assign`.
DECAY = {
    **{"*kernel": True, "*embedding": True, "*lora_a": True, "*lora_b": True},
    **{"*bias": False, "*scale": False},
}

DECAY_PART = 0.2  # of a run with the schedule "wsd"


def make_schedule(optim: OptimConfig, steps: int) -> optax.Schedule:
    """Learning rate by number of finished steps.

    Linear from 0 over `warmup_steps`, then "constant"; "cosine" down to
    `final_lr * peak_lr` at the last step (Loshchilov & Hutter 2017); or "wsd":
    constant, then linear down over the last fifth of the run (Hu et al. 2024).
    "book" (Raschka 2024, appendix D) is "cosine" whose warm-up starts where it ends,
    at `final_lr * peak_lr`.

    Raises:
        ConfigError: the warm-up is longer than the run.
    """
    peak, warmup = optim.peak_lr, optim.warmup_steps
    if warmup > steps:
        raise ConfigError(
            f"optim.warmup_steps={warmup} is longer than train.steps={steps}. Lower "
            "the warm-up or train longer."
        )
    after = steps - warmup
    decay = min(after, round(steps * DECAY_PART))
    low = peak * optim.final_lr
    shapes = {
        "constant": optax.constant_schedule(peak),
        "cosine": optax.cosine_decay_schedule(peak, max(after, 1), optim.final_lr),
        "wsd": optax.linear_schedule(peak, low, max(decay, 1), after - decay),
    }
    shapes["book"] = shapes["cosine"]
    # The first update has rate peak / warmup rather than 0, which would waste it.
    rise = optax.linear_schedule(peak / max(warmup, 1), peak, max(warmup - 1, 1))
    if optim.schedule == "book":
        rise = optax.linear_schedule(low, peak, max(warmup, 1))
    return optax.join_schedules([rise, shapes[optim.schedule]], [warmup])


def learning_rates(optim: OptimConfig, steps: int) -> list[float]:
    """What each step of the run uses, for people to read."""
    rate_at: Any = make_schedule(optim, steps)
    return jax.jit(jax.vmap(rate_at))(jnp.arange(steps)).tolist()


def make_optimizer(optim: OptimConfig, steps: int) -> optax.GradientTransformation:
    """Global-norm clipping, then AdamW (Loshchilov & Hutter 2019)."""
    return optax.chain(
        make_clipping(optim),
        optax.adamw(
            make_schedule(optim, steps),
            b1=optim.beta1,
            b2=optim.beta2,
            weight_decay=optim.weight_decay,
            mask=None if optim.decay_all else decay_mask,
        ),
    )


def make_clipping(optim: OptimConfig) -> optax.GradientTransformation:
    """By the global norm; the schedule "book" begins with it after its warm-up."""
    if not optim.grad_clip:
        return optax.identity()
    clip = clipped(optim.grad_clip)
    if optim.schedule == "book":
        warm: Any = lambda step: step >= optim.warmup_steps  # noqa: E731
        return optax.conditionally_transform(clip, warm)
    return clip


def clipped(limit: float) -> optax.GradientTransformation:
    """Gradients scaled to a norm of at most `limit` (Pascanu et al. 2013, alg. 1).

    Optax divides each gradient by the norm, for which a CPU writes them all once more;
    a product with one factor is made where they are read. A train step knows their
    norm already: `update(..., grad_norm=norm)`.
    """

    def update(
        updates: Any, state: Any, params: Any = None, **known: Any
    ) -> tuple[Any, Any]:
        del params
        norm = known["grad_norm"] if "grad_norm" in known else optax.tree.norm(updates)
        factor = jnp.minimum(1.0, limit / norm)
        return jax.tree.map(lambda g: g * factor, updates), state

    def init(params: Any) -> Any:
        return optax.EmptyState()

    return optax.GradientTransformationExtraArgs(init, update)


def decay_mask(params: optax.Params) -> optax.Params:
    """True for each parameter that decays; only rules that apply must be used."""
    kinds = {name.rsplit("/", 1)[-1] for name in named_leaves(params)}
    return assign(params, {p: d for p, d in DECAY.items() if p[1:] in kinds})
