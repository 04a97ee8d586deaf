"""gptjax: train, fine-tune and run GPT models in JAX.

Public names are imported at first use; importing this package imports neither jax nor
numpy. The stub `__init__.pyi` is the only list of them, for Python and for editors.
"""

import lazy_loader

__version__ = "0.1.0"

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
