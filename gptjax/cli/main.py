"""The `gptjax` command: table of commands and exit codes.

Exit codes: 0 done; 1 a check failed, the loss diverged, or memory, disk or network
failed; 2 invalid input; 75 interrupted with all progress saved; 130 or 143 ended at
once by a second signal.

A command imports jax and other large packages only when it runs.
"""

import errno
import sys
from collections.abc import Sequence

import click

from gptjax.cli import data, inference, planning, runs, train
from gptjax.cli.arguments import HELP_WIDTH, Command
from gptjax.config import did_you_mean
from gptjax.errors import GptjaxError, to_resource_error
from gptjax.runtime.preemption import (
    EXIT_PREEMPTED,
    Interrupted,
    handle_signals,
    report_interruption,
    set_signal_mode,
)
from gptjax.runtime.terminal import discard, print_message

PATH_ERRNOS = {errno.ENOENT, errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG}
PATH_ERRNOS |= {errno.ELOOP, errno.ENXIO, errno.EACCES, errno.EPERM, errno.EROFS}


class Group(click.Group):
    """Group of commands in the order of the table."""

    def __init__(self, name: str, text: str, commands: list[click.Command]) -> None:
        """Sets the help text and its width."""
        super().__init__(
            name,
            {str(command.name): command for command in commands},
            help=text,
            no_args_is_help=False,
            subcommand_metavar="COMMAND [ARGUMENTS]",
            context_settings={"max_content_width": HELP_WIDTH},
        )

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names of the commands."""
        return list(self.commands)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str, click.Command, list[str]]:
        """Finds the command; an unknown one is answered with the most similar name."""
        name = args[0] if args else ""
        if name not in self.commands:
            raise click.UsageError(
                f"unknown command {name!r}.{did_you_mean(name, self.commands)} "
                f"Known: {', '.join(self.commands)}."
            )
        return name, self.commands[name], args[1:]


@click.command("doctor", cls=Command)
def check_installation() -> int:
    """Check versions and devices; print the fix of each problem."""
    from gptjax.cli.doctor import run_doctor

    return run_doctor()


DATA_COMMANDS = Group(
    "data",
    "Fetch, prepare and check data.",
    [data.data_fetch, data.data_prepare, data.data_preview, data.data_verify],
)
COMMANDS = Group(
    "gptjax",
    """Train, fine-tune and run GPT models in JAX.

    MODEL is a run folder, one of its checkpoints (RUN/checkpoints/STEP), a model folder,
    a Hugging Face, OpenAI or book folder, a GGUF file, a public model (gpt2,
    gpt2-medium, gpt2-large, gpt2-xl, smollm2-135m-instruct), or the OWNER/NAME of a
    GPT-2, Llama 3, SmolLM2 or Qwen 3 on the Hugging Face hub.

    gptjax COMMAND --help lists the options of a command. Options may stand before or
    after the other arguments; -- ends the options.
    """,
    [
        train.run_quickstart,
        train.run_train,
        inference.run_generate,
        inference.run_classify,
        inference.start_chat,
        inference.run_evaluate,
        inference.run_import,
        inference.run_export,
        inference.run_push,
        runs.run_watch,
        runs.run_compare,
        runs.run_check,
        runs.run_track,
        DATA_COMMANDS,
        planning.run_plan,
        planning.run_bench,
        check_installation,
    ],
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command, by default that of the process; returns its exit code."""
    try:
        with handle_signals(final=argv is None):
            set_signal_mode("immediate")
            return run_command(list(sys.argv[1:] if argv is None else argv))
    except Interrupted as stopped:
        report_interruption(stopped)
        return EXIT_PREEMPTED


def run_command(words: list[str]) -> int:
    """Runs a command; prints its errors."""
    try:
        if any("\0" in word for word in words):
            raise click.UsageError("an argument contains a NUL character. Remove it.")
        with COMMANDS.make_context("gptjax", words, obj=list(words)) as context:
            return COMMANDS.invoke(context) or 0
    except click.exceptions.Exit as stop:  # --help
        return stop.exit_code
    except click.ClickException as error:
        print_message(f"gptjax: {GptjaxError(error.format_message())}")  # shortened
        return 2
    except BrokenPipeError:  # the reader of our output has closed the pipe
        discard(sys.stdout)
        return 0
    except (GptjaxError, OSError, MemoryError, RuntimeError) as caught:
        error = to_resource_error(caught) or caught
        if isinstance(error, GptjaxError):
            print_message(f"gptjax: {error}")
            return error.exit_code
        if not isinstance(error, OSError):
            raise
        path = error.filename
        text = f"cannot use {path}: {error.strerror}. Check the path." if path else error
        print_message(f"gptjax: {GptjaxError(text)}")
        return 2 if path and error.errno in PATH_ERRNOS else 1
    except KeyboardInterrupt:
        return 130
