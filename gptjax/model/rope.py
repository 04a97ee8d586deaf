"""Rotary position embeddings (RoPE; Su et al. 2021), with Llama 3's frequency scaling.

Each head is rotated in K/2 planes, of dimensions p and p + K/2 (Hugging Face's
convention; llama.cpp and the paper pair neighbours), by the position times a frequency.
Dimension letters: see `gptjax.model.gpt`; in addition [P] planes.
"""

import math
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from gptjax.config import GPTConfig

# Of Llama 3.1 to 3.3: wavelengths up to 1/4 of the original context are unchanged,
# those above all of it are stretched by `rope_factor`; in between, a linear transition.
LOW_FREQ_FACTOR, HIGH_FREQ_FACTOR = 1.0, 4.0


class Rotation(NamedTuple):
    """Cosines and sines of the rotation at each position."""

    cos_BTP: Float[Array, "B T P"]
    sin_BTP: Float[Array, "B T P"]


def rope_frequencies(config: GPTConfig) -> Float[np.ndarray, " P"]:
    """Returns the angle per position of each plane, in radians."""
    head_dim = config.actual_head_dim
    freq_P = config.rope_theta ** (-np.arange(0, head_dim, 2) / head_dim)
    if config.rope_factor != 1:
        rotations_P = config.rope_original_context * freq_P / (2 * math.pi)
        share_P = (rotations_P - LOW_FREQ_FACTOR) / (HIGH_FREQ_FACTOR - LOW_FREQ_FACTOR)
        share_P = np.clip(share_P, 0, 1)  # of the unchanged frequency
        freq_P = freq_P * (share_P + (1 - share_P) / config.rope_factor)
    return freq_P.astype(np.float32)


def make_rotation(config: GPTConfig, position_BT: Int[Array, "B T"]) -> Rotation:
    """Computes the rotation of tokens at these positions."""
    freq_P = jnp.asarray(rope_frequencies(config))
    angle_BTP = position_BT.astype(jnp.float32)[:, :, None] * freq_P[None, None]
    return Rotation(jnp.cos(angle_BTP), jnp.sin(angle_BTP))


def rotate_heads(x_BTHK: Float[Array, "B T H K"], rotation: Rotation) -> Float[Array, "B T H K"]:
    """Rotates each head of queries or keys, in float32."""
    cos_BT1P, sin_BT1P = (x_BTP[:, :, None] for x_BTP in rotation)
    a_BTHP, b_BTHP = jnp.split(x_BTHK.astype(jnp.float32), 2, axis=-1)
    rotated = a_BTHP * cos_BT1P - b_BTHP * sin_BT1P, b_BTHP * cos_BT1P + a_BTHP * sin_BT1P
    return jnp.concatenate(rotated, axis=-1).astype(x_BTHK.dtype)
