"""Configs of foreign models: each key is used, irrelevant, or rejected.

Other values of a key than those of GPT-2, Llama and Qwen 3 belong to other
architectures, and so may keys that are unknown.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from gptjax.config import GPTConfig
from gptjax.errors import ConfigError
from gptjax.presets import LLAMA_OPTIONS
from gptjax.tokenizer.tokenizer import ENDOFTEXT, Tokenizer

GPT2_NAMES = {  # in config.json and hparams.json
    "vocab_size": ("vocab_size", "n_vocab"),
    "context_length": ("n_positions", "n_ctx"),
    "n_layers": ("n_layer",),
    "n_heads": ("n_head",),
    "d_model": ("n_embd",),
}
LLAMA_NAMES = {  # in config.json
    "vocab_size": ("vocab_size",),
    "context_length": ("max_position_embeddings",),
    "n_layers": ("num_hidden_layers",),
    "n_heads": ("num_attention_heads",),
    "d_model": ("hidden_size",),
    "mlp_dim": ("intermediate_size",),
}
LLAMA_OPTIONAL_NAMES = {"n_kv_heads": "num_key_value_heads", "head_dim": "head_dim"}
BOOK_NAMES = {
    **{name: name for name in ("vocab_size", "context_length", "n_heads", "n_layers", "qkv_bias")},
    "emb_dim": "d_model",
}
MODEL_TYPES = ("gpt2", "llama", "qwen3")  # of transformers
REQUIRED_GPT2_VALUES: dict[str, Any] = {
    "activation_function": "gelu_new",
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
    "is_encoder_decoder": False,
    "pruned_heads": {},
}
REQUIRED_LLAMA_VALUES: dict[str, Any] = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "rope_interleaved": False,
    "use_sliding_window": False,
    "add_cross_attention": False,
    "is_encoder_decoder": False,
    "pruned_heads": {},
}
# Of RoPE. Llama 3's frequency factors are the same in all its versions.
REQUIRED_ROPE_VALUES: dict[str, Any] = {
    "low_freq_factor": 1,
    "high_freq_factor": 4,
    "partial_rotary_factor": 1,
}
QWEN3_HEAD_DIM = 128  # default of transformers
USED_ROPE_KEYS = ("rope_theta", "factor", "original_max_position_embeddings")
USED_HF_KEYS = (
    *("model_type", "tie_word_embeddings", "id2label", "num_labels", "problem_type"),
    *("eos_token_id", "pad_token_id"),
)
USED_GPT2_KEYS = ("n_inner", "layer_norm_epsilon")
USED_LLAMA_KEYS = ("rms_norm_eps", "rope_theta", "rope_scaling", "rope_parameters")
# Settings of training, of generation, of other classes and of transformers itself.
IRRELEVANT_HF_KEYS = """
resid_pdrop embd_pdrop attn_pdrop attention_dropout initializer_range
gradient_checkpointing pretraining_tp
finetuning_task task_specific_params label2id _num_labels

bad_words_ids begin_suppress_tokens diversity_penalty do_sample early_stopping
encoder_no_repeat_ngram_size exponential_decay_length_penalty forced_bos_token_id
forced_eos_token_id length_penalty max_length min_length no_repeat_ngram_size
num_beam_groups num_beams num_return_sequences remove_invalid_values
repetition_penalty suppress_tokens temperature top_k top_p typical_p use_cache prefix

summary_activation summary_first_dropout summary_proj_to_labels summary_type
summary_use_proj n_special predict_special_tokens is_decoder tie_encoder_decoder
cross_attention_hidden_size decoder_start_token_id bos_token_id sep_token_id
is_llama_config sliding_window max_window_layers layer_types transformers.js_config

_name_or_path _commit_hash _attn_implementation _attn_implementation_autoset
architectures attn_implementation chunk_size_feed_forward dtype torch_dtype
output_attentions output_hidden_states output_past output_scores
reorder_and_upcast_attn return_dict return_dict_in_generate tf_legacy_loss
tokenizer_class torchscript transformers_version use_bfloat16
"""


def check_keys(metadata: Mapping[str, Any], known: Collection[str]) -> None:
    """Rejects unknown keys, which may change the results; null is no value."""
    for name, value in metadata.items():
        if name not in known and value is not None:
            raise ConfigError(
                f"gptjax does not know {name[:60]}={value!r:.60} in its config. Remove the key "
                "if the model gives the same results without it."
            )


def check_values(metadata: Mapping[str, Any], required: Mapping[str, Any]) -> None:
    """Rejects values of other architectures."""
    for name, value in required.items():
        if metadata.get(name, value) != value:
            raise ConfigError(
                f"{name}={metadata[name]!r:.60}, but gptjax requires {value!r}. It does not "
                "support this architecture."
            )


def get_sizes(metadata: Mapping[str, Any], names: Mapping[str, tuple[str, ...]]) -> dict[str, Any]:
    """Returns positive values under our names."""
    return {ours: get_positive_int(metadata, *theirs) for ours, theirs in names.items()}


def openai_config(hparams: Mapping[str, Any]) -> GPTConfig:
    """Returns the config of an hparams.json."""
    check_keys(hparams, [name for names in GPT2_NAMES.values() for name in names])
    return GPTConfig(**get_sizes(hparams, GPT2_NAMES))


def hf_config(metadata: Mapping[str, Any]) -> GPTConfig:
    """Returns the config of a config.json of transformers, without classes."""
    if (model_type := metadata.get("model_type", "gpt2")) not in MODEL_TYPES:
        raise ConfigError(
            f"model_type={model_type!r:.60}, but gptjax supports {', '.join(MODEL_TYPES)}. Use "
            "a model of one of them."
        )
    return hf_gpt2_config(metadata) if model_type == "gpt2" else hf_llama_config(metadata)


def hf_gpt2_config(metadata: Mapping[str, Any]) -> GPTConfig:
    """Returns the config of a GPT-2 of transformers."""
    check_values(metadata, REQUIRED_GPT2_VALUES)
    names = {name for names in GPT2_NAMES.values() for name in names}
    used = (*names, *REQUIRED_GPT2_VALUES, *USED_HF_KEYS, *USED_GPT2_KEYS)
    check_keys(metadata, [*used, *IRRELEVANT_HF_KEYS.split()])
    sizes = get_sizes(metadata, GPT2_NAMES)
    if metadata.get("n_inner") not in (None, 4 * sizes["d_model"]):
        sizes["mlp_dim"] = get_positive_int(metadata, "n_inner")
    is_tied = get_bool(metadata, "tie_word_embeddings", True)
    epsilon = get_positive_float(metadata, "layer_norm_epsilon", 1e-5)
    return GPTConfig(**sizes, tie_embeddings=is_tied, norm_eps=epsilon)


def hf_llama_config(metadata: Mapping[str, Any]) -> GPTConfig:
    """Returns the config of a Llama or Qwen 3 of transformers."""
    check_values(metadata, REQUIRED_LLAMA_VALUES)
    names = [name for names in LLAMA_NAMES.values() for name in names]
    used = (*names, *LLAMA_OPTIONAL_NAMES.values(), *USED_HF_KEYS, *USED_LLAMA_KEYS)
    check_keys(metadata, [*used, *REQUIRED_LLAMA_VALUES, *IRRELEVANT_HF_KEYS.split()])
    is_qwen = metadata["model_type"] == "qwen3"
    sizes = get_sizes(metadata, LLAMA_NAMES)
    for ours, theirs in LLAMA_OPTIONAL_NAMES.items():
        if metadata.get(theirs) is not None:
            sizes[ours] = get_positive_int(metadata, theirs)
    if is_qwen:
        sizes.setdefault("head_dim", QWEN3_HEAD_DIM)
    return llama_config(
        **sizes,
        **rope_options(metadata),
        norm_eps=get_positive_float(metadata, "rms_norm_eps", 1e-6),
        qk_norm=is_qwen,
        tie_embeddings=get_bool(metadata, "tie_word_embeddings", False),
    )


def llama_config(**values: Any) -> GPTConfig:
    """Returns the config of a Llama-family model; sizes with their default become 0."""
    heads, width = values["n_heads"], values["d_model"]
    defaults = {"mlp_dim": 4 * width, "n_kv_heads": heads, "head_dim": width / heads}
    zeros = {name: 0 for name, default in defaults.items() if values.get(name) == default}
    options: dict[str, Any] = LLAMA_OPTIONS | values | zeros
    return GPTConfig(**options)


def rope_options(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the RoPE options of a config.json.

    transformers 5 writes rope_parameters; earlier versions rope_theta and rope_scaling,
    in which rope_type was once called type.
    """
    top_level = {"rope_theta": metadata.get("rope_theta")}
    rope: dict[str, Any] = {}
    for source in (top_level, metadata.get("rope_scaling"), metadata.get("rope_parameters")):
        if not isinstance(source or {}, dict):
            raise ConfigError(f"RoPE's parameters {source!r:.60} are not a table. Copy the file.")
        for name, value in (source or {}).items():
            name = "rope_type" if name == "type" else name
            if value is not None and rope.setdefault(name, value) != value:
                raise ConfigError(
                    f"{name[:60]}={value!r:.60} contradicts {name[:60]}={rope[name]!r:.60}. "
                    "Correct one of them."
                )
    options: dict[str, Any] = {"rope_theta": get_positive_float(rope, "rope_theta", 10_000.0)}
    if (kind := rope.pop("rope_type", "default")) == "llama3":
        options["rope_factor"] = get_positive_float(rope, "factor", None)
        original = get_positive_int(rope, "original_max_position_embeddings")
        options["rope_original_context"] = original
    elif kind != "default":
        raise ConfigError(
            f"rope_type={kind!r:.60}, but gptjax supports default and llama3. Use a model of "
            "one of them."
        )
    check_values(rope, REQUIRED_ROPE_VALUES)
    check_keys(rope, [*REQUIRED_ROPE_VALUES, *USED_ROPE_KEYS])
    return options


def check_book_config(metadata: Mapping[str, Any], config: GPTConfig) -> None:
    """Rejects a config.json of the book that contradicts the tensors."""
    check_keys(metadata, {*BOOK_NAMES, "drop_rate"})
    for theirs, ours in BOOK_NAMES.items():
        if metadata.get(theirs, getattr(config, ours)) != getattr(config, ours):
            raise ConfigError(
                f"{theirs}={metadata[theirs]!r:.60}, but its tensors have {theirs}="
                f"{getattr(config, ours)}. Correct it or copy the files again."
            )


def check_end_ids(end_ids: Sequence[int], tokenizer: Tokenizer) -> None:
    """Rejects an end of a text that is no special token."""
    for end in end_ids:
        # transformers' default of 50256 may be outside of a smaller vocabulary
        if end in range(tokenizer.vocab_size) and end not in tokenizer.stop_ids:
            raise ConfigError(
                f"eos_token_id={end} is no special token of its tokenizer, which ends a text "
                f"with {tokenizer.eot_name}, {tokenizer.eot_token}. Correct it, or use another "
                "model."
            )


def class_labels(metadata: Mapping[str, Any], tokenizer: Tokenizer) -> tuple[str, ...]:
    """Returns the class names of a classifier of transformers."""
    count = metadata.get("num_labels", 2)  # 2 is their default
    id2label = metadata.get("id2label")
    if id2label is None and type(count) is int:
        id2label = {str(n): f"LABEL_{n}" for n in range(min(count, 10_000))}
    table = id2label if isinstance(id2label, dict) else {}
    labels = tuple(table.get(str(n)) for n in range(len(table)))
    if not labels or not all(isinstance(label, str) for label in labels):
        raise ConfigError(
            f"id2label={id2label!r:.80} does not name the classes 0, 1, ... of the model. "
            "Correct it or copy the file again."
        )
    if (count := metadata.get("num_labels", len(labels))) != len(labels) or len(labels) < 2:
        raise ConfigError(
            f"num_labels={count!r:.60} with {len(labels)} names in id2label. gptjax chooses "
            "one of two or more classes, which all have a name; one number is a regression."
        )
    if (kind := metadata.get("problem_type")) not in (None, "single_label_classification"):
        raise ConfigError(
            f"problem_type={kind!r:.60}, but gptjax chooses exactly one of the classes. Use a "
            "model of single_label_classification."
        )
    # transformers takes all such tokens at the end of a text for padding.
    if (pad_id := metadata.get("pad_token_id")) in tokenizer.ranks.values():
        raise ConfigError(
            f"pad_token_id={pad_id} is a token of ordinary text. Use a model that pads with a "
            f"special token, such as {ENDOFTEXT}."
        )
    return tuple(map(str, labels))


def get_bool(metadata: Mapping[str, Any], name: str, default: bool) -> bool:
    """Returns a boolean; `default`, that of transformers, if it is absent or null."""
    value = default if metadata.get(name) is None else metadata[name]
    if isinstance(value, bool):
        return value
    raise ConfigError(
        f"{name}={value!r:.40} is not true or false. Correct it or copy the file again."
    )


def get_positive_int(metadata: Mapping[str, Any], *names: str) -> int:
    """Returns the positive value of `names`; those that are present must agree."""
    name, *others = [name for name in names if name in metadata] or names[:1]
    value = metadata.get(name)
    for other in others:
        if metadata[other] != value:
            raise ConfigError(
                f"{name}={str(value)[:40]} contradicts {other}={str(metadata[other])[:40]}. "
                "Correct one of them."
            )
    if type(value) is int and value > 0:
        return value
    raise ConfigError(
        f"{name}={str(value)[:40]!r} is not a positive integer. Correct it or copy the file again."
    )


def get_positive_float(metadata: Mapping[str, Any], name: str, default: float | None) -> float:
    """Returns a positive value; `default`, that of transformers, if it is absent."""
    value = metadata.get(name, default)
    if type(value) in (int, float) and 0 < value < 10**99:
        return float(value)
    raise ConfigError(
        f"{name}={str(value)[:40]!r} is not a positive number. Correct it or copy the file again."
    )
