"""Reproduction of the book "Build a Large Language Model (From Scratch)".

Recomputes the numbers that the book prints. They depend on PyTorch's random numbers,
which this package generates without PyTorch. Read `torch_random` first. The rest of
gptjax does not need this package. Public names are imported on first use.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gptjax.book.loader import Loader as Loader
    from gptjax.book.loader import epochs as epochs
    from gptjax.book.params import init_params as init_params
    from gptjax.book.torch_random import TorchGenerator as TorchGenerator

__all__ = ["Loader", "TorchGenerator", "epochs", "init_params"]


def __getattr__(name: str) -> Any:
    """Loads a public name from its module (PEP 562)."""
    if name not in __all__:
        raise AttributeError(f"module 'gptjax.book' has no attribute {name!r}")
    from gptjax.book import loader, params

    return getattr(params if hasattr(params, name) else loader, name)


def __dir__() -> list[str]:
    return sorted(__all__)
