"""A judge's grades come as they were given, or are counted as not there."""

import socket
import string
import threading

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptjax.errors import ConfigError, ModelError
from gptjax.evaluation import llm_judge as module
from gptjax.evaluation.llm_judge import (
    Judgement,
    LLMJudge,
    UnreachableError,
    chat_completion,
    check_judge_allowed,
    endpoint,
    judge_all,
    judge_prompt,
    parse_score,
    summarize_judgements,
)
from gptjax.evaluation.metrics import mean_ci
from tests.file_server import endless, plain
from tests.judge_server import drips, hangs_up, judging, refuses, replies, says, stalls

ROWS = [(f"question {n}", f"truth {n}", f"answer {n}") for n in range(3)]
KEY = "sk-secret"
FAR = "192.0.2.1"  # an address that is nobody's (RFC 5737)


@pytest.fixture(autouse=True)
def waits(monkeypatch):
    """The seconds that would have been waited between tries, of which none is."""
    for name in ("OPENAI_API_KEY", "GPTJAX_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    found = []
    monkeypatch.setattr(module, "sleep", found.append)
    return found


def judge_at(url, **options):
    return LLMJudge(url, "llama3", **options)


@pytest.mark.fast
def test_a_prompt_is_asked_as_the_protocol_says():
    with judging(says("85")) as (url, asked):
        assert chat_completion(judge_at(url), "How good?") == "85"

    assert [request.path for request in asked] == ["/v1/chat/completions"]
    assert asked[0].headers["content-type"] == "application/json"
    assert "authorization" not in asked[0].headers
    assert asked[0].body == {
        "model": "llama3",
        "messages": [{"role": "user", "content": "How good?"}],
        "temperature": 0,
        "seed": 123,
    }


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("http://localhost:11434/v1", "http://localhost:11434/v1/chat/completions"),
        ("https://a.b/v1//", "https://a.b/v1/chat/completions"),
        ("https://a.b/v1/chat/completions", "https://a.b/v1/chat/completions"),
        ("https://a.b/chat/completions/", "https://a.b/chat/completions"),
        ("HTTP://[::1]:80", "http://[::1]:80/chat/completions"),
        ("https://a.b/v1?version=1#x", "https://a.b/v1/chat/completions?version=1"),
    ],
)
def test_the_address_is_found_from_a_base_or_the_whole(url, expected):
    assert endpoint(url).geturl() == expected


def test_the_prompt_is_that_of_the_book():
    assert judge_prompt("2+2?", "4", "5") == (
        "Given the input `2+2?` and correct output `4`, score the model response `5` "
        "on a scale from 0 to 100, where 100 is the best score. Respond with the "
        "integer number only."
    )


@given(st.tuples(*[st.text("{}%s$\\`\n0", max_size=12)] * 3))
def test_texts_stand_in_the_prompt_letter_for_letter(texts):
    start, between, last, end = judge_prompt("\0", "\0", "\0").split("\0")

    found = judge_prompt(*texts)

    assert found == start + texts[0] + between + texts[1] + last + texts[2] + end


@pytest.mark.fast
@given(st.integers(0, 100))
def test_an_integer_is_a_score_in_each_of_its_dresses(score):
    for dress in (
        *("{}", " {}\n", "{}.", "{}/100", "{} / 100.", "**{}**", "**{}/100**", '"{}"'),
        *("'{}'.", "`{}`", "“{}”", "Score: {}", "score = {}.", "**Score:** {}"),
        *("**Score: {}/100**", "<think>95 or 3?\n</think>\n\n{}", "so 7.</think>{}"),
    ):
        assert parse_score(dress.format(score)) == score


@pytest.mark.fast
@pytest.mark.parametrize(
    "reply",
    [
        *("", "good", "eighty", "85 90", "85 or 90", "85\n90", "85-90", "8*5", "8'5"),
        *("8.5", "85.0", "85,5", ".85", "101", "1000", "-5", "+5", "085", "1e2", "85%"),
        *("85/10", "85/1000", "85/100/100", "I give 85.", "85 points", "Score 85"),
        *("Score:", "/100", "٨٥", "85..", "<think>85", "<think>85</think>", "½"),
        "<think>a</think>85</think>90",
    ],
)
def test_anything_else_is_no_score(reply):
    assert parse_score(reply) is None


@given(st.text(string.digits + "./ *-:\nScore", max_size=12))
def test_a_score_is_written_in_the_reply(reply):
    score = parse_score(reply)

    if score is not None:
        assert 0 <= score <= 100
        assert reply.replace("100", "", str(score) != "100").count(str(score)) == 1


@pytest.mark.parametrize("passing", [refuses(500), refuses(503), hangs_up])
def test_what_passes_is_tried_again_after_waits_that_grow_to_a_limit(passing, waits):
    with judging(*[passing] * 8, says("85")) as (url, asked):
        assert chat_completion(judge_at(url, max_attempts=9), "How good?") == "85"

    assert waits == [1, 2, 4, 8, 16, 32, 60, 60]
    assert [request.prompt for request in asked] == ["How good?"] * 9


@pytest.mark.parametrize(
    ("asked_for", "expected"),
    [
        *(("7", 7), ("7.5", 7.5), ("0", 1), ("100000", 60), ("-7", 1), ("soon", 1)),
        *(("", 1), ("9" * 5000, 1), ("Wed, 21 Oct 2015 07:28:00 GMT", 1)),
        ("Thu, 01 Jan 2099 00:00:00 GMT", 60),
    ],
)
def test_a_server_may_ask_for_a_longer_wait_up_to_a_limit(asked_for, expected, waits):
    with judging(refuses(429, Retry_After=asked_for), says("85")) as (url, _):
        assert chat_completion(judge_at(url), "How good?") == "85"

    assert waits == [expected]


NOT_OPENAI = "OpenAI chat completion: {}. .* /v1"


@pytest.mark.parametrize(
    ("answer", "tries", "message"),
    [
        (refuses(429, "slow"), 3, "status 429: .*slow.* Wait, or check the quota"),
        (refuses(500, "oom"), 3, "status 500: .*oom.* server's log"),
        (plain(b"", 502), 3, "status 502: Bad Gateway. "),
        (hangs_up, 3, r"Remote end closed .* \(3 attempts\). Is .* `ollama serve`"),
        (plain(b"{", Content_Length=9), 3, "the connection closed after 1 of 9 bytes"),
        (refuses(401, "who?"), 1, "status 401: .*who.* OPENAI_API_KEY"),
        (refuses(403), 1, "status 403: .* OPENAI_API_KEY"),
        (refuses(404, "none"), 1, "status 404: .*none.*in /v1.* `ollama pull llama3`"),
        (refuses(302, Location="/a"), 1, "status 302: .*It redirects to /a; "),
        (refuses(307, Location="file:///a"), 1, "status 307: .*redirects to file:///a"),
        (refuses(308), 1, "status 308: .*redirects to nowhere"),
        (plain(b"<html>\n\x1b[2J"), 1, NOT_OPENAI.format(r"<html> \[2J")),
        (plain(b""), 1, NOT_OPENAI.format("empty body")),
        (plain(b"\xff"), 1, NOT_OPENAI.format("\N{REPLACEMENT CHARACTER}")),
        (plain(b"[" * 100_000), 1, NOT_OPENAI.format(r"\[{200}")),
        (replies({"choices": []}), 1, NOT_OPENAI.format(r'{"choices": \[\]}')),
        (replies({"error": "no"}), 1, NOT_OPENAI.format('{"error": "no"}')),
        (replies([]), 1, NOT_OPENAI.format(r"\[\]")),
    ],
)
def test_where_no_prompt_would_be_answered_the_error_says_what_to_do(answer, tries, message):
    whole = f"^the judge llama3 at http:.*{message}"

    with judging(answer) as (url, asked), pytest.raises(UnreachableError, match=whole):
        chat_completion(judge_at(url), "How good?")

    assert len(asked) == tries  # a redirect that is followed would be one more


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (refuses(400, "x" * 999), r"status 400: [^x]*x{177}\. Correct the request"),
        (refuses(413), "status 413: .* Correct"),
        (says(None), "without text: .*null.* Name a model"),
        (endless, "more than 1,000,000 bytes. Name a model"),
        (says("x" * 1_000_001), "more than 1,000,000 bytes"),
    ],
)
def test_a_prompt_that_is_refused_is_so_at_once(answer, message):
    refused = pytest.raises(ModelError, match=message)

    with judging(answer) as (url, asked), refused as error:
        chat_completion(judge_at(url), "How good?")

    assert type(error.value) is ModelError
    assert len(asked) == 1


@pytest.mark.parametrize("slow", [stalls, drips])
def test_a_slow_server_is_given_up(slow):
    go_on = threading.Event()

    with judging(slow(go_on)) as (url, asked):
        message = r"timed out.* \(2 attempts\). .* 0\.2 s, or name"
        with pytest.raises(UnreachableError, match=message):
            chat_completion(judge_at(url, timeout=0.2, max_attempts=2), "How good?")
        go_on.set()

    assert len(asked) == 2


def test_a_server_that_does_not_run_is_named(waits):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # and does not listen
        url = f"http://127.0.0.1:{unused.getsockname()[1]}/v1"

        with pytest.raises(UnreachableError, match=f"{url}.* refused .*ollama serve"):
            chat_completion(judge_at(url), "How good?")

    assert waits == [1, 2]


def test_half_a_character_in_a_reply_does_not_hinder_writing_it():
    with judging(says("85 \ud83d")) as (url, _):
        assert chat_completion(judge_at(url), "How good?") == "85 ?"


def test_a_proxy_is_not_asked_for_a_server_on_this_machine(monkeypatch):
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)

    with judging(says("proxy")) as (proxy, seen), judging(says("85")) as (url, _):
        monkeypatch.setenv("http_proxy", proxy)
        assert chat_completion(judge_at(url), "How good?") == "85"

    assert not seen


def test_a_key_goes_to_this_machine_and_never_in_the_clear(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", f" {KEY}\n")

    with judging(says("85")) as (url, asked):
        chat_completion(judge_at(url), "How good?")
    check_judge_allowed(judge_at("https://api.openai.com/v1"))

    assert asked[0].headers["authorization"] == f"Bearer {KEY}"
    for host in (FAR, "example.org", "localhost.example.org", "127.0.0.1.example.org"):
        for function in (check_judge_allowed, lambda judge: chat_completion(judge, "How good?")):
            message = f"unencrypted to http://{host}/v1.* or unset OPENAI_API_KEY"
            with pytest.raises(ConfigError, match=message):
                function(judge_at(f"http://{host}/v1"))


def test_a_key_is_in_no_error(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    refused = pytest.raises(ModelError, match="wrong key …")

    with judging(refuses(401, f"wrong key {KEY}")) as (url, asked), refused as error:
        chat_completion(judge_at(f"{url}?key=hidden"), "How good?")

    assert asked[0].path.endswith("?key=hidden")
    assert KEY not in str(error.value)
    assert "hidden" not in str(error.value)


@pytest.mark.parametrize("key", ["sk secret", "sk\nsecret", "sk-sécret"])
def test_a_key_that_is_none_is_refused_and_not_shown(key, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", key)

    with pytest.raises(ConfigError, match=r"OPENAI_API_KEY .* Set it") as error:
        chat_completion(judge_at("https://api.openai.com/v1"), "How good?")

    assert "cret" not in str(error.value)


def test_offline_only_this_machine_is_asked(monkeypatch):
    monkeypatch.setenv("GPTJAX_OFFLINE", "1")

    with judging(says("85")) as (url, _):
        assert chat_completion(judge_at(url), "How good?") == "85"
    for url in ("http://localhost/v1", "http://[::1]:1/v1", "http://127.9.9.9/v1"):
        check_judge_allowed(judge_at(url))
    for url in (f"http://{FAR}/v1", "https://api.openai.com/v1"):
        with pytest.raises(ConfigError, match=f"GPTJAX_OFFLINE .*{url}.* Unset"):
            judge_all(judge_at(url), ROWS, lambda *_: None)


@pytest.mark.parametrize(
    "url",
    [
        *("", "localhost:11434/v1", "file:///etc/passwd", "ftp://a.b/v1", "http://"),
        *("http:///v1", "http://a b/v1", "http://a/v1\n", "http://é.b", "http://a:b/"),
        *("http://[::1/v1", "https://me:secret@a.b/v1", "http://a:99999/v1"),
    ],
)
def test_an_address_that_cannot_be_asked_is_refused(url):
    with pytest.raises(ConfigError, match=r"judge's URL .* OPENAI_API_KEY") as error:
        judge_at(url)

    assert "secret" not in str(error.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": " "}, "the judge's model is empty"),
        ({"timeout": 0}, "=0 and .*=3.* above 0"),
        ({"timeout": float("inf")}, "=inf"),
        ({"timeout": float("nan")}, "=nan"),
        ({"max_attempts": 0}, "=0.* at least 1"),
    ],
)
def test_a_judge_that_cannot_be_asked_is_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        LLMJudge(**{"url": "http://localhost/v1", "model": "llama3", **options})


@pytest.mark.fast
def test_each_judgement_is_handed_over_before_the_next_prompt_is_asked():
    order = []

    with judging(says("85"), says("Well done!"), refuses(400, "long")) as (url, asked):
        found = judge_all(judge_at(url), ROWS, lambda *one: order.append((len(asked), *one)))

    assert [request.prompt for request in asked] == [judge_prompt(*row) for row in ROWS]
    assert order == [(n + 1, n, judgement) for n, judgement in enumerate(found)]
    assert found[:2] == [Judgement(85, "85", ""), Judgement(None, "Well done!", "")]
    assert found[2][:2] == (None, "")
    assert "status 400" in found[2].error


@pytest.mark.parametrize("answer", [hangs_up, refuses(401), refuses(500), plain(b"")])
def test_a_judge_that_cannot_be_reached_at_first_ends_it_and_later_does_not(answer):
    done = []

    with judging(says("85"), answer) as (url, _):
        found = judge_all(judge_at(url), ROWS, lambda *one: done.append(one))
    with judging(answer, says("85")) as (url, _), pytest.raises(UnreachableError):
        judge_all(judge_at(url, max_attempts=1), ROWS, lambda *one: done.append(one))

    assert [one.score for one in found] == [85, None, None]
    assert [bool(one.error) for one in found] == [False, True, True]
    assert done == list(enumerate(found))


def test_a_first_prompt_that_is_refused_does_not_end_it():
    with judging(refuses(400), says("85")) as (url, _):
        found = judge_all(judge_at(url), ROWS, lambda *_: None)

    assert [one.score for one in found] == [None, 85, 85]


@given(
    st.lists(st.integers(0, 100)),
    st.integers(0, 3),
    st.integers(0, 3),
    st.randoms(use_true_random=False),
)
def test_only_scores_are_averaged(grades, unparsable, failed, order):
    judgements = [
        *(Judgement(grade, str(grade), "") for grade in grades),
        *[Judgement(None, "hm", "")] * unparsable,
        *[Judgement(None, "", "refused")] * failed,
    ]

    found = summarize_judgements(judgements)

    low, high = mean_ci(grades) if grades else (None, None)
    assert found == {
        "judged": len(judgements),
        "scored": len(grades),
        "unparsable": unparsable,
        "failed": failed,
        "mean_score": pytest.approx(np.mean(grades)) if grades else None,
        "low": low,
        "high": high,
    }
    order.shuffle(judgements)
    assert summarize_judgements(judgements)["mean_score"] == found["mean_score"]
