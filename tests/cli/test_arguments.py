"""Every option is documented and parsed, and old names are answered with new ones."""

import click
import pytest

from gptjax.cli import arguments
from gptjax.cli.arguments import ConfigCommand, Number, apply_overrides
from gptjax.cli.main import COMMANDS, DATA_COMMANDS, main
from gptjax.config import RunConfig, config_options
from tests.command_line import parse_command

COMMAND_TABLE = {(name,): c for name, c in COMMANDS.commands.items() if c is not DATA_COMMANDS}
COMMAND_TABLE |= {("data", name): c for name, c in DATA_COMMANDS.commands.items()}


def usage_error(capsys, *words):
    """The message of an invalid command line, which is one line on stderr."""
    assert main(words) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    return err


def test_the_help_of_every_command_documents_all_options_with_their_defaults(capsys):
    for path, command in COMMAND_TABLE.items():
        assert main([*path, "--help"]) == 0
        out = capsys.readouterr().out
        assert out.startswith(f"Usage: gptjax {' '.join(path)} ")
        options = [option for option in command.params if isinstance(option, click.Option)]
        for option in options:
            assert option.opts[0] in out
            assert option.required or "[default: " in option.help
        names = {option.name.replace("__", ".") for option in options}
        assert not isinstance(command, ConfigCommand) or names >= config_options().keys()


def test_every_number_has_a_range_that_its_help_shows(capsys):
    for path, command in COMMAND_TABLE.items():
        for option in command.params:
            default = option.default
            is_number = isinstance(option.type, Number) or isinstance(default, int | float)
            if not is_number or getattr(option, "is_flag", False):
                continue
            assert str(option.type.valid_range) in option.help
            beyond = option.type.valid_range.maximum + 1
            for value in (int(beyond), "9" * 31, "nan"):
                assert option.opts[0] in usage_error(capsys, *path, "x", option.opts[0], str(value))
        for option in command.params if isinstance(command, ConfigCommand) else ():
            if field := config_options().get(str(option.name).replace("__", ".")):
                assert not field.metadata["range"] or str(field.metadata["range"]) in option.help


def test_options_may_stand_anywhere_before_two_dashes():
    for words in ("M Hello --temperature 0 --json", "--json M --temperature=0 -- Hello"):
        found = parse_command(["generate", *words.split()])[1]
        assert (found["model"], found["prompt"]) == ("M", "Hello")
        assert (found["temperature"], found["as_json"]) == (0.0, True)
        assert (found["max_new_tokens"], found["top_p"], found["seed"]) == (100, 1.0, 0)
    found = parse_command(["classify", "M", "--json", "--", "--a", "-b", "--"])[1]
    assert found["texts"] == ("--a", "-b", "--")


def test_several_values_are_repeated_or_separated_by_commas():
    for words in ("--rows 4 --rows 8,16", "--rows 4,8 --rows=16"):
        assert parse_command(["bench", *words.split()])[1]["rows"] == (4, 8, 16)


def test_config_options_override_the_config():
    received = []
    command = ConfigCommand("x", callback=lambda overrides: received.extend(overrides))
    words = ["--train.steps", "20", "--model.causal=False", "--data.source", "--x"]
    words += ["--optim.peak_lr", "1", "--mesh.data", "-1", "--train.sample_prompt", ""]
    with command.make_context("x", words) as context:
        command.invoke(context)

    config = apply_overrides(RunConfig(), received)

    assert (config.train.steps, config.train.sample_prompt) == (20, "")
    assert (config.model.causal, config.data.source) == (False, "--x")
    assert (config.optim.peak_lr, config.mesh.data) == (1.0, -1)
    assert config.model.n_layers == RunConfig().model.n_layers


def test_old_flags_are_rejected_with_the_new_ones(capsys):
    for old, new in arguments.RENAMED_FLAGS.items():
        path = next(p for p, c in COMMAND_TABLE.items() if any(new in x.opts for x in c.params))
        assert f"{old} is now {new}" in usage_error(capsys, *path, "x", old, "y")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("eval m --strid 4", "--strid. Did you mean --stride?"),
        ("train tiny --model.n_head 2", "mean --model.n_heads?"),
        ("train tiny --train.steps 1.5", "train.steps='1.5'"),
        ("train tiny --model.causal 1", "true or false"),
        (f"data preview {'x' * 300}", "x" * 300),
        ("data preview x\0y", "NUL"),
        ("data preview x.jsonl --json --html y", "--html"),
        ("data preview . --json", "--json"),
        ("generate m x --chat --samples 2", "--samples"),
        ("eval m --text x --judge y", "--judge"),
        (f"doctor {'x' * 10_000}", "xxx [...] xxx"),
        ("data prepare x.txt", "--out"),
        ("import model", "--out"),
        ("export model --out x", "--to"),
        ("generate", "MODEL"),
        ("train tiny --on-spike rollback", "rollback"),
        ("eval m --text a --chat-data b", "--classification-data"),
        ("trian", "'trian'. Did you mean train?"),
        ("train tiny --model.n_heads 3", "n_heads=3"),
        ("train my.toml", "n_layer. Did you mean n_layers"),
        ("generate nowhere hello", "'nowhere'"),
        ("classify m --text column", "--file"),
        ("data preview none.jsonl", "none.jsonl does not exist"),
    ],
)
def test_invalid_input_gives_one_message_and_exit_code_2(
    words, message, capsys, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my.toml").write_text("[model]\nn_layer = 3\n")

    assert message in usage_error(capsys, *words.split())
    assert not (tmp_path / "runs").exists()
