"""gptjax: train, fine-tune and run GPT models in JAX.

Public names are imported lazily, at first use; importing this package does not import
jax.
"""

import importlib
from typing import Any

__version__ = "0.1.0"

_EXPORTS = {  # public name -> (module, attribute)
    "GPTConfig": ("config", "GPTConfig"),
    "GptjaxError": ("errors", "GptjaxError"),
    "Model": ("weights.model_folder", "Model"),
    "TrainState": ("training.train_step", "TrainState"),
    "answer": ("inference.assistant", "answer"),
    "apply": ("model.gpt", "apply"),
    "classify": ("inference.classify", "classify"),
    "generate": ("inference.generate", "generate"),
    "hidden_states": ("model.gpt", "hidden_states"),
    "init": ("model.gpt", "init"),
    "init_state": ("training.train_step", "init_state"),
    "load": ("weights.load", "load"),
    "load_ipython_extension": ("cli.notebook", "load_ipython_extension"),
    "make_optimizer": ("training.optimizer", "make_optimizer"),
    "make_train_step": ("training.train_step", "make_train_step"),
    "save": ("weights.model_folder", "save_model"),
    "score": ("evaluation.perplexity", "score"),
    "stream": ("inference.generate", "stream"),
    "train_steps": ("training.train_step", "train_steps"),
}
__all__ = [*_EXPORTS, "__version__"]


def __getattr__(name: str) -> Any:
    """Imports a public name from its module (PEP 562)."""
    if name == "tokenizer":
        return importlib.import_module("gptjax.tokenizer")
    if name not in _EXPORTS:
        raise AttributeError(f"module 'gptjax' has no attribute {name!r}")
    module, attribute = _EXPORTS[name]
    return getattr(importlib.import_module(f"gptjax.{module}"), attribute)


def __dir__() -> list[str]:
    return sorted([*__all__, "tokenizer"])
