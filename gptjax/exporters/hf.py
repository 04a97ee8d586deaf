"""Hugging Face folders: GPT-2, Llama or Qwen 3 (for transformers, vLLM, ...)."""

from pathlib import Path
from typing import Any, NamedTuple

from gptjax.config import GPTConfig
from gptjax.errors import ModelError
from gptjax.exporters.model_card import model_card
from gptjax.exporters.tensors import gpt2_values, lossless_dtype, named_tensors, unsupported_options
from gptjax.fileio.atomic import write_atomic
from gptjax.presets import LLAMA_OPTIONS
from gptjax.weights.model_folder import Model, write_model_json
from gptjax.weights.param_map import HF_PREFIXES, hf_layout
from gptjax.weights.safetensors import write_safetensors

HF_HEAD_TENSORS = ("lm_head.weight", "score.weight")  # without the prefix of the others


class HFArchitecture(NamedTuple):
    """Name of an architecture, and its classes in transformers."""

    name: str
    lm: str
    classifier: str


HF_ARCHITECTURES = {  # by model_type
    "gpt2": HFArchitecture("GPT-2", "GPT2LMHeadModel", "GPT2ForSequenceClassification"),
    "llama": HFArchitecture("Llama", "LlamaForCausalLM", "LlamaForSequenceClassification"),
    "qwen3": HFArchitecture("Qwen 3", "Qwen3ForCausalLM", "Qwen3ForSequenceClassification"),
}
LLAMA_VALUES = {n: (value,) for n, value in (LLAMA_OPTIONS | {"causal": True}).items()}
CLASSIFIER_VALUES = {"pool": ("last",), "head_bias": (False,)}


def hf_model_type(config: GPTConfig) -> str:
    """Returns the key in `HF_ARCHITECTURES` of the most similar architecture."""
    if hf_layout(config) == "hf":
        return "gpt2"
    return "qwen3" if config.qk_norm else "llama"


def hf_problem(config: GPTConfig, is_classifier: bool) -> str:
    """Says why transformers cannot represent a model; "" if it can."""
    model_type = hf_model_type(config)
    values = gpt2_values(config) if model_type == "gpt2" else LLAMA_VALUES
    values = values | (CLASSIFIER_VALUES if is_classifier else {})
    return unsupported_options(config, values, f"{HF_ARCHITECTURES[model_type].name} models")


def gpt2_json(config: GPTConfig) -> dict[str, Any]:
    """Returns the keys that a config.json of a GPT-2 has."""
    return {
        "n_positions": config.context_length,
        "n_ctx": config.context_length,  # old name of n_positions, still read by some tools
        "n_embd": config.d_model,
        "n_layer": config.n_layers,
        "n_head": config.n_heads,
        "n_inner": config.mlp_dim or None,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": config.norm_eps,
        **dict.fromkeys(["attn_pdrop", "embd_pdrop", "resid_pdrop"], config.dropout),
    }


def llama_json(config: GPTConfig) -> dict[str, Any]:
    """Returns the keys that a config.json of a Llama or Qwen 3 has."""
    scaling = None
    if config.rope_factor != 1:
        scaling = {
            "rope_type": "llama3",
            "factor": config.rope_factor,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": config.rope_original_context,
        }
    return {
        "max_position_embeddings": config.context_length,
        "hidden_size": config.d_model,
        "intermediate_size": config.actual_mlp_dim,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.actual_kv_heads,
        "head_dim": config.actual_head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        "attention_bias": False,
        # Names of transformers 4, which later versions and other tools read as well.
        "rope_theta": config.rope_theta,
        "rope_scaling": scaling,
    }


def write_hf(model: Model, folder: Path) -> None:
    """Writes all files that transformers needs, except those of the tokenizer."""
    c, tokenizer = model.config, model.tokenizer
    model_type = hf_model_type(c)
    is_gpt2, architecture = model_type == "gpt2", HF_ARCHITECTURES[model_type]
    if problem := hf_problem(c, bool(model.labels)):
        raise ModelError(f"{problem}. Train a model with other options.")
    arrays = named_tensors(model, hf_layout(c))
    eot, stop_ids = tokenizer.eot_token, tokenizer.stop_ids
    special_tokens = {
        "bos_token_id": eot if tokenizer.bos_token is None else tokenizer.bos_token,
        "eos_token_id": stop_ids if len(stop_ids) > 1 else eot,
    }
    # As in the public files: Llama's and Qwen's are bfloat16, GPT-2's are float32.
    dtype = "float32" if is_gpt2 else lossless_dtype(arrays.values())
    hf_config = {
        "architectures": [architecture.classifier if model.labels else architecture.lm],
        "model_type": model_type,
        "vocab_size": c.vocab_size,
        **(gpt2_json(c) if is_gpt2 else llama_json(c)),
        "tie_word_embeddings": c.tie_embeddings,
        **special_tokens,
        "dtype": dtype,
    }
    if model.labels:
        hf_config |= {
            "id2label": {str(n): label for n, label in enumerate(model.labels)},
            "label2id": {label: n for n, label in enumerate(model.labels)},
            "pad_token_id": eot,  # classifies the token before the first padding
        }
    prefix = HF_PREFIXES[hf_layout(c)]
    prefixed = {
        name if name in HF_HEAD_TENSORS else prefix + name: array.astype(dtype, copy=False)
        for name, array in arrays.items()
    }
    write_safetensors(prefixed, folder / "model.safetensors")
    write_model_json(hf_config, folder / "config.json")
    write_model_json(special_tokens | {"pad_token_id": eot}, folder / "generation_config.json")
    card = model_card(model, architecture=architecture.name, model_type=model_type)
    write_atomic(folder / "README.md", card)
