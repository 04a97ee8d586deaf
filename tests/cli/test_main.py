"""The command line: what a user types, sees and gets back."""

import contextlib
import dataclasses
import errno
import importlib
import io
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from gptjax.cli import doctor, main
from gptjax.cli.train import next_command
from gptjax.config import find_config, load_config
from gptjax.errors import DataError, ResourceError
from gptjax.runtime.preemption import Interrupted
from tests.small_models import make_model

OPTIONS = ["--model.d_model=8", "--model.n_layers=1", "--model.n_heads=1"]
OPTIONS += ["--model.context_length=8", "--train.steps=2", "--train.sample_prompt="]
OPTIONS += ["--optim.warmup_steps=1", "--data.batching=concat"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a run that the command line has trained."""
    folder = tmp_path_factory.mktemp("cli")
    (folder / "text.txt").write_text("".join(f"{n} times 2 is {2 * n}.\n" for n in range(99)))
    words = ["train", "tiny", "--run", folder / "run", "--data.source", folder / "text.txt"]
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert main.main([*map(str, words), *OPTIONS]) == 0
    assert "done " in out.getvalue()
    return folder / "run"


def gptjax(capsys, *args):
    code = main.main([str(arg) for arg in args])
    out, err = capsys.readouterr()
    return code, out, err


def test_help_imports_no_large_package_and_a_closed_pipe_is_no_error():
    program = (
        "import sys, gptjax; gptjax.GPTConfig()\n"
        "from gptjax.cli.main import main\n"
        "heavy = {'jax', 'flax', 'numpy', 'jinja2', 'tiktoken', 'matplotlib', 'huggingface_hub'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
        "sys.exit(main(['train', '--help']))"
    )
    read_end, write_end = os.pipe()
    os.close(read_end)

    command = [sys.executable, "-c", program]
    done = subprocess.run(command, stdout=write_end, stderr=subprocess.PIPE, check=False)

    os.close(write_end)
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.fast
def test_generate_prints_json_or_the_output_of_examples(capsys, run, tmp_path):
    short = ["--max-new-tokens", 3]
    code, out, _ = gptjax(capsys, "generate", run, "2 times", "--samples", 2, "--json", *short)
    assert code == 0
    assert [len(json.loads(line)["ids"]) for line in out.splitlines()] == [3, 3]

    (tmp_path / "examples.jsonl").write_text('{"input": "woc", "output": "cow"}\n')
    few_shot = ["--few-shot", tmp_path / "examples.jsonl"]
    code, out, err = gptjax(capsys, "generate", run, "lie", *few_shot, *short)
    assert (code, out.count("\n"), "lie" in out) == (0, 1, False)
    assert (" 9 tokens" in err, err.count("\n")) == (True, 1)  # dropped: the context has 8


def test_a_prompt_on_stdin_is_its_text_without_the_last_line_break(capsys, run, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("2 \nx\n"))

    code, out, err = gptjax(capsys, "generate", run, "--max-new-tokens", 3)

    assert (code, err, out[:4], out[4] != "\n") == (0, "", "2 \nx", True)


def test_a_model_of_the_wrong_kind_is_refused_before_any_output(capsys, monkeypatch, tmp_path):
    (tmp_path / "data.jsonl").write_text('{"prompt": "a", "response": "b"}\n')
    classifier = make_model(n_classes=2)
    classifier = dataclasses.replace(classifier, labels=("ham", "spam"))
    data = tmp_path / "data.jsonl"
    for model, word, commands in (
        (classifier, "classifier", ("generate m Hi", "generate m Hi --chat --seed 1", "chat m")),
        (classifier, "classifier", (f"eval m --text {data}", f"eval m --chat-data {data}")),
        (make_model(), "labels", ("classify m a", f"eval m --classification-data {data}")),
        (make_model(), "chat template", ("generate m Hi --chat", f"eval m --chat-data {data}")),
    ):
        monkeypatch.setattr("gptjax.weights.load.load", lambda *args, x=model, **options: x)
        for command in commands:
            code, out, err = gptjax(capsys, *command.split())
            assert (code, out, word in err, err.count("\n")) == (2, "", True, 1), command


def test_training_names_the_command_that_uses_its_result(capsys, run):
    for model, command in (
        (SimpleNamespace(labels=("a",)), "classify 'a b' 'a text'"),
        (SimpleNamespace(labels=(), chat_template="x"), "chat 'a b'"),
    ):
        assert next_command(model, Path("a b")) == f"gptjax {command}"

    code, out, _ = gptjax(capsys, "train", run / "config.toml", "--run", run)

    _, command = out.splitlines()[-1].split(maxsplit=1)
    assert (code, gptjax(capsys, *shlex.split(command)[1:])[0]) == (0, 0)


def test_eval_prints_every_metric(capsys, run, tmp_path):
    (tmp_path / "text.txt").write_text("3 times 3 is 9.\n")
    args = ["eval", run, "--text", tmp_path / "text.txt", "--stride", 4]

    code, out, _ = gptjax(capsys, *args)
    metrics = json.loads(gptjax(capsys, *args, "--json")[1])

    assert (code, metrics["tokens"]) == (0, 16)
    assert ["loss", f"{metrics['loss']:.4f}"] in [line.split() for line in out.splitlines()]


def test_data_is_prepared_previewed_and_verified(capsys, tmp_path):
    (tmp_path / "text.txt").write_text("some words\n" * 99)
    folder = tmp_path / "tokens"
    prepare = ["data", "prepare", tmp_path / "text.txt", "--tokenizer", "bytes"]

    assert gptjax(capsys, *prepare, "--out", folder)[0] == 0
    assert "some words" in gptjax(capsys, "data", "preview", folder)[1]
    assert gptjax(capsys, "data", "verify", folder)[0] == 0
    shard = folder / "train-00000.bin"
    shard.write_bytes(b"\1\0" + shard.read_bytes()[2:])
    code, out, _ = gptjax(capsys, "data", "verify", folder)
    assert code == 1
    assert "train-00000.bin" in out


def test_doctor_checks_this_machine_and_names_the_fix_of_each_problem(capsys, monkeypatch):
    assert gptjax(capsys, "doctor")[0] == 0

    versions = doctor.package_versions() | {"grain": "0.1.0"}
    monkeypatch.setattr(doctor, "package_versions", lambda: versions)
    code, out, _ = gptjax(capsys, "doctor")
    assert code == 1
    assert "pip install 'grain>=0.2.15'" in out

    monkeypatch.undo()
    monkeypatch.setattr("gptjax.tokenizer.tokenizer.gpt2_tokenizer", Path("missing").read_text)
    code, out, _ = gptjax(capsys, "doctor")
    assert (code, "'missing' -> install" in out) == (1, True)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (DataError("words of the error"), 2),
        (ResourceError("words of the error"), 1),
        (Interrupted("words of the error"), 75),
        (KeyboardInterrupt(), 130),
        (IsADirectoryError(errno.EISDIR, "words of the error", "a file"), 2),
        (OSError(errno.EIO, "words of the error", "a file"), 1),
    ],
)
def test_the_exit_code_tells_why_a_command_ended(capsys, monkeypatch, error, code):
    def fail(*args, **options):
        raise error

    monkeypatch.setattr("gptjax.tasks.train.train", fail)

    found, out, err = gptjax(capsys, "train", "tiny", "--run", "nowhere")

    assert (found, out) == (code, "")
    assert "words of the error" in err or isinstance(error, KeyboardInterrupt)


SAMPLING = {"max_new_tokens": 3, "temperature": 0.5, "top_k": 4, "top_p": 0.9, "seed": 7}
FLAGS = " ".join(f"--{name.replace('_', '-')} {x}" for name, x in SAMPLING.items())
MORE = {"min_p": 0.1, "repetition_penalty": 1.2, "stop": ("a", "b")}
CHANGES = {"allow_change": ("data.batch_size", "train.steps"), "on_spike": "skip"}
GPTJAX, SUPERVISED = [sys.executable, "-m", "gptjax"], "train tiny --hang-timeout 9"


@pytest.mark.parametrize(
    ("words", "function", "arguments"),
    [
        (
            f"generate M Hi {FLAGS} --min-p 0.1 --repetition-penalty 1.2 --stop a --stop b",
            *("inference.generate.stream", ("model", "Hi", SAMPLING | MORE)),
        ),
        ("generate M Hi --fast-cpu", "runtime.cpu_flags.enable_fast_cpu", ({},)),
        ("generate M Hi --int8", "weights.load.load", ("M", {"int8": True})),
        (f"chat M {FLAGS}", "cli.chat.run_chat", ("model", "M", SAMPLING, {})),
        (
            "train tiny --run a/b --allow-change data.batch_size --allow-change train.steps "
            "--on-spike skip",
            *("tasks.train.train", (load_config(find_config("tiny")), Path("a/b"), CHANGES)),
        ),
        (
            f"{SUPERVISED} --auto-restart",
            *("runtime.supervisor.supervise", ([*GPTJAX, *SUPERVISED.split()], 9.0, {})),
        ),
        ("import M --out d", "weights.load.convert_model", ("M", Path("d"), {})),
        (
            "export M --to hf --out d",
            "exporters.export.export_model",
            ("model", "hf", Path("d"), "", {}),
        ),
    ],
)
def test_options_reach_the_library(capsys, monkeypatch, words, function, arguments):
    results = {"runtime.supervisor.supervise": 75, "inference.generate.stream": []}
    calls, result = [], results.get(function, SimpleNamespace(labels=["a"]))

    def record(*args, **options):
        calls.append((*args, options))
        return result

    importlib.import_module("gptjax.exporters.export")  # before what it imports is replaced
    monkeypatch.setattr("gptjax.weights.load.load", lambda *args, **options: "model")
    monkeypatch.setattr("gptjax.inference.generate.stream", lambda *args, **options: [])
    monkeypatch.setattr(f"gptjax.{function}", record)

    assert gptjax(capsys, *words.split())[0] == (75 if result == 75 else 0)

    assert calls == [arguments]
