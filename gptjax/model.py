"""GPT-2 as a pure function of (params, tokens).

Dimension letters, in array names and in einsum strings alike:

    B batch    T query positions    S key positions    D model width
    H heads    K head width         F MLP width        V vocabulary    N layers
    C classes

Parameters are a nested dict of float32 arrays; those of the blocks are stacked on
a first axis [N]. Numerics are GPT-2's: LayerNorm eps 1e-5, tanh-GELU, float32
softmax and layer-norm statistics (Radford et al. 2019; openai/gpt-2 src/model.py).
"""

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int, Key

from gptjax import packing
from gptjax.attention.call import platform
from gptjax.attention.choice import attend
from gptjax.attention.plain import attention_weights
from gptjax.attention.sight import MIXED, Sight, visible
from gptjax.cache import LayerCache, extend
from gptjax.config import GPTConfig
from gptjax.errors import ConfigError
from gptjax.layers import (
    Dropout,
    Embedding,
    Linear,
    Norm,
    capture,
    changed,
    heads_of,
    once,
)
from gptjax.sharding import axes_here, fully_sharded, gathered, lay

Params = dict[str, Any]
Tokens = Int[Array, "B T"]
Residual = Float[Array, "B T D"]


def all_but_gathered(primitive: Any, *_: Any, **__: Any) -> bool:
    """A policy of `jax.checkpoint`: what a layer has gathered is not kept."""
    return primitive.name not in ("sharding_constraint", "reshard", "reshape")


REMAT_POLICIES = {
    "none": all_but_gathered,
    "dots": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
        jax.checkpoint_policies.save_only_these_names(MIXED),
    ),
    "full": jax.checkpoint_policies.nothing_saveable,
}
UNROLLED = 12  # layers that a program of one device has in a row, at most


class Context(NamedTuple):
    """What every layer needs to know about the rows it works on."""

    slot_BT: Int[Array, "B T"]  # where each query stands among the keys
    segment_BT: Int[Array, "B T"] | None  # document of each token; None: one


def compute_dtype(config: GPTConfig) -> jnp.dtype:
    """The dtype of activations: "auto" is float32 on a CPU, else bfloat16."""
    name = config.dtype
    if name == "auto":
        name = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    return jnp.dtype(name)


class Attention(nn.Module):
    """Causal multi-head self-attention."""

    config: GPTConfig

    @nn.compact
    def __call__(
        self, x_BTD: Residual, cache: LayerCache | None, context: Context
    ) -> tuple[Residual, LayerCache | None]:
        """Mixes positions; given a cache, also sees and extends what it holds."""
        c = self.config
        width = c.n_heads, c.head_width
        query_BTHK, key_BSHK, value_BSHK = (
            lay(x_BTHK, "BTHK") for x_BTHK in heads_of(self, x_BTD, width, c.qkv_bias)
        )
        sight = Sight(segment_BT=context.segment_BT, causal=c.causal)
        if cache is not None:
            cache = extend(cache, key_BSHK, value_BSHK, context.slot_BT)
            key_BSHK, value_BSHK = (jnp.swapaxes(x_BHSK, 1, 2) for x_BHSK in cache)
            sight = Sight(context.slot_BT, causal=c.causal)
        if self.is_mutable_collection("captured"):
            mask_BTS = visible(sight, query_BTHK, key_BSHK)
            heads = jnp.swapaxes(query_BTHK, 1, 2), jnp.swapaxes(key_BSHK, 1, 2)
            capture(self, "attention", attention_weights(*heads, mask_BTS))
        dropping = c.dropout > 0 and self.has_rng("dropout")
        simple = cache is not None or self.is_initializing()  # rows of any length
        mixed_BTHK = attend(
            query_BTHK,
            key_BSHK,
            value_BSHK,
            sight,
            backend="plain" if simple else c.attention,
            dropout=Dropout(c.dropout) if dropping else None,
        )
        out = Linear((c.d_model,), residual_std(c), axes=2, name="out")
        return out(mixed_BTHK), cache


class MLP(nn.Module):
    """Two products with a GELU between them."""

    config: GPTConfig

    @nn.compact
    def __call__(self, x_BTD: Residual) -> Residual:
        """Every position by itself."""
        x_BTF = lay(Linear((self.config.mlp_width,), name="up")(x_BTD), "BTF")
        x_BTF = nn.gelu(x_BTF, approximate=True)
        down = Linear((self.config.d_model,), residual_std(self.config), name="down")
        return down(x_BTF)


class Block(nn.Module):
    """One layer: attention and MLP, each on the normalised residual stream."""

    config: GPTConfig

    @nn.compact
    def __call__(
        self, x_BTD: Residual, cache: LayerCache | None, context: Context
    ) -> tuple[Residual, LayerCache | None]:
        """The residual stream after this layer."""
        c = self.config
        x_BTD = once(changed(self, "residual", x_BTD))
        capture(self, "residual", x_BTD)
        normed_BTD = Norm(name="attention_norm")(x_BTD)
        y_BTD, cache = Attention(c, name="attention")(normed_BTD, cache, context)
        x_BTD = once(x_BTD + Dropout(c.dropout)(y_BTD))
        y_BTD = MLP(c, name="mlp")(Norm(name="mlp_norm")(x_BTD))
        x_BTD += Dropout(c.dropout)(y_BTD)
        return lay(x_BTD, "BTD"), cache


class GPT(nn.Module):
    """The decoder up to its last norm.

    With `stacked`, the layers are one scanned block, as in training: compile time
    does not grow with depth. Without, they are separate modules "block_0", ...,
    as in decoding: on a CPU a scan copies every layer out of the stack. The last
    `tail` layers can be a stack of their own, "tail", so that only they are trained.
    """

    config: GPTConfig
    stacked: bool = True
    tail: int = 0

    @nn.compact
    def __call__(
        self, token_BT: Tokens, position_BT: Tokens, cache: Any, context: Context
    ) -> tuple[Residual, Any]:
        """Final hidden states, and the extended cache if one was given."""
        c, dtype = self.config, compute_dtype(self.config)

        def embed(name: str, rows: int, std: float) -> Embedding:
            return Embedding(rows, c.d_model, std, name=name)

        x_BTD = embed("token_embedding", c.padded_vocab_size, 0.02)(token_BT)
        x_BTD += embed("position_embedding", c.context_length, 0.01)(position_BT)
        if not c.tie_embeddings and self.is_initializing():
            embed("output_embedding", c.padded_vocab_size, 0.02)(token_BT)
        if c.n_classes and self.is_initializing():
            Linear((c.n_classes,), use_bias=c.head_bias, name="head")(x_BTD)
        x_BTD = lay(Dropout(c.dropout)(x_BTD).astype(dtype), "BTD")
        if self.stacked:
            for name, layers in (
                ("blocks", c.n_layers - self.tail),
                ("tail", self.tail),
            ):
                if layers:
                    blocks = stack(c, layers)(c, name=name)
                    x_BTD, cache = blocks(x_BTD, cache, context)
        else:
            caches: list[Any] = [None] * c.n_layers if cache is None else list(cache)
            for n in range(c.n_layers):
                block = Block(c, name=f"block_{n}")
                x_BTD, caches[n] = block(x_BTD, caches[n], context)
            cache = None if cache is None else tuple(caches)
        return Norm(name="final_norm")(x_BTD), cache


def stack(config: GPTConfig, layers: int) -> Any:
    """`Block` scanned over layers, recomputed in backward as `config.remat` says."""
    # A loop copies what each layer keeps, and on a CPU the layer; but without a loop
    # nothing makes backward wait until it computes again, and no memory is saved.
    alone = platform() != "tpu" and math.prod(axes_here().values()) == 1
    unroll, block = min(layers, UNROLLED) if alone else 1, Block
    if config.remat != "none" or fully_sharded():
        policy = REMAT_POLICIES[config.remat]
        unroll, block = 1, nn.remat(Block, policy=policy, prevent_cse=False)
    return nn.scan(
        block,
        variable_axes={"params": 0, "adapters": 0, "added": 0, "captured": 0},
        split_rngs={"params": True, "dropout": True},
        in_axes=(0, nn.broadcast),
        length=layers,
        unroll=unroll,
    )


def residual_std(config: GPTConfig) -> float:
    """Initial deviation of what adds to the residual stream: 2N terms sum up."""
    return 0.02 / math.sqrt(2 * config.n_layers)


@functools.partial(jax.jit, static_argnums=0)  # one program, not one for each leaf
def init(config: GPTConfig, key: Key[Array, ""]) -> Params:
    """Fresh float32 parameters with GPT-2's initial distribution.

    Raises:
        ConfigError: the vocabulary has no size yet.
    """
    if not config.vocab_size:
        raise ConfigError(
            "model.vocab_size=0 leaves nothing to predict. Set it to the "
            "vocab_size of the tokenizer."
        )
    token_BT = jnp.zeros((1, 1), jnp.int32)
    context = Context(token_BT, None)
    variables: Any = GPT(config).init(key, token_BT, token_BT, None, context)
    return variables["params"]


def hidden(
    config: GPTConfig,
    params: Params,
    token_BT: Tokens,
    *,
    position_BT: Tokens | None = None,
    segment_BT: Tokens | None = None,
    dropout_key: Key[Array, ""] | None = None,
    adapters: Params | None = None,
    add: Params | None = None,
    collect: bool = False,
) -> tuple[Residual, Params]:
    """Final hidden states [B, T, D], and the captured activations by name.

    Args:
        config: shape of the model.
        params: as `init` makes them, or with the last layers apart as "tail".
        token_BT: ids in [0, vocab_size); not checked here, where they are traced.
        position_BT: row of the position table per token; default 0, 1, ... T-1.
        segment_BT: documents of packed rows; tokens of different ones do not mix.
        dropout_key: given in training, absent otherwise.
        adapters: what `gptjax.lora` adds to the kernels.
        add: {"residual": [N, B, T, D]}, added to what enters each layer: to steer or
            patch a model, or for the gradient of its activations.
        collect: whether to capture activations.
    """
    slot_BT = jnp.broadcast_to(
        jnp.arange(token_BT.shape[1], dtype=jnp.int32)[None], token_BT.shape
    )
    position_BT = slot_BT if position_BT is None else position_BT
    tail = jax.tree.leaves(params["tail"])[0].shape[0] if "tail" in params else 0
    given = {"adapters": adapters, "added": add and {"blocks": add}}
    variables = {"params": params, **{n: tree for n, tree in given.items() if tree}}
    outputs: Any = GPT(config, tail=tail).apply(
        variables,
        token_BT,
        position_BT,
        None,
        Context(slot_BT, segment_BT),
        rngs=None if dropout_key is None else {"dropout": dropout_key},
        mutable=["captured"] if collect else [],
    )
    (x_BTD, _), captured = outputs
    return x_BTD, captured


def apply(
    config: GPTConfig,
    params: Params,
    token_BT: Tokens,
    *,
    capture: Sequence[str] = (),
    **options: Any,
) -> Any:
    """Logits [B, T, V] in float32; a pure function for jit, grad and vmap.

    Args:
        config: shape of the model.
        params: as `init` makes them.
        token_BT: int [B, T], T at most `context_length`.
        capture: any of "residual" (what enters each layer, [N, B, T, D]) and
            "attention" (weights, [N, B, H, T, S]): then the result is
            (logits, {name: array}).
        **options: `position_BT`, `segment_BT`, `dropout_key`, `adapters`, `add` of
            `hidden`.

    Raises:
        ConfigError: more tokens than the context holds.
    """
    if token_BT.shape[1] > config.context_length:
        raise ConfigError(
            f"{token_BT.shape[1]} tokens do not fit model.context_length="
            f"{config.context_length}. Cut the row or raise the context."
        )
    x_BTD, captured = hidden(config, params, token_BT, collect=bool(capture), **options)
    logit_BTV = logits(config, output_table(config, params), x_BTD)
    if not capture:
        return logit_BTV
    blocks = captured["captured"]["blocks"]
    kept = blocks | blocks["attention"]
    return logit_BTV, {name: kept[name] for name in capture}


def output_table(config: GPTConfig, params: Params) -> Any:
    """The matrix [V, D] whose rows are compared with the final hidden state."""
    if "output" in params:
        return params["output"]  # of `gptjax.packing`
    name = "token_embedding" if config.tie_embeddings else "output_embedding"
    return params[name]["embedding"]


def logits(
    config: GPTConfig, table_VD: Any, x_BTD: Float[Array, "*B D"]
) -> Float[Array, "*B V"]:
    """Scores in float32; rows that only pad the vocabulary get the lowest one."""
    flat = x_BTD.reshape(-1, x_BTD.shape[-1])
    if isinstance(table_VD, packing.Packed):
        score = packing.product(flat, table_VD).astype(jnp.float32)
    else:
        table_VD = gathered(table_VD.astype(flat.dtype), "VD")
        score = jnp.dot(flat, table_VD.T, preferred_element_type=jnp.float32)
    score = lay(score, "BV")
    if score.shape[-1] > config.vocab_size:
        real_V = jnp.arange(score.shape[-1]) < config.vocab_size
        score = jnp.where(real_V[None], score, jnp.finfo(jnp.float32).min)
    return score.reshape(*x_BTD.shape[:-1], -1)


def empty_cache(config: GPTConfig, rows: int, slots: int) -> tuple[LayerCache, ...]:
    """A cache of N layers for `rows` rows of up to `slots` positions."""
    shape = (rows, config.n_heads, slots, config.head_width)

    def zeros() -> Array:
        return jnp.zeros(shape, compute_dtype(config))

    return tuple(LayerCache(zeros(), zeros()) for _ in range(config.n_layers))


def apply_cached(
    config: GPTConfig,
    layers: Params,
    token_BT: Tokens,
    position_BT: Tokens,
    cache: tuple[LayerCache, ...],
) -> tuple[Residual, tuple[LayerCache, ...]]:
    """Final hidden states of T new tokens per row, and the extended cache.

    Args:
        config: shape of the model.
        layers: parameters as `gptjax.packing.unstack` makes them, or packed.
        token_BT: the new tokens, one after the other.
        position_BT: position of each; the same as its slot in the cache.
        cache: as `empty_cache` or the previous call made it.
    """
    context = Context(position_BT, None)
    module: Any = GPT(config, stacked=False)
    return module.apply({"params": layers}, token_BT, position_BT, cache, context)
