"""README.md: its Python and commands are valid, and the files it names exist."""

import re
import shlex
from email.message import Message
from pathlib import Path

import jax

import gptjax
from gptjax import errors
from gptjax.config import builtin_config_dir, find_config, load_config
from tests.command_line import parse_command

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text("utf-8")
COMMANDS = ("pip install -e . && gptjax quickstart", 'pip install -e ".[test]" && pytest')

# "gptjax" or "gptjax[extra]" as a requirement of pip, without an address behind it.
FROM_INDEX = re.compile(
    r"pip install [^\n&|;]*?(?<=[\s\"'])gptjax(\[[\w,-]+\])?(?! @ )(?=[\s\"'\\]|$)", re.M
)


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_the_python_blocks_run_in_order(tmp_path, monkeypatch, capsys):
    scope = {}

    # The last block: others test training and streaming.
    monkeypatch.setattr(gptjax, "train", lambda config, run_dir: scope["model"])
    monkeypatch.setattr(gptjax, "stream", lambda model, prompt, max_new_tokens: prompt)
    monkeypatch.chdir(tmp_path)

    with jax.default_prng_impl("unsafe_rbg"):  # compiles faster
        for block in blocks("python"):
            exec(compile(block, "README.md", "exec"), scope)

    assert (tmp_path / "my-model" / "model.safetensors").is_file()
    assert "(2, 1, 2, 22, 22)" in capsys.readouterr().out


def test_the_commands_parse_and_all_configs_are_valid():
    bash = blocks("bash")
    assert set(COMMANDS) <= {block.strip() for block in bash}
    lines = [line for block in bash for line in block.splitlines() if line.startswith("gptjax ")]
    names = re.findall(r"`?gptjax train ([\w/]+)", README)
    for line in lines:
        _, arguments = parse_command(shlex.split(line, comments=True)[1:])
        names += [arguments["config_name"]] if "config_name" in arguments else []
    assert {"text", "classify/csv"} <= set(names)
    for path in [*map(find_config, names), *builtin_config_dir().rglob("*.toml")]:
        config = load_config(path)
        assert config.optim.warmup_steps <= config.train.steps, path


def test_the_files_that_it_names_exist_and_the_tree_lists_all_packages():
    links = re.findall(r"\]\((?!https)([^)]*)\)", README)
    paths = re.findall(r"`((?:gptjax|configs|tests|colab)/[\w/.]*)`", README)
    (tree,) = [block for block in blocks("text") if block.startswith("gptjax/\n")]
    packages = {path.parent.name for path in (ROOT / "gptjax").glob("*/__init__.py")}

    assert links
    assert paths
    for name in (*links, *paths):
        assert (ROOT / name).exists(), name
    assert packages <= set(re.findall(r"(\w+)/", tree))


def test_a_clone_installs_itself_and_a_wheel_installs_from_its_repository(tmp_path, monkeypatch):
    assert errors.install_command("tpu-plan") == 'pip install -e ".[tpu-plan]"'
    address = "https://github.com/someone/something"
    found = Message()
    found["Project-URL"] = f"Repository, {address}"
    monkeypatch.setattr(errors, "PROJECT_FILE", tmp_path / "pyproject.toml")
    monkeypatch.setattr("importlib.metadata.metadata", lambda name: found)
    assert errors.install_command("tpu") == f'pip install "gptjax[tpu] @ git+{address}"'


def test_no_file_installs_a_package_of_this_name_from_an_index():
    folders = [ROOT / name for name in ("gptjax", "configs", "colab")]
    for path in [ROOT / "README.md", *(p for f in folders for p in f.rglob("*") if p.is_file())]:
        assert not FROM_INDEX.search(path.read_text("utf-8", errors="replace")), path
