"""What a run will cost, by arithmetic: parameters, FLOPs, memory, peak rates."""

import jax

from gptjax.config import GPTConfig, RunConfig
from gptjax.model import compute_dtype, init
from gptjax.tree import count

# Dense bfloat16 matrix-multiply peak per chip in FLOP/s, from the makers' data
# sheets; the key is how JAX names the device.
PEAK_FLOPS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989e12,
}


def parameter_count(config: GPTConfig) -> int:
    """Numbers to train, found without making them."""
    return count(jax.eval_shape(lambda: init(config, jax.random.key(0))))


def flops_per_token(config: GPTConfig) -> int:
    """Forward and backward FLOPs per token: 6 P + 12 N D T.

    P counts what is multiplied: all parameters but the position table (and but the
    token table where the head is another one). The second term is attention over
    the full square, as in Chowdhery et al. 2022, appendix B; causal kernels do half.
    """
    multiplied = parameter_count(config) - config.context_length * config.d_model
    if not config.tie_embeddings:
        multiplied -= config.padded_vocab_size * config.d_model
    square = 12 * config.n_layers * config.d_model * config.context_length
    return 6 * multiplied + square


def memory_bytes(run: RunConfig) -> dict[str, int]:
    """Bytes of one device's memory by contributor; the activations are an estimate.

    Per token and layer, backward keeps about 18 D (LayerNorm inputs, query, key,
    value, mixed heads, the MLP before and after its GELU, residuals) and, in the
    plain attention, 2 H T scores and weights in float32.
    """
    c, params = run.model, parameter_count(run.model)
    size = compute_dtype(c).itemsize
    tokens = run.data.batch_size // run.train.accumulate * c.context_length
    layer = 18 * c.d_model * size + 2 * c.n_heads * c.context_length * 4
    kept = {"none": layer, "dots": layer // 2, "full": c.d_model * size}[c.remat]
    chunk = tokens * min(run.train.loss_chunk, c.context_length) // c.context_length
    return {
        "parameters": 4 * params,
        "gradients": 4 * params,
        "AdamW moments": 8 * params,
        "activations": tokens * c.n_layers * kept,
        "logits": 2 * 4 * chunk * c.padded_vocab_size,
    }


def peak_flops() -> float | None:
    """Peak FLOP/s of all devices together, or None where it is not known."""
    kind = jax.devices()[0].device_kind
    known = [peak for name, peak in PEAK_FLOPS.items() if kind.startswith(name)]
    return max(known) * jax.device_count() if known else None


def human(size: int | float) -> str:
    """A size in bytes for people.

    >>> human(1.6e9)
    '1.5 GiB'
    """
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.3g} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"
