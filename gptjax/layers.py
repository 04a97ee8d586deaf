"""What the blocks are built from; the letters are those of `gptjax.model`."""

import math
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

LORA = ("lora_a", "lora_b")
Residual = Float[Array, "B T D"]


class Linear(nn.Module):
    """A product with the last `axes` axes of x, as one two-dimensional product.

    On a CPU, XLA runs [B*T, D] @ [D, F] much faster than the batched form. Where the
    collection "adapters" has `lora_a` [in, R] and `lora_b` [R, out], their product is
    added to the kernel without being made (Hu et al. 2021, "LoRA", eq. 3).
    """

    features: tuple[int, ...]
    std: float = 0.02
    axes: int = 1
    use_bias: bool = True

    @nn.compact
    def __call__(self, x: Float[Array, "*inner"]) -> Float[Array, "*outer"]:
        """The last axes of x become `features`."""
        inner, outer = x.shape[-self.axes :], math.prod(self.features)
        shape = (*inner, *self.features)
        kernel = self.param("kernel", nn.initializers.normal(self.std), shape)
        flat = x.reshape(-1, math.prod(inner))
        y = flat @ kernel.astype(x.dtype).reshape(math.prod(inner), outer)
        if self.has_variable("adapters", "lora_a"):
            a, b = (self.get_variable("adapters", name) for name in LORA)
            y += (flat @ a.astype(x.dtype)) @ b.astype(x.dtype)
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, self.features)
            y += bias.astype(x.dtype).reshape(1, outer)
        return y.reshape(*x.shape[: -self.axes], *self.features)


class Norm(nn.Module):
    """LayerNorm with float32 statistics."""

    @nn.compact
    def __call__(self, x_BTD: Residual) -> Residual:
        """Mean 0 and variance 1 over the width, then scale and bias."""
        norm = nn.LayerNorm(epsilon=1e-5, use_fast_variance=False, dtype=jnp.float32)
        nn.share_scope(self, norm)
        return norm(x_BTD.astype(jnp.float32)).astype(x_BTD.dtype)


class Dropout(nn.Module):
    """Zeroes activations where the call was given a dropout key, else nothing."""

    rate: float

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """The kept activations, scaled up so that their mean stays."""
        return nn.Dropout(self.rate, deterministic=not self.has_rng("dropout"))(x)


def capture(module: nn.Module, name: str, value: Array) -> None:
    """Keeps `value` for a caller that asked for it; costs nothing otherwise."""
    keep: Any = lambda _, new: new  # noqa: E731 (Flax types it as a tuple's)
    module.sow("captured", name, value, init_fn=tuple, reduce_fn=keep)
