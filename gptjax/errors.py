"""Errors that a user can mend: one sentence with the value, the need and the fix.

The command line prints them without a traceback and exits with code 2; with 1, where
it was the machine that failed.
"""


class GptjaxError(Exception):
    """A mistake in what the user gave, told so that the user can mend it."""


class ConfigError(GptjaxError, ValueError):
    """An option, a config file or a combination of values that cannot be used."""


class DataError(GptjaxError, ValueError):
    """Text, tokens or data files that cannot be used."""


class ModelError(GptjaxError, ValueError):
    """A model, checkpoint or run folder that cannot be used."""


class MachineError(GptjaxError, OSError):
    """The machine failed, as with a full disk: the same again may go well later."""
