"""Reproduction of the book "Build a Large Language Model (From Scratch)".

Recomputes the numbers that the book prints. They depend on PyTorch's random numbers,
which this package generates without PyTorch. Read `torch_random` first. The rest of
gptjax does not need this package. Public names are imported on first use.
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
