"""Errors a user can fix: a message states the value, the requirement and the fix.

The command line prints them without a traceback and exits with code 2, or with 1 for
a `ResourceError`.
"""


class GptjaxError(Exception):
    """Base of all errors a user can fix."""


class ConfigError(GptjaxError, ValueError):
    """Invalid configuration."""


class DataError(GptjaxError, ValueError):
    """Invalid data."""


class ModelError(GptjaxError, ValueError):
    """Invalid or incompatible model, checkpoint or run folder."""


class ResourceError(GptjaxError, OSError):
    """Out of memory, disk or network: the same command may succeed later."""
