"""State dict of the book's PyTorch GPTModel, whose output head is never tied."""

from pathlib import Path

from gptjax.errors import ModelError
from gptjax.exporters.tensors import gpt2_values, named_tensors, unsupported_options
from gptjax.weights.model_folder import Model, write_model_json
from gptjax.weights.safetensors import write_safetensors


def write_book(model: Model, folder: Path) -> None:
    """Writes the state dict and the config dictionary of the book (GPT_CONFIG)."""
    c = model.config
    if model.labels:
        raise ModelError("the book's format stores no labels of a classifier. Use --to hf.")
    sizes = {"mlp_dim": (0, 4 * c.d_model), "norm_eps": (1e-5,)}
    if problem := unsupported_options(c, gpt2_values(c) | sizes, "GPT-2 models"):
        raise ModelError(f"{problem}. Train a model with other options.")
    book_config = {
        "vocab_size": c.vocab_size,
        "context_length": c.context_length,
        "emb_dim": c.d_model,
        "n_heads": c.n_heads,
        "n_layers": c.n_layers,
        "drop_rate": c.dropout,
        "qkv_bias": c.qkv_bias,
    }
    write_safetensors(named_tensors(model, "book"), folder / "model.safetensors")
    write_model_json(book_config, folder / "config.json")
