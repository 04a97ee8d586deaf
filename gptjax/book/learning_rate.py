"""Learning rate and clipping of appendix D: `optim.schedule = "book"`."""

from typing import Any

import optax

from gptjax.config import OptimConfig
from gptjax.training.optimizer import LearningRateRule


def make_book_schedule(optim: OptimConfig, steps: int) -> optax.Schedule:
    """Warms up from the learning rate of the last step, then decays like "cosine"."""
    warmup_steps, final_lr = optim.warmup_steps, optim.peak_lr * optim.final_lr_fraction
    warmup = optax.linear_schedule(final_lr, optim.peak_lr, max(warmup_steps, 1))
    decay = optax.cosine_decay_schedule(
        optim.peak_lr, max(steps - warmup_steps, 1), optim.final_lr_fraction
    )
    return optax.join_schedules([warmup, decay], [warmup_steps])


def clip_after_warmup(
    optim: OptimConfig, clip: optax.GradientTransformation
) -> optax.GradientTransformation:
    """Clips gradients only after the warm-up."""
    after_warmup: Any = lambda step: step >= optim.warmup_steps  # noqa: E731
    return optax.conditionally_transform(clip, after_warmup)


BOOK_LEARNING_RATE = LearningRateRule(make_book_schedule, clip_after_warmup)
