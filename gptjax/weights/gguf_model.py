"""Models in GGUF files, as llama.cpp has them: config, tokenizer, order of head rows.

Each key of the architecture is used, irrelevant, or rejected by name and value.
"""

import dataclasses
from array import array
from collections.abc import Mapping
from typing import Any

import numpy as np

from gptjax.config import GPTConfig
from gptjax.errors import ConfigError, DataError
from gptjax.model.rope import rope_frequencies
from gptjax.tokenizer.tokenizer import Tokenizer, tokenizer_from_vocab
from gptjax.weights.foreign_config import (
    check_keys,
    check_values,
    get_positive_float,
    get_positive_int,
    llama_config,
)
from gptjax.weights.safetensors import TensorReader

ARCHITECTURES = ("gpt2", "llama", "qwen3")
SIZE_KEYS = {
    "context_length": "context_length",
    "n_layers": "block_count",
    "n_heads": "attention.head_count",
    "d_model": "embedding_length",
    "mlp_dim": "feed_forward_length",
}
GPT2_EPSILON = "attention.layer_norm_epsilon"
OPTIONAL_SIZE_KEYS = {"n_kv_heads": "attention.head_count_kv", "head_dim": "attention.key_length"}
FLOAT_KEYS = {  # and their defaults
    "norm_eps": ("attention.layer_norm_rms_epsilon", None),
    "rope_theta": ("rope.freq_base", 10_000.0),
}
REQUIRED_GGUF_VALUES: dict[str, Any] = {
    "rope.scaling.type": "none",
    "attention.causal": True,
    "expert_count": 0,
    "expert_used_count": 0,
}
IRRELEVANT_GGUF_KEYS = ("tensor_data_layout",)
ROPE_FREQS = "rope_freqs.weight"
ORIGINAL_CONTEXTS = (8192, *(1 << n for n in range(25)))  # Llama 3's own comes first
NORMAL_TOKEN = 1  # in tokenizer.ggml.token_type; all others are special
END_TOKEN_KEYS = ("eos_token_id", "eot_token_id", "eom_token_id")  # of text, turn, message
BOS_PRE_TOKENIZERS = ("llama-bpe",)  # of models that expect BOS unless the file says no


def gguf_config(metadata: Mapping[str, Any], reader: TensorReader) -> GPTConfig:
    """Returns the config of a model."""
    architecture = metadata.get("general.architecture")
    if architecture not in ARCHITECTURES:
        raise ConfigError(
            f"general.architecture={architecture!r:.60}, but gptjax reads "
            f"{', '.join(ARCHITECTURES)}. Use a model of one of these."
        )
    if (count := metadata.get("split.count")) not in (None, 0, 1):  # 0 after merging
        raise ConfigError(
            f"split.count={count!r:.60}: it is one part of a model. Merge the parts: "
            "llama-gguf-split --merge FIRST_PART OUT"
        )
    values = section_values(metadata, f"{architecture}.")
    for key, value in values.items():
        if isinstance(value, list | array):
            raise ConfigError(
                f"{key[:60]}={value!r:.60}, but gptjax needs one value for all layers. Use "
                "another model."
            )
    if "token_embd.weight" not in reader.tensors:
        raise ConfigError("it lacks the tensor token_embd.weight. Download it again.")
    fields: dict[str, Any] = {
        "vocab_size": reader.tensors["token_embd.weight"].shape[0],
        "tie_embeddings": "output.weight" not in reader.tensors,
    }
    if architecture == "gpt2":
        return gpt2_config(values, fields)
    names = SIZE_KEYS | {n: key for n, key in OPTIONAL_SIZE_KEYS.items() if key in values}
    fields |= {name: get_positive_int(values, key) for name, key in names.items()}
    fields |= {name: get_positive_float(values, *key) for name, key in FLOAT_KEYS.items()}
    config = llama_config(qk_norm=architecture == "qwen3", **fields)
    required = REQUIRED_GGUF_VALUES | {
        "vocab_size": config.vocab_size,
        "attention.value_length": config.actual_head_dim,
        "rope.dimension_count": config.actual_head_dim,
    }
    check_values(values, required)
    used = [*names.values(), *(key for key, _ in FLOAT_KEYS.values()), *required]
    check_keys(values, [*used, *IRRELEVANT_GGUF_KEYS])
    return with_rope_factor(config, reader) if ROPE_FREQS in reader.tensors else config


def gpt2_config(values: Mapping[str, Any], fields: Mapping[str, Any]) -> GPTConfig:
    """Returns the config of a GPT-2 with these fields."""
    sizes: dict[str, Any] = {n: get_positive_int(values, key) for n, key in SIZE_KEYS.items()}
    required = {"vocab_size": fields["vocab_size"], "attention.head_count_kv": sizes["n_heads"]}
    check_values(values, required)
    check_keys(values, [*SIZE_KEYS.values(), GPT2_EPSILON, *required, *IRRELEVANT_GGUF_KEYS])
    if sizes["mlp_dim"] == 4 * sizes["d_model"]:
        sizes["mlp_dim"] = 0  # the default
    norm_eps = get_positive_float(values, GPT2_EPSILON, None)
    return GPTConfig(**fields, **sizes, norm_eps=norm_eps)


def with_rope_factor(config: GPTConfig, reader: TensorReader) -> GPTConfig:
    """Adds Llama 3's frequency scaling, of which the file has the result."""
    stretch_P = reader.read(ROPE_FREQS)  # divisors of the frequencies
    for context in ORIGINAL_CONTEXTS:
        scaled = dataclasses.replace(
            config, rope_factor=float(stretch_P.max()), rope_original_context=context
        )
        expected_P = rope_frequencies(config) / rope_frequencies(scaled)
        if stretch_P.shape == expected_P.shape and np.allclose(stretch_P, expected_P, rtol=1e-4):
            return scaled
    raise ConfigError(
        f"{ROPE_FREQS} has no frequency scaling of Llama 3, which gptjax requires. Use another "
        "model."
    )


def gguf_tokenizer(metadata: Mapping[str, Any], name: str) -> Tokenizer:
    """Returns the tokenizer of a model under a name."""
    values = section_values(metadata, "tokenizer.ggml.")
    check_values(values, {"add_eos_token": False, "model": "gpt2"})
    match {"add_bos_token": None, **values}:
        case {
            "pre": str(pre),
            "tokens": list(tokens),
            "merges": list(merges),
            "add_bos_token": None | bool() as add_bos,
        }:
            pass
        case _:
            raise ConfigError(
                "tokenizer.ggml.pre, tokens, merges or add_bos_token is missing or of another "
                "type. Download it again."
            )
    types = values.get("token_type", [NORMAL_TOKEN] * len(tokens))
    if not isinstance(types, list | array) or len(types) != len(tokens):
        raise ConfigError("tokenizer.ggml.token_type is no type for each token. Download it again.")
    bos = get_token_id(values, "bos_token_id", len(tokens))
    ends = [get_token_id(values, key, len(tokens)) for key in END_TOKEN_KEYS]
    add_bos = pre in BOS_PRE_TOKENIZERS if add_bos is None else add_bos
    if bos in ends and not add_bos:
        bos = None  # not used, but llama.cpp needs one
    special_ids = {n for n, kind in enumerate(types) if kind != NORMAL_TOKEN}
    special_ids |= {n for n in (bos, *ends) if n is not None}
    try:
        return tokenizer_from_vocab(
            name,
            tokens,
            merges,
            special={tokens[n]: n for n in sorted(special_ids)},
            pre=pre,
            bos=bos,
            eos=[n for n in ends if n is not None],
            add_bos=add_bos,
        )
    except DataError as error:
        raise DataError(f"{error}. Download it again, or use another model.") from error


def section_values(metadata: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """Returns the values of the keys with a prefix, without it."""
    return {k.removeprefix(prefix): v for k, v in metadata.items() if k.startswith(prefix)}


def get_token_id(values: Mapping[str, Any], key: str, num_tokens: int) -> int | None:
    """Returns the id of a special token, or None if the model has none."""
    token_id = values.get(key)
    if token_id is None or (type(token_id) is int and 0 <= token_id < num_tokens):
        return token_id
    raise ConfigError(
        f"tokenizer.ggml.{key}={token_id!r:.60} is none of its {num_tokens} tokens. Download it "
        "again."
    )


def pairs_to_halves(reader: TensorReader, config: GPTConfig) -> TensorReader:
    """Reorders the rows of query and key heads when they are read.

    RoPE rotates the rows 2i and 2i + 1 of a head in llama.cpp's `llama`; here, and in
    `qwen3`, it rotates i and i + K / 2.
    """

    def read(name: str) -> np.ndarray:
        tensor = reader.read(name)
        if not name.endswith(("attn_q.weight", "attn_k.weight")):
            return tensor
        pairs = tensor.reshape(-1, config.actual_head_dim // 2, 2, *tensor.shape[1:])
        return pairs.swapaxes(1, 2).reshape(tensor.shape)

    return TensorReader(reader.tensors, read)
