"""Linear layers of the decoding model, for the layouts of `gptjax.model.quantization`.

Input: hidden states and unstacked parameters. A kernel in a decode-time layout is the
leaf "packed" in place of "kernel"; query, key and value are then one layer, "qkv".

    I inputs of a kernel    O outputs of a kernel
"""

import math

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from gptjax.model.layers import HiddenStates, Linear, project_qkv
from gptjax.model.quantization import decode_matmul


class DecodeLinear(Linear):
    """`Linear` that also accepts a decode-time kernel, which is never sharded."""

    @nn.compact
    def __call__(self, x: Float[Array, "*inner"]) -> Float[Array, "*outer"]:
        """Replaces the last `num_input_axes` axes of x by `features`."""
        if not self.has_variable("params", "packed"):
            return super().__call__(x)
        x_BI = x.reshape(-1, math.prod(x.shape[-self.num_input_axes :]))
        y_BO = decode_matmul(x_BI, self.get_variable("params", "packed"))
        if self.use_bias:
            bias = self.get_variable("params", "bias")
            y_BO += bias.astype(x.dtype).reshape(1, -1)
        return y_BO.reshape(*x.shape[: -self.num_input_axes], *self.features)


def decode_qkv(
    module: nn.Module, x_BTD: HiddenStates, head_shape: tuple[int, int], use_bias: bool
) -> tuple[Float[Array, "B T H K"], ...]:
    """Computes `project_qkv`; one matmul if the parameters of `module` are fused."""
    if not module.has_variable("params", "qkv"):
        return project_qkv(x_BTD, head_shape, use_bias, DecodeLinear)
    qkv = DecodeLinear((3, *head_shape), use_bias=use_bias, name="qkv")
    return tuple(jnp.unstack(qkv(x_BTD), axis=2))
