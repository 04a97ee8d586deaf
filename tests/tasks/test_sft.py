import dataclasses
import io
import json

import jax
import numpy as np
import pytest

import gptjax
import gptjax.book
from gptjax.cli.main import main
from gptjax.config import RunConfig, from_dict
from gptjax.errors import ConfigError, DataError, ModelError
from gptjax.evaluation.instructions import evaluate_file
from gptjax.evaluation.llm_judge import LLMJudge
from gptjax.inference.assistant import answer_batch, encode_chat, stream_answer
from gptjax.model.lora import merge_adapters
from gptjax.runtime.preemption import Interrupted
from gptjax.runtime.terminal import sanitize
from gptjax.tasks.train import train
from gptjax.tokenizer.chat_template import load_chat_template
from gptjax.training.finetune import initial_params, resolve_model_config
from gptjax.training.metrics import read_events
from gptjax.weights.model_folder import load_adapters
from tests.judge_server import judging, says
from tests.runs import train_logged
from tests.small_models import make_model

WORDS = ["sky", "sea", "sun", "ant", "elm", "ice", "oak", "owl", "rye", "yew"]


def make_rows():
    """Two tasks on a few words, some of them held out."""
    rows = []
    for number, word in enumerate(WORDS * 2):
        task = "first" if number < len(WORDS) else "upper"
        answer = word[0] if task == "first" else word.upper()
        split = ["train", "train", "train", "validation", "test"][number % 5]
        row = {"prompt": f"{task} {word}", "completion": answer}
        rows.append(row | {"task": task, "split": split})
    return rows


def make_config(folder, **changes) -> RunConfig:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in make_rows()))
    table = {
        "model": {"context_length": 32, "n_layers": 2, "n_heads": 2, "d_model": 16},
        "data": {
            **{"source": str(path), "tokenizer": "bytes", "chat_template": "qa"},
            "batch_size": 4,
        },
        "optim": {"warmup_steps": 2, "peak_lr": 1e-2},
        "train": {"task": "sft", "steps": 12, "eval_every": 6, "log_every": 3},
        "finetune": {},
        "checkpoint": {"every": 4},
    }
    for name, value in changes.items():
        section, option = name.split("__")
        table[section][option] = value
    return from_dict(RunConfig, table)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """A finished run: its config, folder, model and what it printed."""
    folder = tmp_path_factory.mktemp("assistant")
    config, said = make_config(folder), []
    model = train_logged(config, folder / "run", said)
    return config, folder / "run", model, said


def read_rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def events_of(folder, split):
    events = read_events(folder / "metrics.jsonl")
    return [e for e in events if e["event"] == "eval" and e["split"] == split]


@pytest.mark.fast
def test_a_run_leaves_an_assistant_and_what_it_answered(unbroken):
    _, folder, model, said = unbroken

    assert model.chat_template == load_chat_template("qa").source
    assert (folder / "model" / "chat_template.jinja").read_text() == model.chat_template
    validation = events_of(folder, "validation")
    assert [e["step"] for e in validation] == [0, 6, 12]
    assert validation[-1]["response_loss"] < validation[0]["response_loss"]
    assert {"exact_match", "token_f1", "rouge_l"} <= validation[0].keys()
    before, test = events_of(folder, "test")
    assert (before["step"], test["step"]) == (0, 12)
    assert test["response_loss"] < before["response_loss"]
    rows = read_rows(folder / "responses.jsonl")
    assert [row["prompt"] for row in rows] == [
        row["prompt"] for row in make_rows() if row["split"] == "test"
    ]
    exact = [row["response"] == row["completion"] for row in rows]
    assert [row["exact_match"] for row in rows] == exact
    assert test["exact_match"] == pytest.approx(np.mean(exact))
    text = (folder / "report.md").read_text()
    assert "| first |" in text
    assert "| upper |" in text
    assert any("6 conversations" in x or "rows     train 12" in x for x in said)


def test_the_kept_model_is_the_one_that_predicts_the_validation_answers_best(unbroken):
    config, folder, model, _ = unbroken
    best = min(e["response_loss"] for e in events_of(folder, "validation"))
    path = folder.parent / "held-out.jsonl"
    rows = [row for row in make_rows() if row["split"] == "validation"]
    for row in rows:
        del row["split"]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))

    numbers, tasks = evaluate_file(model, str(path), None, None, lambda line: None)

    assert numbers["response_loss"] == pytest.approx(best, rel=1e-6)
    assert numbers["rows"] == len(rows)
    assert set(tasks) == {"first", "upper"}
    assert config.data.chat_template == "qa"


@pytest.mark.parametrize("lost", ["", "metrics.jsonl"])
def test_a_stopped_and_resumed_run_ends_with_the_same_bits(unbroken, monkeypatch, lost):
    config, folder, model, _ = unbroken
    again = folder.parent / f"again{bool(lost)}"
    stops = iter([False] * 6 + [True] * 100)
    monkeypatch.setattr(
        "gptjax.training.run_dir.handle_signals", lambda: Stopping(lambda: next(stops))
    )
    with pytest.raises(Interrupted):
        train(config, again)
    monkeypatch.undo()
    if lost:
        (again / lost).unlink()

    resumed = train(config, again)

    jax.tree.map(np.testing.assert_array_equal, resumed.params, model.params)


class Stopping:
    """A `stop_signal` of which the test decides when it came."""

    def __init__(self, came):
        self.came = came

    def __enter__(self):
        return self.came

    def __exit__(self, *_):
        return None


@pytest.mark.parametrize("batching", ["packed", "book"])
def test_other_ways_of_batching_train_too(tmp_path, batching):
    config = make_config(tmp_path, data__batching=batching, train__steps=2)

    train(config, tmp_path / "run")

    validation = events_of(tmp_path / "run", "validation")
    assert validation[-1]["response_loss"] < validation[0]["response_loss"]


def test_lora_from_a_model_keeps_what_is_frozen_and_merges(unbroken, tmp_path):
    _, folder, start, _ = unbroken
    config = make_config(
        tmp_path,
        finetune__init_from=str(folder),
        finetune__trainable="lora",
        finetune__lora_rank=2,
        data__tokenizer="",
        data__chat_template="",
        train__steps=3,
    )

    model = train(config, tmp_path / "run")

    assert model.chat_template == start.chat_template
    adapters = load_adapters(tmp_path / "run" / "adapters.safetensors")
    again = merge_adapters(start.params, adapters)
    close = lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6)  # noqa: E731
    jax.tree.map(close, again, model.params)
    embedding = model.params["token_embedding"]["embedding"]
    np.testing.assert_array_equal(embedding, start.params["token_embedding"]["embedding"])


def test_the_last_block_alone_can_be_trained(unbroken, tmp_path):
    _, folder, start, _ = unbroken
    config = make_config(
        tmp_path, finetune__init_from=str(folder), finetune__trainable="last-block", train__steps=2
    )

    model = train(config, tmp_path / "run")

    for name, same in (("attention", 0), ("mlp", 0)):
        ours, theirs = (jax.tree.leaves(m.params["blocks"][name]) for m in (model, start))
        for a, b in zip(ours, theirs, strict=True):
            np.testing.assert_array_equal(a[same], b[same])
            assert not np.array_equal(a[1], b[1])


def test_another_tokenizer_keeps_the_rows_of_tokens_that_both_have():
    start = make_model()
    tokenizer = gptjax.tokenizer.train(["the cat the cat the cat"] * 5, 262)
    config = resolve_model_config(RunConfig().model, start, tokenizer)

    params = initial_params(config, start, tokenizer, jax.random.key(0))

    ours, theirs = (np.asarray(p["token_embedding"]["embedding"]) for p in (params, start.params))
    assert ours.shape[0] == tokenizer.vocab_size == 262
    for token, row in start.tokenizer.ranks.items():
        np.testing.assert_array_equal(ours[tokenizer.ranks[token]], theirs[row])
    np.testing.assert_array_equal(ours[tokenizer.eot_token], theirs[start.tokenizer.eot_token])
    jax.tree.map(np.testing.assert_array_equal, params["blocks"], start.params["blocks"])


@pytest.fixture(scope="module")
def assistant():
    return dataclasses.replace(
        make_model(context_length=64), chat_template=load_chat_template("chatml").source
    )


def test_many_answers_are_those_that_come_alone(assistant):
    asked = [[{"role": "user", "content": "x" * n}] for n in (1, 9, 4, 2)]

    together = answer_batch(assistant, asked, 6)

    alone = [gptjax.answer(assistant, each, temperature=0.0, max_new_tokens=6) for each in asked]
    assert together == alone
    pieces = stream_answer(assistant, asked[1], temperature=0.0, max_new_tokens=6)
    assert "".join(pieces).strip() == alone[1]


def test_a_question_is_a_conversation_of_one_message(assistant):
    options = {"temperature": 0.0, "max_new_tokens": 3}

    asked = [{"role": "user", "content": "why"}]
    assert gptjax.answer(assistant, "why", **options) == gptjax.answer(assistant, asked, **options)
    assert assistant.tokenizer.decode(encode_chat(assistant, asked)) == (
        "<|im_start|>user\nwhy<|im_end|>\n<|im_start|>assistant\n"
    )


def test_a_base_model_answers_nothing():
    with pytest.raises(ModelError, match="this model has no chat template"):
        gptjax.answer(make_model(), "why")


def test_a_model_with_a_template_is_saved_exported_and_loaded(assistant, tmp_path):
    gptjax.save(assistant, tmp_path / "own")
    code = main(["export", str(tmp_path / "own"), "--to", "hf", "--out", f"{tmp_path}/hf"])

    assert code == 0
    assert gptjax.load(tmp_path / "own").chat_template == assistant.chat_template
    assert gptjax.load(tmp_path / "hf").chat_template == assistant.chat_template
    (tmp_path / "hf" / "chat_template.jinja").write_text("{{ broken")
    said = []
    assert gptjax.load(tmp_path / "hf", said.append).chat_template == ""
    assert "template not used" in said[-1]
    (tmp_path / "own" / "chat_template.jinja").write_text("{{ broken")
    with pytest.raises(ModelError, match=r"chat_template\.jinja: the chat "):
        gptjax.load(tmp_path / "own")


def test_eval_writes_responses_and_judgements(unbroken, tmp_path, capsys):
    _, folder, _, _ = unbroken
    data = folder.parent / "rows.jsonl"
    replies = [says("80"), says("nonsense"), *[says("60")] * 18]
    with judging(*replies) as (url, asked):
        options = ["--out", f"{tmp_path}/out.jsonl", "--judge", url, "--json"]
        code = main(["eval", str(folder), "--chat-data", str(data), *options])

    assert code == 0
    numbers = json.loads(capsys.readouterr().out)
    assert (numbers["judged"], numbers["scored"], numbers["unparsable"]) == (20, 19, 1)
    assert numbers["mean_score"] == pytest.approx((80 + 18 * 60) / 19)
    rows = read_rows(tmp_path / "out.jsonl")
    assert [row["judge_score"] for row in rows] == [80, None, *[60] * 18]
    assert "Given the input `Q: first sky` and correct output `s`" in str(asked[0])
    assert main(["eval", str(folder), "--chat-data", str(data), *options]) == 2
    assert "out.jsonl already exists" in capsys.readouterr().err


def test_a_judge_that_is_not_there_loses_no_response(unbroken, tmp_path):
    _, folder, model, _ = unbroken
    judge = LLMJudge("http://127.0.0.1:9/v1", "nobody")
    data, out = str(folder.parent / "rows.jsonl"), tmp_path / "out.jsonl"

    with pytest.raises(ModelError, match=r"The responses are in .*out\.jsonl"):
        evaluate_file(model, data, out, judge, lambda line: None)

    assert len(out.read_text().splitlines()) == 20
    with pytest.raises(ConfigError, match="--out FILE"):
        evaluate_file(model, data, None, judge, lambda line: None)


def test_generate_can_ask_an_assistant(unbroken, capsys):
    _, folder, model, _ = unbroken

    code = main(["generate", str(folder), "first sky", "--chat", "--temperature", "0"])

    assert code == 0
    expected = gptjax.answer(model, "first sky", temperature=0.0)
    assert capsys.readouterr().out == f"{expected}\n"


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"data__chat_template": "alpca"}, ConfigError, "no chat template 'alpca'. Did you"),
        ({"data__batching": "concat"}, DataError, "data.batching=concat"),
        ({"model__context_length": 1}, DataError, "no train conversation of .* fits"),
        ({"data__tokenizer": "bpe:x"}, ConfigError, "data.tokenizer='bpe:x'"),
    ],
)
def test_a_run_that_cannot_be_says_why(tmp_path, changes, error, message):
    config = make_config(tmp_path, **changes)

    with pytest.raises(error, match=message):
        train(config, tmp_path / "run")


def test_the_preview_shows_what_is_learned(unbroken, tmp_path, capsys):
    _, folder, model, _ = unbroken
    command = ["data", "preview", str(folder.parent / "rows.jsonl")]
    command += ["--chat-template", "qa", "--tokenizer", "bytes"]

    assert main([*command, "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(rows) == 20
    assert rows[0]["text"] == "Q: first sky\nA: s<|endoftext|>"
    assert model.tokenizer.decode(rows[0]["tokens"]) == rows[0]["text"]
    assert rows[0]["loss_mask"] == [0] * (len(rows[0]["tokens"]) - 2) + [1, 1]
    assert main([*command, "--rows", "1"]) == 0
    assert "A: ⟦s<|endoftext|>⟧" in capsys.readouterr().out
    assert main([*command, "--html", str(tmp_path / "page.html")]) == 0
    assert "<mark" in (tmp_path / "page.html").read_text()
    assert main([*command[:2], str(tmp_path / "nothing.json")]) == 2


def test_chat_answers_the_lines_of_a_pipe(assistant, tmp_path, monkeypatch, capsys):
    gptjax.save(assistant, tmp_path / "model")
    asked = ["sky", "sea", "what?"]
    lines = "\n/reset\n".join([*asked, "/nonsense"])
    monkeypatch.setattr("sys.stdin", io.StringIO(lines))
    options = {"temperature": 0.0, "max_new_tokens": 8}
    answers = [gptjax.answer(assistant, text, **options) for text in asked]
    assert all(answers), "the test needs a model that says something"
    flags = ["--temperature", "0", "--max-new-tokens", "8"]

    code = main(["chat", str(tmp_path / "model"), *flags])

    assert code == 0
    said = capsys.readouterr()
    assert said.out.split() == sanitize(" ".join(answers)).split()
    assert "there is no command /nonsense" in said.err
