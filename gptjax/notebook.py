"""The command line inside a notebook: `%gptjax train tiny` after `%load_ext gptjax`.

It runs in the notebook's own process, as a TPU serves one process at a time and a GPU's
memory is taken by the first that asks.
"""

import shlex
from typing import Any

from gptjax.cli import main


def load_ipython_extension(shell: Any) -> None:
    """Gives the notebook the line magic %gptjax; IPython calls this."""
    from IPython.core.error import UsageError  # where there is a shell, there it is

    def gptjax(line: str) -> None:
        """Runs `gptjax LINE`; the cells below do not run when it fails."""
        try:
            code = main(shlex.split(line))
        except SystemExit as stop:  # --help, or arguments that are none
            code = stop.code
        if code:
            raise UsageError(f"gptjax {line}: exit code {code}, see above")

    shell.register_magic_function(gptjax, "line")
