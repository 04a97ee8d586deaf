"""gptjax: train, fine-tune and run GPT models in JAX.

Public names are imported lazily, at first use; importing this package does not import
jax.
"""

import importlib
from typing import Any

__version__ = "0.1.0"

_EXPORTS = {  # public name -> module that defines it
    "GPTConfig": "config",
    "GptjaxError": "errors",
    "Model": "weights.folder",
    "TrainState": "train",
    "answer": "answering",
    "apply": "model",
    "classify": "prediction",
    "generate": "generation",
    "hidden": "model",
    "init": "model",
    "init_state": "train",
    "load": "weights.importing",
    "load_ipython_extension": "notebook",
    "make_optimizer": "optim",
    "make_train_step": "train",
    "save": "weights.folder",
    "score": "evaluate",
    "steps": "train",
    "stream": "generation",
    "tokenizer": "tokenizer",
}
__all__ = [*_EXPORTS, "__version__"]


def __getattr__(name: str) -> Any:
    """Imports a public name from its module (PEP 562)."""
    if name not in _EXPORTS:
        raise AttributeError(f"module 'gptjax' has no attribute {name!r}")
    module = importlib.import_module(f"gptjax.{_EXPORTS[name]}")
    return module if name == _EXPORTS[name] == "tokenizer" else getattr(module, name)


def __dir__() -> list[str]:
    return sorted(__all__)
