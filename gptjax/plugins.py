"""Values of config options that a package implements, such as "book" of `gptjax.book`.

Importing the package registers its values. Registration is cheap: the implementation
is imported at its first use.
"""

from collections.abc import Callable
from typing import Any, get_args

from gptjax.config import PluginValue, config_options, did_you_mean
from gptjax.errors import ConfigError

_loaders: dict[tuple[str, str], Callable[[], Any]] = {}


def register_value(option: str, value: str, load: Callable[[], Any]) -> None:
    """Registers a `PluginValue` of the option "section.option".

    `load` imports and returns the implementation: a `SplitFn` (data.split_strategy), an
    `SFTBatching` (data.batching), a `LearningRateRule` (optim.schedule) or a `StagesFn`
    (train.task).
    """
    _loaders[option, value] = load


def load_plugin(option: str, value: str) -> Any:
    """Returns the implementation of a value; its package must have been imported."""
    if (option, value) in _loaders:
        return _loaders[option, value]()
    if value in get_args(PluginValue):
        raise ConfigError(
            f"{option}={value!r} is implemented by gptjax.{value}. Add `import gptjax.{value}`."
        )
    known = get_args(config_options()[option].type)
    raise ConfigError(
        f"{option}={value!r} must be one of {', '.join(known)}.{did_you_mean(value, known)}"
    )
