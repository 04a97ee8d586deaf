"""Nothing that is read is run, and no secret is written."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from gptjax.tokenizer.chat_template import load_chat_template
from gptjax.weights.model_folder import Model, save
from tests.file_server import plain, serving
from tests.judge_server import judging, says
from tests.small_models import make_model

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = sorted((ROOT / "gptjax").rglob("*.py"))

MODULES = {  # that run, or make objects of, what a file says; or unpack it anywhere
    *("pickle", "cPickle", "cloudpickle", "dill", "marshal", "shelve", "joblib"),
    *("copyreg", "yaml", "code", "codeop", "runpy", "imp", "zipimport", "xmlrpc"),
    *("tarfile", "zipfile", "torch", "tensorflow", "multiprocessing"),
    "jax.experimental.serialize_executable",
}
CALLS = {  # by any name that ends so
    *("eval", "exec", "compile", "__import__", "system", "popen", "extractall"),
    *("unpack_archive", "load_module", "exec_module", "literal_eval"),
    *("jinja2.Template", "jinja2.Environment", "NativeEnvironment", "np.load"),
    *("torch.load", "deserialize_and_load", "compilation_cache.set_cache_dir"),
}
WORDS = {"allow_pickle", "shell", "weights_only"}  # arguments
STRINGS = {"jax_compilation_cache_dir"}  # options of JAX
LOWERED = "of a program that was lowered, not of a text"
ALLOWED = {  # module: {what: why}
    "runtime.compilation_cache": {
        "jax_compilation_cache_dir": "a directory that only the user can write to"
    },
    "planning.aot": {"compile": LOWERED},
    "training.trainer": {"compile": LOWERED},
    "bench.device": {"compile": LOWERED},
    "bench.workloads": {"compile": LOWERED},
    "bench.torch_workloads": {"compile": "torch.compile of a model", "eval": "model.eval()"},
}
COMPILERS = {"re", "regex"}  # of patterns


def dangers(tree):
    """What a source file uses of the tables above."""
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=names):
                found = {alias.name for alias in names}
            case ast.ImportFrom(module=str(module), names=names):
                found = {module, *(f"{module}.{alias.name}" for alias in names)}
            case ast.Call(func=func, keywords=words):
                yield from WORDS & {word.arg for word in words}
                name = ast.unparse(func)
                if name.split(".")[0] not in COMPILERS or not name.endswith("compile"):
                    ends = {name, ".".join(name.split(".")[-2:]), name.split(".")[-1]}
                    yield from CALLS & ends
                continue
            case ast.Constant(value=str(text)):
                yield from STRINGS & {text}
                continue
            case ast.Attribute(attr=name):
                yield from STRINGS & {name}
                continue
            case _:
                continue
        parts = {name.split(".")[0] for name in found} | found
        yield from MODULES & parts


def name_of(file):
    return ".".join(file.relative_to(ROOT / "gptjax").with_suffix("").parts)


def test_nothing_in_the_package_can_run_what_a_file_says():
    found = {}
    for file in PACKAGE:
        uses = set(dangers(ast.parse(file.read_text(encoding="utf-8"))))
        if uses:
            found[name_of(file)] = uses

    assert found == {name: set(reasons) for name, reasons in ALLOWED.items()}


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "from torch import load",
        "import tarfile as t",
        "from jax.experimental import serialize_executable",
        "eval('1')",
        "builtins.exec(x)",
        "archive.extractall(x)",
        "np.load(path, allow_pickle=True)",
        "subprocess.run(x, shell=True)",
        "jinja2.Template(x)",
        "compile(x, 'y', 'exec')",
        "jax.config.update('jax_compilation_cache_dir', x)",
    ],
)
def test_each_danger_would_be_seen(line):
    assert set(dangers(ast.parse(line)))


SECRETS = {
    "HF_TOKEN": "canary-hf-4711",
    "AWS_SECRET_ACCESS_KEY": "canary-aws-4711",
    "OPENAI_API_KEY": "canary-openai-4711",
    "HTTPS_PROXY": "http://user:canary-proxy-4711@127.0.0.1:9",
    "PASSWORD_OF_MINE": "canary-mine-4711",
}
CONFIG = """
[model]
context_length = 16
n_layers = 1
n_heads = 2
d_model = 8
[data]
source = "text.txt"
tokenizer = "bytes"
[optim]
warmup_steps = 1
[train]
steps = 2
log_every = 1
sample_prompt = ""
"""
CRASH = """
import sys
from gptjax.cli.main import main
from gptjax.training import trainer
def save_checkpoint(*arguments):
    raise RuntimeError("a crash")
trainer.save_checkpoint = save_checkpoint
sys.exit(main(sys.argv[1:]))
"""
COMPILED = {  # by the first command for the others, in a file that is looked at too
    "JAX_ENABLE_COMPILATION_CACHE": "true",
    "JAX_COMPILATION_CACHE_DIR": "programs",
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
}
RUN = "import sys; from gptjax.cli.main import main; sys.exit(main(sys.argv[1:]))"


def said(folder, *arguments, code=RUN, **environment):
    """(exit code, all that a command prints) with secrets in its environment."""
    known = {**os.environ, **SECRETS, "GPTJAX_HOME": str(folder / "home"), **COMPILED}
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=folder,
        env={**known, "PYTHONPATH": str(ROOT), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        check=False,
    )
    return done.returncode, done.stdout


def test_no_secret_of_the_environment_is_printed_or_written(tmp_path):
    (tmp_path / "text.txt").write_text("One and one is two. " * 50)
    (tmp_path / "tiny.toml").write_text(CONFIG)
    row = {"prompt": "Hi", "completion": "Ho"}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    made = make_model(context_length=64)
    source = load_chat_template("qa").source
    assistant = Model(made.config, made.params, made.tokenizer, chat_template=source)
    save(assistant, tmp_path / "assistant")
    bad = "https://user:canary-url-4711@127.0.0.1:9/v1"

    outputs = [
        said(tmp_path, "train", "tiny.toml", "--run", "run"),
        said(tmp_path, "train", "tiny.toml", "--run", "crashed", code=CRASH),
        said(tmp_path, "generate", "owner/name", "Hi", HF_ENDPOINT=bad),
    ]
    with serving(plain(b"no", 401)) as (url, asked):
        end = url.removesuffix("/file")
        outputs.append(said(tmp_path, "generate", "owner/name", "Hi", HF_ENDPOINT=end))
    with judging(says("80")) as (url, judged):
        for address, out in ((url, "out.jsonl"), (bad, "other.jsonl")):
            options = ["--chat-data", "rows.jsonl", "--out", out, "--judge", address]
            outputs.append(said(tmp_path, "eval", "assistant", *options))

    assert [code for code, _ in outputs] == [0, 1, 2, 2, 0, 2], outputs
    assert b"a crash" in outputs[1][1]
    assert SECRETS["HF_TOKEN"] in asked[0].headers["authorization"]  # it was in use
    assert SECRETS["OPENAI_API_KEY"] in judged[0].headers["authorization"]
    for _, text in outputs:
        assert b"canary" not in text
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 20
    for path in files:
        assert b"canary" not in path.read_bytes(), path


def test_one_module_opens_urls():
    found = {
        name_of(file) for file in PACKAGE if "urllib.request" in file.read_text(encoding="utf-8")
    }

    assert found == {"fileio.download"}
