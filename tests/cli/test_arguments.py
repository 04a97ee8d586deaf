"""Arguments: every option is documented, and old names are answered with new ones."""

import dataclasses
import re

import click
import pytest

from gptjax.cli import arguments
from gptjax.cli.arguments import ConfigCommand, apply_overrides
from gptjax.cli.inference import run_classify, run_generate
from gptjax.cli.main import COMMANDS, main, parse_command
from gptjax.config import RENAMED_OPTIONS, RunConfig, config_options
from gptjax.errors import ConfigError


def all_commands(group=COMMANDS, path=()):
    """Every command with the words that call it."""
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from all_commands(command, (*path, name))
        else:
            yield (*path, name), command


COMMAND_TABLE = dict(all_commands())
CONFIG_COMMANDS = [path[0] for path, c in COMMAND_TABLE.items() if isinstance(c, ConfigCommand)]


def usage_error(capsys, *words):
    """The message of an invalid command line."""
    assert main(words) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    return err


@pytest.mark.parametrize("path", COMMAND_TABLE, ids=" ".join)
def test_every_option_has_a_description_and_shows_its_default(path):
    command = COMMAND_TABLE[path]
    context = click.Context(command, info_name=" ".join(path))

    for parameter in command.params:
        if isinstance(parameter, click.Option):
            _, text = parameter.get_help_record(context)
            description, _, default = text.partition("  [")
            assert len(description) > 3, parameter.opts
            shown = r"(default: .+)|(required)"
            assert re.match(shown, default), parameter.opts


@pytest.mark.parametrize("path", COMMAND_TABLE, ids=" ".join)
def test_the_help_of_every_command_fits_its_width(path, capsys):
    assert main([*path, "--help"]) == 0

    out = capsys.readouterr().out
    assert out.startswith(f"Usage: gptjax {' '.join(path)} ")
    assert "[ARGS]" not in out
    assert max(map(len, out.splitlines())) <= arguments.HELP_WIDTH


def test_the_list_of_commands_describes_each_in_one_line(capsys):
    assert main(["--help"]) == 0

    lines = capsys.readouterr().out.partition("Commands:\n")[2].splitlines()
    assert [line.split()[0] for line in lines] == list(COMMANDS.commands)
    assert all(line.endswith(".") and not line.endswith("..") for line in lines)


@pytest.mark.parametrize("command", CONFIG_COMMANDS)
def test_the_help_documents_every_config_option_in_groups(command, capsys):
    assert CONFIG_COMMANDS == ["train", "plan"]

    assert main([command, "--help"]) == 0

    groups = re.split(r"^\[(\w+)\] ", capsys.readouterr().out, flags=re.MULTILINE)
    sections = dict(zip(groups[1::2], groups[2::2], strict=True))
    assert list(sections) == [field.name for field in dataclasses.fields(RunConfig)]
    for name, field in config_options().items():
        text = " ".join(sections[name.partition(".")[0]].split())
        (entry,) = re.findall(rf"--{name} .*?\[default: .*?\]", text)
        words = field.metadata["description"].split()
        assert " ".join(words[:4]) in entry
        minimum = field.metadata["minimum"]
        assert minimum is None or f"at least {minimum}" in entry


def test_the_default_of_a_config_option_is_that_of_its_field(capsys):
    main(["train", "--help"])

    text = " ".join(capsys.readouterr().out.split())
    for name, default in {
        "model.n_layers": "12",
        "model.causal": "true",
        "model.attention": "auto",
        "optim.peak_lr": "0.0006",
        "data.source": '"python-help"',
        "train.sample_prompt": r'"\n"',
    }.items():
        entry = text.partition(f"--{name} ")[2].partition(" --")[0]
        assert f"[default: {default}]" in entry


@pytest.mark.parametrize(
    "words",
    [
        ["MODEL", "Hello", "--temperature", "0", "--json"],
        ["MODEL", "--temperature", "0", "Hello", "--json"],
        ["--json", "--temperature", "0", "MODEL", "Hello"],
        ["--json", "MODEL", "--temperature=0", "--", "Hello"],
    ],
)
def test_options_may_stand_before_and_after_the_other_arguments(words):
    command, found = parse_command(["generate", *words])

    assert command is run_generate
    assert (found["model"], found["prompt"]) == ("MODEL", "Hello")
    assert (found["temperature"], found["as_json"]) == (0.0, True)


def test_two_dashes_end_the_options():
    command, found = parse_command(["classify", "M", "--json", "--", "--a", "-b", "--"])

    assert command is run_classify
    assert found["texts"] == ("--a", "-b", "--")
    assert found["as_json"]


@pytest.mark.parametrize(
    "words", [["--rows", "4", "--rows", "8,16"], ["--rows", "4,8", "--rows=16"]]
)
def test_several_values_are_repeated_or_separated_by_commas(words):
    only = ["--only", "train,save", "--only", "load"]

    _, found = parse_command(["bench", *words, *only])

    assert found["rows"] == (4, 8, 16)
    assert found["only"] == ("train", "save", "load")
    assert found["attention"] == ()
    assert parse_command(["bench"])[1]["rows"] == (4, 8, 16, 32, 64, 128)


@pytest.mark.parametrize("words", [["--only", "train,x"], ["--rows", "4,x"]])
def test_a_wrong_value_in_a_list_is_rejected(words):
    with pytest.raises(click.UsageError) as error:
        parse_command(["bench", *words])

    assert words[0] in error.value.format_message()
    assert "'x'" in error.value.format_message()


def test_config_options_override_the_config_in_the_order_given():
    words = ["--train.steps", "20", "--model.causal=False", "--data.source", "--x"]
    words += ["--optim.peak_lr", "1", "--mesh.data", "-1", "--train.sample_prompt", ""]

    config = apply_overrides(RunConfig(), parse_overrides(words))

    assert config.train.steps == 20
    assert config.model.causal is False
    assert (config.data.source, config.train.sample_prompt) == ("--x", "")
    assert config.optim.peak_lr == 1.0
    assert config.mesh.data == -1
    assert parse_overrides(["--train.steps=2", "--data.source", "b"]) == [
        "--train.steps",
        "2",
        "--data.source",
        "b",
    ]


def parse_overrides(words):
    """The overrides that the command gets."""
    received = []
    command = ConfigCommand("x", callback=lambda overrides: received.extend(overrides))
    with command.make_context("x", list(words)) as context:
        command.invoke(context)
    return received


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--train.steps", "many"], "train.steps='many' must be an integer"),
        (["--train.steps", "1.5"], "train.steps='1.5' must be an integer"),
        (["--optim.peak_lr", "x"], "optim.peak_lr='x' must be a number"),
        (["--optim.peak_lr", "inf"], "optim.peak_lr=inf must be finite"),
        (["--model.causal", "1"], "model.causal='1' must be true or false"),
        (["--model.dtype", "float16"], "'float16' .* mean bfloat16"),
        (["--train.steps", "0"], "train.steps=0 must be at least 1"),
        (["--model.dropout", "1"], r"model.dropout=1.0 must be in \[0, 1\)"),
        (["--model.n_layer", "2"], "model.n_layer.* mean n_layers"),
        (["--modle.n_layers", "2"], "modle.* mean model"),
        (["--train.steps"], "'--train.steps' .* VALUE"),
        (["train.steps", "2"], "'train.steps' .* VALUE"),
        (["--train.task", "instruct"], "train.task = 'instruct' is now 'sft'"),
    ],
)
def test_overrides_that_are_no_config_are_rejected(words, message):
    with pytest.raises(ConfigError, match=message):
        apply_overrides(RunConfig(), words)


OLD_FLAGS = [
    (("data", command) if command == "preview" else (command,), old, new)
    for command, flags in arguments.RENAMED_FLAGS.items()
    for old, new in flags.items()
]


@pytest.mark.parametrize(("path", "old", "new"), OLD_FLAGS)
def test_an_old_flag_is_rejected_with_the_new_one(path, old, new, capsys):
    known = {flag for p in COMMAND_TABLE[path].params for flag in p.opts}

    message = usage_error(capsys, *path, "x", old, "y")

    assert f"{old} is now {new}" in message
    assert new in known
    assert old not in known


def test_the_renamed_flags_are_these():
    assert sorted(old for _, old, _ in OLD_FLAGS) == [
        "--against",
        "--data",
        "--estimate",
        "--labelled",
        "--learn-prompts",
        "--pairs",
        "--supervise",
        "--template",
    ]


@pytest.mark.parametrize("command", CONFIG_COMMANDS)
@pytest.mark.parametrize("old", [name for name in RENAMED_OPTIONS if "." in name])
def test_an_old_config_option_is_rejected_with_the_new_one(command, old, capsys):
    message = usage_error(capsys, command, "tiny", f"--{old}", "1")

    assert f"--{old} is now --{RENAMED_OPTIONS[old]}" in message


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["eval", "m", "--strid", "4"], "--strid. Did you mean --stride?"),
        (["train", "tiny", "--model.n_head", "2"], "mean --model.n_heads?"),
        (["train", "tiny", "--verb"], "unknown option --verb."),
        (["data", "preview", "f", "--jsn"], "gptjax data preview --help"),
        (["generate", "m", "--temp", "0"], "unknown option --temp."),
        (["generate", "m", "-x"], "unknown option -x."),
        (["generate"], "MODEL"),
        (["generate", "m", "--top-k", "x"], "--top-k"),
        (["generate", "m", "--samples", "0"], "--samples"),
        (["train", "tiny", "--on-spike", "rollback"], "rollback"),
        (["eval", "m"], "--classification-data"),
        (["eval", "m", "--text", "a", "--chat-data", "b"], "--classification-data"),
        (["trian"], "'trian'. Did you mean train?"),
        (["data", "verfy"], "'verfy'. Did you mean verify?"),
        (["data"], "command"),
        ([], "command"),
    ],
)
def test_an_invalid_command_line_is_one_sentence(words, message, capsys):
    assert message in usage_error(capsys, *words)
