"""Supervised fine-tuning: runs, their answers, and commands for assistants."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest

import gptjax
from gptjax.cli.main import main
from gptjax.config import RunConfig
from gptjax.data.conversations import Conversation
from gptjax.errors import ConfigError, DataError, ModelError
from gptjax.evaluation.instructions import (
    SCORE_FUNCTIONS,
    ResponseEval,
    evaluate_file,
    generate_responses,
)
from gptjax.evaluation.llm_judge import LLMJudge
from gptjax.evaluation.perplexity import Evaluation
from gptjax.inference.assistant import answer_batch, encode_chat, stream_answer
from gptjax.tasks import sft
from gptjax.tasks.train import train
from gptjax.tokenizer.chat_template import load_chat_template
from gptjax.training.finetune import initial_params, resolve_model_config
from gptjax.training.run_dir import RUN_FILES, RUN_FOLDERS
from gptjax.training.task import RunContext
from gptjax.weights.model_folder import Model
from tests.runs import config_with, delete_after, evaluations
from tests.servers import judging, says
from tests.small_models import assert_same, random_params

WORDS = ["sky", "sea", "sun", "ant", "elm", "ice", "oak", "owl", "rye", "yew"]


def make_rows():
    """Two tasks on a few words, some of them held out."""
    tasks = {"first": [w[0] for w in WORDS], "upper": [w.upper() for w in WORDS]}
    splits = ["train", "train", "train", "validation", "test"]
    return [
        {"prompt": f"{task} {word}", "completion": answer, "task": task, "split": splits[n % 5]}
        for task, answers in tasks.items()
        for n, (word, answer) in enumerate(zip(WORDS, answers, strict=True))
    ]


def make_config(folder, **changes) -> RunConfig:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in make_rows()))
    table = {
        "model": {"context_length": 32, "n_layers": 2, "n_heads": 2, "d_model": 16},
        "data": {"source": str(path), "tokenizer": "bytes", "chat_template": "qa", "batch_size": 4},
        "optim": {"warmup_steps": 2, "peak_lr": 1e-2},
        "train": {"task": "sft", "steps": 12, "eval_every": 6, "log_every": 3},
        "checkpoint": {"every": 4},
    }
    return config_with(table, **changes)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run: its config, folder and model."""
    folder = tmp_path_factory.mktemp("assistant")
    config = make_config(folder)
    return config, folder / "run", train(config, folder / "run")


def read_rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_run_writes_an_assistant_and_its_answers(finished):
    _, folder, model = finished

    assert model.chat_template == load_chat_template("qa").source
    validation = evaluations(folder, "validation")
    assert [e["step"] for e in validation] == [0, 6, 12]
    assert validation[-1]["response_loss"] < validation[0]["response_loss"]
    assert {"exact_match", "token_f1", "rouge_l"} <= validation[0].keys()
    before, test = evaluations(folder, "test")
    assert (before["step"], test["step"]) == (0, 12)
    assert test["response_loss"] < before["response_loss"]
    assert {path.name for path in folder.iterdir()} <= {*RUN_FILES, *RUN_FOLDERS}
    rows = read_rows(folder / "responses.jsonl")
    expected = [row["prompt"] for row in make_rows() if row["split"] == "test"]
    assert [row["prompt"] for row in rows] == expected
    exact = [row["response"] == row["completion"] for row in rows]
    assert [row["exact_match"] for row in rows] == exact
    assert test["exact_match"] == pytest.approx(np.mean(exact))


def test_another_tokenizer_keeps_the_embeddings_of_shared_tokens(finished, caplog):
    caplog.set_level("INFO", "gptjax")
    assistant = finished[2]
    tokenizer = gptjax.tokenizer.train(["the cat the cat the cat"] * 5, 262)
    config = resolve_model_config(RunConfig().model, assistant, tokenizer)

    params = initial_params(config, assistant, tokenizer, jax.random.key(0))

    assert "257 of 262 keep their embeddings; the initial model has 257" in caplog.text
    new, old = (np.asarray(p["token_embedding"]["embedding"]) for p in (params, assistant.params))
    assert new.shape[0] == tokenizer.vocab_size == 262
    for token, row in assistant.tokenizer.ranks.items():
        np.testing.assert_array_equal(new[tokenizer.ranks[token]], old[row])
    np.testing.assert_array_equal(new[tokenizer.eot_token], old[assistant.tokenizer.eot_token])
    jax.tree.map(np.testing.assert_array_equal, params["blocks"], assistant.params["blocks"])


def test_answers_are_the_same_alone_in_a_batch_streamed_and_printed(finished, tmp_path, capsys):
    assistant = dataclasses.replace(finished[2], params=random_params(finished[2].config))
    gptjax.save(assistant, tmp_path)
    chats = [[{"role": "user", "content": "x" * n}] for n in (1, 8, 4)]
    options = {"temperature": 0.0, "max_new_tokens": 5}

    answers = answer_batch(assistant, chats, 5)

    assert all(answers)
    assert answers == [gptjax.answer(assistant, chat, **options) for chat in chats]
    assert "".join(stream_answer(assistant, chats[1], **options)).strip() == answers[1]
    reference = {"role": "assistant", "content": "no"}
    conversations = [Conversation((*chat, reference), {}, "") for chat in chats]
    responses = generate_responses(assistant, conversations, 5)
    assert [result.response for result in responses] == answers
    words = f"generate {tmp_path} xxxx --chat --temperature 0 --max-new-tokens 5"
    assert main(words.split()) == 0
    assert capsys.readouterr().out == f"{answers[2]}\n"
    assert assistant.tokenizer.decode(encode_chat(assistant, chats[0])) == "Q: x\nA: "
    with pytest.raises(ModelError, match="chat template"):
        gptjax.answer(dataclasses.replace(assistant, chat_template=""), "why")


def test_an_unfinished_run_answers_with_its_newest_checkpoint(finished, tmp_path, capsys):
    _, folder, model = finished
    run_dir = shutil.copytree(folder, tmp_path / "run")
    delete_after(run_dir / "checkpoints", 8)

    words = f"generate {run_dir} x --chat --max-new-tokens 1".split()
    assert main(words) == 0
    assert capsys.readouterr().err == f"step     8 of the unfinished run {run_dir}\n"
    newest = gptjax.load(run_dir)
    assert newest.chat_template == model.chat_template
    assert not np.array_equal(*(jax.tree.leaves(m.params)[0] for m in (newest, model)))
    (run_dir / "model" / "model.safetensors").unlink()  # as before the first evaluation
    assert_same(gptjax.load(run_dir), newest)


def test_eval_writes_responses_and_judgements(finished, tmp_path, capsys):
    folder, model = finished[1:3]
    data, out = str(folder.parent / "rows.jsonl"), tmp_path / "out.jsonl"
    command = ["eval", str(folder), "--chat-data", data, "--json", "--out", str(out)]

    with judging(says("80"), says("nonsense"), *[says("60")] * 18) as (url, requests):
        assert main([*command, "--judge", url]) == 0

    numbers = json.loads(capsys.readouterr().out)
    assert (numbers["judged"], numbers["scored"], numbers["unparsable"]) == (20, 19, 1)
    assert numbers["mean_score"] == pytest.approx((80 + 18 * 60) / 19)
    rows = read_rows(out)
    assert [row["judge_score"] for row in rows] == [80, None, *[60] * 18]
    assert "Given the input `Q: first sky` and correct output `s`" in str(requests[0])
    assert main(command) == 2  # out.jsonl already exists
    # No response is lost if there is no judge.
    judge, other = LLMJudge("http://127.0.0.1:9/v1", "nobody"), tmp_path / "other.jsonl"
    with pytest.raises(ModelError, match=r"other\.jsonl"):
        evaluate_file(model, data, other, judge)
    assert len(read_rows(other)) == 20


def test_evaluations_during_training_are_bounded(tmp_path, monkeypatch):
    config = make_config(tmp_path, train__eval_batches=1)
    monkeypatch.setattr(sft, "LOSS_BATCH_SIZE", 2)
    monkeypatch.setattr(sft, "NUM_TEST_SAMPLES", 3)
    run, data = sft.load_sft_data(RunContext(config, tmp_path))
    sizes, model = {"loss": [], "answers": []}, Model(run.config.model, {}, data.inputs.tokenizer)

    def example_loss(model, examples):
        sizes["loss"].append(len(examples))
        return Evaluation(1.0, 1, 1, 1.0)

    def generate(model, conversations, max_new_tokens):
        sizes["answers"].append(len(conversations))
        return [ResponseEval(conversations[0], "", "", dict.fromkeys(SCORE_FUNCTIONS, 0.0))]

    monkeypatch.setattr(sft, "example_loss", example_loss)
    monkeypatch.setattr(sft, "generate_responses", generate)
    sft.make_sft_evaluate(run, data)(model, 0, False)

    assert sizes == {"loss": [2, 2, 3], "answers": [4, 3]}
    assert [len(part) for part in data.examples.values()] == [12, 4, 4]


def test_invalid_data_and_options_are_reported(tmp_path):
    for changes, error, message in [
        ({"data__chat_template": "alpca"}, ConfigError, r"'alpca'.*alpaca"),
        ({"data__batching": "concat"}, ConfigError, r"data\.batching=concat"),
        ({"model__context_length": 1}, DataError, r"train .*model\.context_length=1"),
    ]:
        with pytest.raises(error, match=message):
            train(make_config(tmp_path, **changes), tmp_path / "run")
