"""Shapes of public models: options of `GPTConfig` by name of the model."""

from typing import Any

# Of Llama, SmolLM2 and Qwen 3.
LLAMA_OPTIONS: dict[str, Any] = {
    "position": "rope",
    "norm": "rms",
    "mlp": "swiglu",
    "bias": False,
    "qkv_bias": False,
}
PRESETS: dict[str, dict[str, Any]] = {
    name: {"vocab_size": 50_257, "n_layers": layers, "n_heads": heads, "d_model": width}
    for name, layers, heads, width in (  # Radford et al. 2019, table 2
        ("gpt2", 12, 12, 768),
        ("gpt2-medium", 24, 16, 1024),
        ("gpt2-large", 36, 20, 1280),
        ("gpt2-xl", 48, 25, 1600),
    )
}
PRESETS["smollm2-135m"] = LLAMA_OPTIONS | {  # huggingface.co/HuggingFaceTB/SmolLM2-135M
    "vocab_size": 49_152,
    "context_length": 8192,
    "n_layers": 30,
    "n_heads": 9,
    "n_kv_heads": 3,
    "d_model": 576,
    "mlp_dim": 1536,
    "rope_theta": 100_000.0,
}
PRESETS["llama3.2-1b"] = LLAMA_OPTIONS | {  # huggingface.co/meta-llama/Llama-3.2-1B
    "vocab_size": 128_256,
    "context_length": 131_072,
    "n_layers": 16,
    "n_heads": 32,
    "n_kv_heads": 8,
    "d_model": 2048,
    "rope_theta": 500_000.0,
    "rope_factor": 32.0,
}
PRESETS["qwen3-0.6b"] = LLAMA_OPTIONS | {  # huggingface.co/Qwen/Qwen3-0.6B
    "vocab_size": 151_936,
    "context_length": 40_960,
    "n_layers": 28,
    "n_heads": 16,
    "n_kv_heads": 8,
    "head_dim": 128,
    "d_model": 1024,
    "mlp_dim": 3072,
    "norm_eps": 1e-6,
    "qk_norm": True,
    "rope_theta": 1_000_000.0,
}
