"""Configs of foreign models: each key is used, irrelevant, or rejected.

Other values of a key than GPT-2's belong to other architectures, and so may keys that
are unknown.
"""

from collections.abc import Collection, Mapping
from typing import Any

from gptjax.config import GPTConfig
from gptjax.errors import ConfigError
from gptjax.tokenizer.tokenizer import ENDOFTEXT, Tokenizer

CONFIG_NAMES = {  # in config.json and hparams.json
    "vocab_size": ("vocab_size", "n_vocab"),
    "context_length": ("n_positions", "n_ctx"),
    "n_layers": ("n_layer",),
    "n_heads": ("n_head",),
    "d_model": ("n_embd",),
}
BOOK_NAMES = {
    **{name: name for name in ("vocab_size", "context_length", "n_heads", "n_layers", "qkv_bias")},
    "emb_dim": "d_model",
}
REQUIRED_HF_VALUES: dict[str, Any] = {
    "model_type": "gpt2",
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
    "is_encoder_decoder": False,
    "pruned_heads": {},
}
USED_HF_KEYS = (
    *("tie_word_embeddings", "n_inner", "id2label", "num_labels", "problem_type"),
    *("eos_token_id", "pad_token_id"),
)
# Settings of training, of generation, of other classes and of transformers itself.
IRRELEVANT_HF_KEYS = """
resid_pdrop embd_pdrop attn_pdrop initializer_range gradient_checkpointing
finetuning_task task_specific_params label2id _num_labels

bad_words_ids begin_suppress_tokens diversity_penalty do_sample early_stopping
encoder_no_repeat_ngram_size exponential_decay_length_penalty forced_bos_token_id
forced_eos_token_id length_penalty max_length min_length no_repeat_ngram_size
num_beam_groups num_beams num_return_sequences remove_invalid_values
repetition_penalty suppress_tokens temperature top_k top_p typical_p use_cache prefix

summary_activation summary_first_dropout summary_proj_to_labels summary_type
summary_use_proj n_special predict_special_tokens is_decoder tie_encoder_decoder
cross_attention_hidden_size decoder_start_token_id bos_token_id sep_token_id

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


def gpt2_config(metadata: Mapping[str, Any], **changes: Any) -> GPTConfig:
    """Returns the config with the sizes in config.json or hparams.json."""
    for name, theirs in CONFIG_NAMES.items():
        changes[name] = get_positive_int(metadata, *theirs)
    return GPTConfig(**changes)


def openai_config(hparams: Mapping[str, Any]) -> GPTConfig:
    """Returns the config of an hparams.json."""
    check_keys(hparams, [name for names in CONFIG_NAMES.values() for name in names])
    return gpt2_config(hparams)


def hf_config(metadata: Mapping[str, Any]) -> GPTConfig:
    """Returns the config of a config.json of transformers, without classes."""
    for name, required in REQUIRED_HF_VALUES.items():
        if metadata.get(name, required) != required:
            raise ConfigError(
                f"{name}={metadata[name]!r:.60}, but GPT-2 requires {required!r}. gptjax does "
                "not support this architecture."
            )
    names = {name for names in CONFIG_NAMES.values() for name in names}
    check_keys(metadata, [*names, *REQUIRED_HF_VALUES, *USED_HF_KEYS, *IRRELEVANT_HF_KEYS.split()])
    is_tied = metadata.get("tie_word_embeddings", True) is not False
    config = gpt2_config(metadata, tie_embeddings=is_tied)
    if metadata.get("n_inner") not in (None, config.actual_mlp_dim):
        raise ConfigError(
            f"n_inner={metadata['n_inner']!r:.60}, but gptjax only supports 4 * n_embd = "
            f"{config.actual_mlp_dim}."
        )
    return config


def check_book_config(metadata: Mapping[str, Any], config: GPTConfig) -> None:
    """Rejects a config.json of the book that contradicts the tensors."""
    check_keys(metadata, {*BOOK_NAMES, "drop_rate"})
    for theirs, ours in BOOK_NAMES.items():
        if metadata.get(theirs, getattr(config, ours)) != getattr(config, ours):
            raise ConfigError(
                f"{theirs}={metadata[theirs]!r:.60}, but its tensors have {theirs}="
                f"{getattr(config, ours)}. Correct it or copy the files again."
            )


def check_end_token(metadata: Mapping[str, Any], tokenizer: Tokenizer) -> None:
    """Rejects another end of a text than <|endoftext|>."""
    ends = metadata.get("eos_token_id")
    for end in ends if isinstance(ends, list) else [ends]:
        # transformers' default of 50256 may be outside of a smaller vocabulary
        if end in range(tokenizer.vocab_size) and end != tokenizer.eot_token:
            raise ConfigError(
                f"eos_token_id={end}, but gptjax ends a text with {ENDOFTEXT}, whose id is "
                f"{tokenizer.eot_token}. Correct it, or use another model."
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


def get_positive_int(metadata: Mapping[str, Any], *names: str) -> int:
    """Returns the positive value of the one or more of `names` that are present."""
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
