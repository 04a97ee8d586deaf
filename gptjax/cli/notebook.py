"""Notebook magic: `%gptjax train tiny` after `%load_ext gptjax`.

Commands run in the notebook's process, because a TPU serves one process at a time and
the first process on a GPU allocates its memory.
"""

import contextlib
import shlex
from typing import Any

from gptjax.cli.main import main
from gptjax.cli.session import log_to_console

exit_stack = contextlib.ExitStack()  # closed when the extension is unloaded


def load_ipython_extension(shell: Any) -> None:
    """Registers the line magic %gptjax and prints progress; called by IPython."""
    from IPython.core.error import UsageError  # installed, as a shell is given

    def gptjax(line: str) -> None:
        """Runs `gptjax LINE`; a failure stops the execution of further cells."""
        if code := main(shlex.split(line)):
            raise UsageError(f"gptjax {line}: exit code {code}, see above")

    shell.register_magic_function(gptjax, "line")
    exit_stack.enter_context(log_to_console())  # progress of functions, too


def unload_ipython_extension(shell: Any) -> None:
    """Removes the line magic and the handler; called by IPython."""
    del shell.magics_manager.magics["line"]["gptjax"]
    exit_stack.close()
