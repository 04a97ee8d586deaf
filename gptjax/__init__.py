"""gptjax: the whole life of a GPT in JAX.

Importing this package imports neither jax nor anything else that takes time; each
name below is loaded from its module at first use.
"""

import importlib
from typing import Any

__version__ = "0.1.0"

HOMES = {  # public name: the module that defines it
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
__all__ = [*HOMES, "__version__"]


def __getattr__(name: str) -> Any:
    """Loads a public name from its module (PEP 562)."""
    if name not in HOMES:
        raise AttributeError(f"module 'gptjax' has no attribute {name!r}")
    module = importlib.import_module(f"gptjax.{HOMES[name]}")
    return module if name == HOMES[name] == "tokenizer" else getattr(module, name)


def __dir__() -> list[str]:
    return sorted(__all__)
