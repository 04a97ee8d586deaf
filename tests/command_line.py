"""Command lines that are parsed without being run."""

from collections.abc import Sequence
from typing import Any

import click

from gptjax.cli.main import COMMANDS, Group


def parse_command(argv: Sequence[str]) -> tuple[click.Command, dict[str, Any]]:
    """The command of a line and its arguments."""
    context, words = click.Context(COMMANDS), list(argv)
    command: click.Command = COMMANDS
    while isinstance(command, Group):
        _, command, words = command.resolve_command(context, words)
    with command.make_context(command.name, words, obj=list(argv)) as context:
        return command, dict(context.params)
