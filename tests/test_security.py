"""Nothing that is read is executed, and no secret is written."""

import dataclasses
import io
import json
import re
from pathlib import Path

import pytest

import gptjax
from gptjax.cli.main import main
from gptjax.tokenizer.chat_template import load_chat_template
from gptjax.training import trainer
from gptjax.weights.model_folder import save
from tests.servers import judging, plain, says, serving, use_hub
from tests.small_models import make_model

PACKAGE = Path(gptjax.__file__).parent
# Calls that execute or unpickle the content of a file, beyond ruff's rules
# and the imports that test_style.py forbids.
DANGEROUS = re.compile(
    r"\b(tarfile|zipfile|runpy|multiprocessing|serialize_executable|deserialize_and_load"
    r"|extractall|unpack_archive|load_module|exec_module|literal_eval|Environment"
    r"|NativeEnvironment|allow_pickle|weights_only)\b(?!\")"
)


def test_nothing_in_the_package_executes_the_content_of_files():
    for file in PACKAGE.rglob("*.py"):
        assert not DANGEROUS.search(file.read_text(encoding="utf-8")), file


EVIL = "\x1b]0;title\x07\x9b2J\u202e"  # sets the title, clears the screen, reverses the line


def test_no_text_from_outside_controls_the_terminal(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    Path("table.csv").write_text(f"{EVIL},b{EVIL}\nx,{EVIL}\n" * 9)
    Path("broken.jsonl").write_text(json.dumps({EVIL: EVIL}) + "\n")
    Path("key.toml").write_text(f"[train]\n{json.dumps(EVIL)} = 1")
    Path("template.jinja").write_text(f"{{{{ raise_exception({EVIL!r}) }}}}")
    Path("rows.jsonl").write_text(json.dumps({"prompt": EVIL, "completion": EVIL}) + "\n")
    model = make_model(context_length=64)
    assistant = dataclasses.replace(model, chat_template=load_chat_template("qa").source)
    save(assistant, "assistant")
    save(model, f"model{EVIL}")
    monkeypatch.setattr("sys.stdin", io.StringIO(f"/{EVIL}\n{EVIL}\n"))
    preview = ["data", "preview", "rows.jsonl", "--tokenizer", "bytes"]
    commands = [
        [EVIL],
        ["train", EVIL],
        ["train", "tiny", f"--{EVIL}", "1"],
        ["train", "tiny", "--train.steps", EVIL],
        ["train", "key.toml"],
        ["generate", f"model{EVIL}", EVIL, "--max-new-tokens", "3"],
        ["generate", f"no{EVIL}/model", EVIL],
        ["chat", "assistant", "--max-new-tokens", "3"],
        ["eval", "assistant", "--classification-data", "table.csv"],
        ["data", "prepare", "table.csv", "--tokenizer", "bytes", "--out", f"out{EVIL}"],
        ["data", "prepare", "table.csv", "--column", EVIL, "--tokenizer", "bytes", "--out", "out"],
        ["data", "preview", "broken.jsonl"],
        preview,
        [*preview, "--json"],
        [*preview, "--chat-template", "template.jinja"],
    ]

    with serving(plain(EVIL.encode(), 401)) as (hub, _):
        use_hub(monkeypatch, tmp_path / "hub", hub)
        codes = {main(command) for command in [*commands, ["generate", "owner/name", "Hi"]]}

    printed = capfd.readouterr()
    assert codes == {0, 2}
    assert_sanitized(printed.out, printed.err)


def assert_sanitized(*texts):
    for text in texts:
        assert "\ufffd]0;title" in text
        assert not {"\x1b", "\x07", "\x9b", "\u202e"} & set(text)


SECRETS = {
    "HF_TOKEN": "canary-hf-4711",
    "AWS_SECRET_ACCESS_KEY": "canary-aws-4711",
    "OPENAI_API_KEY": "canary-openai-4711",
    "HTTPS_PROXY": "http://user:canary-proxy-4711@127.0.0.1:9",
    "PASSWORD_OF_MINE": "canary-mine-4711",
}
CONFIG = """
model = {context_length = 16, n_layers = 1, n_heads = 2, d_model = 8}
data = {source = "text.txt", tokenizer = "bytes"}
optim.warmup_steps = 1
train = {steps = 2, log_every = 1, sample_prompt = "\\u001b]0;title"}
"""


def test_no_secret_of_the_environment_is_printed_or_written(tmp_path, monkeypatch, capfd):
    (tmp_path / "text.txt").write_text("One and one is two. " * 50)
    (tmp_path / "tiny.toml").write_text(CONFIG)
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "Hi", "completion": EVIL}))
    model = make_model(context_length=64, n_layers=1)
    template = load_chat_template("qa").source
    save(dataclasses.replace(model, chat_template=template), tmp_path / "qa")
    monkeypatch.chdir(tmp_path)
    judge = ["eval", "qa", "--chat-data", "rows.jsonl", "--judge"]

    with serving(plain(b"no", 401)) as (hub, asked), judging(says("80")) as (url, judged):
        use_hub(monkeypatch, tmp_path / "hub", hub)
        for name, secret in SECRETS.items():
            monkeypatch.setenv(name, secret)
        codes = [
            main(["train", "tiny.toml", "--run", "run"]),
            main(["generate", "owner/name", "Hi"]),
            main([*judge, url, "--out", "out.jsonl"]),
            main([*judge, "https://user:canary-url-4711@127.0.0.1:9/v1", "--out", "b.jsonl"]),
        ]
        monkeypatch.setattr(trainer, "save_checkpoint", None)
        with pytest.raises(TypeError, match="NoneType"):  # a crash
            main(["train", "tiny.toml", "--run", "crashed"])

    printed = capfd.readouterr()
    assert codes == [0, 2, 0, 2], printed
    assert SECRETS["HF_TOKEN"] in asked[0].headers["authorization"]  # it was in use
    assert SECRETS["OPENAI_API_KEY"] in judged[0].headers["authorization"]
    assert "canary" not in printed.out + printed.err
    assert_sanitized(printed.out, (tmp_path / "run" / "report.md").read_text())
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 15
    for path in files:
        assert b"canary" not in path.read_bytes(), path
