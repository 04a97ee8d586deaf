"""Every option is documented and parsed, and old names are answered with new ones."""

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


def usage_error(capsys, *words):
    """The message of an invalid command line, which is one line on stderr."""
    assert main(words) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    return err


def test_every_command_documents_its_options_with_their_defaults(capsys):
    assert main(["--help"]) == 0
    lines = capsys.readouterr().out.partition("Commands:\n")[2].splitlines()
    assert [line.split()[0] for line in lines] == list(COMMANDS.commands)
    assert all(line.endswith(".") and not line.endswith("..") for line in lines)

    for path, command in COMMAND_TABLE.items():
        assert main([*path, "--help"]) == 0
        out = capsys.readouterr().out
        assert out.startswith(f"Usage: gptjax {' '.join(path)} ")
        assert "[ARGS]" not in out
        assert max(map(len, out.splitlines())) <= arguments.HELP_WIDTH
        context = click.Context(command, info_name=" ".join(path))
        for parameter in command.params:
            if isinstance(parameter, click.Option):
                _, text = parameter.get_help_record(context)
                assert re.match(r".{4,}  \[((default: .+)|(required))", text), parameter.opts


@pytest.mark.parametrize("command", ["train", "plan"])
def test_the_help_documents_every_config_option_in_groups(command, capsys):
    main([command, "--help"])

    groups = re.split(r"^\[(\w+)\] ", capsys.readouterr().out, flags=re.MULTILINE)
    sections = dict(zip(groups[1::2], groups[2::2], strict=True))
    assert list(sections) == [field.name for field in dataclasses.fields(RunConfig)]
    for name, field in config_options().items():
        text = " ".join(sections[name.partition(".")[0]].split())
        (entry,) = re.findall(rf"--{name} .*?\[default: .*?\]", text)
        assert " ".join(field.metadata["description"].split()[:4]) in entry
        minimum = field.metadata["minimum"]
        assert minimum is None or f"at least {minimum}" in entry
        default = str(field.default).replace("\n", r"\n").lower()
        assert re.search(rf'default: "?{re.escape(default)}"?\]', entry.lower())


@pytest.mark.parametrize(
    "words",
    [
        ["MODEL", "Hello", "--temperature", "0", "--json"],
        ["MODEL", "--temperature", "0", "Hello", "--json"],
        ["--json", "MODEL", "--temperature=0", "--", "Hello"],
    ],
)
def test_options_may_stand_before_and_after_the_other_arguments(words):
    command, found = parse_command(["generate", *words])

    assert command is run_generate
    assert (found["model"], found["prompt"]) == ("MODEL", "Hello")
    assert (found["temperature"], found["as_json"]) == (0.0, True)
    assert (found["max_new_tokens"], found["top_p"], found["seed"]) == (100, 1.0, 0)


def test_two_dashes_end_the_options():
    command, found = parse_command(["classify", "M", "--json", "--", "--a", "-b", "--"])

    assert command is run_classify
    assert found["texts"] == ("--a", "-b", "--")
    assert found["as_json"]


def test_several_values_are_repeated_or_separated_by_commas(capsys):
    for words in (["--rows", "4", "--rows", "8,16"], ["--rows", "4,8", "--rows=16"]):
        _, found = parse_command(["bench", *words, "--only", "train,save", "--only", "load"])
        assert found["rows"] == (4, 8, 16)
        assert found["only"] == ("train", "save", "load")
    assert parse_command(["bench"])[1]["rows"] == ()
    assert "'x'" in usage_error(capsys, "bench", "--only", "train,x")
    assert "'x'" in usage_error(capsys, "bench", "--rows", "4,x")


def parse_overrides(words):
    """The overrides that a command gets."""
    received = []
    command = ConfigCommand("x", callback=lambda overrides: received.extend(overrides))
    with command.make_context("x", list(words)) as context:
        command.invoke(context)
    return received


def test_config_options_override_the_config():
    words = ["--train.steps", "20", "--model.causal=False", "--data.source", "--x"]
    words += ["--optim.peak_lr", "1", "--mesh.data", "-1", "--train.sample_prompt", ""]

    config = apply_overrides(RunConfig(), parse_overrides(words))

    assert config.train.steps == 20
    assert config.model.causal is False
    assert (config.data.source, config.train.sample_prompt) == ("--x", "")
    assert config.optim.peak_lr == 1.0
    assert config.mesh.data == -1
    assert config.model.n_layers == RunConfig().model.n_layers


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--train.steps", "many"], "train.steps='many' .* int, .* 3"),
        (["--train.steps", "1.5"], "train.steps='1.5'"),
        (["--optim.peak_lr", "x"], "optim.peak_lr='x' .* float, .* 0.1"),
        (["--optim.peak_lr", "inf"], "optim.peak_lr=inf"),
        (["--model.causal", "1"], "model.causal='1' .* true or false"),
        (["--model.dtype", "float16"], "'float16' .* mean bfloat16"),
        (["--model.n_layer", "2"], "model.n_layer.* mean n_layers"),
        (["--modle.n_layers", "2"], "modle.* mean model"),
        (["--train.steps"], "'--train.steps'"),
        (["train.steps", "2"], "'train.steps'"),
        (["--train.task", "instruct"], "'instruct' is now 'sft'"),
    ],
)
def test_invalid_overrides_are_rejected(words, message):
    with pytest.raises(ConfigError, match=message):
        apply_overrides(RunConfig(), words)


def test_old_flags_are_rejected_with_the_new_ones(capsys):
    renamed = []
    for name, flags in arguments.RENAMED_FLAGS.items():
        path = ("data", name) if name == "preview" else (name,)
        known = {flag for parameter in COMMAND_TABLE[path].params for flag in parameter.opts}
        for old, new in flags.items():
            renamed.append(old)
            assert f"{old} is now {new}" in usage_error(capsys, *path, "x", old, "y")
            assert new in known
            assert old not in known
    for old in filter(lambda name: "." in name, RENAMED_OPTIONS):
        for command in ("train", "plan"):
            message = usage_error(capsys, command, "tiny", f"--{old}", "1")
            assert f"--{old} is now --{RENAMED_OPTIONS[old]}" in message

    expected = (
        "--against --data --estimate --labelled --learn-prompts --pairs --supervise --template"
    )
    assert sorted(renamed) == expected.split()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["eval", "m", "--strid", "4"], "--strid. Did you mean --stride?"),
        (["train", "tiny", "--model.n_head", "2"], "mean --model.n_heads?"),
        (["data", "preview", "f", "--jsn"], "gptjax data preview --help"),
        (["generate", "m", "--temp", "0"], "unknown option --temp."),
        (["generate", "m", "-x"], "unknown option -x."),
        (["generate"], "MODEL"),
        (["generate", "m", "--top-k", "x"], "--top-k"),
        (["generate", "m", "--samples", "0"], "--samples"),
        (["train", "tiny", "--on-spike", "rollback"], "rollback"),
        (["train", "tiny", "--hang-timeout", "0"], "--hang-timeout"),
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
