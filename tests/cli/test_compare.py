"""`gptjax compare`: tables, picture, and what it says of models and configs."""

import dataclasses
import json
import re
from pathlib import Path

import jax
import pytest
from PIL import Image

from gptjax.cli.main import main
from gptjax.data.prepare import prepare_dataset
from gptjax.evaluation.perplexity import score
from gptjax.evaluation.run_comparison import held_out_documents, read_run_records
from gptjax.weights.model_folder import save
from tests.evaluation.test_run_comparison import write_run
from tests.small_models import make_model

SHAPE = {"context_length": 16, "n_layers": 2, "n_heads": 2, "d_model": 16, "vocab_size": 257}
OPTIONS = {f"model__{name}": value for name, value in SHAPE.items()}


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """Two runs with the same text, of which the second has much smaller parameters."""
    monkeypatch.chdir(tmp_path)
    rows = [json.dumps({"text": f"{n} times {n} is {n * n}."}) + "\n" for n in range(40)]
    Path("rows.jsonl").write_text("".join(rows))
    model = make_model(std=0.5, context_length=16)
    for name, scale, peak_lr in (("wild", 1.0, 1e-2), ("tame", 0.1, 1e-3)):
        write_run(tmp_path / name, optim__peak_lr=peak_lr, **OPTIONS)
        prepare_dataset(["rows.jsonl"], "bytes", Path(name, "data"), val_fraction=0.5)
        params = jax.tree.map(lambda leaf, scale=scale: scale * leaf, model.params)
        save(dataclasses.replace(model, params=params), Path(name, "model"))
    return model


def test_it_prints_the_changes_and_compares_the_models_on_the_held_out_documents(runs, capfd):
    assert main(["compare", "wild", "tame", "--x", "tokens"]) == 0

    printed = capfd.readouterr()
    documents = held_out_documents(read_run_records([Path("wild")])[0], 10**6)
    assert documents is not None
    scores = [score(runs, text) for text in documents]
    mean = sum(x.total_loss for x in scores) / sum(x.tokens for x in scores)
    lines = printed.out.splitlines()
    assert lines[1].split()[:2] == ["wild", "11,072"]
    assert lines[5].split() == ["optim.peak_lr", "0.01", "0.001"]
    (models,) = [line for line in lines if line.startswith("model of tame - model of wild")]
    assert f"- {mean:.4f})" in models
    assert "over 20 documents" in models
    assert models.endswith("the model of tame is better.")
    (configs,) = [line for line in lines if line.startswith("config of tame")]
    assert "1 finished seed and 1 finished seed" in configs
    assert "compare.png" in printed.err
    with Image.open("compare.png") as picture:
        assert picture.size[0] > 500


def test_models_that_saw_different_text_need_a_text(runs, capfd):
    prepare_dataset(["rows.jsonl"], "bytes", Path("other"), val_fraction=0.5, seed=1)
    Path("tame", "data").rename("unused")
    Path("other").rename("tame/data")
    compare = ["compare", "wild", "tame"]

    assert main(compare) == 0
    assert "Give --text" in capfd.readouterr().out
    assert main([*compare, "--text", "rows.jsonl", "--max-bytes", "300", "--markdown"]) == 0

    printed = capfd.readouterr().out
    assert "| `optim.peak_lr` | `0.01` | `0.001` |" in printed
    tokens = re.search(r"with (\d+) tokens", printed)
    assert tokens is not None
    assert 200 < int(tokens[1]) <= 300
    assert "not compared, since they were validated on different data" in printed


def test_three_seeds_of_each_config_are_told_apart_by_their_losses(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    for name, loss, peak_lr in (("low", 2, 1e-2), ("high", 3, 1e-3)):
        for seed in range(3):
            options = {"train__seed": seed, "optim__peak_lr": peak_lr, **OPTIONS}
            write_run(Path(f"{name}{seed}"), loss=loss + seed / 100, **options)
            meta = {"tokens_per_step": 512, "data": {"validation": {"sha256": "1"}}}
            Path(f"{name}{seed}", "meta.json").write_text(json.dumps(meta))
    names = [f"{name}{seed}" for name in ("low", "high") for seed in range(3)]

    assert main(["compare", *names, "--x", "flops", "--out", "new/picture.png"]) == 0

    printed = capfd.readouterr().out
    assert "over 3 and 3 seeds (Welch): the config of high0 is worse." in printed
    assert "models: not compared" in printed
    assert Path("new/picture.png").is_file()
    assert main(["compare", *names[:3]]) == 0
    assert "seeds of one config" in capfd.readouterr().out


def test_it_takes_at_least_two_runs(tmp_path, capfd):
    assert main(["compare", str(tmp_path)]) == 2
    assert main(["compare", str(tmp_path), str(tmp_path / "other")]) == 2
    assert "config.toml" in capfd.readouterr().err


@pytest.mark.parametrize("longest", [1, 400])
def test_it_warns_if_a_few_long_documents_dominate(longest, runs, capfd):
    texts = [f"{n} and " * (longest if n == 0 else 1) for n in range(40)]
    Path("text.jsonl").write_text("".join(json.dumps({"text": x}) + "\n" for x in texts))

    assert main(["compare", "wild", "tame", "--text", "text.jsonl"]) == 0

    assert ("count as 1 equal" in capfd.readouterr().out) == (longest == 400)
