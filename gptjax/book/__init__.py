"""Reproduction of the book "Build a Large Language Model (From Scratch)".

Recomputes the numbers that the book prints. They depend on PyTorch's random numbers,
which this package generates without PyTorch. Read `torch_random` first. The rest of
gptjax does not need this package. Public names are imported on first use.

Importing it adds the value "book" to four options: the book's splits, batch order,
learning rate and training loops.
"""

import functools

import lazy_loader

from gptjax.plugins import register_value

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

for _option, _name in {
    "data.split_strategy": "book_split",
    "data.batching": "BOOK_BATCHING",
    "optim.schedule": "BOOK_LEARNING_RATE",
    "train.task": "book_stages",
}.items():
    register_value(_option, "book", functools.partial(__getattr__, _name))
