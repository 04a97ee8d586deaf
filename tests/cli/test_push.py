"""`gptjax push`: what reaches a hub is what the dry run lists, and is not private."""

import dataclasses
import json
import tomllib

import pytest
from huggingface_hub import constants

import gptjax
from gptjax.cli.main import main
from gptjax.weights.model_folder import save
from tests.evaluation.test_run_comparison import write_run
from tests.servers import serving, use_hub, writable_hub
from tests.small_models import assert_same, make_model

# huggingface_hub 2.4 uploads in a way that httpx deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
SECRET = "secret-place"  # in the paths of the machine


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Files that the hub has received."""
    stored = {}
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    with serving(writable_hub(stored)) as (url, _):
        use_hub(monkeypatch, tmp_path / "cache", url)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
        monkeypatch.setenv("HF_TOKEN", "hf_x")
        monkeypatch.setattr("huggingface_hub.hf_api.constants.ENDPOINT", constants.ENDPOINT)
        yield stored


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A run of a classifier, with paths of this machine in its options and records."""
    folder = tmp_path / SECRET / "run"
    options = {"data__source": f"/home/me/{SECRET}.csv", "train__sample_prompt": SECRET}
    options |= {"data__tokenizer": f"../{SECRET}", "finetune__init_from": f"{SECRET}/model"}
    (tmp_path / SECRET).mkdir()
    monkeypatch.chdir(tmp_path / SECRET)
    (tmp_path / SECRET / SECRET / "model").mkdir(parents=True)
    write_run(folder, metadata={"command": ["gptjax", f"--run={SECRET}"]}, **options)
    model = make_model(bias=False, qkv_bias=False, norm="rms", mlp="relu2")
    save(model, folder / "model")
    return folder, model


def test_it_uploads_the_files_of_the_dry_run_and_nothing_private(hub, run, capsys):
    folder, model = run

    assert main(["push", str(folder), "me/gpt", "--license", "mit", "--dry-run"]) == 0
    listed = capsys.readouterr().out
    assert not hub
    assert main(["push", str(folder), "me/gpt", "--license", "mit"]) == 0

    assert {line.split()[1]: line.split()[0].replace(",", "") for line in listed.splitlines()} == {
        name: str(len(content)) for name, content in hub.items()
    }
    assert not [name for name, content in hub.items() if SECRET.encode() in content]
    assert_same(load_files(hub, folder.parent / "copy"), model)


def load_files(files, folder):
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return gptjax.load(folder)


def test_the_card_of_a_classifier_says_how_to_load_it(hub, run):
    folder = run[0].parent / "spam"
    save(
        dataclasses.replace(make_model(n_classes=2, head_bias=False), labels=("no", "yes")), folder
    )

    assert main(["push", str(folder), "me/spam"]) == 0

    metadata, body = hub["README.md"].decode().removeprefix("---\n").split("---\n", 1)
    assert "license: unknown\n" in metadata
    assert "library_name: transformers\n" in metadata
    assert 'from_pretrained("me/spam")' in body
    assert "gptjax classify me/spam" in body
    assert json.loads(hub["config.json"])["id2label"] == {"0": "no", "1": "yes"}


def test_the_card_of_a_run_has_its_last_results_and_changed_options(hub, run):
    folder, _ = run

    assert main(["push", str(folder), "me/gpt"]) == 0

    card = hub["README.md"].decode()
    assert "| validation | 2.1000 | 2.0000 |" in card
    options = tomllib.loads(card.split("```toml\n")[1].split("```")[0])
    assert options["train"]["eval_every"] == 10
    assert "source" not in options["data"]


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["gpt"], "OWNER/NAME"),
        (["me/gpt@v1"], "OWNER/NAME"),
        (["me/gpt", "--license", "my own"], "--license"),
    ],
)
def test_invalid_names_are_errors(arguments, word, hub, run, capsys):
    assert main(["push", str(run[0]), *arguments]) == 2

    assert word in capsys.readouterr().err
    assert not hub


def test_an_upload_that_is_not_allowed_says_so(hub, run, monkeypatch, capsys):
    monkeypatch.setenv("GPTJAX_OFFLINE", "1")

    assert main(["push", str(run[0]), "me/gpt"]) == 2

    assert "GPTJAX_OFFLINE" in capsys.readouterr().err
    assert not hub
