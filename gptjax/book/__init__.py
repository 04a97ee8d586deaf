"""The book "Build a Large Language Model (From Scratch)", number for number.

Its untrained models, its shuffled batches and its worked examples are made of PyTorch's
random numbers; here they are without PyTorch. Nothing else in gptjax needs this folder.
Each name below is loaded from its module at first use.
"""

import importlib
from typing import Any

HOMES = {  # public name: the module that defines it
    "Loader": "loader",
    "TorchGenerator": "torch_random",
    "epochs": "loader",
    "init_params": "params",
}
__all__ = [*HOMES]


def __getattr__(name: str) -> Any:
    """Loads a public name from its module (PEP 562)."""
    if name not in HOMES:
        raise AttributeError(f"module 'gptjax.book' has no attribute {name!r}")
    return getattr(importlib.import_module(f"gptjax.book.{HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
