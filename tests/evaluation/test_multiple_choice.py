"""Benchmarks from files: prompts, tokens and metrics are those of the harness."""

import json
import math

import numpy as np
import pytest

import gptjax
from gptjax.cli.main import main
from gptjax.errors import DataError
from gptjax.evaluation import multiple_choice
from gptjax.evaluation.multiple_choice import (
    Question,
    evaluate_questions,
    few_shot_context,
    grade_choices,
    parse_question,
    split_last_word,
)
from gptjax.inference.loglikelihood import ScoringRequest, encode_pair, score_continuations
from gptjax.tokenizer.tokenizer import from_merges
from tests.small_models import make_model

ROWS = [
    {"context": "2 + 2 =", "choices": ["3", "4", "five"], "answer": 1, "id": 7},
    {"question": "sky ", "choices": ["blue", "grün"], "answer": "A"},
    {"context": "", "choices": ["yes", "no"], "answer": "no"},
]


@pytest.fixture(scope="module")
def model():
    return make_model(0.4, context_length=32, n_layers=1)


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_rows_become_questions():
    questions = [parse_question("rows:1", row) for row in ROWS]

    assert [x.context for x in questions] == ["2 + 2 =", "sky ", ""]
    assert [x.answer for x in questions] == [1, 0, 1]
    # The text of a choice comes before its letter.
    assert parse_question("", {"context": "x", "choices": ["B", "A"], "answer": "A"}).answer == 1


@pytest.mark.parametrize(
    "change",
    [
        {"context": 3},
        {"question": "two"},
        {"choices": ["one"]},
        {"choices": "AB"},
        {"choices": ["a", ""]},
        {"choices": ["a", 3]},
        {"answer": 3},
        {"answer": -1},
        {"answer": True},
        {"answer": "D"},
        {"answer": "AB"},
        {"answer": None},
    ],
)
def test_other_rows_are_errors_with_their_line(change, tmp_path, model):
    path = write_jsonl(tmp_path / "rows.jsonl", [ROWS[0], ROWS[0] | change])

    with pytest.raises(DataError, match=r"rows\.jsonl:2: "):
        evaluate_questions(model, path, None, None, None)


def test_choices_are_graded_as_they_are_and_by_characters_and_bytes():
    question = Question("", ["abcd", "ééé", "x"], 1, {})
    # Per character -1.0, -1.1, -4; per byte -1.0, -0.55, -4.
    logprobs = [-4.0, -3.3, -4.0]

    assert grade_choices(question, logprobs) == {
        "prediction": 1,
        "acc": 1.0,
        "acc_norm": 0.0,
        "acc_bytes": 1.0,
    }


def test_examples_precede_the_question_which_is_not_its_own_example():
    questions = [parse_question("", row) for row in ROWS]

    context = few_shot_context(questions[0], questions, 2)

    assert context == "sky  blue\n\n no\n\n2 + 2 ="
    assert few_shot_context(questions[0], questions, None) == context


def test_blanks_before_a_choice_belong_to_it_and_it_always_has_tokens():
    merges = [b" a", b"ab", b"abc"]
    tokenizer = from_merges("test", range(256), merges)
    ids = {text: tokenizer.encode(text) for text in ("x", " a", "abc", "ab", "c")}
    assert len(ids["abc"]) == len(ids["ab"]) == 1

    assert encode_pair(tokenizer, "x ", "a") == (ids["x"], ids[" a"])
    assert encode_pair(tokenizer, "", "c") == ([tokenizer.eot_token], ids["c"])
    assert encode_pair(tokenizer, "ab", "c") == (ids["ab"], ids["c"])  # not [], from "abc"


def test_eval_prints_the_metrics_and_writes_the_rows(model, tmp_path, capsys):
    gptjax.save(model, tmp_path / "model")
    questions = write_jsonl(tmp_path / "rows.jsonl", ROWS)
    shots = write_jsonl(tmp_path / "shots.jsonl", ROWS[:1])
    out, command = tmp_path / "out.jsonl", ["eval", str(tmp_path / "model"), "--json"]
    options = ["--choices", str(questions), "--out", str(out)]

    assert main([*command, *options]) == 0

    metrics = json.loads(capsys.readouterr().out)
    rows = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert [
        {name: row[name] for name in source} for row, source in zip(rows, ROWS, strict=True)
    ] == ROWS
    for name in ("acc", "acc_norm", "acc_bytes"):
        values = [row[name] for row in rows]
        assert metrics[name] == pytest.approx(np.mean(values))
        assert metrics[f"{name}_stderr"] == pytest.approx(np.std(values, ddof=1) / math.sqrt(3))
        assert metrics[f"{name} low 95%"] <= metrics[name] <= metrics[f"{name} high 95%"]
    pair = encode_pair(model.tokenizer, "2 + 2 =", " 4")
    ((score,),) = score_continuations(model, [ScoringRequest(pair[0], [pair[1]])])
    assert rows[0]["logprobs"][1] == pytest.approx(score.logprob, abs=1e-4)
    assert main([*command, *options]) == 2  # out exists
    assert main([*command, "--choices", str(questions), "--num-fewshot", "1"]) == 2
    few_shot = ["--few-shot", str(shots), "--num-fewshot"]
    assert main([*command, "--choices", str(questions), *few_shot, "1"]) == 2  # is a question
    assert "--num-fewshot 1" in capsys.readouterr().err
    assert main([*command, "--text", str(shots), *few_shot, "1"]) == 2
    assert "--choices" in capsys.readouterr().err


def test_the_last_word_of_a_text_is_predicted(model, tmp_path, monkeypatch):
    path = write_jsonl(tmp_path / "texts.jsonl", [{"text": "one two\nthree"}, {"text": "a b"}])
    scores = [(-1.0, True), (-3.0, False)]
    monkeypatch.setattr(
        multiple_choice,
        "score_continuations",
        lambda model, requests: [[multiple_choice.ContinuationScore(*x)] for x in scores],
    )

    metrics = multiple_choice.evaluate_last_words(model, path, None)

    assert split_last_word("", {"text": "one two\nthree"}) == ("one", " two\nthree")
    assert metrics["acc"] == 0.5
    assert metrics["perplexity"] == pytest.approx(math.exp(2))


@pytest.mark.parametrize("text", ["word", " word", "two words ", "", 3])
def test_a_text_without_a_last_word_is_an_error(text):
    with pytest.raises(DataError, match="rows:3: "):
        split_last_word("rows:3", {"text": text})
