"""Options shared by commands, and the options that are generated from the run config.

Commands are click commands of the class `Command`, or `ConfigCommand` if they take the
options of a config. All options have a description with their default.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, get_args

import click

import gptjax.book  # noqa: F401 (adds values of options)
from gptjax.config import SAMPLING_RANGES, Range, RunConfig, config_options, did_you_mean, from_dict
from gptjax.errors import ConfigError
from gptjax.fileio.paths import user_path
from gptjax.renamed_options import RENAMED_OPTIONS
from gptjax.runtime import cpu_flags


class PathType(click.ParamType):
    """Path given by the user."""

    name = "path"

    def convert(self, value: Any, param: Any, ctx: Any) -> Path:
        """Expands `~`."""
        return user_path(value)


PATH = PathType()
HELP_WIDTH = 88  # maximum number of columns of a help text
METAVARS: dict[Any, str] = {int: "N", float: "X", PATH: "FILE"}  # by type; others: NAME

# Decorator of a function that will be a command.
Decorator = Callable[[Any], Any]

RENAMED_FLAGS = {f"--{old}": f"--{new}" for old, new in RENAMED_OPTIONS.items() if "." in old} | {
    "--supervise": "--auto-restart",
    "--labelled": "--classification-data",
    "--data": "--chat-data",
    "--against": "--compare-profile",
    "--estimate": "--no-compile",
    "--pairs": "--repeats",
    "--template": "--chat-template",
    "--learn-prompts": "--train-on-prompts",
}


class Command(click.Command):
    """Command that answers an unknown option with its current or a similar name."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Sets the width of the help text."""
        settings = {"max_content_width": HELP_WIDTH, "help_option_names": ["--help"]}
        super().__init__(*args, context_settings=settings, **kwargs)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parses the arguments."""
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            name = error.option_name
            known = [flag for x in self.params for flag in x.opts if flag.startswith("-")]
            text = f"unknown option {name}.{did_you_mean(name, known)} "
            text += f"All options: {ctx.command_path} --help"
            if (current := RENAMED_FLAGS.get(name)) in known:
                text = f"{name} is now {current}."
            raise click.UsageError(text, ctx) from error

    def invoke(self, ctx: click.Context) -> Any:
        """Runs the command, with the CPU flags of --fast-cpu."""
        if ctx.params.pop("fast_cpu", False):  # before jax starts, which reads it once
            cpu_flags.enable_fast_cpu()
        return super().invoke(ctx)


class ConfigCommand(Command):
    """Command with all options of a run config, in groups.

    The function gets those given as `overrides`, a list of words for `apply_overrides`.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Adds the options of the config."""
        super().__init__(*args, **kwargs)
        self.params += [make_config_option(*item) for item in config_options().items()]

    def invoke(self, ctx: click.Context) -> Any:
        """Runs the command."""
        overrides: list[str] = []
        for name in config_options():
            if (value := ctx.params.pop(name.replace(".", "__"))) is not None:
                overrides += [f"--{name}", value]
        ctx.params["overrides"] = overrides
        return super().invoke(ctx)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Writes the command's own options, then those of each section."""
        titles = {"": "Options"}
        for section in dataclasses.fields(RunConfig):
            summary = str(section.type.__doc__).splitlines()[0].rstrip(".")
            titles[section.name] = f"[{section.name}] {summary}"
        groups: dict[str, list[tuple[str, str]]] = {name: [] for name in titles}
        for parameter in self.get_params(ctx):
            if record := parameter.get_help_record(ctx):
                name = str(parameter.name).partition("__")[0]
                groups[name if name in groups else ""].append(record)
        for name, records in groups.items():
            if not records:  # expected results are no options
                continue
            with formatter.section(titles[name]):
                formatter.write_dl(records)


def make_config_option(name: str, field: Any) -> click.Option:
    """Makes the command-line option of a config option."""
    description, valid_range = field.metadata["description"], field.metadata["range"]
    choices = {bool: ("true", "false")}.get(field.type, get_args(field.type))
    default = str(field.default).lower() if choices else repr(field.default).replace("'", '"')
    return click.Option(
        [f"--{name}", name.replace(".", "__")],
        metavar="|".join(choices) or field.type.__name__.upper(),
        help=f"{description}  [default: {default}]" + f"  [{valid_range}]" * bool(valid_range),
    )


class Number(click.ParamType):
    """Integer or float in a range."""

    def __init__(self, kind: type[int] | type[float], valid_range: Range) -> None:
        """Takes the type and the range."""
        self.kind, self.valid_range, self.name = kind, valid_range, kind.__name__

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> int | float:
        """Parses a number; rejects it outside the range."""
        number = click.types.convert_type(self.kind).convert(value, param, ctx)
        if not self.valid_range.includes(number):
            self.fail(f"{number} is not in the range {self.valid_range}.", param, ctx)
        return number


def apply_overrides(config: RunConfig, overrides: Sequence[str]) -> RunConfig:
    """Replaces options of a config by words, such as `["--train.steps", "20"]`."""
    table: Any = dataclasses.asdict(config)
    for index in range(0, len(overrides), 2):
        flag, *values = overrides[index : index + 2]
        section, _, key = flag.removeprefix("--").partition(".")
        if not flag.startswith("--") or not key or not values:
            raise ConfigError(
                f"{flag!r} is not an option with a value. Write --section.option VALUE."
            )
        value: Any = values[0]
        if field := config_options().get(f"{section}.{key}"):
            with contextlib.suppress(ValueError, KeyError):  # `from_dict` rejects the text
                value = PARSERS.get(field.type, str)(value)
        table.setdefault(section, {})[key] = value
    config = from_dict(RunConfig, table)
    data, flags = config.data, overrides[::2]
    if "--data.source" in flags:
        from gptjax.data.token_files import reset_split_options

        data = reset_split_options(data, [flag.removeprefix("--data.") for flag in flags])
    return dataclasses.replace(config, data=data)


PARSERS: dict[Any, Callable[[str], Any]] = {  # of options that are not texts
    int: int,
    float: float,
    bool: lambda text: {"true": True, "false": False}[text.lower()],
}


def value_option(
    name: str,
    text: str,
    default: Any = None,
    *,
    shown: str = "none",
    dest: str = "",
    valid_range: Range | None = None,
    **settings: Any,
) -> Decorator:
    """Option with a value, of the type of its default or of `settings["type"]`.

    A default that is None or "" is described by `shown`; `dest` is the parameter of the
    function, if it has another name; `valid_range` is that of a number; `settings` are
    those of `click.option`.
    """
    if not settings.get("required"):
        text += f"  [default: {shown if default in (None, '') else default}]"
        settings["default"] = default
    kind = settings.get("type", type(default))
    settings.setdefault("metavar", METAVARS.get(kind, "NAME"))
    if valid_range:
        text += f"  [{valid_range}]"
        settings["type"] = Number(kind, valid_range)
    return click.option(name, *filter(None, [dest]), help=text, **settings)


def flag_option(name: str, text: str, *names: str) -> Decorator:
    """Option without a value; `names` are other names and that of the parameter."""
    return click.option(name, *names, is_flag=True, help=f"{text}  [default: off]")


def list_option(
    name: str, text: str, *, shown: str, kind: click.ParamType, metavar: str = "N"
) -> Decorator:
    """Option with several values, separated by commas or given by repetition."""

    def split(
        ctx: click.Context, parameter: click.Parameter, values: tuple[str, ...]
    ) -> tuple[Any, ...]:
        return tuple(
            kind.convert(part, parameter, ctx) for value in values for part in value.split(",")
        )

    text += f"; several: separated by commas, or repeat the option  [default: {shown}]"
    return click.option(name, multiple=True, callback=split, help=text, metavar=metavar)


def add_options(*options: Decorator) -> Decorator:
    """Combines options, in the order of the help text."""
    return lambda function: functools.reduce(lambda f, option: option(f), options[::-1], function)


fast_cpu_argument = flag_option(  # handled by `Command`
    "--fast-cpu",
    "XLA and malloc settings for CPUs with AVX-512; needs more memory, see "
    "gptjax/runtime/cpu_flags.py",
)
session_arguments = add_options(
    flag_option("--verbose", "print a startup time breakdown in seconds to stderr", "-v"),
    fast_cpu_argument,
)
model_session_arguments = add_options(  # of a command that loads MODEL
    flag_option("--int8", "round weights to 8 bits: less memory, slightly different results"),
    session_arguments,
)


def sampling_arguments(max_new_tokens: int, temperature: float) -> Decorator:
    """Options of sampling, arguments with the names of `GenerationConfig`."""
    return add_options(
        sampling_option("max_new_tokens", "maximum length in tokens", max_new_tokens),
        sampling_option("temperature", "sampling temperature; 0 = greedy", temperature),
        sampling_option("top_k", "sample from the N most likely tokens; 0 = all", 0),
        sampling_option(
            "top_p", "sample from the smallest set of tokens with this total probability", 1.0
        ),
        sampling_option("seed", "seed of the sampling", 0),
    )


def sampling_option(name: str, text: str, default: int | float, **settings: Any) -> Decorator:
    """Option of a sampling parameter, with the range of its values."""
    flag = f"--{name.replace('_', '-')}"
    return value_option(flag, text, default, valid_range=SAMPLING_RANGES[name], **settings)
