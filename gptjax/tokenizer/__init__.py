"""Text to token ids and back, and chat templates.

Input: text, or a conversation. Output: token ids, or a rendered prompt. Read
`tokenizer` first. The public functions are imported at first use, since the template
worker imports this package without NumPy and tiktoken.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gptjax.tokenizer.tokenizer import Tokenizer as Tokenizer
    from gptjax.tokenizer.tokenizer import load_tokenizer as load
    from gptjax.tokenizer.tokenizer import train_tokenizer as train

__all__ = ["Tokenizer", "load", "train"]


def __getattr__(name: str) -> Any:
    """Imports a public name at first use (PEP 562)."""
    if name not in __all__:
        raise AttributeError(f"module 'gptjax.tokenizer' has no attribute {name!r}")
    from gptjax.tokenizer import tokenizer

    return getattr(tokenizer, {"Tokenizer": name}.get(name, f"{name}_tokenizer"))


def __dir__() -> list[str]:
    return [*__all__, "bpe", "chat_template", "tokenizer"]
