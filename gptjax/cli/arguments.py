"""Options shared by commands, and the options that are generated from the run config.

Commands are click commands of the class `Command`, or `ConfigCommand` if they take the
options of a config. All options have a description with their default.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, get_args

import click

import gptjax.book  # noqa: F401 (adds values of options)
from gptjax.config import RENAMED_OPTIONS, RunConfig, config_options, did_you_mean, from_dict
from gptjax.errors import ConfigError
from gptjax.runtime import cpu_flags

PATH = click.Path(path_type=Path)
HELP_WIDTH = 88  # maximum number of columns of a help text

# Decorator of a function that will be a command.
Decorator = Callable[[Any], Any]

RENAMED_FLAGS = {  # command: {earlier name: current name}
    "train": {"--supervise": "--auto-restart"},
    "eval": {"--labelled": "--classification-data", "--data": "--chat-data"},
    "plan": {"--against": "--compare-profile", "--estimate": "--no-compile"},
    "bench": {"--pairs": "--repeats"},
    "preview": {"--template": "--chat-template", "--learn-prompts": "--train-on-prompts"},
}


class Command(click.Command):
    """Command that answers an unknown option with its current or a similar name."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Sets the width of the help text."""
        settings = {"max_content_width": HELP_WIDTH, "help_option_names": ["--help"]}
        super().__init__(*args, context_settings=settings, **kwargs)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parses the arguments; an unknown option names the most similar one."""
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            raise click.UsageError(explain_unknown_option(ctx, error.option_name), ctx) from error

    def invoke(self, ctx: click.Context) -> Any:
        """Runs the command, with the CPU flags of --fast-cpu."""
        if ctx.params.pop("fast_cpu", False):  # before jax starts, which reads it once
            cpu_flags.enable_fast_cpu()
        return super().invoke(ctx)


class ConfigOption(click.Option):
    """Option of a config section, as a flag."""

    def __init__(self, name: str, field: Any, group: str) -> None:
        """Describes the option by its field."""
        metadata = field.metadata
        choices = {bool: ("true", "false")}.get(field.type, get_args(field.type))
        valid_range = "in [0, 1)" if metadata["unit_interval"] else ""
        if metadata["minimum"] is not None:
            valid_range = f"at least {metadata['minimum']}"
        default = str(field.default).lower() if choices else repr(field.default)
        default = default.replace("'", '"')
        description = metadata["description"]
        if valid_range:
            description += f" ({valid_range})"
        super().__init__(
            [f"--{name}", name.replace(".", "__")],
            metavar="|".join(choices) or field.type.__name__.upper(),
            help=f"{description}  [default: {default}]",
        )
        self.group = group


class ConfigCommand(Command):
    """Command with all options of a run config, in groups.

    The function gets those given as `overrides`, a list of words for `apply_overrides`.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Adds the options of the config."""
        super().__init__(*args, **kwargs)
        sections = {field.name: field.type for field in dataclasses.fields(RunConfig)}
        for name, field in config_options().items():
            section = name.partition(".")[0]
            summary = str(sections[section].__doc__).splitlines()[0].rstrip(".")
            self.params.append(ConfigOption(name, field, f"[{section}] {summary}"))

    def invoke(self, ctx: click.Context) -> Any:
        """Runs the command."""
        flags = {p.name: p.opts[0] for p in self.params if isinstance(p, ConfigOption)}
        overrides: list[str] = []
        for name in [name for name in ctx.params if name in flags]:
            value = ctx.params.pop(name)
            overrides += [] if value is None else [flags[name], value]
        ctx.params["overrides"] = overrides
        return super().invoke(ctx)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Writes the command's own options, then those of each section."""
        groups: dict[str, list[tuple[str, str]]] = {"Options": []}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record and isinstance(parameter, click.Option):
                group = getattr(parameter, "group", "Options")
                groups.setdefault(group, []).append(record)
        for group, records in groups.items():
            with formatter.section(group):
                formatter.write_dl(records)


def apply_overrides(config: RunConfig, overrides: Sequence[str]) -> RunConfig:
    """Replaces options of a config.

    Args:
        config: the config.
        overrides: words such as `["--train.steps", "20", "--model.dropout", "0.1"]`.

    Raises:
        ConfigError: unknown option or invalid value.
    """
    table: Any = dataclasses.asdict(config)
    known = config_options()
    for flag, text in _pairs(overrides):
        name = flag.removeprefix("--")
        section, _, key = name.partition(".")
        value = _parse_value(name, text, known[name].type) if name in known else text
        table.setdefault(section, {})[key] = value
    return from_dict(RunConfig, table)


def _pairs(words: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yields flags and their values."""
    for index in range(0, len(words), 2):
        flag = words[index]
        if not flag.startswith("--") or "." not in flag or index + 1 == len(words):
            raise ConfigError(
                f"{flag!r} is not an option with a value. Write --section.option VALUE."
            )
        yield flag, words[index + 1]


def _parse_value(name: str, text: str, kind: Any) -> Any:
    """Parses the value of an option.

    Raises:
        ConfigError: the text is not a value of type `kind`.
    """
    if kind not in (int, float, bool):
        return text  # `from_dict` checks the choices
    try:
        if kind is bool:
            return {"true": True, "false": False}[text.lower()]
        return kind(text)
    except (ValueError, KeyError) as error:
        example = {int: "an integer, such as 3", float: "a number, such as 0.1"}
        raise ConfigError(
            f"{name}={text!r} must be {example.get(kind, 'true or false')}."
        ) from error


def explain_unknown_option(context: click.Context, name: str) -> str:
    """Error message for an unknown option: its current name, or a similar one."""
    command = context.command
    renamed = RENAMED_FLAGS.get(str(command.name), {})
    known = [flag for parameter in command.params for flag in parameter.opts]
    if isinstance(command, ConfigCommand):
        renamed = renamed | {f"--{a}": f"--{b}" for a, b in RENAMED_OPTIONS.items()}
    if name in renamed:
        return f"{name} is now {renamed[name]}."
    flags = [flag for flag in known if flag.startswith("-")]
    return (
        f"unknown option {name}.{did_you_mean(name, flags)} All options: "
        f"{context.command_path} --help"
    )


def value_option(
    *names: str, text: str, default: Any = None, shown: str = "", **settings: Any
) -> Decorator:
    """Option with a value.

    Args:
        *names: the flag, and the name of the argument if it differs.
        text: description, with the unit.
        default: default value.
        shown: description of the default, if it is None.
        **settings: of `click.option`.
    """
    if not settings.get("required"):
        text += f"  [default: {shown or repr(default)}]".replace("'", '"')
    return click.option(*names, default=default, help=text, **settings)


def flag_option(*names: str, text: str) -> Decorator:
    """Option without a value."""
    return click.option(*names, is_flag=True, help=f"{text}  [default: off]")


def list_option(
    name: str,
    *,
    text: str,
    kind: click.ParamType = click.STRING,
    default: Sequence[Any] = (),
    shown: str = "",
    **settings: Any,
) -> Decorator:
    """Option with several values, separated by commas or given by repetition."""

    def split(
        ctx: click.Context, parameter: click.Parameter, values: tuple[str, ...]
    ) -> tuple[Any, ...]:
        parts = [part for value in values for part in value.split(",")]
        return tuple(kind.convert(part, parameter, ctx) for part in parts) or tuple(default)

    text += "; several: separated by commas, or repeat the option"
    text += f"  [default: {shown or ','.join(map(str, default))}]"
    return click.option(name, multiple=True, callback=split, help=text, **settings)


def model_session_arguments(function: Any) -> Any:
    """Adds the options of a command that loads MODEL: --int8, --verbose, --fast-cpu."""
    text = "round weights to 8 bits: less memory, slightly different results"
    return flag_option("--int8", text=text)(session_arguments(function))


def session_arguments(function: Any) -> Any:
    """Adds --verbose and --fast-cpu."""
    function = fast_cpu_argument(function)
    text = "print a startup time breakdown in seconds to stderr"
    return flag_option("-v", "--verbose", text=text)(function)


def fast_cpu_argument(function: Any) -> Any:
    """Adds --fast-cpu, which `Command` handles."""
    text = (
        "XLA and malloc settings for CPUs with AVX-512; needs more memory, see "
        "gptjax/runtime/cpu_flags.py"
    )
    return flag_option("--fast-cpu", text=text)(function)


def sampling_arguments(max_new_tokens: int, temperature: float) -> Decorator:
    """Adds the options of sampling, arguments with the names of `GenerationConfig`."""
    options = [
        value_option(
            "--max-new-tokens",
            type=int,
            default=max_new_tokens,
            metavar="N",
            text="maximum length in tokens, at least 1",
        ),
        value_option(
            "--temperature",
            type=float,
            default=temperature,
            metavar="X",
            text="sampling temperature, at least 0; 0 = greedy",
        ),
        value_option(
            "--top-k",
            type=int,
            default=0,
            metavar="N",
            text="sample from the N most likely tokens; 0 = all",
        ),
        value_option(
            "--top-p",
            type=float,
            default=1.0,
            metavar="P",
            text="sample from the smallest set of tokens with this total probability",
        ),
        value_option("--seed", type=int, default=0, metavar="N", text="seed of the sampling"),
    ]

    def decorate(function: Any) -> Any:
        for add in reversed(options):
            function = add(function)
        return function

    return decorate
