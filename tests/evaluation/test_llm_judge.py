"""LLM judge: requests, scores, failures of the server, and where the key is sent."""

import gzip
import json
import sys

import pytest

from gptjax.errors import ConfigError, ModelError
from gptjax.evaluation import llm_judge
from gptjax.evaluation.llm_judge import Judgement, LLMJudge, UnreachableError, iter_judgements
from tests.servers import endless, hangs_up, judging, plain, refuses, says

ROWS = [(f"question {n}", f"truth {n}", f"answer {n}") for n in range(3)]
PROMPT = (
    "Given the input `2+2?` and correct output `4`, score the model response `5` on a scale from "
    "0 to 100, where 100 is the best score. Respond with the integer number only."
)
KEY = "sk-secret"


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch):
    for name in ("OPENAI_API_KEY", "GPTJAX_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0, raising=False)


def ask(url, prompt="How good?"):
    return LLMJudge(url, "llama3").reply_to(prompt)


def test_request_is_a_greedy_chat_completion_with_the_book_prompt():
    with judging(says("85")) as (url, requests):
        assert ask(url, llm_judge.judge_prompt("2+2?", "4", "5")) == "85"

    assert [request.path for request in requests] == ["/v1/chat/completions"]
    messages = [{"role": "user", "content": PROMPT}]
    expected = {"model": "llama3", "messages": messages, "temperature": 0, "seed": 123}
    assert json.loads(requests[0].body) == expected


def test_scores_are_parsed_with_common_decorations_and_nothing_else():
    for reply in (
        *("{}", " {}\n", "{} / 100.", "**{}/100**", '"{}"', "`{}`"),
        *("Score: {}", "**Score:** {}", "<think>95?\n</think>\n\n{}"),
    ):
        for score in (0, 7, 85, 100):
            assert llm_judge.parse_score(reply.format(score)) == score, reply
    for reply in ("", "85 90", "8.5", "101", "-5", "85%", "85/10", "I give 85.", "<think>85"):
        assert llm_judge.parse_score(reply) is None, reply


def test_transient_failures_are_retried_and_lone_surrogates_replaced():
    for failure in (refuses(500), refuses(429), hangs_up):
        with judging(failure, failure, says("85 \ud83d")) as (url, requests):
            assert ask(url) == "85 ?"
        assert len(requests) == 3


@pytest.mark.parametrize(
    ("answer", "num_requests", "error_type", "message"),
    [
        (hangs_up, 3, UnreachableError, "cannot be reached.*ollama serve"),
        (refuses(401, "who?"), 1, UnreachableError, "401.*who.*OPENAI_API_KEY"),
        (refuses(404), 1, UnreachableError, "404.*/v1.*ollama pull"),
        # A redirect that is followed would be one more request.
        (refuses(307, Location="/v1/chat/completions"), 1, UnreachableError, "307.*redirects"),
        (plain(b"<html>\n\x1b[2J"), 1, UnreachableError, r"<html>\\n\\x1b\[2J"),
        # Other prompts may succeed.
        (refuses(400, "x" * 999), 1, ModelError, "400"),
    ],
)
def test_failed_request_is_an_error_with_a_fix(answer, num_requests, error_type, message):
    with judging(answer) as (url, requests), pytest.raises(error_type, match=message) as error:
        ask(url)

    assert type(error.value) is error_type
    assert len(str(error.value)) < 500
    assert len(requests) == num_requests


def test_key_is_sent_encrypted_or_to_this_machine_only_and_never_shown(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", f" {KEY}\n")
    monkeypatch.setenv("OPENAI_CUSTOM_HEADERS", "X-Secret: s")

    rejected = pytest.raises(ModelError, match="wrong key …")
    with judging(refuses(401, f"wrong key {KEY}")) as (url, requests), rejected as error:
        ask(f"{url}/chat/completions")
    LLMJudge("https://api.openai.com/v1", "gpt")

    assert KEY not in str(error.value)
    assert requests[0].path == "/v1/chat/completions"
    assert requests[0].headers["authorization"] == f"Bearer {KEY}"
    assert "x-secret" not in requests[0].headers
    for host in ("192.0.2.1", "localhost.example.org", "127.0.0.1.example.org"):
        with pytest.raises(ConfigError, match=f"OPENAI_API_KEY.*{host}"):
            LLMJudge(f"http://{host}/v1", "llama3")


def test_a_reply_is_stored_without_the_key_and_with_a_limited_size(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with judging(says(f"85 for Bearer {KEY}")) as (url, _):
        assert ask(url) == "85 for Bearer …"
    compressed = plain(gzip.compress(b" " * 10**7), Content_Encoding="gzip")
    for answer, word in ((endless, "1,048,576 bytes"), (compressed, "gzip")):
        with judging(answer) as (url, _), pytest.raises(ModelError, match=word) as error:
            ask(url)
        assert type(error.value) is ModelError  # other replies may be shorter


def test_offline_and_behind_a_proxy_a_local_server_is_asked_directly(monkeypatch):
    monkeypatch.setenv("GPTJAX_OFFLINE", "1")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)

    with judging(says("proxy")) as (proxy, seen), judging(says("85")) as (url, _):
        monkeypatch.setenv("http_proxy", proxy)
        assert ask(url) == "85"

    assert not seen
    with pytest.raises(ConfigError, match=r"GPTJAX_OFFLINE.*192\.0\.2\.1"):
        LLMJudge("http://192.0.2.1/v1", "llama3")


def test_invalid_url_and_missing_client_are_errors_without_a_password(monkeypatch):
    for url in (
        *("localhost:11434/v1", "file:///etc/passwd", "http:///v1", "http://a/v1\n", "http://a:b/"),
        *("http://[::1/v1", "https://me:secret@a.b/v1", "https://a.b/v1?version=1"),
    ):
        with pytest.raises(ConfigError, match="judge's URL") as error:
            LLMJudge(url, "llama3")
        assert "secret" not in str(error.value)
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(ConfigError, match=r"\[judge\]"):
        LLMJudge("http://localhost/v1", "llama3")


def test_each_judgement_arrives_before_the_next_request_and_only_scores_are_averaged():
    with judging(says("85"), says("Well done!"), refuses(401, "who?")) as (url, requests):
        found = []
        for judgement in iter_judgements(LLMJudge(url, "llama3"), ROWS):
            found.append(judgement)
            assert len(requests) == len(found)

    assert found[:2] == [Judgement(85, "85", ""), Judgement(None, "Well done!", "")]
    assert found[2][:2] == (None, "")
    assert "status 401" in found[2].error

    summary = llm_judge.summarize_judgements([*found, Judgement(5, "5", "")])
    assert 5 <= summary.pop("low") < 45 < summary.pop("high") <= 85
    assert summary == {"judged": 4, "scored": 2, "unparsable": 1, "failed": 1, "mean_score": 45}
    assert llm_judge.summarize_judgements(found[1:])["mean_score"] is None


def test_only_an_unreachable_server_ends_the_evaluation_at_the_first_row():
    with judging(refuses(401), says("85")) as (url, _), pytest.raises(UnreachableError):
        list(iter_judgements(LLMJudge(url, "llama3"), ROWS))
    with judging(refuses(400), says("85")) as (url, _):
        found = list(iter_judgements(LLMJudge(url, "llama3"), ROWS))

    assert [one.score for one in found] == [None, 85, 85]
