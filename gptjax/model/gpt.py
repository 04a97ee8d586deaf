"""Decoder-only Transformer as a pure function of (params, tokens).

Dimension letters, the same in array names, einsum strings and annotations:

    B batch (rows)    T query positions    S key positions    D model width
    H heads           K head dim           F MLP dim          V vocabulary
    G key/value heads N layers             C classes

The name of an array ends in the letters of its axes, in order: `query_BTHK` has
shape [B, T, H, K]. The file reads from the parts to the whole: `Attention`, `MLP`,
`Block`, `GPT`; then `init` and `apply`, the public functions.

Parameters are a nested dict of float32 arrays. Those of the blocks are stacked along
a leading axis [N], so that blocks/mlp/up/kernel is [N, D, F].

The default is GPT-2: pre-norm blocks, LayerNorm with epsilon 1e-5, tanh approximation
of GELU, learned positions (Radford et al. 2019, sec. 2.3; openai/gpt-2, src/model.py).
Options lead from there to Llama (Touvron et al. 2023) and Qwen 3 (Yang et al. 2025).
Softmax and the statistics of norms are float32.
"""

import contextlib
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, overload

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int, Key

from gptjax.config import GPTConfig
from gptjax.errors import ConfigError, check_type
from gptjax.model.attention.dispatch import compute_attention, select_backend
from gptjax.model.attention.mask import ATTN_OUT, AttentionMask, AttentionSpec
from gptjax.model.interventions import (
    POINT_MODULES,
    CapturePoint,
    capture_point,
    check_points,
    intervention_variables,
    is_observed,
    stack_captured,
)
from gptjax.model.kv_cache import KVCache, update_cache
from gptjax.model.layers import (
    Dropout,
    Embedding,
    HiddenStates,
    Linear,
    Norm,
    materialize_on_cpu,
    project_qkv,
)
from gptjax.model.lora import apply_adapters
from gptjax.model.quantization import QKV_NAMES, DecodeKernel, decode_matmul
from gptjax.model.rope import Rotation, make_rotation, rotate_heads
from gptjax.model.validation import Shapes, check_param_shapes, check_tokens, found_shapes
from gptjax.parallel.sharding import all_gather_params, constrain, current_mesh_shape, is_fsdp
from gptjax.runtime.device import target_platform
from gptjax.tree import Params

Tokens = Int[Array, "B T"]


def save_all_but_gathered(primitive: Any, *_: Any, **__: Any) -> bool:
    """Remat policy that saves everything but parameters gathered for a layer (FSDP)."""
    return primitive.name not in ("sharding_constraint", "reshard", "reshape")


REMAT_POLICIES = {
    "none": save_all_but_gathered,
    "dots": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
        jax.checkpoint_policies.save_only_these_names(ATTN_OUT),
    ),
    "full": jax.checkpoint_policies.nothing_saveable,
}
STACKED_COLLECTIONS = ["params", "adapters", "interventions", *POINT_MODULES]
MAX_UNROLLED_LAYERS = 12  # per iteration of the scan, on one device


class BlockInputs(NamedTuple):
    """Per-token inputs of all blocks."""

    query_position_BT: Int[Array, "B T"]  # index of each query among the keys
    segment_id_BT: Int[Array, "B T"] | None  # document of each token
    rotation: Rotation | None = None  # of queries and keys (RoPE)


def compute_dtype(config: GPTConfig) -> jnp.dtype:
    """Returns the dtype of activations; "auto" is float32 on CPU, else bfloat16."""
    name = config.dtype
    if name == "auto":
        name = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    return jnp.dtype(name)


def resolve_backend(config: GPTConfig, platform: str = "") -> str:
    """Returns the attention backend of training; `model.attention` may be "auto".

    `platform` is "cpu", "gpu" or "tpu"; "" = the current one.
    """
    spec = AttentionSpec(
        num_queries=config.context_length,
        num_keys=config.context_length,
        head_dim=config.actual_head_dim,
        dtype=str(compute_dtype(config)),
        platform=platform or target_platform(),
        edits_weights=config.dropout > 0,
    )
    return select_backend(config.attention, spec)


class Attention(nn.Module):
    """Multi-head self-attention of the normalized residual stream.

    Vaswani et al. 2017, sec. 3.2.2.
    """

    config: GPTConfig

    @nn.compact
    def __call__(
        self, x_BTD: HiddenStates, cache: KVCache | None, inputs: BlockInputs
    ) -> tuple[HiddenStates, KVCache | None]:
        """Applies attention; with a cache, extends it and attends to all it holds."""
        c = self.config
        heads = c.n_heads, c.actual_kv_heads, c.actual_kv_heads
        qkv = project_qkv(self, x_BTD, heads, c.actual_head_dim, c.qkv_bias)
        query_BTHK, key_BSGK, value_BSGK = (
            capture_point(self, name, constrain(x_BTHK, "BTHK"))
            for name, x_BTHK in zip(QKV_NAMES, qkv, strict=True)
        )
        if c.qk_norm:
            query_BTHK = Norm("rms", c.norm_eps, name="query_norm")(query_BTHK)
            key_BSGK = Norm("rms", c.norm_eps, name="key_norm")(key_BSGK)
        if inputs.rotation is not None:
            query_BTHK = rotate_heads(query_BTHK, inputs.rotation)
            key_BSGK = rotate_heads(key_BSGK, inputs.rotation)
        mask = AttentionMask(segment_id_BT=inputs.segment_id_BT, causal=c.causal)
        if cache is not None:
            cache = update_cache(cache, key_BSGK, value_BSGK, inputs.query_position_BT)
            key_BSGK, value_BSGK = (jnp.swapaxes(x_BGSK, 1, 2) for x_BGSK in cache)
            mask = AttentionMask(inputs.query_position_BT, causal=c.causal)
        use_dropout = c.dropout > 0 and self.has_rng("dropout")
        dropout = Dropout(c.dropout) if use_dropout else None
        observed = is_observed(self, "attention")

        def observe_weights(weight_BHTS: Array) -> Array:
            weight_BHTS = capture_point(self, "attention", weight_BHTS)
            return weight_BHTS if dropout is None else dropout(weight_BHTS)

        # Decoding and initialization have rows of any length.
        use_reference = cache is not None or self.is_initializing() or observed
        attn_out_BTHK = compute_attention(
            query_BTHK,
            key_BSGK,
            value_BSGK,
            mask,
            backend="reference" if use_reference else c.attention,
            edit_weights=observe_weights if observed else dropout,
        )
        attn_out_BTHK = capture_point(self, "head_output", attn_out_BTHK)
        out = Linear((c.d_model,), residual_init_std(c), 2, c.bias, name="out")
        return out(attn_out_BTHK), cache


class MLP(nn.Module):
    """MLP with GELU, squared ReLU (So et al. 2021) or SwiGLU (Shazeer 2020)."""

    config: GPTConfig

    @nn.compact
    def __call__(self, x_BTD: HiddenStates) -> HiddenStates:
        """Applies the MLP to each position."""
        c = self.config

        def project(name: str) -> Float[Array, "B T F"]:
            linear = Linear((c.actual_mlp_dim,), use_bias=c.bias, name=name)
            return constrain(linear(x_BTD), "BTF")

        x_BTF = project("up")
        if c.mlp == "swiglu":
            x_BTF *= nn.silu(project("gate"))
        else:
            x_BTF = nn.gelu(x_BTF, approximate=True) if c.mlp == "gelu" else nn.relu(x_BTF) ** 2
        x_BTF = capture_point(self, "mlp_hidden", x_BTF)
        down = Linear((c.d_model,), residual_init_std(c), use_bias=c.bias, name="down")
        return capture_point(self, "mlp_output", down(x_BTF))


class Block(nn.Module):
    """Pre-norm transformer block: attention and MLP, both with residual connections."""

    config: GPTConfig

    @nn.compact
    def __call__(
        self, x_BTD: HiddenStates, cache: KVCache | None, inputs: BlockInputs
    ) -> tuple[HiddenStates, KVCache | None]:
        """Returns the new residual stream, and the updated cache or None."""
        c = self.config
        # XLA for CPUs (jax 0.12) cannot compile a barrier in a decode loop of one head.
        use_barrier = cache is None or c.n_heads > 1
        materialize = materialize_on_cpu if use_barrier else lambda x_BTD: x_BTD
        x_BTD = materialize(capture_point(self, "residual", x_BTD))
        normed_BTD = Norm(c.norm, c.norm_eps, c.bias, name="attention_norm")(x_BTD)
        branch_out_BTD, cache = Attention(c, name="attention")(normed_BTD, cache, inputs)
        x_BTD = materialize(x_BTD + Dropout(c.dropout)(branch_out_BTD))
        normed_BTD = Norm(c.norm, c.norm_eps, c.bias, name="mlp_norm")(x_BTD)
        branch_out_BTD = MLP(c, name="mlp")(normed_BTD)
        x_BTD += Dropout(c.dropout)(branch_out_BTD)
        return constrain(x_BTD, "BTD"), cache


class GPT(nn.Module):
    """Decoder from token ids to the final norm; `lm_logits` is its head.

    Attributes:
        config: shape of the model.
        stacked: True for training: the blocks are one scanned module with parameters
            [N, ...], so compile time does not grow with depth. False for decoding:
            they are modules "block_0", "block_1", ..., because on CPU a scan copies
            the parameters of each layer out of the stack.
        num_trainable_blocks: how many of the last blocks form a stack of their own,
            "tail". Fine-tuning trains only these, and no gradient is computed for
            the others.
    """

    config: GPTConfig
    stacked: bool = True
    num_trainable_blocks: int = 0

    @nn.compact
    def __call__(
        self, token_BT: Tokens, position_BT: Tokens, cache: Any, inputs: BlockInputs
    ) -> tuple[HiddenStates, Any]:
        """Returns the final hidden states, and the updated cache.

        The cache is a tuple of N `KVCache` if not `stacked`, else None.
        """
        c, dtype = self.config, compute_dtype(self.config)

        def embed(name: str, num_embeddings: int, std: float) -> Embedding:
            return Embedding(num_embeddings, c.d_model, std, name=name)

        x_BTD = embed("token_embedding", c.padded_vocab_size, 0.02)(token_BT)
        if c.position == "rope":
            inputs = inputs._replace(rotation=make_rotation(c, position_BT))
        else:
            x_BTD += embed("position_embedding", c.context_length, 0.01)(position_BT)
        if not c.tie_embeddings and self.is_initializing():
            embed("output_embedding", c.padded_vocab_size, 0.02)(token_BT)
        if c.n_classes and self.is_initializing():
            Linear((c.n_classes,), use_bias=c.head_bias, name="head")(x_BTD)
        x_BTD = constrain(Dropout(c.dropout)(x_BTD).astype(dtype), "BTD")
        if self.stacked:
            for name, layers in (
                ("blocks", c.n_layers - self.num_trainable_blocks),
                ("tail", self.num_trainable_blocks),
            ):
                if layers:
                    blocks = scan_blocks(c, layers)(c, name=name)
                    x_BTD, cache = blocks(x_BTD, cache, inputs)
        else:
            caches = []
            for n, layer_cache in enumerate(cache):
                block = Block(c, name=f"block_{n}")
                x_BTD, layer_cache = block(x_BTD, layer_cache, inputs)
                caches.append(layer_cache)
            cache = tuple(caches)
        return Norm(c.norm, c.norm_eps, c.bias, name="final_norm")(x_BTD), cache


def scan_blocks(config: GPTConfig, layers: int) -> Any:
    """Returns `Block` scanned over layers, with rematerialization by `config.remat`."""
    # On one device, unrolling saves the copies that a loop makes of the residuals of
    # each layer, and on CPU of its parameters. Remat and FSDP need the loop: without
    # it nothing delays recomputation until the backward pass gets to a layer, so all
    # layers would be recomputed at once and no memory saved.
    single_device = target_platform() != "tpu" and math.prod(current_mesh_shape().values()) == 1
    unroll, block = min(layers, MAX_UNROLLED_LAYERS) if single_device else 1, Block
    if config.remat != "none" or is_fsdp():
        policy = REMAT_POLICIES[config.remat]
        unroll, block = 1, nn.remat(Block, policy=policy, prevent_cse=False)
    return nn.scan(
        block,
        variable_axes=dict.fromkeys(STACKED_COLLECTIONS, 0),
        split_rngs={"params": True, "dropout": True},
        in_axes=(0, nn.broadcast),
        length=layers,
        unroll=unroll,
    )


def residual_init_std(config: GPTConfig) -> float:
    """Returns the initial std of the 2N projections that the residual stream adds up.

    Radford et al. 2019, sec. 2.3; zero in Zhang et al. 2019 ("Fixup").
    """
    return 0.0 if config.residual_init == "zero" else 0.02 / math.sqrt(2 * config.n_layers)


def init(config: GPTConfig, key: Key[Array, ""]) -> Params:
    """Initializes float32 parameters with GPT-2's distribution."""
    check_type("config", config, GPTConfig, "Write init(config, jax.random.key(0)).")
    check_type("key", key, jax.Array, "Write init(config, jax.random.key(0)).")
    if not config.vocab_size:
        raise ConfigError(
            "model.vocab_size=0 is not a vocabulary size. Set it to the vocab_size of "
            "the tokenizer."
        )
    return _init_params(config, key)


@functools.partial(jax.jit, static_argnums=0)  # one program instead of one per leaf
def _init_params(config: GPTConfig, key: Key[Array, ""]) -> Params:
    token_BT = jnp.zeros((1, 1), jnp.int32)
    inputs = BlockInputs(token_BT, None)
    variables: Any = GPT(config).init(key, token_BT, token_BT, None, inputs, mutable=["params"])
    return variables["params"]


@functools.lru_cache(maxsize=16)
def expected_shapes(config: GPTConfig) -> Shapes:
    """Returns the shapes of the parameters of a config, without a classifier head."""
    return found_shapes(jax.eval_shape(lambda: _init_params(config, jax.random.key(0))))


def check_params(config: GPTConfig, params: Params) -> None:
    """Validates names and shapes of parameters; a classification head is optional."""
    check_param_shapes(expected_shapes(config), params)


def hidden_states(
    config: GPTConfig,
    params: Params,
    token_BT: Tokens,
    *,
    position_BT: Tokens | None = None,
    segment_id_BT: Tokens | None = None,
    dropout_key: Key[Array, ""] | None = None,
    adapters: Params | None = None,
    interventions: Mapping[str, Array] | None = None,
    capture: Sequence[CapturePoint] = (),
) -> tuple[HiddenStates, dict[str, Array]]:
    """Computes the hidden states [B, T, D] after the final norm.

    Args:
        config: shape of the model.
        params: from `init`; the last blocks may be a stack of their own, "tail".
        token_BT: ids in [0, vocab_size), unchecked inside `jit`; T <= context_length.
        position_BT: position of each token in its document; default 0, ..., T-1.
        segment_id_BT: document of each token; attention stays within a document.
        dropout_key: enables dropout; omit it in evaluation.
        adapters: LoRA adapters, scaled by `gptjax.model.lora.scale_adapters`.
        interventions: {capture point: array to add}, for steering, activation patching
            or gradients of activations; `gptjax.model.interventions` has the shapes.
        capture: capture points whose activations to return.

    Returns:
        The hidden states, and {capture point: activations [N, ...]}.
    """
    check_type("config", config, GPTConfig, "Write apply(config, params, tokens).")
    check_params(config, params)
    check_tokens(config, token_BT)
    if dropout_key is not None:
        check_type("dropout_key", dropout_key, jax.Array, "Write jax.random.key(0).")
    check_points("capture", capture)
    positions_1T = jnp.arange(token_BT.shape[1], dtype=jnp.int32)[None]
    query_position_BT = jnp.broadcast_to(positions_1T, token_BT.shape)
    position_BT = query_position_BT if position_BT is None else position_BT
    num_tail = jax.tree.leaves(params["tail"])[0].shape[0] if "tail" in params else 0
    variables = {"params": params}
    if adapters:
        variables["adapters"] = adapters
    if interventions:
        variables["interventions"] = intervention_variables(
            config, interventions, token_BT.shape, num_tail
        )
    module: Any = GPT(config, num_trainable_blocks=num_tail)
    with nn.intercept_methods(apply_adapters) if adapters else contextlib.nullcontext():
        (x_BTD, _), captured = module.apply(
            variables,
            token_BT,
            position_BT,
            None,
            BlockInputs(query_position_BT, segment_id_BT),
            rngs=None if dropout_key is None else {"dropout": dropout_key},
            mutable=list(capture),
        )
    return x_BTD, stack_captured(captured, capture)


@overload
def apply(
    config: GPTConfig,
    params: Params,
    token_BT: Tokens,
    *,
    position_BT: Tokens | None = None,
    segment_id_BT: Tokens | None = None,
    dropout_key: Key[Array, ""] | None = None,
    adapters: Params | None = None,
    interventions: Mapping[str, Array] | None = None,
    capture: tuple[()] = (),
) -> Float[Array, "B T V"]: ...


@overload
def apply(
    config: GPTConfig,
    params: Params,
    token_BT: Tokens,
    *,
    position_BT: Tokens | None = None,
    segment_id_BT: Tokens | None = None,
    dropout_key: Key[Array, ""] | None = None,
    adapters: Params | None = None,
    interventions: Mapping[str, Array] | None = None,
    capture: Sequence[CapturePoint],
) -> tuple[Float[Array, "B T V"], dict[str, Array]]: ...


def apply(
    config: GPTConfig,
    params: Params,
    token_BT: Tokens,
    *,
    position_BT: Tokens | None = None,
    segment_id_BT: Tokens | None = None,
    dropout_key: Key[Array, ""] | None = None,
    adapters: Params | None = None,
    interventions: Mapping[str, Array] | None = None,
    capture: Sequence[CapturePoint] = (),
) -> Any:
    """Computes logits [B, T, V] in float32; pure, so jit, grad and vmap apply.

    Arguments and errors are those of `hidden_states`. With `capture`, returns a pair of
    the logits and {capture point: activations [N, ...]}.
    """
    x_BTD, activations = hidden_states(
        config,
        params,
        token_BT,
        position_BT=position_BT,
        segment_id_BT=segment_id_BT,
        dropout_key=dropout_key,
        adapters=adapters,
        interventions=interventions,
        capture=capture,
    )
    logit_BTV = lm_logits(config, unembedding_matrix(config, params), x_BTD)
    return (logit_BTV, activations) if capture else logit_BTV


def unembedding_matrix(config: GPTConfig, params: Params) -> Any:
    """Returns the unembedding matrix [V, D], or its decode-time form."""
    if "output" in params:
        return params["output"]  # from `gptjax.model.quantization`
    name = "token_embedding" if config.tie_embeddings else "output_embedding"
    return params[name]["embedding"]


def lm_logits(
    config: GPTConfig, unembedding_VD: Any, x_BTD: Float[Array, "*B D"]
) -> Float[Array, "*B V"]:
    """Computes float32 logits from final hidden states with any leading axes.

    Logits of padding rows (`vocab_multiple`) are the lowest float32, hence probability
    0. `unembedding_VD` is from `unembedding_matrix`.
    """
    x_flat = x_BTD.reshape(-1, x_BTD.shape[-1])
    if isinstance(unembedding_VD, DecodeKernel):
        logit = decode_matmul(x_flat, unembedding_VD).astype(jnp.float32)
    else:
        unembedding_VD = all_gather_params(unembedding_VD.astype(x_flat.dtype), "VD")
        logit = jnp.dot(x_flat, unembedding_VD.T, preferred_element_type=jnp.float32)
    logit = constrain(logit, "BV")
    if logit.shape[-1] > config.vocab_size:
        real_V = jnp.arange(logit.shape[-1]) < config.vocab_size
        logit = jnp.where(real_V[None], logit, jnp.finfo(jnp.float32).min)
    return logit.reshape(*x_BTD.shape[:-1], -1)


def init_cache(config: GPTConfig, rows: int, max_length: int) -> tuple[KVCache, ...]:
    """Returns N empty KV caches, one per layer, of `max_length` positions each."""
    shape = rows, config.actual_kv_heads, max_length, config.actual_head_dim
    zeros = functools.partial(jnp.zeros, shape, compute_dtype(config))
    return tuple(KVCache(zeros(), zeros()) for _ in range(config.n_layers))


def apply_with_cache(
    config: GPTConfig,
    params: Params,
    token_BT: Tokens,
    position_BT: Tokens,
    cache: tuple[KVCache, ...],
) -> tuple[HiddenStates, tuple[KVCache, ...]]:
    """Computes the final hidden states of T new tokens per row, and the updated cache.

    `params` is unstacked, from `gptjax.model.quantization`; `position_BT`, consecutive
    in each row, is also the tokens' indices in the cache; `cache` is from `init_cache`
    or the previous call.
    """
    inputs = BlockInputs(position_BT, None)
    module: Any = GPT(config, stacked=False)
    return module.apply({"params": params}, token_BT, position_BT, cache, inputs)
